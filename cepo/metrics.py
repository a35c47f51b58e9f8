"""What a run says about itself: metrics.jsonl, one record a line, and the time each phase of a step takes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cepo import checkpoint
from cepo.errors import InputError, one_line

FILE = "metrics.jsonl"

logger = logging.getLogger("cepo")


class Clock:
    """Seconds per phase of one step. On a GPU it waits for the phase's work, or times would land on the next."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._start = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def total(self) -> float:
        return self._now() - self._start

    def with_other(self) -> dict[str, float]:
        """Seconds per phase, and those of no phase."""
        return {**self.seconds, "other": self.total() - sum(self.seconds.values())}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def append(run: Path, record: dict[str, Any]) -> None:
    """Add one record. Raises InputError where the disk is full."""
    try:
        with (run / FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {run / FILE}: {one_line(error)}; resume with --resume {run}") from error


def read(run: Path) -> list[dict[str, Any]]:
    """All records that `stream` gives."""
    return list(stream(run))


def stream(run: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Whole records one at a time, of one kind if given: those of a long run fill a memory.

    A last line that a crash cut short is left out, one before it with a warning.
    """
    name = b"" if kind is None else json.dumps(kind).encode()
    damaged: list[int] = []
    if not (run / FILE).exists():
        return
    with (run / FILE).open("rb") as file:
        for number, line in enumerate(file, 1):
            if name not in line:
                continue
            if (record := _record(line)) is None:
                damaged.append(number)
            elif kind in (None, record["kind"]):
                yield record
    if damaged and damaged[-1] == number:
        damaged.pop()
    if damaged:
        logger.warning(
            "%s: left out %d lines that are no records, the first is %d", run / FILE, len(damaged), damaged[0]
        )


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if whole else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a record, which may be damaged, is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e300


def cut_back(run: Path, step: int | None) -> None:
    """Drop what was recorded after `step`, or everything if None: those steps will be taken again."""
    with checkpoint.replacing(run / FILE) as temporary, temporary.open("w") as file:
        for record in stream(run) if step is not None else ():
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")


def mean(values: Tensor) -> float | None:
    """Mean of the numbers among `values`, None if there are none."""
    values = values[~values.isnan()]
    return values.mean().item() if values.numel() else None
