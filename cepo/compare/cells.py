"""One cell of a comparison: a normal run directory, and one small JSON of its numbers that outlives it.

OUT/<task>/<method>/lr<rate>-seed<seed>/     the run; its checkpoints go once the numbers are written; files.json has
                                             digests of the files and models that its config names, if there are any
OUT/cells/<task>-<method>-lr<rate>-seed<seed>.json
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import platform
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import torch
import yaml

import cepo
import cepo_kernels
from cepo import checkpoint, metrics, rollout, trainer
from cepo.cli import dump
from cepo.compare.files import MODELS
from cepo.compare.plan import BASE, METRICS, Cell, defaults, digest, identity
from cepo.errors import InputError, one_line
from cepo.parts import Parts, held_out, load_parts, problems_of
from cepo.policy import threads
from cepo.report import curves
from cepo.rewards.verifier import verifier
from cepo.tasks import Problem

Record = dict[str, Any]
FOLDER = "cells"
FILES = "files.json"


class Store:
    """The numbers of cells in one directory, found by what made them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, cell: Cell) -> Path:
        return self.out / FOLDER / f"{cell.name}.json"

    def get(self, cell: Cell) -> Record | None:
        """The record of a cell, with an "error" in it if it failed; None if there is none of this configuration."""
        record = self._read(cell)
        return record if record and not self._other(record, cell) else None

    def put(self, cell: Cell, values: Record) -> Record:
        record = {"cell": cell.name, "kind": cell.kind, "task": cell.task, "method": cell.method, "lr": cell.lr,
                  "seed": cell.seed, "hash": cell.hash, "config": asdict(cell.config), "files": cell.files,
                  "models": cell.models, **values}  # fmt: skip
        self.path(cell).parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.replacing(self.path(cell)) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
        return record

    def stale(self, cell: Cell) -> str | None:
        """What another configuration left in a cell's place, and how it differs; None if nothing."""
        record, file = self._read(cell), self.out / cell.directory / checkpoint.CONFIG
        if record and (difference := self._other(record, cell)):
            return f"{self.path(cell)} ({difference})"
        if file.is_file():
            left = identity(yaml.safe_load(file.read_text()) or {})
            files = self.out / cell.directory / FILES
            began = json.loads(files.read_text()) if files.is_file() else {}
            if difference := _difference(left, cell.content, defaults()) or _of_files(began, cell):
                return f"{file.parent} ({difference})"
        return None

    @staticmethod
    def _other(record: Record, cell: Cell) -> str | None:
        """How a record's configuration differs from a cell's; by its values too, as a default may have changed."""
        difference = _difference(identity(record["config"]), cell.content, defaults())
        difference = difference or _of_files({**record.get("files", {}), **record.get("models", {})}, cell)
        return difference or (None if record["hash"] == cell.hash else "pass_at")

    def discard(self, cell: Cell) -> None:
        """Remove a cell, its run with it."""
        self.path(cell).unlink(missing_ok=True)
        if cell.kind != BASE:
            shutil.rmtree(self.out / cell.directory, ignore_errors=True)

    def _read(self, cell: Cell) -> Record | None:
        try:
            record = json.loads(self.path(cell).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path(cell)}: expected the numbers of a cell, got {one_line(error)}") from error
        if not _is_sound(record):
            raise InputError(f"{self.path(cell)}: expected the numbers of a cell, got {record!r:.60}")
        return record


def _is_sound(record: Any) -> TypeGuard[Record]:
    """Whether a record has what decides whose it is, and accuracies."""
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "hash" not in record:
        return False
    if not all(isinstance(record.get(name, {}), dict) for name in ("files", "models")):
        return False
    curve = record.get("curve")
    return "error" in record or (
        isinstance(curve, list)
        and len(curve) >= (1 if record.get("kind") == BASE else 2)
        and all(isinstance(point, dict) and all(_is_share(point.get(name)) for name in METRICS) for point in curve)
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def run(cell: Cell, store: Store, keep_weights: bool) -> Record:
    """Run a cell, from its newest checkpoint if it has one, and keep its numbers; a failure too is kept, and returned.

    Raises InputError if nothing can be written.
    """
    try:
        values = _base(cell) if cell.kind == BASE else _train(cell, store.out / cell.directory)
    except Exception as error:  # whatever it is, the other cells go on
        told = one_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error)}"
        return store.put(cell, {"error": told, "traceback": traceback.format_exc().splitlines()})
    record = store.put(cell, values)
    if cell.kind != BASE and not keep_weights:
        shutil.rmtree(store.out / cell.directory / checkpoint.FOLDER, ignore_errors=True)
        (store.out / cell.directory / checkpoint.TEACHER).unlink(missing_ok=True)
    return record


def _base(cell: Cell) -> Record:
    parts = load_parts(cell.config)
    with threads(parts.policy, cell.config.policy.threads):
        result = trainer.evaluate(parts)
        return {"curve": _curve([{"kind": "eval", "step": 0, **result}]), **_common(cell, parts, 0)}


def _train(cell: Cell, directory: Path) -> Record:
    began = time.perf_counter()
    config = copy.deepcopy(cell.config)
    config.run_dir = str(directory)
    start, done = None, 0
    with ExitStack() as held:
        exists = (directory / checkpoint.CONFIG).is_file()
        if exists:
            held.enter_context(checkpoint.lock(directory))
            start = checkpoint.newest(directory)
            done = 0 if start is None else checkpoint.step_of(start)
        parts = load_parts(config, None if start is None else str(start))
        trainer.check_prompts(parts)
        if not exists:
            checkpoint.create_run(str(directory), "", lambda _: dump(config))
            held.enter_context(checkpoint.lock(directory))
            if noted := {**cell.files, **cell.models}:
                with checkpoint.replacing(directory / FILES) as temporary:
                    temporary.write_text(json.dumps(noted) + "\n")
        before = [] if start is None else metrics.read(directory)
        spent = sum(_seconds(record) for record in before if record["step"] <= done)
        with threads(parts.policy, config.policy.threads):
            for _ in trainer.train(parts, directory, start):
                pass
            common = _common(cell, parts, config.train.steps)
        curves.draw(directory)
    return {
        **_numbers(metrics.read(directory), config.train.updates_per_batch),
        **common,
        "rollouts_per_step": config.rollout.prompts * config.rollout.group_size,
        "resumed_from_step": done,
        "wall_seconds": spent + time.perf_counter() - began,
    }


def _numbers(records: list[Record], updates_per_batch: int) -> Record:
    """What the records of a whole run come to."""
    steps = [record for record in records if record["kind"] == "train"]
    phases = list(dict.fromkeys(phase for record in steps for phase in record["seconds"]))
    # Without teachers to fade every step is alike.
    active = [sum(record["seconds"].values()) for record in steps if record["lam"] != 0 or "divergence" in record]
    return {
        "curve": _curve(records),
        "start": _without_times(steps[0]),
        "end": _without_times(steps[-1]),
        "steps": len(steps),
        # A batch in which every group agrees moves nothing, and is no step of the optimiser.
        "optimizer_steps": sum(
            updates_per_batch - record["skipped_updates"] for record in steps if record["gradient_norm"] != 0
        ),
        "generated_tokens": sum(record["tokens"] for record in steps),
        "seconds": {phase: sum(record["seconds"].get(phase, 0.0) for record in steps) for phase in phases},
        "evaluation_seconds": sum(record["seconds"] for record in records if record["kind"] == "eval"),
        "seconds_per_active_step": sum(active) / len(active) if active else None,
    }


def _curve(records: list[Record]) -> list[Record]:
    """Every evaluation, with the seconds of training before it."""
    points, seconds = [], 0.0
    for record in records:
        if record["kind"] == "train":
            seconds += _seconds(record)
        else:
            point = {key: record[key] for key in ("step", "sampled", "greedy")}
            points.append({**point, "training_seconds": seconds})
    return points


def _seconds(record: Record) -> float:
    seconds = record["seconds"]
    return float(sum(seconds.values()) if isinstance(seconds, dict) else seconds)


def _without_times(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in ("kind", "seconds", "tokens_per_second")}


def _common(cell: Cell, parts: Parts, steps: int) -> Record:
    """The problems of training, in their order, and of the evaluation, in which cells must agree; pass@k; software."""
    training = [problem.text for step in range(1, steps + 1) for problem in problems_of(parts, step)]
    problems = held_out(parts)
    tested = [problem.text for problem in problems]
    return {
        "training_problems": digest(training),
        "held_out_problems": digest(tested),
        "held_out": len(tested),
        "in_both": len({*training} & {*tested}),
        "pass_at": _pass_at(parts, problems, **cell.pass_at) if cell.pass_at and cell.pass_at["problems"] else None,
        "software": software(),
    }


def _pass_at(parts: Parts, held_out: Sequence[Problem], k: int, problems: int) -> Record:
    """Share of the first held-out problems that at least one of k rollouts solves, by the task's own check."""
    config, first = parts.config, held_out[:problems]
    rollouts = rollout.sample(
        parts.policy, first, group_size=k, max_new_tokens=parts.max_new_tokens,
        temperature=config.eval.temperature, key=(config.eval.seed, 0), batch_size=config.rollout.batch_size,
    )  # fmt: skip
    of_each = rollouts.per_rollout(rollouts.problems)
    scores = verifier([], rollouts.completions, [], task=parts.task, problem=of_each, truncated=rollouts.truncated)
    success = torch.tensor([r is not None and r >= config.reward.success_threshold for r in scores])
    return {"k": k, "problems": len(first), "accuracy": success.view(-1, k).any(1).float().mean().item()}


def software() -> Record:
    """What computes here."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"cepo": cepo.__version__, "source": _source(), "python": platform.python_version(), **packages,
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}  # fmt: skip


@functools.cache
def _source() -> str:
    """A hash of all that is used from here, the compiled parts and the embedded models included."""
    found = hashlib.sha256()
    for package in (cepo, cepo_kernels):
        folder = Path(package.__path__[0])
        for file in sorted(file for kind in ("py", "so", "safetensors", "json") for file in folder.rglob(f"*.{kind}")):
            found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _of_files(digests: Mapping[str, Any], cell: Cell) -> str | None:
    """The first file or model that is not what it was when a cell was run.

    A model is compared where both know it: cells were made before it was looked at, and it may be somewhere else now.
    """
    then = {name: value for name, value in digests.items() if name in cell.models or name not in MODELS}
    now = {**cell.files, **{name: value for name, value in cell.models.items() if name in then}}
    return _difference(then, now, {}, "content of ")


def _difference(
    old: Mapping[str, Any], new: Mapping[str, Any], default: Mapping[str, Any], prefix: str = ""
) -> str | None:
    """The first value that is not the same, by name; what neither says has its default."""
    for key in [*old, *(key for key in new if key not in old)]:
        usual = default.get(key)
        before, after = old.get(key, usual), new.get(key, usual)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if found := _difference(before, after, usual if isinstance(usual, Mapping) else {}, f"{prefix}{key}."):
                return found
        elif before != after:
            return f"{prefix}{key}: {before!r}, now {after!r}"
    return None
