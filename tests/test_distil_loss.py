"""The losses `opsd` and `sdpo`: value and gradient are those of the formulas, on a model small enough to tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401
from torch import Tensor

from cepo import distil, trainer, update
from cepo.config import LossConfig
from cepo.distil import SelfTeacher
from cepo.metrics import Clock
from cepo.parts import Parts, load_parts
from cepo.policy import response_logits
from cepo.tasks import Problem
from cepo_kernels import token_logprobs


class Worked(Sums):
    """Sums with a worked solution, and feedback on whatever states a wrong answer."""

    def feedback(self, completion: str, problem: Problem) -> str | None:
        answer = self.parse_answer(completion)
        return None if answer is None or self.accepts(answer, problem) else f"it is {problem.answer}, not {answer}."


TASK = Worked()
PROBLEMS = [Problem("3+4", "7", {"solution": "sum#7"}), Problem("1+1", "2", {"solution": "two#2"})]
COMPLETIONS = ["a#7", "bb#8", "#9", "7#7", "c#2", "d", "e", "f"]
SUCCESS = [True, False, False, True, True, False, False, False]


def tiny_parts(loss: dict[str, Any], **sections: Any) -> Parts:
    """A random float64 model, whose teacher's weights differ from its own unless they are the same."""
    config = small(loss=loss, train={"max_grad_norm": 1e9}, **sections)
    policy = tiny_policy()
    policy.model.double()
    parts = replace(load_parts(config), policy=policy, task=TASK, self_teacher=SelfTeacher(policy.model, config.loss))
    torch.manual_seed(1)
    with torch.no_grad():
        for value in policy.model.parameters():
            value += 0.05 * torch.randn_like(value)
    return parts


def batch_of(parts: Parts, truncated: tuple[int, ...] = ()) -> update.Batch:
    rollouts = rollouts_of(parts.policy, PROBLEMS, COMPLETIONS, truncated)
    kinds = parts.distillation.TEACHER_CONTEXT
    contexts = distil.build(parts.policy, parts.config.teacher, kinds, parts.task, rollouts, SUCCESS)
    return trainer.make_batch(parts, rollouts, torch.zeros(8), None, 0.0, contexts.ids)


def formula(student: Tensor, teacher: Tensor, loss: LossConfig) -> Tensor:
    """The divergence of rows of logits, from probabilities, as it stands in the papers."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    if loss.top_k is not None and loss.top_k < s.shape[-1] - 1:
        top = s.topk(loss.top_k).indices
        s, t = (torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1) for p in (s, t))
    if loss.divergence == "jsd":
        beta = loss.beta
        assert beta is not None
        m = beta * t + (1 - beta) * s
        terms = beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()
    else:
        terms = t * (t / s).log() if loss.divergence == "forward_kl" else s * (s / t).log()
    return (terms if loss.clip is None else terms.clamp(max=loss.clip)).sum(-1)


def expected(parts: Parts, batch: update.Batch, ratio: Tensor | None = None) -> Tensor:
    """The loss from one unpadded pass for each rollout and each model: averaged as the papers say."""
    config, teacher = parts.config, parts.self_teacher
    assert batch.contexts is not None
    assert teacher is not None
    per_rollout = []
    for b, context in enumerate(batch.contexts):
        if context is None:
            continue
        response = batch.rollouts.responses[b]
        rows = []
        for model, prompt in ((parts.policy.model, batch.prompts([b])[0]), (teacher.model, context)):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits / config.rollout.temperature)
        values = formula(rows[0], rows[1].detach(), config.loss)
        per_rollout.append(values if ratio is None else values * batch_slice(batch, ratio, b).clamp(max=2))
    if config.loss.name == "opsd":
        return torch.stack([values.mean() for values in per_rollout]).mean()
    return torch.cat(per_rollout).mean()


def assert_gradients(model: Any, expected: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():  # the weights of the tokens are float32
        assert (value.grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def batch_slice(batch: update.Batch, values: Tensor, b: int) -> Tensor:
    return values.split([len(ids) for ids in batch.rollouts.responses])[b]


LOSSES: list[dict[str, Any]] = [
    {"name": "opsd"},
    {"name": "opsd", "divergence": "jsd", "clip": 0.01, "teacher": "policy"},
    {"name": "opsd", "divergence": "jsd", "beta": 0.3, "teacher": "ema"},
    {"name": "sdpo"},
    {"name": "sdpo", "top_k": 5},
    {"name": "sdpo", "top_k": 3, "divergence": "jsd", "teacher": "fixed"},
    {"name": "sdpo", "top_k": 10_000, "teacher": "policy"},
]


@pytest.mark.parametrize("split_head", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_formula(loss: dict[str, Any], split_head: bool) -> None:
    parts = tiny_parts(loss, rollout={"temperature": 0.8, "prompts": 2, "group_size": 4})
    teacher, model = parts.self_teacher, parts.policy.model
    assert teacher is not None
    parts = replace(parts, policy=replace(parts.policy, split_head=split_head))
    batch = batch_of(parts)
    assert batch.contexts is not None
    assert (None in batch.contexts) == (loss["name"] == "sdpo")
    want = expected(parts, batch)
    want.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    tokens, record = update.update(parts, still, batch, Clock(parts.policy.device))
    assert record["loss"] == pytest.approx(want.item(), rel=1e-6)
    assert want.item() > 1e-3
    assert_gradients(model, gradients)
    if teacher.kind != "policy":
        assert all(value.grad is None for value in teacher.model.parameters())
    weighted = (tokens["divergence"] * batch.per_token(batch.weights, list(range(8)))).nansum()
    assert weighted.item() == pytest.approx(want.item(), rel=1e-5)
    assert tokens["entropy"].isnan().sum() == 0
    dropped = torch.tensor([ids is None for ids in batch.contexts])
    assert torch.equal(tokens["divergence"].isnan(), batch.per_token(dropped, list(range(8))))


def test_passes_in_pieces_give_the_gradient_of_the_whole() -> None:
    gradients = []
    for pieces in (0, 1):
        parts = tiny_parts({"name": "sdpo"}, rollout={"prompts": 2, "group_size": 4})
        parts.config.train.prompts_per_pass = pieces
        model = parts.policy.model
        update.update(parts, torch.optim.SGD(model.parameters(), lr=0.0), batch_of(parts), Clock(parts.policy.device))
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["opsd", "sdpo"])
def test_later_rounds_weigh_by_the_ratio_up_to_two(name: str) -> None:
    parts = tiny_parts({"name": name}, rollout={"prompts": 2, "group_size": 4})
    batch, model = batch_of(parts), parts.policy.model
    assert batch.contexts is not None
    rows = [b for b, ids in enumerate(batch.contexts) if ids is not None]
    clock = Clock(parts.policy.device)
    first = update.distillation_loss(parts, batch, rows, None, clock)
    assert first.credit is not None
    assert not first.clipped.any()
    logits = response_logits(parts.policy, batch.prompts(rows), batch.responses(rows))
    labels = torch.tensor([token for ids in batch.responses(rows) for token in ids])
    torch.testing.assert_close(first.credit.logprobs, token_logprobs(logits, labels).logprobs.detach())
    log_ratio = torch.linspace(-1, 1.5, labels.numel(), dtype=torch.float64)
    old = first.credit._replace(logprobs=first.credit.logprobs - log_ratio)
    later = update.distillation_loss(parts, batch, rows, old, clock)
    if name == "opsd":
        assert later.loss.item() == first.loss.item()
        assert not later.clipped.any()
        return
    everywhere = torch.full((sum(map(len, batch.rollouts.responses)),), float("nan"), dtype=torch.float64)
    kept = torch.tensor([b in rows for b in range(8)])
    everywhere[batch.per_token(kept, list(range(8)))] = log_ratio.exp()
    want = expected(parts, batch, everywhere)
    assert later.loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(later.clipped, log_ratio.exp() > 2)
    assert 0 < later.clipped.sum() < labels.numel()
    want.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    later.loss.backward()
    assert_gradients(model, gradients)


def test_masked_rollouts_stay_in_the_average_and_dropped_ones_do_not() -> None:
    sections = {"rollout": {"prompts": 2, "group_size": 4, "mask_truncated": True}}
    parts = tiny_parts({"name": "sdpo"}, **sections)
    batch = batch_of(parts, truncated=(1,))
    lengths = torch.tensor([len(ids) for ids in batch.rollouts.responses])
    assert batch.contexts is not None
    kept = torch.tensor([ids is not None for ids in batch.contexts])
    assert (batch.weights[~kept] == 0).all()
    assert batch.weights[1] == 0
    assert torch.allclose(batch.weights[kept & (torch.arange(8) != 1)], 1 / lengths[kept].sum())


@pytest.mark.parametrize("loss", LOSSES[:4], ids=str)
def test_steps_on_one_batch_lower_the_divergence(loss: dict[str, Any]) -> None:
    parts = tiny_parts({**loss, "clip": None}, rollout={"prompts": 2, "group_size": 4})
    batch, optimizer = batch_of(parts), torch.optim.Adam(parts.policy.model.parameters(), lr=3e-3)
    losses = [update.update(parts, optimizer, batch, Clock(parts.policy.device))[1]["loss"] for _ in range(20)]
    assert 0 < losses[-1] < 0.3 * losses[0]
