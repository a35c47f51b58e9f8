"""What a run says about itself: metrics.jsonl, one record a line, and the time each phase of a step takes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """All whole records. A last line that a crash cut short is left out, one before it with a warning."""
    lines = (run / FILE).read_bytes().splitlines() if (run / FILE).exists() else []
    records = [_record(line) for line in lines]
    if damaged := [number for number, record in enumerate(records[:-1], 1) if record is None]:
        logger.warning(
            "%s: left out %d lines that are no records, the first is %d", run / FILE, len(damaged), damaged[0]
        )
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if whole else None


def cut_back(run: Path, step: int | None) -> None:
    """Drop what was recorded after `step`, or everything if None: those steps will be taken again."""
    kept = [record for record in read(run) if step is not None and record["step"] <= step]
    with checkpoint.replacing(run / FILE) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


def mean(values: Tensor) -> float | None:
    """Mean of the numbers among `values`, None if there are none."""
    values = values[~values.isnan()]
    return values.mean().item() if values.numel() else None
