"""Rollouts of a run token by token, <run>/tokens/step-000020.json: one file a step, complete or absent.

The trainer leaves here what it has computed anyway: nothing is computed for the record, and no random number is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cepo import checkpoint
from cepo.config import ReportConfig
from cepo.errors import InputError, one_line
from cepo.parts import Parts
from cepo.update import Batch

FOLDER = "tokens"
_LARGEST = torch.finfo(torch.float32).max
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Rollout:
    """A response of T tokens, and what was computed of them."""

    right: bool
    reward: float | None
    advantage: float | None
    """Of its group; None where no token's is made of it."""
    answer: str | None
    """What it states, None if nothing could be parsed."""
    negative: str | None
    """r-, None if its teachers knew none."""
    truncated: bool
    tokens: list[str]
    """(T,) texts that join to the response; "" for a part of a character that a later token completes."""
    columns: dict[str, list[float | None]]
    """(T,) each, by the names of `ContrastiveLogprobs` and of a credit's own; infinities as float32's largest."""


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt."""

    prompt: str
    positive: str
    """r+"""
    rollouts: list[Rollout]


@dataclass(frozen=True)
class Sample:
    """Groups of one step."""

    step: int
    method: str
    """Of credit; of a loss that distils, where there is no credit."""
    lam: float | None
    """None: the method has no weights to mix."""
    eps_w: float
    groups: list[Group]

    def columns(self) -> set[str]:
        """The names of the columns that some rollout has."""
        return {name for group in self.groups for rollout in group.rollouts for name in rollout.columns}


class Recorder:
    """Keeps groups of the steps that `report` of a config asks for."""

    def __init__(self, parts: Parts, run: Path, done: int | None) -> None:
        """Drop what `run` has of steps after `done`, or of all if None: they will be taken again."""
        self._parts, self._run = parts, run
        self._sample: Sample | None = None
        for step, path in files(run).items():
            if done is None or step > done:
                path.unlink()

    def observe(
        self,
        step: int,
        batch: Batch,
        rewards: Sequence[float | None],
        success: Sequence[bool],
        tokens: dict[str, Tensor],
    ) -> None:
        """Look at a step: rewards and success are (B,), tokens the (N,) tensors of its update, NaN for none."""
        config = self._parts.config
        if not due(config.report, step, config.train.steps):
            return
        lengths = [len(ids) for ids in batch.rollouts.responses]
        columns = {name: column.split(lengths) for name, column in tokens.items()}
        if "positive_logprobs" not in columns:
            columns.pop("negative_logprobs", None)  # no teacher's: the policy's own
        without = config.loss.distils or (batch.ahead is not None and batch.ahead.replaces)

        def rollout(b: int) -> Rollout:
            teachers, completion = batch.teachers, batch.rollouts.completions[b]
            negative = None if teachers is None else teachers.negative[b]
            return Rollout(
                right=success[b],
                reward=_number(rewards[b]),
                advantage=None if without else _number(batch.advantages[b].item()),
                answer=self._parts.task.parse_answer(completion),
                negative=None if teachers is None or negative is None else teachers.answers[negative],
                truncated=batch.rollouts.truncated[b],
                tokens=texts(self._parts.policy.tokenizer, batch.rollouts.responses[b]),
                columns={name: [_number(x) for x in column[b].tolist()] for name, column in columns.items()
                         if not column[b].isnan().all()},
            )  # fmt: skip

        size = batch.rollouts.group_size
        learns = batch.active().view(-1, size).any(1).tolist()
        differ = [len(set(success[p * size : (p + 1) * size])) > 1 for p in range(len(learns))]
        chosen = sorted(range(len(learns)), key=lambda p: (not learns[p], not differ[p]))[: config.report.prompts]
        groups = [
            Group(problem.text, problem.answer, [rollout(b) for b in range(p * size, (p + 1) * size)])
            for p, problem in enumerate(batch.rollouts.problems)
            if p in chosen
        ]
        method = config.loss.name if config.loss.distils else config.credit.name
        lam = batch.lam if self._parts.teachers else None
        self._sample = Sample(step, method, lam, config.credit.eps_w or 0.0, groups)

    def write(self) -> None:
        """Write what was kept of the step last looked at, if anything was. Raises InputError where it cannot."""
        sample, self._sample = self._sample, None
        if sample is None:
            return
        path = self._run / FOLDER / f"step-{sample.step:06d}.json"
        with suppress(OSError):  # which writing the file tells
            path.parent.mkdir(exist_ok=True)
        with checkpoint.replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(sample), separators=(",", ":")) + "\n")


def due(report: ReportConfig, step: int, last: int) -> bool:
    """Whether groups of a step are kept."""
    return report.every > 0 and (step in (1, last) or step % report.every == 0)


def files(run: Path) -> dict[int, Path]:
    """The files of the recorded steps, by step."""
    found = {path.stem.removeprefix("step-"): path for path in (run / FOLDER).glob("step-*.json")}
    return {int(step): found[step] for step in sorted(found, key=lambda s: (len(s), s)) if step.isdecimal()}


def read(path: Path) -> Sample:
    """What a file holds. Raises InputError if that is not what `Recorder` writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups = [
            _made(Group, {**g, "rollouts": [_made(Rollout, r) for r in g["rollouts"]]}) for g in content["groups"]
        ]
        sample = _made(Sample, {**content, "groups": groups})
        for rollout in (r for g in groups for r in g.rollouts):
            if any(len(column) != len(rollout.tokens) for column in rollout.columns.values()):
                raise ValueError("columns and tokens differ in length")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: expected what a training run writes there, got {one_line(error)[:200]}") from error
    return sample


def _made(kind: type[_Kind], values: dict[str, Any]) -> _Kind:
    """One of the classes above. Raises TypeError for a value that is not of the type it is declared to be."""
    made = kind(**values)
    for name, hint in get_type_hints(kind).items():
        if not _fits(values[name], hint):
            raise TypeError(f"{name}: {values[name]!r:.60}, which is no {getattr(hint, '__name__', hint)}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether JSON's `value` is of type `hint`, its numbers of a size that `_number` writes."""
    outer, inner = get_origin(hint), get_args(hint)
    if outer is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if outer is list:
        hint = inner[0]
    values = value if outer is list else [value]
    types = {*(get_args(hint) or [hint])}
    types |= {int} if float in types else set()
    return (
        isinstance(values, list)
        and {*map(type, values)} <= types
        and all(abs(x) <= _LARGEST for x in values if isinstance(x, int | float))
    )


def texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included; together they are the whole text."""

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # What a token adds depends on those just before it, as blanks between words do. ids[start:] is read again, and
    # `told` characters of it are there already; `whole` is where no character was left open last.
    found, start, whole, told = [], 0, 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        # An open end may be completed by later tokens; bytes that never become text must not make this quadratic.
        closed = text if end == len(ids) or end - start > 32 else text.rstrip("\ufffd")
        found.append(closed[told:])
        told = max(told, len(closed))
        if closed == text:
            start, whole = whole, end
            told = len(decode(ids[start:end]))
    return found


def _number(value: float | None) -> float | None:
    """To six digits, as JSON can say it."""
    if value is None or math.isnan(value):
        return None
    return float(f"{min(max(value, -_LARGEST), _LARGEST):.6g}")
