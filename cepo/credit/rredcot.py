"""Credit axis: RREDCoT, reward redistribution over the segments of a chain of thought (arXiv 2606.06475).

A response is cut into segments (`_segments`); v_t is the probability that the policy, made to answer before segment t,
gives the correct answer (`cepo.value`): forward passes alone, no teacher and no critic. The reward moves to where v
does: r_t = v_(t+1) - v_t, the last one reward - v_t, t = 0, 1, ...; their sum is reward - v_0. Modes:

    return_to_go    A_t = reward - v_t, what is still to come: unbiased for any v, as v_t and the segment's start depend
                    on earlier tokens alone (with `loss.average: constant`, as any policy gradient)
    difference      A_t = r_t: unbiased only if v is the true value
    scale           A |r_t| / mean |r_t|, A from the advantage axis: as published, a heuristic

The paper merges segments by the entropies of the whole response, which looks ahead and biases `return_to_go`; here a
boundary is kept by the entropy at its own token. Centring by the group's own mean would bias it as well: `centre:
others` takes the mean of reward - v_0 over the group's other rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cepo import value
from cepo.config import Config
from cepo.config.checks import one_of
from cepo.config.methods import RREDCOT_MODES
from cepo.credit import TokenAdvantages
from cepo.errors import InputError
from cepo.metrics import mean
from cepo.parts import Parts
from cepo.tasks import Problem
from cepo.update import Batch
from cepo_kernels import contrastive_logprobs

TEACHERS: tuple[str, ...] = ()
EPS_W = 0.0
LAM_STEPS = 0
SUPERVISION: tuple[str, ...] = ("verifier", "answer")
NEEDS_ZERO_A_ROWS = True


def rredcot(
    policy_logits: Tensor,
    positive_logits: Tensor | None,
    negative_logits: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    op: Callable[..., Any] = contrastive_logprobs,
    **options: Any,
) -> Any:
    """The advantages are those of `token_advantages`. Teachers are not read."""
    return op(policy_logits, None, None, labels, advantages, **options)


def redistribute(values: Tensor, reward: float) -> Tensor:
    """r (S,), which sums to reward - v_0, from the values (S,) at the starts of the segments."""
    return torch.cat([values[1:], values.new_tensor([reward])]) - values


def segment_advantages(mode: str, values: Tensor, reward: float, advantage: float, baseline: float = 0.0) -> Tensor:
    """The advantage of each segment's tokens, (S,).

    Args:
        mode: return_to_go, difference or scale.
        values: (S,) v at the starts of the segments.
        reward, advantage: the rollout's; the advantage matters to `scale` alone.
        baseline: subtracted in `return_to_go`; may depend on other rollouts, never on this one.

    Raises InputError for another mode.
    """
    one_of("mode", mode, RREDCOT_MODES)
    moved = redistribute(values, reward)
    if mode == "difference":
        return moved
    if mode == "return_to_go":
        return reward - values - baseline
    size = moved.abs()
    return advantage * (size / size.mean() if size.any() else torch.ones_like(size))


def mean_of_others(gains: Mapping[int, float], b: int, size: int) -> float:
    """The mean of `gains` over the other rollouts in b's group of `size`, 0 if none has any."""
    first = b - b % size
    others = [gains[j] for j in range(first, first + size) if j != b and j in gains]
    return sum(others) / max(len(others), 1)


def check(config: Config) -> None:
    """Raise InputError for an advantage that no mode would read, or a reward that is no chance of success."""
    mode, name = config.rredcot.mode, config.advantage.name
    if mode != "scale" and name != type(config.advantage)().name:
        raise InputError(
            f"advantage.name: expected the default, as rredcot.mode {mode} has advantages of its own, got {name!r}; "
            "`--rredcot.mode scale` multiplies it"
        )
    if mode != "scale" and not (config.reward.name == "verifier" or config.reward.is_function):
        raise InputError(
            f"reward.name: expected verifier or a function, as rredcot.mode {mode} subtracts chances of success from "
            f"it, got {config.reward.name!r}; `--rredcot.mode scale` multiplies its advantage"
        )


def check_problem(parts: Parts, problem: Problem, prompt: Sequence[int]) -> None:
    """Raise InputError if a problem has no answer to value, or none that fits the model's context."""
    value.encode_answer(parts, problem, len(prompt) + parts.max_new_tokens)


def token_advantages(
    parts: Parts,
    batch: Batch,
    rows: list[list[int]],
    outcomes: Sequence[float | None],
    success: Sequence[bool],
    step: int,
) -> TokenAdvantages:
    """Token advantages of the rollouts in `rows`, from what v estimates: the task's scores, or a function's rewards.

    0 for those without one.

    Recorded of every token are `value` and `segment_reward`, v and r of its segment. Statistics: `segments` per
    rollout; `segment_reward`, mean |r|; and over the segments of all rollouts with an outcome `value_mean`,
    `value_outcome` (how many lie in rollouts that succeed) and `value_brier`, mean square of v minus that 0 or 1.
    """
    config, size = parts.config.rredcot, batch.rollouts.group_size
    starts: dict[int, list[int]] = {}
    values: dict[int, Tensor] = {}

    def valued(some: list[int]) -> tuple[list[int], list[list[int]], list[Tensor]]:
        cut = value.segments(parts, batch, some)
        return some, cut, value.answer_values(parts, batch, some, cut)

    for part in parts.processes.gather("values", lambda: [valued(some) for some in rows]):
        for some, cut, valued_at in part:
            starts.update(zip(some, cut, strict=True))
            values.update(zip(some, valued_at, strict=True))
    gains = {b: reward - v[0].item() for b, v in values.items() if (reward := outcomes[b]) is not None}
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # per segment; NaN where there is no reward
    lengths: list[int] = []
    for b, v in values.items():
        reward, unknown = outcomes[b], torch.full_like(v, float("nan"))
        lengths += [end - start for start, end in pairwise([*starts[b], len(batch.rollouts.responses[b])])]
        if reward is None:
            columns.append((torch.zeros_like(v), v, unknown, unknown))
            continue
        baseline = mean_of_others(gains, b, size) if config.centre == "others" else 0.0
        advantages = segment_advantages(config.mode, v, reward, batch.advantages[b].item(), baseline)
        columns.append((advantages, v, redistribute(v, reward), torch.full_like(v, success[b])))
    advantages, v, moved, outcome = (torch.cat(column) for column in zip(*columns, strict=True))
    statistics = {
        "segments": len(lengths) / len(values),
        "segment_reward": mean(moved.abs()),
        "value_mean": mean(v[~outcome.isnan()]),
        "value_outcome": mean(outcome),
        "value_brier": mean((v - outcome).square()),
    }
    advantages, v, moved = (
        column.float().repeat_interleave(torch.tensor(lengths)) for column in (advantages, v, moved)
    )
    return TokenAdvantages(advantages, {"value": v, "segment_reward": moved}, statistics, config.mode != "scale")
