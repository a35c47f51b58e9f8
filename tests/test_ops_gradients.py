"""First-order gradients: right, rounded once, written where they belong and nowhere else."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cepo_kernels

pytestmark = pytest.mark.usefixtures("poisoned")

UPSTREAMS = [(1.0, None), (None, 1.0), (-0.7, 0.3), (65536.0, None), (0.0, 2.0), (1e-4, -1e-3)]


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_reference_passes_gradcheck(softcap):
    logits = oracle.logits_like((2, 3, 7), 1, torch.float64, 2.0).requires_grad_()
    labels = torch.tensor([[0, 6, -100], [3, 3, 1]])
    temperature = torch.tensor([[0.5, 1.0, 2.0], [1.3, 0.9, 1.1]], dtype=torch.float64)

    def scalars(x):
        out = cepo_kernels.token_logprobs(
            x, labels, temperature=temperature, logit_scale=1.5, logit_softcap=softcap, return_entropy=True,
            backend="reference",
        )  # fmt: skip
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(scalars, (logits,), eps=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(
        lambda x: scalars(x[:, :, 1:])[0], (oracle.logits_like((2, 3, 8), 2, torch.float64).requires_grad_(),)
    )


@settings(max_examples=40)
@given(data=st.data())
def test_every_gradient_matches_float64(backend, data):
    vocabulary = data.draw(st.one_of(st.integers(1, 80), st.sampled_from([1000, 4095, 4097, 9001, 50257, 131073])))
    shape = data.draw(st.sampled_from([(1,), (4,), (2, 2), (1, 1, 2)])) if vocabulary < 20000 else (2,)
    dtype, seed = data.draw(st.sampled_from(oracle.NATIVE)), data.draw(st.integers(0, 10**6))
    logits = oracle.logits_like((*shape, vocabulary), seed, dtype, data.draw(st.sampled_from([0.0, 1.0, 4.0, 25.0])))
    labels = oracle.labels_like(shape, vocabulary, seed, data.draw(st.sampled_from([0.0, 0.4])))
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 0.6, torch.rand(shape) + 0.5])),
        "logit_scale": data.draw(st.sampled_from([1.0, 0.3])),
    }
    upstreams = data.draw(st.sampled_from(UPSTREAMS))
    got = oracle.gradient_of(backend, logits, labels, *upstreams, **options)
    oracle.assert_gradient(got, oracle.logits_gradient(logits, labels, *upstreams, **options), dtype)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("upstreams", UPSTREAMS)
@pytest.mark.parametrize("spread", [3.0, 40.0])
def test_the_gradient_goes_through_the_cap(backend, upstreams, spread, dtype):
    """Far into saturation too."""
    logits, labels = oracle.logits_like((4, 1003), 1, dtype, spread), oracle.labels_like((4,), 1003, 2, 0.2)
    options = {"logit_softcap": 15.0, "temperature": 0.8}
    got = oracle.gradient_of(backend, logits, labels, *upstreams, **options)
    want = oracle.logits_gradient(logits, labels, *upstreams, **options)
    oracle.assert_gradient(got, want, dtype)


@pytest.mark.parametrize("vocabulary", [3, 200, 4100])
def test_off_label_gradients_keep_relative_precision(backend, vocabulary):
    """p_j from 1 to 1e-30, whatever the label's own probability is."""
    logits = torch.linspace(-65.0, 0.0, vocabulary).repeat(3, 1)
    labels = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    got = oracle.gradient_of(backend, logits, labels, 1.0)
    want = oracle.logits_gradient(logits, labels, 1.0).value
    oracle.assert_close(got, want, oracle.RELATIVE, name="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_rounded_once_to_nearest(backend, dtype):
    """Twice, or by cutting off, moves more than one element in a thousand off the nearest number."""
    logits, labels = oracle.logits_like((6, 4099), 1, dtype, 2.0), oracle.labels_like((6,), 4099, 2)
    for upstream in (1.0, 3000.0):
        got = oracle.gradient_of(backend, logits, labels, upstream).double().numpy()
        want = oracle.logits_gradient(logits, labels, upstream).value
        nearest = torch.from_numpy(want).to(dtype).double().numpy()
        assert (got != nearest).mean() < 2e-3
        assert abs(np.mean(np.sign(got - want))) < 0.05  # as often up as down


def test_upstream_gradients_scale_each_row_by_its_own(backend):
    logits, labels = oracle.logits_like((2, 3, 501), 1), oracle.labels_like((2, 3), 501, 2)
    scale = torch.tensor([[1.0, 0.0, -2.5], [65536.0, 1e-6, 1.0]])
    for upstreams in ((scale, None), (None, scale), (scale, scale.flip(1))):
        got = oracle.gradient_of(backend, logits, labels, *upstreams)
        oracle.assert_gradient(got, oracle.logits_gradient(logits, labels, *upstreams), torch.float32)
    assert (oracle.gradient_of(backend, logits, labels, scale)[1] == 0).all()


def test_sums_of_losses_accumulate(backend):
    device = oracle.device_of(backend)
    leaf = oracle.logits_like((4, 100), 1).to(device).requires_grad_()
    labels = oracle.labels_like((4,), 100, 2)
    for factor in (1.0, -0.25):
        out = oracle.run(backend, leaf, None, None, labels)
        (factor * out.logprobs.mean() + 0.01 * factor * out.entropy.mean()).backward()
    want = oracle.logits_gradient(leaf, labels, 0.75 / 4, 0.0075 / 4)
    oracle.assert_gradient(leaf.grad.cpu(), want, torch.float32, relative=3e-5)


def test_a_sliced_view_gives_the_whole_tensor_its_gradient(backend):
    device = oracle.device_of(backend)
    leaf = oracle.logits_like((2, 6, 303), 1, torch.bfloat16).to(device).requires_grad_()
    labels = oracle.labels_like((2, 5), 303, 2)
    out = oracle.run(backend, leaf[:, :-1], None, None, labels)
    out.logprobs.sum().backward()
    want = oracle.logits_gradient(leaf[:, :-1].detach(), labels, 1.0)
    oracle.assert_gradient(leaf.grad[:, :-1].reshape(10, 303).cpu(), want, torch.bfloat16)
    assert (leaf.grad[:, -1] == 0).all()


@pytest.mark.parametrize("view", ["transposed", "expanded", "every second row", "flipped batch", "four dimensions"])
def test_any_leading_strides_are_taken_as_they_are(backend, view):
    base = oracle.logits_like((4, 6, 130), 1).to(oracle.device_of(backend))
    views = {
        "transposed": lambda x: x.transpose(0, 1),
        "expanded": lambda x: x[:1].expand(4, 6, 130),
        "every second row": lambda x: x[::2, 1::2],
        "flipped batch": lambda x: x[[3, 1]].transpose(0, 1)[1:],
        "four dimensions": lambda x: x.view(2, 2, 6, 130).permute(2, 0, 1, 3),
    }
    leaf = base.clone().requires_grad_()
    policy, positive = views[view](leaf), views[view](base * 0.5)
    labels = oracle.labels_like(tuple(policy.shape[:-1]), 130, 2, 0.1)
    got = oracle.run(backend, policy, positive, None, labels, torch.ones(()))
    packed = oracle.run(backend, policy.detach().contiguous(), positive.contiguous(), None, labels, torch.ones(()))
    for name, value in got._asdict().items():
        oracle.assert_same_bits(value, getattr(packed, name), name)
    (gradient,) = torch.autograd.grad(got.logprobs.sum(), leaf, retain_graph=True)
    (through_copy,) = torch.autograd.grad(
        policy, leaf, oracle.gradient_of(backend, policy, labels, 1.0).view(policy.shape).to(policy)
    )
    oracle.assert_same_bits(gradient, through_copy, "gradient")


def test_ignored_rows_get_zeros_whatever_they_hold(backend):
    logits, labels = oracle.logits_like((5, 4100), 1), torch.tensor([3, -100, 7, -100, 0])
    logits[labels == -100] = torch.nan
    for upstreams in ((1.0, None), (None, 1.0), (float("nan"), 1.0)):
        gradient = oracle.gradient_of(backend, logits, labels, *upstreams)
        assert (gradient[labels == -100] == 0).all()


def test_only_logprobs_and_entropy_carry_a_gradient(backend):
    device = oracle.device_of(backend)
    policy, positive, negative = (oracle.logits_like((3, 40), s).to(device).requires_grad_() for s in (1, 2, 3))
    advantages = torch.ones(3, device=device, requires_grad=True)
    temperature = torch.ones(3, device=device, requires_grad=True)
    labels = oracle.labels_like((3,), 40, 4)
    got = oracle.run(backend, policy, positive, negative, labels, advantages, temperature=temperature)
    assert [name for name, value in got._asdict().items() if value.requires_grad] == ["logprobs", "entropy"]
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert policy.grad is not None
    assert all(other.grad is None for other in (positive, negative, advantages, temperature))
    frozen = oracle.run(backend, policy.detach(), positive, None, labels, advantages)
    assert not any(value.requires_grad for value in frozen)
    with torch.no_grad():
        assert not oracle.run(backend, policy, None, None, labels).logprobs.requires_grad
    rlsd = oracle.run(backend, policy, positive.detach(), None, labels, advantages)
    assert not rlsd.negative_logprobs.requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_raises(backend, inplace):
    leaf = oracle.logits_like((3, 40), 1).to(oracle.device_of(backend)).requires_grad_()
    out = oracle.run(backend, leaf * 1.0, None, None, oracle.labels_like((3,), 40, 2), inplace_grad=inplace)

    def second_derivative():
        (gradient,) = torch.autograd.grad(out.logprobs.sum(), leaf, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="first-order gradients only"):
        second_derivative()


class TestInPlace:
    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("vocabulary", [1, 77, 4097, 9001])
    def test_the_gradient_is_the_same_and_lies_over_the_logits(self, backend, vocabulary, dtype):
        values = oracle.logits_like((2, 3, vocabulary), 1, dtype)
        labels = oracle.labels_like((2, 3), vocabulary, 2, 0.3)
        values[0, 0], labels[0, 0] = torch.nan, -100
        upstreams = torch.rand(2, 3), torch.rand(2, 3)
        want = oracle.gradient_of(backend, values, labels, *upstreams).view(2, 3, vocabulary)
        leaf = values.to(oracle.device_of(backend)).requires_grad_()
        logits, seen = leaf * 1, []
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
        out = oracle.run(backend, logits, None, None, labels, inplace_grad=True)
        version = logits._version
        torch.autograd.backward([out.logprobs, out.entropy], [u.to(out.logprobs) for u in upstreams])
        oracle.assert_same_bits(leaf.grad, want, "gradient")
        assert seen == [logits.data_ptr()]
        assert logits._version > version
        oracle.assert_same_bits(logits.detach(), want, "logits")

    def test_the_forward_leaves_the_logits_alone(self, backend):
        leaf = oracle.logits_like((3, 40), 1).to(oracle.device_of(backend)).requires_grad_()
        logits = leaf * 1
        plain = oracle.run(backend, logits, None, None, oracle.labels_like((3,), 40, 2))
        out = oracle.run(backend, logits, None, None, oracle.labels_like((3,), 40, 2), inplace_grad=True)
        oracle.assert_same_bits(out.logprobs, plain.logprobs)
        oracle.assert_same_bits(logits, leaf)

    def test_leaves_expanded_and_shared_logits_are_refused(self, backend):
        base = oracle.logits_like((4, 50), 1).to(oracle.device_of(backend)).requires_grad_()
        labels = oracle.labels_like((4,), 50, 2)
        with pytest.raises(ValueError, match="leaf"):
            oracle.run(backend, base, None, None, labels, inplace_grad=True)
        with pytest.raises(ValueError, match="a view of a leaf"):
            oracle.run(backend, base[1:], None, None, labels[1:], inplace_grad=True)
        with pytest.raises(ValueError, match="expanded"):
            oracle.run(backend, (base * 1)[:1].expand(4, 50), None, None, labels, inplace_grad=True)
        with pytest.raises(ValueError, match="share memory"):
            oracle.run(backend, (base * 1).as_strided((4, 50), (20, 1)), None, None, labels, inplace_grad=True)
        whole = base * 1
        for teachers, name in (((whole, None), "positive_logits"), ((None, whole.detach()), "negative_logits")):
            with pytest.raises(ValueError, match=name):
                oracle.run(backend, whole, *teachers, labels, inplace_grad=True)
        with pytest.raises(ValueError, match="positive_logits"):
            oracle.run(backend, whole[:3], whole.detach()[1:], None, labels[:3], inplace_grad=True)
        oracle.run(backend, whole[:2], whole.detach()[2:], None, labels[:2], inplace_grad=True)  # neighbours only

    def test_without_a_gradient_there_is_nothing_to_refuse(self, backend):
        logits = oracle.logits_like((4, 50), 1)
        oracle.run(backend, logits, logits, None, oracle.labels_like((4,), 50, 2), inplace_grad=True)

    def test_a_second_backward_raises(self, backend):
        leaf = oracle.logits_like((4, 50), 1).to(oracle.device_of(backend)).requires_grad_()
        loss = oracle.run(
            backend, leaf * 1, None, None, oracle.labels_like((4,), 50, 2), inplace_grad=True
        ).logprobs.sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError):
            loss.backward()

    def test_whoever_else_kept_the_logits_is_told(self, backend):
        leaf = oracle.logits_like((4, 50), 1).to(oracle.device_of(backend)).requires_grad_()
        logits = leaf * 1
        other = logits.square().sum()  # keeps the logits for its own backward
        out = oracle.run(backend, logits, None, None, oracle.labels_like((4,), 50, 2), inplace_grad=True)
        out.logprobs.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_both_ops_take_it(self, backend):
        labels = oracle.labels_like((4,), 50, 2)
        leaf = oracle.logits_like((4, 50), 1).to(oracle.device_of(backend)).requires_grad_()
        logits = leaf * 1
        cepo_kernels.token_logprobs(
            logits, oracle.place(backend, labels), inplace_grad=True, backend=backend
        ).logprobs.sum().backward()
        oracle.assert_same_bits(leaf.grad, oracle.gradient_of(backend, leaf, labels, 1.0), "gradient")
