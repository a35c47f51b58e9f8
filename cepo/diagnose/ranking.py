"""Ranking: does credit single out the first wrong token among the result tokens of its rollout?

The rivals are the other tokens that state a result, in the same rollout: against filler everything looks decisive. A
score is high where blame should fall: the clipped weight of a wrong rollout, its evidence negated, and, for want of
any teacher, the policy's own entropy and surprisal. Rollouts are those that an update reads: wrong, with A < 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cepo.diagnose.batches import Observed, Reading, successes
from cepo.diagnose.statistics import Estimate, auroc, estimate, top_share
from cepo.parts import Parts
from cepo.rollout import Rollouts
from cepo.teacher import Teachers, teacher_context

UNCERTAIN, EARLIER, LATER = "rivals uncertain", "rivals earlier", "rivals later"
_SETS = ["all", "rivals", "result", "r-"]


@dataclass(frozen=True)
class Slip:
    """A wrong rollout: the scores of its K result tokens, each (K,), and which of them is the first wrong one."""

    problem: int
    step: int
    """Which of the results it is in, from 1."""
    own: bool | None
    """Whether its group's r- is its own answer; None: no r-."""
    index: int
    scores: dict[str, Tensor]

    def sets(self) -> list[str]:
        """The sets of comparisons that it belongs to."""
        r_minus = {None: "r- none", True: "r- own", False: "r- other"}[self.own]
        return ["all", UNCERTAIN, EARLIER, LATER, f"result {self.step}", r_minus]

    def compared(self, name: str) -> Tensor:
        """The first wrong token and those it is compared with in a set, (K,) bool."""
        entropy, places = self.scores["entropy"], torch.arange(len(self.scores["entropy"]))
        return {
            UNCERTAIN: (places <= self.index) & (entropy >= entropy[self.index] / 2),
            EARLIER: places <= self.index,
            LATER: places >= self.index,
        }.get(name, places >= 0)


def knows_errors(parts: Parts) -> bool:
    """Whether the task says where its completions go wrong."""
    return hasattr(parts.task, "result_spans") and hasattr(parts.task, "first_error")


def result_tokens(parts: Parts, completion: str, ids: Sequence[int]) -> list[tuple[int, int, range]]:
    """(t, k, characters) for every token t with a part in a result, the k-th of them, both counted from 0."""
    task: Any = parts.task
    spans, found, start = task.result_spans(completion), [], 0
    for t in range(len(ids)):
        end = len(parts.policy.tokenizer.decode(ids[: t + 1], skip_special_tokens=True))
        result = next((k for k, (a, b) in enumerate(spans) if max(a, start) < min(b, end)), None)
        if result is not None:
            found.append((t, result, range(start, end)))
        start = end
    return found


def slips(parts: Parts, observed: Observed) -> tuple[list[Slip], int]:
    """The slips of a batch, and how many of the wrong rollouts with A < 0 are none.

    Those go wrong first elsewhere than in a result, or have no second result token.
    """
    task: Any = parts.task
    rollouts, problem = observed.scored.rollouts, observed.scored.problem_of_rollouts()
    blamed = ~successes(parts, observed.scored) & (observed.scored.advantages < 0)
    found, elsewhere = [], 0
    for i, b in enumerate(observed.rows):
        if not blamed[b]:
            continue
        completion = rollouts.completions[b]
        tokens = result_tokens(parts, completion, rollouts.responses[b])
        error = task.first_error(completion, rollouts.problems[b // rollouts.group_size])
        index = next((k for k, (_, _, characters) in enumerate(tokens) if error in characters), None)
        if index is None or len(tokens) < 2:
            elsewhere += 1
            continue
        places = torch.tensor([t for t, _, _ in tokens])
        scores = blame(parts, {label: readings[i] for label, readings in observed.readings.items()})
        picked = {name: values[places] for name, values in scores.items()}
        own = answer_is_r_minus(parts, observed.batches["cepo"].teachers, rollouts, b)
        found.append(Slip(int(problem[b]), tokens[index][1] + 1, own, index, picked))
    return found, elsewhere


def blame(parts: Parts, readings: dict[str, Reading]) -> dict[str, Tensor]:
    """What each method's reading of a wrong rollout, and the policy's own, holds against each token: (T,) each."""
    scores: dict[str, Tensor] = {}
    for label, values in readings.items():
        if "evidence" in values:
            scores |= {f"{label}: evidence": -values["evidence"], f"{label}: weight": values["weight"]}
        if "divergence" in values:
            scores[f"{label}: divergence"] = values["divergence"]
        if "segment_reward" in values and not values["segment_reward"].isnan().any():
            scores |= {f"{label}: {parts.config.rredcot.mode}": -values["advantages"],
                       f"{label}: difference": -values["segment_reward"]}  # fmt: skip
    policy = readings["uniform"]
    entropy = policy["entropy"]
    return {**scores, "entropy": entropy, "surprisal": -policy["logprobs"], "chance": torch.zeros_like(entropy)}


def answer_is_r_minus(parts: Parts, teachers: Teachers | None, rollouts: Rollouts, b: int) -> bool | None:
    """Whether the negative teacher of rollout b is told that rollout's own answer; None: it is told nothing."""
    negative = None if teachers is None else teachers.negative[b]
    if teachers is None or negative is None:
        return None
    answer = parts.task.parse_answer(rollouts.completions[b])
    problem = rollouts.problems[b // rollouts.group_size]
    if answer is None:
        return False
    return teacher_context(parts.policy, parts.config.teacher, problem, answer.strip()) == teachers.prefixes[negative]


def rank(found: Sequence[Slip]) -> dict[str, dict[str, dict[str, Estimate | None]]]:
    """{set of comparisons: {score: {"auroc": ..., "top": ...}}}, an `Estimate` each.

    A rollout's AUROC is the share of its rivals that its first wrong token outranks; "top" is whether it outranks all.
    Both are averaged over rollouts, with intervals over problems. The sets: all; against those rivals alone that come
    later, or earlier (which are right, later ones need not be), or earlier with at least half the entropy, where the
    policy was uncertain too; by the result that the error is in; by whether r- is the rollout's own answer.
    """
    names = sorted({name for slip in found for name in slip.sets()}, key=lambda n: (_SETS.index(n.split()[0]), n))
    return {name: table for name in names if (table := _rank([slip for slip in found if name in slip.sets()], name))}


def _rank(found: Sequence[Slip], name: str) -> dict[str, dict[str, Estimate | None]]:
    compared = [(slip, mask) for slip in found if (mask := slip.compared(name)).sum() > 1]
    table: dict[str, dict[str, Estimate | None]] = {}
    for score in dict.fromkeys(score for slip, _ in compared for score in slip.scores):
        areas, tops, problems = [], [], []
        for slip, mask in compared:
            if score not in slip.scores:
                continue
            values, index = slip.scores[score], slip.index
            rivals = mask & (torch.arange(mask.numel()) != index)
            areas.append(auroc(values[index : index + 1], values[rivals]))
            tops.append(top_share(values[mask], int(mask[:index].sum())))
            problems.append(slip.problem)
        owners = torch.tensor(problems)
        table[score] = {"auroc": estimate(torch.tensor(areas), owners), "top": estimate(torch.tensor(tops), owners)}
    return table


def ranking(parts: Parts, observed: Sequence[Observed]) -> dict[str, Any] | None:
    """`rank` of all batches, and how many wrong rollouts it is of; None if the task does not say where errors are."""
    if not knows_errors(parts):
        return None
    each = [slips(parts, one) for one in observed]
    found = [slip for some, _ in each for slip in some]
    return {"slips": len(found), "elsewhere": sum(without for _, without in each), "sets": rank(found)}
