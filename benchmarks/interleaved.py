"""Fair timing on a noisy machine: all contenders take turns inside one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def race(
    benchmark: Any, calls: Mapping[str, Callable[..., object]], rounds: int, ours: str = "cepo",
    before: Callable[[], tuple[Any, ...]] = tuple,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each, all warmed up; those of ``ours`` are what the `benchmark` fixture measures. What
    ``before`` returns, untimed, is what a call takes."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def others() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, call in calls.items():
            if name != ours:
                arguments = before()
                start = time.perf_counter()
                call(*arguments)
                seconds[name].append(time.perf_counter() - start)
        return before(), {}

    for call in calls.values():
        call(*before())
    benchmark.pedantic(calls[ours], setup=others, rounds=rounds)
    seconds[ours] = list(benchmark.stats.stats.data)
    return {name: statistics.median(values) for name, values in seconds.items()}


def line(
    name: str, seconds: float, ours: float | None, *, moved: int | None = None, share: float | None = None,
    error: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row of a table; ``ours``: the seconds it is compared with, ``moved``: bytes."""
    return {
        "name": name,
        "ms": seconds * 1e3,
        "gb_per_s": None if moved is None else moved / seconds / 1e9,
        "share_of_read": share,
        "speedup": None if ours is None else seconds / ours,
        "error": error,
    }
