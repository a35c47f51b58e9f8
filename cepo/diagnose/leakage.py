"""Leakage: does the policy come to know the answers, or only to say less, without getting better?

log P_S(r+ | x, answer cue) is the policy's, made to answer at once and given no hint. Credit from a teacher who knows
the answer must not put it into the weights: a rise of that number, or a fall of the entropy, without a rise of the
accuracy shows that it did.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cepo.diagnose.batches import Reading, Scored, batch_of, read, successes
from cepo.diagnose.statistics import Estimate, estimate
from cepo.parts import Parts
from cepo.rollout import Rollouts
from cepo.value import encode_answer


def leakage(uniform: Parts, collected: Sequence[Scored]) -> dict[str, Estimate | None]:
    """answer_logprob, entropy per token (both in nats) and accuracy.

    `uniform` holds the policy under the method that asks no teacher.
    """
    found = [_values(uniform, scored) for scored in collected]
    columns = {name: list(zip(*(some[name] for some in found), strict=True)) for name in found[0]}
    return {name: estimate(torch.cat(values), torch.cat(owners)) for name, (values, owners) in columns.items()}


def _values(uniform: Parts, scored: Scored) -> dict[str, tuple[Tensor, Tensor]]:
    """Each quantity's values, and the problem that each of them is of."""
    owner = scored.problem_of_rollouts()
    answers = answer_logprobs(uniform, scored.rollouts)
    entropies = [values["entropy"] for values in _read_all(uniform, scored.rollouts)]
    lengths = torch.tensor([len(entropy) for entropy in entropies])
    return {
        "answer_logprob": (answers, scored.first + torch.arange(answers.numel())),
        "entropy": (torch.cat(entropies), owner.repeat_interleave(lengths)),
        "accuracy": (successes(uniform, scored).double(), owner),
    }


def answer_logprobs(uniform: Parts, rollouts: Rollouts) -> Tensor:
    """log P_S(r+ | x, answer cue) of every problem, (P,), cued and ended as `cepo.value` does."""
    prompts, answers = [], []
    for prompt, problem in zip(rollouts.prompts, rollouts.problems, strict=True):
        ids, labels = encode_answer(uniform, problem, len(prompt))
        cue = labels.count(-100)  # only what follows it is scored
        prompts.append(prompt + ids[:cue])
        answers.append(ids[cue:])
    texts = [problem.answer for problem in rollouts.problems]
    cued = Rollouts(rollouts.problems, prompts, answers, texts, [False] * len(texts))
    return torch.stack([values["logprobs"].sum() for values in _read_all(uniform, cued)])


def _read_all(uniform: Parts, rollouts: Rollouts) -> list[Reading]:
    """With some advantage for each: the loss passes over rollouts that have none."""
    some = torch.ones(len(rollouts.responses))
    unscored: list[float | None] = [None] * some.numel()
    batch = batch_of(uniform, Scored(rollouts, unscored, unscored, some))
    return list(read(uniform, batch, some > 0).values())
