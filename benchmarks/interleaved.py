"""Fair timing on a noisy machine: all contenders take turns inside one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Turns:
    """Seconds per contender, one entry per round."""

    calls: Mapping[str, Callable[[], object]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def take(self, *, skip: str | None = None) -> None:
        """One round: everybody once, except ``skip``, whom the caller times."""
        for name, call in self.calls.items():
            if name == skip:
                continue
            start = time.perf_counter()
            call()
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds.items()}
