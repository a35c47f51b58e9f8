"""The control `shuffled`: the weights of CEPO, each rollout's own, in another order that only seed and step decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import one_thread  # noqa: F401
from torch import Tensor

from cepo import teacher, trainer, update
from cepo.credit.shuffled import permutation
from cepo.metrics import Clock
from cepo.parts import Parts, load_parts


def test_a_permutation_keeps_to_its_rollout_and_depends_on_seed_step_and_rollout_alone() -> None:
    lengths, rollouts = [5, 1, 30], [2, 3, 7]
    places = permutation(lengths, rollouts, 0, 1)
    for own, begin in zip(places.split(lengths), (0, 5, 6), strict=True):
        assert sorted(own.tolist()) == list(range(begin, begin + own.numel()))
    assert torch.equal(places, permutation(lengths, rollouts, 0, 1))
    assert torch.equal(places[6:] - 6, permutation([30], [7], 0, 1))
    last = places[6:] - 6
    for other in (range(30), permutation([30], [7], 1, 1), permutation([30], [7], 0, 2), permutation([30], [8], 0, 1)):
        assert last.tolist() != list(other)


def credited(step: int = 1, **sections: Any) -> tuple[Parts, update.Batch, Tensor, list[int]]:
    """Step 1 with its token advantages, those that CEPO would give, and the rollouts with A != 0."""
    parts = load_parts(small(credit={"name": "shuffled"}, **sections))
    problems = trainer.problems_of(parts, 1)
    rollouts = trainer.rollout.sample(
        parts.policy, problems, group_size=4, max_new_tokens=28, temperature=1.0, key=(0, 1)
    )
    rewards = trainer.score(parts, rollouts)
    told = teacher.build(parts.policy, parts.config.teacher, parts.task, rollouts, rewards, 1.0)
    table = torch.tensor([float("nan") if r is None else r for r in rewards]).view(-1, 4)
    plain = trainer.make_batch(parts, rollouts, parts.advantage(table).flatten(), told, 0.5)
    rows = plain.advantages.nonzero().flatten().tolist()
    cepo = load_parts(small())
    clock = Clock(parts.policy.device)
    want = update.policy_loss(cepo, plain, rows, None, clock).credit.advantages
    assert want is not None
    return parts, update.credit_ahead(parts, plain, rewards, [False] * 24, step, clock), want, rows


def test_every_rollout_keeps_its_weights_in_another_order() -> None:
    _, batch, want, rows = credited()
    assert batch.ahead is not None
    got = batch.token_advantages(rows)
    lengths = [len(ids) for ids in batch.responses(rows)]
    assert rows
    for mine, theirs in zip(got.split(lengths), want.split(lengths), strict=True):
        assert theirs.unique().numel() > 3, "all weights alike: the test would prove nothing"
        torch.testing.assert_close(mine.sort().values, theirs.sort().values)
        assert not torch.equal(mine, theirs)
    order = permutation(lengths, rows, 0, 1)
    torch.testing.assert_close(got, want[order])
    idle = [b for b in range(24) if b not in rows]
    assert idle
    assert not batch.token_advantages(idle).any()
    weight = batch.ahead.tokens["weight"]
    a = batch.per_token(batch.advantages, list(range(24)))
    there = ~weight.isnan()
    assert torch.equal(there, a != 0)
    torch.testing.assert_close(batch.ahead.advantages[there], a[there] * (0.5 + 0.5 * weight[there]))


def test_the_update_reads_no_teacher_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, batch, _, rows = credited()
    monkeypatch.setattr(update, "teacher_states", None)
    out = update.policy_loss(parts, batch, rows, None, Clock(parts.policy.device))
    assert torch.equal(out.credit.advantages, batch.token_advantages(rows))


def test_the_order_does_not_depend_on_the_passes_but_on_the_step() -> None:
    one, other, later = (credited(**c)[1].ahead for c in ({}, {"train": {"prompts_per_pass": 1}}, {"step": 2}))
    assert one is not None
    assert other is not None
    assert later is not None
    torch.testing.assert_close(one.advantages, other.advantages, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one.advantages, later.advantages, atol=1e-2)
