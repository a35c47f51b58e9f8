"""Experiment trackers, through accelerate: TensorBoard, W&B, trackio are told what metrics.jsonl is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cepo.config import Config
from cepo.errors import InputError

Record = dict[str, Any]


def check(names: Iterable[str]) -> None:
    """Raise InputError for a tracker that is not installed."""
    for name in names:
        try:
            from accelerate.tracking import get_available_trackers
        except ImportError as error:
            raise InputError('log.trackers: needs accelerate: pip install "cepo[accelerate]"') from error
        if name not in map(str, get_available_trackers()):
            raise InputError(f"log.trackers: {name} is not installed here: pip install {name}")


def tracked(records: Iterable[Record], config: Config, run: Path) -> Iterator[Record]:
    """`records` as they come, each told to the trackers of `config` on its way."""
    if not config.log.trackers:
        yield from records
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    trackers = []
    for name in dict.fromkeys(config.log.trackers):
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(run.name, run) if kind.requires_logging_directory else kind("cepo", name=run.name)
        tracker.start()
        tracker.store_init_configuration(flat(asdict(config)))
        trackers.append(tracker)
    try:
        for record in records:
            values = {k: v for k, v in flat(record).items() if isinstance(v, (int, float)) and k != "step"}
            for tracker in trackers:
                tracker.log({f"{record['kind']}/{name}": value for name, value in values.items()}, step=record["step"])
            yield record
    finally:
        for tracker in trackers:
            tracker.finish()


def flat(values: Mapping[str, Any], above: str = "") -> Record:
    """Sections as one level, `section/key`; what is neither number nor text, as text."""
    result: Record = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{above}{name}/")
        else:
            result[above + name] = value if isinstance(value, (int, float, str)) else str(value)
    return result
