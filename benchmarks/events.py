"""Times on a CUDA device: all contenders take turns, each timed by events; the median of the rounds is kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 15
Call = Callable[[], Any]


def timed(call: Call) -> float:
    """Milliseconds of one call on the device."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def medians(calls: dict[str, Call]) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """Median milliseconds and peak bytes beyond the inputs of each, and why others could not run."""
    peak: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name, call in list(calls.items()):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(3):  # compiles, and warms up
                call()
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # whatever a contender may raise, the others shall be measured
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del calls[name]
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}, peak, absent
