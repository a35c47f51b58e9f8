"""The loop: what may be skipped, what stays exact, and that it learns from what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_thread  # noqa: F401
from torch import Tensor

from cepo import axes, checkpoint, trainer, update
from cepo.config import Config, EvalConfig, RolloutConfig, TrainConfig
from cepo.errors import InputError
from cepo.metrics import Clock
from cepo.parts import Parts, load_parts
from cepo.policy import response_logits
from cepo.tasks import Problem
from cepo_kernels import token_logprobs


def small(**sections: Any) -> Config:
    """A config of a few cheap steps; a section given as a dict changes some of its fields."""
    config = Config(
        rollout=RolloutConfig(prompts=6, group_size=4),
        train=TrainConfig(steps=3, lr=1e-3),
        eval=EvalConfig(problems=8, every=0),
    )
    for name, changes in sections.items():
        setattr(config, name, replace(getattr(config, name), **changes))
    return config.check()


def steps(config: Config, n: int = 3, first: int = 1) -> tuple[Parts, list[trainer.Record]]:
    parts = load_parts(config)
    optimizer = trainer.make_optimizer(parts)
    return parts, [trainer.train_step(parts, optimizer, step) for step in range(first, first + n)]


def weights(parts: Parts) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parts.policy.model.state_dict().items()}


def same_bits(one: Parts, other: Parts) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("name", ["cepo", "rlsd", "shuffled"])
def test_skipping_the_teachers_changes_no_bit(name: str, share_prefix: bool) -> None:
    # lam_steps = 2: the third step has lambda 0, where every teacher is skipped.
    sections = {"credit": {"name": name, "lam_steps": 2}}
    skipping, records = steps(small(**sections, teacher={"skip": True, "share_prefix": share_prefix}))
    forced, forced_records = steps(small(**sections, teacher={"skip": False, "share_prefix": share_prefix}))
    assert same_bits(skipping, forced)
    assert [r["lam"] for r in records] == [0.5, 0.25, 0.0]
    assert any(0 < r["zero_variance"] < 1 for r in records), "no group was skipped: the test would prove nothing"
    for mine, theirs in zip(records, forced_records, strict=True):
        assert all(mine[key] == theirs[key] for key in ("reward", "entropy", "loss", "gradient_norm"))
    assert records[2]["evidence_right"] is None
    assert forced_records[2]["evidence_right"] is not None


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], Any]]:
    """The positional arguments and the result of every fused loss that is computed."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = update.loss_op

    def spied_op(policy: Any) -> Any:
        def spy(*args: Any, **options: Any) -> Any:
            result = original(policy)(*args, **options)
            calls.append((args, result))
            return result

        return spy

    monkeypatch.setattr(update, "loss_op", spied_op)
    return calls


@pytest.mark.parametrize("loss", ["clipped", "cispo"])
def test_an_on_policy_ratio_is_exactly_one(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    calls = spied(monkeypatch)
    parts = load_parts(small(train={"updates_per_batch": 2}, loss={"name": loss}))
    # The same weights twice: the second round compares its log-probs with those of the first.
    optimizer = torch.optim.SGD(parts.policy.model.parameters(), lr=0.0)
    parts.config.train.lr = 0.0
    trainer.train_step(parts, optimizer, 1)
    (_, first), (_, second) = calls
    assert (first.ratio == 1).all()
    torch.testing.assert_close(second.ratio, first.ratio)  # a product of other rows may round otherwise


def test_later_rounds_keep_the_credit_of_the_behaviour_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    _, records = steps(small(train={"updates_per_batch": 3, "lr": 3e-3}), n=1)
    assert len(calls) == 3  # rows with A = 0 are in none
    (first, behaviour), *later = calls
    assert first[1] is not None
    for (_, positive, negative, _, advantages, old), _ in later:
        assert positive is None
        assert negative is None
        assert torch.equal(advantages, behaviour.credit.advantages)
        assert torch.equal(old, behaviour.credit.logprobs)
    assert records[0]["ratio_clipped"] > 0


def test_passes_in_pieces_give_the_gradient_of_the_whole() -> None:
    gradients = []
    for pieces in (0, 1, 2):
        parts = load_parts(small(train={"prompts_per_pass": pieces, "max_grad_norm": 1e9}))
        trainer.train_step(parts, torch.optim.SGD(parts.policy.model.parameters(), lr=0.0), 1)
        gradients.append(torch.cat([p.grad.flatten() for p in parts.policy.model.parameters()]))
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-4 * gradients[0].norm()


def test_the_update_is_the_policy_gradient_with_the_global_token_count() -> None:
    parts = load_parts(small(train={"max_grad_norm": 1e9}, credit={"name": "uniform"}))
    model = parts.policy.model
    parts.config.train.lr = 0.0
    trainer.train_step(parts, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    rollouts = trainer.rollout.sample(
        parts.policy, trainer.problems_of(parts, 1), group_size=4, max_new_tokens=28, temperature=1.0, key=(0, 1)
    )
    rewards = torch.tensor(trainer.score(parts, rollouts)).view(6, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    total = sum(map(len, rollouts.responses))
    for b, response in enumerate(rollouts.responses):
        prompt = rollouts.prompts[b // 4]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        (-advantages[b] * logprobs.sum() / total).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (got - expected).norm() < 1e-4 * expected.norm()


def test_a_batch_without_any_advantage_moves_nothing() -> None:
    parts = load_parts(small())
    parts = replace(parts, reward=lambda prompts, *args, **columns: [1.0] * len(prompts))
    optimizer = trainer.make_optimizer(parts)
    before = weights(parts)
    record = trainer.train_step(parts, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in weights(parts).items())
    assert record["zero_variance"] == 1
    assert record["entropy"] > 0


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    parts = load_parts(small())
    parts = replace(parts, advantage=lambda rewards: torch.full_like(rewards, float("inf")))
    before = weights(parts)
    record = trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    assert record["skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in weights(parts).items())


def test_truncated_rollouts_score_zero_and_masking_them_keeps_the_denominator() -> None:
    parts = load_parts(small())
    problems = trainer.problems_of(parts, 1)
    free = trainer.rollout.sample(parts.policy, problems, group_size=4, max_new_tokens=28, temperature=1.0, key=(0, 1))
    cut = max(map(len, free.responses)) - 1
    rollouts = trainer.rollout.sample(
        parts.policy, problems, group_size=4, max_new_tokens=cut, temperature=1.0, key=(0, 1)
    )
    assert any(rollouts.truncated)
    scores = trainer.score(parts, rollouts)
    assert all(s == 0 for s, truncated in zip(scores, rollouts.truncated, strict=True) if truncated)
    masked = load_parts(small(rollout={"max_new_tokens": cut, "mask_truncated": True}))
    batch = trainer.make_batch(masked, rollouts, torch.ones(24), None, 0.0)
    lengths = torch.tensor([len(ids) for ids in rollouts.responses])
    assert (batch.weights[torch.tensor(rollouts.truncated)] == 0).all()
    assert torch.allclose(batch.weights[~torch.tensor(rollouts.truncated)], 1 / lengths.sum())


def test_records_hold_what_a_person_watches() -> None:
    _, records = steps(small(), n=1)
    for key in ("reward", "accuracy", "entropy", "zero_variance", "lam", "evidence_right", "evidence_wrong",
                "weight_clipped", "ratio_clipped", "tokens_per_second", "negative_shared", "truncated"):  # fmt: skip
        assert isinstance(records[0][key], float), key
    assert {"rollout", "reward", "teacher", "policy", "credit", "update"} <= set(records[0]["seconds"])
    assert records[0]["evidence_right"] > records[0]["evidence_wrong"]


def test_evaluation_disturbs_nothing(tmp_path: Path) -> None:
    finals = []
    for every in (0, 1):
        run = tmp_path / str(every)
        run.mkdir()
        list(trainer.train(load_parts(small(eval={"every": every})), run))
        finals.append(load_parts(small(policy={"model": str(run)})))
    assert same_bits(*finals)


@pytest.mark.parametrize("advantage", axes.members("advantages"))
@pytest.mark.parametrize("credit", axes.members("credit"))
def test_any_advantage_goes_with_any_credit(advantage: str, credit: str) -> None:
    config = small(
        advantage={"name": advantage},
        credit={"name": credit},
        rredcot={"mode": "scale"},  # the others have advantages of their own
        rollout={"prompts": 3, "group_size": 4},
    )
    _, records = steps(config, n=1)
    assert records[0]["gradient_norm"] > 0


def test_bfloat16_computes_by_autocast_and_keeps_float32_weights() -> None:
    parts, records = steps(small(policy={"compute_dtype": "bfloat16"}), n=1)
    assert records[0]["gradient_norm"] > 0
    assert {value.dtype for value in weights(parts).values()} == {torch.float32}


def test_the_head_in_pieces_gives_what_token_logprobs_gives() -> None:
    parts = load_parts(small())
    rollouts = trainer.rollout.sample(
        parts.policy, trainer.problems_of(parts, 1), group_size=4, max_new_tokens=28, temperature=1.0, key=(0, 1)
    )
    batch = trainer.make_batch(parts, rollouts, torch.ones(24), None, 0.0)
    rows = [0, 5, 7]
    out = update.policy_loss(parts, batch, rows, None, Clock(parts.policy.device)).credit
    logits = response_logits(parts.policy, batch.prompts(rows), batch.responses(rows))
    labels = torch.tensor([token for ids in batch.responses(rows) for token in ids])
    torch.testing.assert_close(out.logprobs, token_logprobs(logits, labels).logprobs)


@pytest.mark.parametrize("credit", ["cepo", "rredcot", "shuffled"])
def test_a_head_that_cannot_be_told_apart_gives_the_same_step(credit: str) -> None:
    losses = []
    for split in (True, False):
        parts = load_parts(small(credit={"name": credit}))
        parts = replace(parts, policy=replace(parts.policy, split_head=split))
        record = trainer.train_step(parts, trainer.make_optimizer(parts), 1)
        losses.append((record["loss"], record["gradient_norm"], record["entropy"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def jsonl(path: Path, **changes: str) -> dict[str, str]:
    """A file of training problems of which the last differs, as `task` of a config."""
    lines = [{"prompt": f"{i}+{i}", "answer": str(2 * i), "split": "train"} for i in range(9)]
    lines += [{**lines[0], **changes}] if changes else []
    lines += [{"prompt": f"1+{i}", "answer": str(1 + i), "split": "validation"} for i in range(2, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": f"jsonl:{path}"}


@pytest.mark.parametrize(
    ("changes", "credit", "words"),
    [
        ({"prompt": "7 " * 600}, "uniform", "prompt '7 7"),
        ({"prompt": "8+8+8", "answer": "7 " * 600}, "cepo", "teacher context of prompt '8\\+8\\+8'"),
        ({"prompt": "8+8+8", "answer": "7 " * 600}, "uniform", None),
    ],
)
def test_every_listed_training_problem_is_checked_before_a_run(
    tmp_path: Path, changes: dict[str, str], credit: str, words: str | None
) -> None:
    sections = {"task": jsonl(tmp_path / "file.jsonl", **changes), "credit": {"name": credit}}
    parts = load_parts(small(**sections, rollout={"prompts": 1, "max_new_tokens": 28}))
    if words is None:
        trainer.check_prompts(parts)
        return
    with pytest.raises(InputError, match=f"{words}.*expected at most 1024 tokens"):
        trainer.check_prompts(parts)


@pytest.mark.parametrize("step", [1, 3])
def test_bad_input_in_a_step_leaves_a_checkpoint_of_those_before(tmp_path: Path, step: int) -> None:
    parts = load_parts(small(rollout={"prompts": 2, "group_size": 4}))
    endless = parts.task.train

    def train(index: int, seed: int) -> Problem:
        return Problem("7 " * 600, "7") if index // 2 + 1 == step else endless(index, seed)

    parts.task.train = train  # type: ignore[method-assign]
    with pytest.raises(InputError, match="expected at most 1024 tokens"):
        list(trainer.train(parts, tmp_path))
    last = checkpoint.newest(tmp_path)
    assert (last and last.name) == (None if step == 1 else "step-000002")
    if last is not None:
        assert same_bits(parts, load_parts(parts.config, str(last)))


def test_the_learning_rate_warms_up() -> None:
    parts, records = steps(small(train={"warmup_steps": 3, "lr": 1e-3}, rollout={"prompts": 2, "group_size": 4}), n=5)
    assert [r["lr"] for r in records] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    optimizer = trainer.make_optimizer(parts)
    trainer.train_step(parts, optimizer, 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5e-3])


def test_a_step_uses_its_temperature_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    parts = load_parts(small(rollout={"temperature": 0.7}))
    rollouts = trainer.rollout.sample(
        parts.policy, trainer.problems_of(parts, 1), group_size=4, max_new_tokens=28, temperature=0.7, key=(0, 1)
    )
    rewards = trainer.score(parts, rollouts)
    mixed = [p for p in range(6) if len(set(rewards[4 * p : 4 * p + 4])) > 1]
    rows = [b for p in mixed for b in range(4 * p, 4 * p + 4)]
    contexts = [rollouts.prompts[b // 4] for b in rows]
    logits = response_logits(parts.policy, contexts, [rollouts.responses[b] for b in rows]).detach()
    labels = torch.tensor([token for b in rows for token in rollouts.responses[b]])
    expected = token_logprobs(logits, labels, temperature=0.7).logprobs
    trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    (_, result) = calls[0]
    torch.testing.assert_close(result.credit.logprobs, expected)
    assert (expected - token_logprobs(logits, labels).logprobs).abs().max() > 0.01
