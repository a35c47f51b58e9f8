"""What `torch.func`, forward mode and batched backwards get from the ops is right, or an error."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.autograd import forward_ad

from cepo_kernels import (
    contrastive_policy_loss,
    divergence,
    linear_contrastive_policy_loss,
    linear_divergence,
    linear_products,
    linear_token_logprobs,
    token_logprobs,
)
from cepo_kernels.backends import sharded

ROWS, WIDTH, VOCABULARY = 4, 6, 11
LOGITS, TEACHER, HIDDEN, OTHER, HEAD, A = (
    torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(ROWS, VOCABULARY)] * 2 + [(ROWS, WIDTH)] * 2 + [(VOCABULARY, WIDTH), (ROWS,)])
)
LABELS = torch.arange(ROWS)
CALLS = {
    "token_logprobs": (LOGITS, lambda x: token_logprobs(x, LABELS).logprobs),
    "contrastive_policy_loss": (LOGITS, lambda x: contrastive_policy_loss(x, None, None, LABELS, A).loss),
    "divergence": (LOGITS, lambda x: divergence(x, TEACHER)),
    "linear_token_logprobs, frozen": (HIDDEN, lambda h: linear_token_logprobs(h, HEAD, LABELS).logprobs),
    "linear_token_logprobs, head": (HEAD, lambda w: linear_token_logprobs(HIDDEN, w, LABELS).logprobs),
    "linear_policy_loss, head": (
        HEAD,
        lambda w: linear_contrastive_policy_loss(HIDDEN, None, None, w, LABELS, A).loss,
    ),
    "linear_divergence, frozen": (HIDDEN, lambda h: linear_divergence(h, OTHER, HEAD)),
    "linear_divergence, head": (HEAD, lambda w: linear_divergence(HIDDEN, OTHER, w)),
}


@pytest.mark.parametrize(("of", "call"), CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_right_or_refused(of, call):
    both = torch.stack([of, of * 2.0])
    torch.testing.assert_close(torch.func.vmap(call)(both), torch.stack([call(x) for x in both]))

    def forward_mode():
        with forward_ad.dual_level():
            call(forward_ad.make_dual(of, of))

    for transformed in (
        lambda: torch.func.grad(lambda x: call(x).sum())(of),
        lambda: torch.func.jvp(call, (of,), (of,)),
        lambda: torch.func.jvp(torch.func.vmap(call), (both,), (both,)),
        forward_mode,
    ):
        with pytest.raises(TypeError, match=r"^\w+: expected a tensor that a backward differentiates"):
            transformed()


@pytest.mark.parametrize(("of", "call"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_backwards_come_in_batches(of, call, dtype):

    def gradient(upstream, batched):
        leaf = of.to(dtype).requires_grad_()
        return torch.autograd.grad(call(leaf), leaf, upstream, is_grads_batched=batched)[0]

    upstreams = torch.randn(3, *call(of).shape, generator=torch.Generator().manual_seed(9))
    for together in (upstreams, upstreams[:, :1].expand_as(upstreams) if upstreams.ndim > 1 else upstreams * 0.0):
        want = torch.stack([gradient(upstream, False) for upstream in together])
        torch.testing.assert_close(gradient(together, True), want)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("surroundings", [torch.float64, torch.float16, torch.device("meta")], ids=str)
def test_default_dtype_and_device_change_nothing(name, surroundings, monkeypatch):
    monkeypatch.setattr(sharded, "TILE", 4)  # of logits that nobody keeps
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 0)
    monkeypatch.setattr(linear_products, "LEAST_ROWS", 2)
    inputs, call = CALLS[name]

    def run():
        leaf = inputs.clone().requires_grad_()
        value = call(leaf)
        return value.detach(), torch.autograd.grad(value, leaf, torch.ones_like(value))[0], call(inputs)

    want, dtype = run(), torch.get_default_dtype()
    if isinstance(surroundings, torch.device):
        with surroundings:
            got = run()
    else:
        torch.set_default_dtype(surroundings)
        try:
            got = run()
        finally:
            torch.set_default_dtype(dtype)
    for ours, right in zip(got, want, strict=True):
        oracle.assert_same_bits(ours, right)
