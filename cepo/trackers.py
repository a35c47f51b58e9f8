"""Experiment trackers, through accelerate: TensorBoard, W&B, trackio are told what metrics.jsonl is told."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cepo.config import Config
from cepo.errors import InputError, one_line

Record = dict[str, Any]
logger = logging.getLogger("cepo")


def check(names: Iterable[str]) -> None:
    """Raise InputError for a tracker that is not installed."""
    for name in names:
        try:
            from accelerate.tracking import get_available_trackers
        except ImportError as error:
            raise InputError('log.trackers: needs accelerate: pip install "cepo[accelerate]"') from error
        if name not in map(str, get_available_trackers()):
            raise InputError(f"log.trackers: {name} is not installed here: pip install {name}")


def tracked(records: Iterable[Record], config: Config, run: Path, done: int = 0) -> Iterable[Record]:
    """`records` as they come, each told to the trackers of `config` on its way; the run goes on from step `done`.

    They are started here, before the first record; one that cannot be raises InputError. One that fails later is warned
    about and told no more.
    """
    trackers: dict[str, Any] = {}

    def each(act: str, *told: Any) -> None:
        for name, tracker in list(trackers.items()):
            try:
                getattr(tracker, act)(*told)
            except Exception as error:  # of as many kinds as there are trackers; metrics.jsonl has it all anyway
                del trackers[name]
                logger.warning("log.trackers: %s failed and is told no more: %s", name, one_line(error)[:200])

    def telling() -> Iterator[Record]:
        try:
            for record in records:
                values = {k: v for k, v in flat(record).items() if isinstance(v, (int, float)) and k != "step"}
                each("log", {f"{record['kind']}/{name}": value for name, value in values.items()}, record["step"])
                yield record
        finally:
            each("finish")

    try:
        for name in dict.fromkeys(config.log.trackers):
            trackers[name] = _started(name, config, run, done)
    except InputError:
        each("finish")
        raise
    return telling() if trackers else records


def _started(name: str, config: Config, run: Path, done: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # accelerate's own logging asks for it; where there are several processes it is there
    options: dict[str, Any] = {"name": run.name}
    if name == "tensorboard":  # which then drops what was logged after the checkpoint
        options = {"logging_dir": run, **({"purge_step": done + 1} if done else {})}
    elif name == "wandb":
        options["dir"] = str(run)
    try:
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](name if name == "tensorboard" else "cepo", **options)
        tracker.start()
        tracker.store_init_configuration(flat(asdict(config)))
    except Exception as error:  # without an account, a network or room on the disk
        raise InputError(f"log.trackers: {name} cannot be started: {one_line(error)[:300]}") from error
    return tracker


def flat(values: Mapping[str, Any], above: str = "") -> Record:
    """Sections as one level, `section/key`; what is neither number nor text, as text."""
    result: Record = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{above}{name}/")
        else:
            result[above + name] = value if isinstance(value, (int, float, str)) else str(value)
    return result
