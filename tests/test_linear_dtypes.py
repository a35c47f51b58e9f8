"""The ops from hidden states where dtypes differ: what is cast, and in what it is summed."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_linear import compare, gradients, inputs, logits_of

import cepo_kernels
from cepo_kernels import linear_products
from cepo_kernels.linear import linear_contrastive_logprobs, linear_contrastive_policy_loss, linear_token_logprobs

pytestmark = pytest.mark.usefixtures("poisoned")


def test_a_teacher_of_more_digits_keeps_them():
    """Beside a policy and a head in bfloat16, whose products need not upcast where there are some of that dtype."""
    hidden, weight, _, labels, advantages = inputs()
    narrow = weight.bfloat16()
    out = linear_contrastive_logprobs(hidden[0].bfloat16(), hidden[1], hidden[2].bfloat16(), narrow, labels, advantages)
    want = linear_token_logprobs(hidden[1].double(), narrow.double(), labels)
    torch.testing.assert_close(out.positive_logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["teacher", "bias"])
def test_one_input_of_float64_makes_all_of_it_float64(which):
    hidden, weight, bias, labels, advantages = inputs()
    policy, teacher = hidden[0].clone().requires_grad_(), hidden[1]
    teacher, bias = (teacher.double(), bias) if which == "teacher" else (teacher, bias.double())
    out = linear_contrastive_logprobs(policy, teacher, None, weight, labels, advantages, lm_head_bias=bias)
    for found, context in ((out.logprobs, policy), (out.positive_logprobs, teacher)):
        want = linear_token_logprobs(context.double(), weight.double(), labels, lm_head_bias=bias.double())
        torch.testing.assert_close(found, want.logprobs, rtol=1e-12, atol=1e-12)
    out.logprobs.sum().backward()
    assert policy.grad.dtype == torch.float32


def test_meta_tensors_tell_shapes():
    hidden, weight, _, labels, _ = inputs()
    out = linear_token_logprobs(*(x.to("meta") for x in (hidden[0], weight, labels)))
    assert out.logprobs.shape == labels.shape


def test_autocast_casts_as_for_a_linear_layer():
    hidden, weight, _, labels, _ = inputs()
    policy = hidden[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_token_logprobs(policy, weight, labels)
    rounded = linear_token_logprobs(hidden[0].bfloat16(), weight.bfloat16(), labels)
    oracle.assert_same_bits(out.logprobs, rounded.logprobs)
    out.logprobs.sum().backward()
    assert policy.grad.dtype == torch.float32


def test_autocast_casts_the_bias_and_leaves_float64():
    hidden, weight, bias, labels, _ = inputs()
    leaf = bias.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_token_logprobs(hidden[0], weight, labels, lm_head_bias=leaf)
    rounded = [x.bfloat16() for x in (hidden[0], weight, bias)]
    want = linear_token_logprobs(*rounded[:2], labels, lm_head_bias=rounded[2])
    oracle.assert_same_bits(out.logprobs, want.logprobs)
    out.logprobs.sum().backward()
    assert leaf.grad.dtype == torch.float32
    wide = [x.double() for x in (hidden[0], weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_token_logprobs(*wide[:2], labels, lm_head_bias=wide[2])
    oracle.assert_same_bits(out.logprobs, linear_token_logprobs(*wide[:2], labels, lm_head_bias=wide[2]).logprobs)


def test_float16_keeps_its_gradient_under_a_loss_scale():
    """At the denominator of a large batch the gradient lies below float16 until GradScaler's factor arrives."""
    hidden, weight, bias, labels, advantages = inputs(torch.float16)
    scale, options = 65536.0, {"denominator": 16384.0, "entropy_coef": 0.01}

    def ours(policy, weight, bias):
        out = linear_contrastive_policy_loss(
            policy, *hidden[1:], weight, labels, advantages * 0.01, lm_head_bias=bias, **options
        )
        return out.loss * scale

    def plain(policy, weight, bias):
        logits = [logits_of(x, weight, bias) for x in (policy, *hidden[1:])]
        loss = cepo_kernels.contrastive_policy_loss(*logits, labels, advantages.double() * 0.01, **options).loss
        return loss * scale

    got, want = (gradients(run, hidden[0], weight, bias, False) for run in (ours, plain))
    compare(got, want, torch.float16)


def test_the_gradient_of_the_head_is_summed_in_float32_over_chunks(monkeypatch):
    """Many rows, each adding less than bfloat16 could to what is there."""
    torch.manual_seed(0)
    rows = 4096
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 0)
    hidden = (torch.rand(rows, 4) + 0.5).bfloat16()
    weight = torch.randn(8, 4).bfloat16().requires_grad_()
    linear_token_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.int64)).logprobs.sum().backward()
    exact = weight.detach().double().requires_grad_()
    F.linear(hidden.double(), exact).log_softmax(-1)[:, 0].sum().backward()
    assert (weight.grad.double() - exact.grad).abs().max() < 2**-8 * exact.grad.abs().max()
