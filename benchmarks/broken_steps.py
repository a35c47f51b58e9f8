"""Steps in which something is not finite, fails or is empty, and what the trainer makes of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cepo import checkpoint, trainer
from cepo.config import CheckpointConfig, Config, EvalConfig, RewardConfig, RolloutConfig, TrainConfig
from cepo.errors import InputError
from cepo.parts import Parts, load_parts
from cepo.sharding import broken_weight

STEPS, AT = 7, 3  # the step from which on it is broken
REWARDS = """
calls = 0


def reward(prompts, completions, **columns):
    global calls
    calls += 1
    ranks = [float(b % 5) for b in range(len(completions))]
    return ranks if calls < {at} else {then}
"""
NAN = float("nan")


class State:
    """Which step a run is at."""

    step = 0


Break = Callable[[Parts, State], Parts | None]


@dataclass
class Case:
    """What is broken, and what has to come of it.

    Args:
        then: what the reward function gives from step AT on, instead of breaking anything.
        timeout_s: how long it may take.
        ends: words of the error that ends the run; None: it goes to its end.
        skipped: steps that are skipped.
        what: what the record of such a step names.
        saved: the last checkpoint.
    """

    breaks: Break | None = None
    then: str | None = None
    timeout_s: float | None = None
    ends: str | None = None
    skipped: tuple[int, ...] = ()
    what: str = ""
    saved: int | None = STEPS
    tokens: int | None = None


def in_weight(value: float) -> Break:
    """A weight that is spoilt before step AT, for good."""

    def breaks(parts: Parts, state: State) -> None:
        weight = next(parts.policy.model.parameters())
        original = parts.task.train

        def train(index: int, seed: int) -> Any:
            if state.step == AT:
                weight.data.view(-1)[7] = value
            return original(index, seed)

        parts.task.train = train  # type: ignore[method-assign]

    return breaks


def in_states(*steps: int, flat: bool = False) -> Break:
    """NaN in the states that the model hands to its head, in some steps."""

    def breaks(parts: Parts, state: State) -> Parts | None:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * NAN if state.step in steps else output

        parts.policy.model.base_model.norm.register_forward_hook(hook)
        return replace(parts, reward=lambda prompts, *rest, **columns: [1.0] * len(prompts)) if flat else None

    return breaks


def of_advantage(parts: Parts, state: State) -> Parts:
    plain = parts.advantage
    return replace(parts, advantage=lambda rewards: plain(rewards) * (math.inf if state.step >= AT else 1.0))


def of_gradient(parts: Parts, state: State) -> None:
    weight = next(p for p in parts.policy.model.parameters() if p.ndim == 2)
    weight.register_hook(lambda gradient: gradient * (math.inf if state.step >= AT else 1.0))


def of_teacher(parts: Parts, state: State) -> Parts:
    plain = parts.credit

    def credit(own: Any, positive: Any, negative: Any, *rest: Any, **options: Any) -> Any:
        return plain(own, positive * NAN if state.step >= AT else positive, negative, *rest, **options)

    return replace(parts, credit=credit)


def of_score(parts: Parts, state: State) -> None:
    plain = parts.task.score

    def score(completion: str, problem: Any) -> Any:
        if state.step >= AT:
            raise KeyError("line one\nline two")
        return plain(completion, problem)

    parts.task.score = score  # type: ignore[method-assign]


def of_length(sign: float) -> Break:
    """Every rollout ends at once, or never."""

    def breaks(parts: Parts, state: State) -> None:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output[..., list(parts.policy.eos_ids)] += sign * 1e4
            return output

        parts.policy.model.get_output_embeddings().register_forward_hook(hook)

    return breaks


LIMIT = "3 steps in a row skipped"
THREE = (AT, AT + 1, AT + 2)
RANKS = "ranks"
OF_WEIGHTS: dict[str, Any] = {"ends": "is not saved: weight", "skipped": (3, 4), "what": "weight", "saved": 2}
OF_LOGITS: dict[str, Any] = {"ends": LIMIT, "skipped": THREE, "what": "logits", "saved": 5}
CASES = {
    "NaN in a weight": Case(in_weight(NAN), **OF_WEIGHTS),
    "infinity in a weight": Case(in_weight(math.inf), **OF_WEIGHTS),
    "NaN in the logits, from one step on": Case(in_states(*range(AT, 99)), **OF_LOGITS),
    "NaN in the logits of one step": Case(in_states(AT), skipped=(AT,), what="logits"),
    "NaN in the logits of two steps, and of two": Case(in_states(2, 3, 5, 6), skipped=(2, 3, 5, 6), what="logits"),
    "NaN in the logits of groups without a gradient": Case(in_states(*range(AT, 99), flat=True), **OF_LOGITS),
    "NaN in a teacher's logits": Case(of_teacher, ends=LIMIT, skipped=THREE, what="loss", saved=5),
    "infinite advantages": Case(of_advantage, ends=LIMIT, skipped=THREE, what="loss", saved=5),
    "an infinite gradient": Case(of_gradient, ends=LIMIT, skipped=THREE, what="gradient", saved=5),
    "a task whose score raises": Case(of_score, ends="its score raised KeyError: 'line one", saved=2),
    "a reward that raises": Case(then="1 / 0", ends="raised ZeroDivisionError", saved=2),
    "a reward that ends the program": Case(then="exit(3)", ends="raised SystemExit", saved=2),
    "a reward that hangs": Case(then="__import__('time').sleep(999)", timeout_s=3.0, ends="timeout_s = 3 s", saved=2),
    "too few rewards": Case(then="ranks[1:]", ends="expected 8 rewards, one per completion, got 7", saved=2),
    "no list of rewards": Case(then="1.0", ends="expected a list of 8 rewards, got a float", saved=2),
    "an infinite reward": Case(then="ranks[1:] + [float('inf')]", ends="float32's range, got inf", saved=2),
    "a reward of 1e308": Case(then="ranks[1:] + [1e308]", ends="float32's range, got 1e+308", saved=2),
    "rewards that are NaN": Case(then="[float('nan')] * len(ranks)"),
    "rewards that are None": Case(then="[None] * len(ranks)"),
    "some rewards that are NaN": Case(then="[float('nan'), *ranks[1:]]"),
    "rewards of 1e30": Case(then="[r * 1e30 for r in ranks]"),
    "completions that end at once": Case(of_length(1.0), then=RANKS, tokens=8),
    "completions that never end": Case(of_length(-1.0), then=RANKS, tokens=8 * 28),
}  # fmt: skip


@contextmanager
def stepping(state: State) -> Iterator[None]:
    """Let `state` know the step."""
    plain = trainer.train_step

    def train_step(parts: Parts, optimizer: Any, step: int, observe: Any = None) -> Any:
        state.step = step
        try:
            return plain(parts, optimizer, step, observe)
        finally:
            state.step = 0

    trainer.train_step = train_step
    try:
        yield
    finally:
        trainer.train_step = plain


def run(name: str, folder: Path) -> tuple[str, str | None]:
    """(what came of a case, what of that is wrong)."""
    case, state = CASES[name], State()
    folder.mkdir(parents=True)
    reward = RewardConfig()
    if case.then:
        (folder / "rewards.py").write_text(REWARDS.format(at=AT, then=case.then))
        reward = RewardConfig(f"{folder}/rewards.py:reward", timeout_s=case.timeout_s)
    config = Config(
        rollout=RolloutConfig(prompts=2, group_size=4),
        train=TrainConfig(steps=STEPS, lr=1e-3),
        eval=EvalConfig(problems=4, every=0),
        checkpoint=CheckpointConfig(every=2, keep=9),
        reward=reward,
    ).check()
    parts = load_parts(config)
    parts = (case.breaks(parts, state) if case.breaks else None) or parts
    records, error = [], ""
    with stepping(state):
        try:
            records += trainer.train(parts, folder)
        except InputError as raised:
            error = str(raised)
        # A generator that raises gives what it had given before.
    records = trainer.metrics.read(folder)
    return verdict(case, parts, folder, records, error)


def verdict(
    case: Case, parts: Parts, folder: Path, records: list[dict[str, Any]], error: str
) -> tuple[str, str | None]:
    steps = [record for record in records if record["kind"] == "train"]
    skipped = tuple(record["step"] for record in steps if record["skipped_updates"])
    named = sorted({record["not_finite"].partition(" ")[0] for record in steps if record["skipped_updates"]})
    last = checkpoint.newest(folder)  # which verifies it
    saved = None if last is None else checkpoint.step_of(last)
    came = [f"skipped {', '.join(map(str, skipped))} ({', '.join(named)})"] if skipped else []
    came += ["ended with an error" if error else "went on to its end", f"saved step {saved}"]
    wrong = []
    if (case.ends or "") not in error or bool(case.ends) != bool(error) or "\n" in error:
        wrong.append(f"error {error!r}, expected {case.ends!r}")
    if skipped != case.skipped or (skipped and named != [case.what]):
        wrong.append(f"skipped {skipped} for {named}, expected {case.skipped} for {case.what}")
    if saved != case.saved:
        wrong.append(f"saved {saved}, expected {case.saved}")
    if last is not None and broken_weight(load_parts(parts.config, str(last)).policy.model):
        wrong.append("weights were saved that are not finite")
    if case.tokens is not None and any(record["tokens"] != case.tokens for record in steps):
        wrong.append(f"tokens {[record['tokens'] for record in steps]}, expected {case.tokens}")
    if any(isinstance(value, float) and not math.isfinite(value) for record in steps for value in record.values()):
        wrong.append("a record holds a number that JSON has not")
    return "; ".join(came), "; ".join(wrong) or None


def run_all(folder: Path) -> dict[str, Any]:
    cases, wrong = {}, []
    for number, name in enumerate(CASES):
        cases[name], error = run(name, folder / str(number))
        wrong += [f"{name}: {error}"] if error else []
    return {"cases": cases, "wrong": wrong}
