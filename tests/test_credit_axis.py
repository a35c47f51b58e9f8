"""The credit and loss axes: theorem 1 and the proposition of CEPO (arXiv 2605.19436), and what RLSD has in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cepo import axes
from cepo.credit import lam_at
from cepo.errors import InputError
from cepo.losses import token_weights
from cepo_kernels import contrastive_policy_loss

V = 17
cases = st.tuples(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 0.9), st.integers(1, 6))


def rows(seed: int, n: int, scale: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, positive, negative = scale * torch.randn(3, n, V, generator=generator)
    return {
        "policy_logits": policy.requires_grad_(),
        "positive_logits": positive,
        "negative_logits": negative,
        "labels": torch.randint(V, (n,), generator=generator),
        "advantages": torch.randn(n, generator=generator),
    }


def credit(name: str, **arguments: Any) -> Any:
    return axes.lookup("credit", name)(**arguments)


@pytest.mark.parametrize("name", axes.members("credit"))
@given(case=cases)
def test_theorem_1_a_token_advantage_has_the_sign_of_its_rollout(name: str, case: Any) -> None:
    seed, lam, eps_w, n = case
    inputs = rows(seed, n)
    out = credit(name, **inputs, lam=lam, eps_w=eps_w)
    assert torch.equal(out.advantages.sign(), inputs["advantages"].sign())
    low, high = 1 - lam * eps_w, 1 + lam * eps_w
    multiplier = out.advantages / inputs["advantages"]
    assert ((multiplier >= low - 1e-5) & (multiplier <= high + 1e-5)).all()


@given(case=cases)
def test_theorem_1_only_the_sampled_tokens_log_probs_receive_a_gradient(case: Any) -> None:
    seed, lam, eps_w, n = case
    inputs = rows(seed, n)
    for name in ("positive_logits", "negative_logits"):
        inputs[name].requires_grad_()
    out = credit("cepo", **inputs, lam=lam, eps_w=eps_w)
    (out.logprobs * out.advantages).sum().backward()
    assert inputs["positive_logits"].grad is None
    assert inputs["negative_logits"].grad is None
    leaf = inputs["policy_logits"].detach().requires_grad_()
    picked = leaf.log_softmax(-1).gather(1, inputs["labels"][:, None])[:, 0]
    (picked * out.advantages).sum().backward()
    assert torch.allclose(inputs["policy_logits"].grad, leaf.grad, atol=1e-5)


@given(case=cases)
def test_theorem_1_cepo_with_the_policy_as_negative_teacher_is_rlsd(case: Any) -> None:
    seed, lam, eps_w, n = case
    inputs = rows(seed, n)
    rlsd = credit("rlsd", **inputs, lam=lam, eps_w=eps_w)
    masked = credit("cepo", **inputs, negative_mask=torch.zeros(n, dtype=torch.bool), lam=lam, eps_w=eps_w)
    itself = {**inputs, "negative_logits": inputs["policy_logits"].detach().clone()}
    for other in (masked, credit("cepo", **itself, lam=lam, eps_w=eps_w)):
        assert torch.equal(rlsd.logprobs, other.logprobs)
        assert torch.allclose(rlsd.weight, other.weight, atol=1e-5)
        assert torch.allclose(rlsd.advantages, other.advantages, atol=1e-5)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6))
def test_proposition_on_a_correct_rollout_cepo_outweighs_rlsd_where_the_negative_teacher_doubts(
    seed: int, n: int
) -> None:
    # Stated for unclipped weights, so on the evidence: w = exp(evidence) on a correct rollout.
    inputs = rows(seed, n, scale=0.3)
    inputs["advantages"] = torch.ones(n)
    cepo, rlsd = credit("cepo", **inputs, eps_w=0.999), credit("rlsd", **inputs, eps_w=0.999)
    doubts = cepo.negative_logprobs < cepo.logprobs
    apart = (cepo.negative_logprobs - cepo.logprobs).abs() > 1e-5
    assert torch.equal((cepo.evidence > rlsd.evidence)[apart], doubts[apart])


@pytest.mark.parametrize("name", ["rlsd", "cepo"])
@given(case=cases)
def test_without_advantage_or_lambda_no_teacher_matters(name: str, case: Any) -> None:
    seed, _, eps_w, n = case
    inputs = rows(seed, n)
    alone = {**inputs, "positive_logits": None, "negative_logits": None}
    for change in ({"lam": 0.0}, {"lam": 0.5, "advantages": torch.zeros(n)}):
        with_teachers = credit(name, **{**inputs, **change}, eps_w=eps_w)
        without = credit(name, **{**alone, **change}, eps_w=eps_w)
        assert torch.equal(with_teachers.logprobs, without.logprobs)
        assert torch.equal(with_teachers.advantages, without.advantages)


def test_lambda_falls_linearly_from_the_first_step_and_depends_on_nothing_else() -> None:
    assert [lam_at(s, 0.5, 25) for s in (1, 26, 1000)] == [0.5, 0.0, 0.0]
    assert lam_at(6, 0.5, 25) == pytest.approx(0.4)
    assert lam_at(999, 0.3, 0) == 0.3


@pytest.mark.parametrize(("name", "eps_w", "steps"), [("cepo", 0.5, 25), ("rlsd", 0.2, 50)])
def test_published_defaults(name: str, eps_w: float, steps: int) -> None:
    module = axes.module("credit", name)
    assert eps_w == module.EPS_W
    assert steps == module.LAM_STEPS


def test_clipped_takes_the_lesser_of_the_free_and_the_held_gain() -> None:
    loss = axes.lookup("losses", "clipped")
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    logprobs = ratio.log().requires_grad_()
    out = loss(logprobs, torch.zeros(5), advantages, torch.full((5,), 0.2), clip_low=0.2, clip_high=0.28)
    assert out.loss.item() == pytest.approx(-0.2 * (1 + 1.28 - 1.5 + 0.5 - 0.8))
    assert out.clipped.tolist() == [False, True, False, False, True]
    out.loss.backward()
    assert (logprobs.grad == 0).tolist() == out.clipped.tolist()


@pytest.mark.parametrize("name", [n for n in axes.members("losses") if hasattr(axes.module("losses", n), "SURROGATE")])
def test_the_fused_kernel_computes_the_loss_that_the_axis_defines(name: str) -> None:
    inputs = rows(3, 40)
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(40, generator=generator)
    plain = credit("cepo", **inputs, lam=0.5, eps_w=0.5)
    old = plain.logprobs.detach() + 0.4 * torch.randn(40, generator=generator)
    want = axes.lookup("losses", name)(plain.logprobs, old, plain.advantages, weights)
    surrogate = axes.module("losses", name).SURROGATE
    got = contrastive_policy_loss(**inputs, old_logprobs=old, surrogate=surrogate, token_weight=weights, denominator=1)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.ratio, want.ratio)
    assert torch.equal(got.clipped, want.clipped)
    assert 0 < want.clipped.sum() < 40
    gradients = [torch.autograd.grad(loss, inputs["policy_logits"])[0] for loss in (got.loss, want.loss)]
    torch.testing.assert_close(*gradients)


def test_averages_weigh_tokens_rollouts_or_a_constant_length() -> None:
    lengths = torch.tensor([1, 3])
    assert torch.allclose(token_weights(lengths, "token", 10), torch.tensor([1 / 4, 1 / 4]))
    assert torch.allclose(token_weights(lengths, "sequence", 10), torch.tensor([1 / 2, 1 / 6]))
    assert torch.allclose(token_weights(lengths, "constant", 10), torch.tensor([1 / 20, 1 / 20]))
    with pytest.raises(InputError, match="token, sequence, constant"):
        token_weights(lengths, "mean", 10)
