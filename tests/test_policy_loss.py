"""`contrastive_policy_loss`: the loss and gradient of the unfused composition, in one pass."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

import cepo_kernels
from cepo_kernels import contrastive_logprobs, contrastive_policy_loss, token_logprobs

pytestmark = pytest.mark.usefixtures("poisoned")

SURROGATES = ("ppo", "cispo")
TERMS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.3, -0.05)]  # kl_coef, entropy_coef
ROWS = 12


def inputs(dtype=torch.float32, vocabulary=900, shape=(ROWS,)):
    """Logits, labels, advantages with zeros; old, weight and reference log-probs so that ratios fall everywhere."""
    policy, positive, negative = (oracle.logits_like((*shape, vocabulary), seed, dtype) for seed in (1, 2, 3))
    labels = oracle.labels_like(shape, vocabulary, 4, 0.2)
    advantages = oracle.logits_like(shape, 5)
    advantages.view(-1)[::4] = 0.0
    own = torch.from_numpy(oracle.logprobs(policy, labels)).float().reshape(shape)
    rows = {
        "old_logprobs": own + oracle.logits_like(shape, 6, spread=0.4),
        "token_weight": oracle.logits_like(shape, 7).abs(),
        "ref_logprobs": own + oracle.logits_like(shape, 8, spread=0.5),
    }
    return (policy, positive, negative, labels, advantages), rows


def expected(
    tensors, old_logprobs=None, token_weight=1.0, ref_logprobs=0.0, surrogate="ppo", clip_low=0.2, clip_high=0.28,
    kl_coef=0.0, entropy_coef=0.0, denominator=None, **options,
):  # fmt: skip
    """Loss, ratio, clipped and the gradient, in float64, from the formulas."""
    labels, group = tensors[3], oracle.array(tensors[4], tuple(tensors[3].shape))
    shape = tuple(labels.shape)
    forward = oracle.contrastive(*tensors, **options)
    scored = labels.reshape(-1).numpy() != options.get("ignore_index", -100)
    active = scored & ((group != 0) | (kl_coef != 0) | (entropy_coef != 0))
    own, token = forward.logprobs, forward.advantages
    ratio = np.exp(own - (own if old_logprobs is None else oracle.array(old_logprobs, shape)))
    weight = oracle.array(token_weight, shape)
    bounded = ratio.clip(1 - clip_low, 1 + clip_high)
    if surrogate == "ppo":
        clipped = bounded * token < ratio * token
        losses, slope = -weight * np.minimum(ratio * token, bounded * token), -weight * token * ratio * ~clipped
    else:
        clipped = bounded != ratio
        losses, slope = -weight * bounded * token * own, -weight * bounded * token
    gap = oracle.array(ref_logprobs, shape) - own
    losses = losses + kl_coef * (np.exp(gap) - 1 - gap) - entropy_coef * forward.entropy
    slope = slope + kl_coef * (1 - np.exp(gap))
    count = denominator or max(1, scored.sum())
    gradient = oracle.logits_gradient(
        tensors[0], labels, torch.from_numpy(np.where(active, slope, 0.0) / count).reshape(shape),
        torch.from_numpy(np.where(active, -entropy_coef, 0.0) / count).reshape(shape),
        **{name: value for name, value in options.items() if name not in ("lam", "eps_w", "negative_mask")},
    )  # fmt: skip
    return np.where(active, losses, 0.0).sum() / count, np.where(active, ratio, 0.0), clipped & active, gradient


def run(backend, tensors, upstream=1.0, **options):
    """The call's result and the gradient (N, V) in the policy's dtype, on the backend's device."""
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)
    policy = policy.detach().requires_grad_()
    options = {name: oracle.place(backend, value) for name, value in options.items()}
    fed = policy * 1.0 if options.get("inplace_grad") else policy
    out = contrastive_policy_loss(fed, *others, backend=backend, **options)
    (out.loss * upstream).backward()
    return out, policy.grad.reshape(-1, policy.shape[-1]).cpu()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_it_is_the_formula(backend, dtype, terms, surrogate):
    tensors, rows = inputs(dtype)
    options = {"surrogate": surrogate, "kl_coef": terms[0], "entropy_coef": terms[1], **rows}
    loss, ratio, clipped, gradient = expected(tensors, **options)
    out, got = run(backend, tensors, **options)
    assert out.loss.shape == ()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    oracle.assert_close(out.ratio, ratio, 1e-5, name="ratio")
    assert out.clipped.cpu().tolist() == clipped.tolist()
    assert 0 < clipped.sum() < ROWS
    # In float16 the denominator's power of two comes after the rounding.
    oracle.assert_gradient(got, gradient, dtype, 3e-5, roundings=2 if dtype == torch.float16 else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "logit_scale": 1.5, "lam": 1.0, "eps_w": 0.9},
        {"logit_softcap": 8.0, "entropy_coef": 0.01},
        {"denominator": 37.0, "clip_low": 0.0, "clip_high": 0.0},
        {"temperature": torch.linspace(0.5, 2.0, ROWS)},
        {"negative_mask": torch.arange(ROWS) % 3 > 0},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_options(backend, options):
    tensors, rows = inputs()
    labels = tensors[3].clamp(min=0).index_fill(0, torch.tensor([2, 5]), 3)
    tensors = (*tensors[:3], labels, tensors[4])
    loss, _, _, gradient = expected(tensors, **options, **rows)
    out, got = run(backend, tensors, **options, **rows)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    oracle.assert_gradient(got, gradient, torch.float32, 3e-5)


def test_coefficients_may_be_tensors(backend):
    tensors, rows = inputs()
    numbers = {"kl_coef": 0.3, "entropy_coef": -0.05}
    out, gradient = run(backend, tensors, **numbers, **rows)
    again, got = run(
        backend, tensors, **{name: torch.full((), x, dtype=torch.float64) for name, x in numbers.items()}, **rows
    )
    oracle.assert_same_bits(again.loss, out.loss, "loss")
    oracle.assert_same_bits(got, gradient, "gradient")


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 4095, 4097, 50_257])
@pytest.mark.parametrize("teachers", ["both", "positive", "none"])
def test_any_vocabulary_and_teachers(backend, vocabulary, teachers):
    tensors, rows = inputs(vocabulary=vocabulary, shape=(5,))
    positive, negative = tensors[1] if teachers != "none" else None, tensors[2] if teachers == "both" else None
    tensors = (tensors[0], positive, negative, *tensors[3:])
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, **rows}
    loss, _, _, gradient = expected(tensors, **options)
    out, got = run(backend, tensors, **options)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    oracle.assert_gradient(got, gradient, torch.float32, 3e-5)
    assert (out.credit.evidence is None) == (positive is None)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("entropy", [False, True])
def test_on_policy_the_ratio_is_exactly_one(backend, dtype, entropy):
    """Old log-probs from any op have the bits of this one's."""
    (policy, *teachers, labels, _), _ = inputs(dtype)
    advantages = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, -1.0)
    placed = [oracle.place(backend, tensor) for tensor in (policy, *teachers, labels)]
    olds = {
        "none": None,
        "token_logprobs": token_logprobs(placed[0], placed[3], backend=backend).logprobs,
        "contrastive_logprobs": contrastive_logprobs(*placed, backend=backend, return_entropy=True).logprobs,
    }
    for old in olds.values():
        out, gradient = run(
            backend, (policy, *teachers, labels, advantages), old_logprobs=old, return_entropy=entropy, clip_low=0.0,
            clip_high=0.0,
        )  # fmt: skip
        assert torch.equal(out.ratio.cpu(), (labels != -100).float())
        assert not out.clipped.any()
        assert bool(gradient[labels != -100].ne(0).any(1).all())


def test_what_it_returns_has_the_bits_of_contrastive_logprobs(backend):
    tensors, rows = inputs()
    tensors = (*tensors[:4], torch.where(tensors[4] == 0, 0.5, tensors[4]))
    out, _ = run(backend, tensors, return_entropy=True, **rows)
    for name, value in oracle.run(backend, *tensors)._asdict().items():
        oracle.assert_same_bits(getattr(out.credit, name), value, name)


@pytest.mark.parametrize("in_place", [False, True])
def test_idle_and_ignored_rows_are_not_read(backend, in_place):
    """NaN in every tensor of such a row reaches nothing, and its gradient is zeros."""
    tensors, rows = inputs()
    labels, advantages = tensors[3], tensors[4]
    idle = (labels == -100) | (advantages == 0)
    assert 0 < idle.sum() < ROWS
    clean, clean_gradient = run(backend, tensors, **rows)
    broken = tuple(tensor.masked_fill(idle[:, None], math.nan) for tensor in tensors[:3])
    broken_rows = {name: value.masked_fill(idle, math.nan) for name, value in rows.items()}
    out, gradient = run(backend, (*broken, labels, advantages), inplace_grad=in_place, **broken_rows)
    oracle.assert_same_bits(out.loss, clean.loss, "loss")
    oracle.assert_same_bits(gradient, clean_gradient, "gradient")
    assert not gradient[idle].any()
    for value in (*out.credit, out.ratio, out.clipped):
        assert value is None or not value.cpu()[idle].any()


def test_a_kl_or_entropy_term_acts_on_rows_without_advantage(backend):
    tensors, rows = inputs()
    rows_at_zero = (tensors[3] != -100) & (tensors[4] == 0)
    for term in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}):
        out, gradient = run(backend, tensors, **term, **rows)
        assert bool(gradient[rows_at_zero].ne(0).any(1).all())
        assert bool(out.credit.logprobs.cpu()[rows_at_zero].lt(0).all())


def test_a_clipped_row_gets_zeros_only_from_ppo(backend):
    """Far out on either side, for either sign."""
    (policy, _, _, labels, _), _ = inputs(shape=(4,))
    labels = labels.clamp(min=0)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    own = torch.from_numpy(oracle.logprobs(policy, labels)).float()
    old = own - torch.tensor([2.0, -2.0, 2.0, -2.0])
    out, gradient = run(backend, (policy, None, None, labels, advantages), old_logprobs=old)
    assert out.clipped.tolist() == [True, False, False, True]
    assert gradient.ne(0).any(1).tolist() == [False, True, True, False]
    out, gradient = run(backend, (policy, None, None, labels, advantages), old_logprobs=old, surrogate="cispo")
    assert out.clipped.all()
    assert bool(gradient.ne(0).any(1).all())


def test_a_broken_row_stays_alone(backend):
    tensors, rows = inputs()
    active = int(((tensors[3] != -100) & (tensors[4] != 0)).nonzero()[0])
    policy = tensors[0].clone()
    policy[active, 7] = math.inf
    _, clean = run(backend, tensors, **rows)
    out, gradient = run(backend, (policy, *tensors[1:]), **rows)
    assert out.loss.isnan()
    assert gradient[active].isnan().all()
    others = torch.arange(ROWS) != active
    oracle.assert_same_bits(gradient[others], clean[others], "gradient")


@pytest.mark.parametrize("upstream", [1.0, 65536.0, -0.25, 0.0])
def test_what_comes_from_above_scales_the_gradient(backend, upstream):
    tensors, rows = inputs()
    _, plain = run(backend, tensors, **rows)
    _, scaled = run(backend, tensors, upstream=upstream, **rows)
    torch.testing.assert_close(scaled, plain * upstream, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["plain", "in place", "compiled"])
def test_in_float16_a_loss_scale_saves_the_gradient_from_the_denominator(backend, how):
    """As for the unfused composition, which sees the scale before it rounds."""
    torch._dynamo.reset()
    tensors, _ = inputs(torch.float16, 2000)
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)

    def composed(logits):
        out = contrastive_logprobs(logits, *others, backend=backend)
        return -(out.logprobs * out.advantages).sum() / 8192.0

    def fused(logits):
        options = {"denominator": 8192.0, "inplace_grad": how == "in place", "backend": backend}
        return contrastive_policy_loss(logits * 1.0, *others, **options).loss

    if how == "compiled":
        fused = torch.compile(fused, fullgraph=True, backend="aot_eager")
    credited = torch.from_numpy(oracle.contrastive(*tensors).advantages)
    want = torch.from_numpy(oracle.logits_gradient(tensors[0], tensors[3], -credited * 65536.0 / 8192.0).value)
    errors = []
    for step in (composed, fused):
        leaf = policy.detach().requires_grad_()
        loss = step(leaf)
        (loss * 65536.0).backward()
        errors.append(float((leaf.grad.cpu().double() - want).norm()))
    assert loss.item() == pytest.approx(-float(credited.sum()) / 8192.0, rel=1e-5)
    assert errors[1] <= 1.01 * errors[0]


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_in_place_has_the_same_bits(backend, dtype):
    tensors, rows = inputs(dtype)
    out, gradient = run(backend, tensors, entropy_coef=0.01, **rows)
    again, written = run(backend, tensors, entropy_coef=0.01, inplace_grad=True, **rows)
    oracle.assert_same_bits(again.loss, out.loss, "loss")
    oracle.assert_same_bits(written, gradient, "gradient")


def test_in_place_says_so_to_whoever_saved_the_logits(backend):
    (policy, positive, negative, labels, advantages), _ = inputs()
    leaf = policy.requires_grad_()
    logits = leaf.exp()  # its backward reads its result
    out = contrastive_policy_loss(logits, positive, negative, labels, advantages, inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    with pytest.raises(ValueError, match="inplace_grad: policy_logits is a leaf"):
        contrastive_policy_loss(leaf, positive, negative, labels, advantages, inplace_grad=True)
    logits = leaf * 1.0
    with pytest.raises(ValueError, match="shares memory with positive_logits"):
        contrastive_policy_loss(logits, logits, negative, labels, advantages, inplace_grad=True)


@pytest.mark.parametrize("how", ["a product", "another loss"])
def test_a_gradient_that_was_written_over_is_refused(backend, how):
    (policy, *others), _ = inputs()
    policy, *others = (oracle.place(backend, tensor) for tensor in (policy, *others))
    logits = policy.requires_grad_() * 1.0
    out = contrastive_policy_loss(logits, *others, inplace_grad=True, backend=backend)
    if how == "a product":
        logits.mul_(3.0)
    else:
        contrastive_policy_loss(logits, *others, inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"policy_logits.* modified by an inplace operation"):
        out.loss.backward()


def test_a_second_backward_raises(backend):
    tensors, _ = inputs()
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)
    out = contrastive_policy_loss(policy.requires_grad_(), *others, backend=backend)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward took the gradient"):
        out.loss.backward()


def test_only_the_loss_is_differentiable(backend):
    tensors, rows = inputs()
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)
    rows = {name: oracle.place(backend, value) for name, value in rows.items()}
    out = contrastive_policy_loss(policy.requires_grad_(), *others, **rows, return_entropy=True, backend=backend)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in (*out.credit, out.ratio, out.clipped))
    with torch.no_grad():
        quiet = contrastive_policy_loss(policy, *others, **rows, backend=backend)
    assert not quiet.loss.requires_grad
    oracle.assert_same_bits(quiet.loss, out.loss, "loss")


@pytest.mark.parametrize("view", ["sliced", "four dimensions", "transposed"])
def test_any_leading_shape_and_stride(backend, view):
    vocabulary = 301
    tensors, _ = inputs(vocabulary=vocabulary, shape=(2, 3, 2, 5))
    policy, positive, negative, labels, advantages = tensors
    if view == "sliced":
        policy = torch.nn.functional.pad(policy, (0, 0, 0, 3))[..., :-3, :]
    elif view == "transposed":
        policy = policy.transpose(0, 2).contiguous().transpose(0, 2)
    flat = [tensor.reshape(-1, *tensor.shape[4:]) for tensor in tensors]
    want, want_gradient = run(backend, flat)
    leaf = oracle.place(backend, policy).detach().requires_grad_()
    out = contrastive_policy_loss(
        leaf, *(oracle.place(backend, tensor) for tensor in (positive, negative, labels, advantages)), backend=backend
    )
    out.loss.backward()
    assert out.ratio.shape == labels.shape == out.credit.weight.shape
    oracle.assert_same_bits(out.ratio.reshape(-1), want.ratio, "ratio")
    oracle.assert_same_bits(leaf.grad.reshape(-1, vocabulary).cpu(), want_gradient, "gradient")


def test_a_value_for_each_rollout_is_broadcast(backend):
    tensors, _ = inputs(shape=(3, 4))
    per_rollout, weight = torch.tensor([[1.0], [-2.0], [0.0]]), torch.tensor([[0.5, 1.0, 2.0, 0.0]])
    out, gradient = run(backend, (*tensors[:4], per_rollout), token_weight=weight)
    full, full_gradient = run(backend, (*tensors[:4], per_rollout.expand(3, 4)), token_weight=weight.expand(3, 4))
    oracle.assert_same_bits(out.loss, full.loss, "loss")
    oracle.assert_same_bits(gradient, full_gradient, "gradient")


def test_no_rows_and_no_scored_rows(backend):
    tensors, _ = inputs()
    nothing, gradient = run(backend, (*tensors[:3], torch.full((ROWS,), -100), tensors[4]))
    assert nothing.loss.item() == 0.0
    assert not gradient.any()
    empty, gradient = run(backend, [tensor[:0] for tensor in tensors])
    assert empty.loss.item() == 0.0
    assert gradient.shape[0] == 0
    assert empty.credit.entropy is None


def test_float64_against_difference_quotients():
    """PPO only: CISPO's bound is a constant to the gradient and not to the quotient."""
    tensors, rows = inputs(torch.float64, 6, (2, 3))
    rows = {name: value.double() for name, value in rows.items()}

    def loss(policy):
        return contrastive_policy_loss(policy, *tensors[1:], kl_coef=0.1, entropy_coef=0.1, lam=0.0, **rows).loss

    leaf = tensors[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    step = 1e-6
    for index in range(leaf.numel()):
        shift = torch.zeros(leaf.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view_as(leaf)
        quotient = (loss(tensors[0] + shift) - loss(tensors[0] - shift)) / (2 * step)
        assert float(gradient.view(-1)[index]) == pytest.approx(float(quotient), abs=1e-8)
    assert gradient.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"surrogate": "gspo"}, ValueError, "surrogate: expected one of ppo, cispo; got 'gspo'; sequence-level"),
        ({"old_logprobs": torch.zeros(2, 1)}, ValueError, r"old_logprobs: expected shape \(2, 3\).*sequence-level"),
        (
            {"old_logprobs": torch.zeros(5)},
            ValueError,
            r"old_logprobs: expected shape \(2, 3\) as labels .*got \(5,\)$",
        ),
        ({"kl_coef": None}, TypeError, "kl_coef: expected a number or a 0-d tensor, got NoneType"),
        ({"return_entropy": "yes"}, TypeError, "return_entropy: expected a bool, got str"),
        ({"inplace_grad": 1}, TypeError, "inplace_grad: expected a bool, got int"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor, got None"),
        ({"advantages": torch.zeros(2)}, ValueError, r"pass advantages\[:, None\]"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected log-probs of the reference policy for kl_coef = 0.1"),
        ({"clip_low": 1.5}, ValueError, r"clip_low: expected a number in \[0, 1\], got 1.5"),
        ({"clip_high": -0.1}, ValueError, "clip_high: expected a number of at least 0, got -0.1"),
        ({"denominator": 0.0}, ValueError, "denominator: expected a positive finite number, got 0.0"),
        (
            {"denominator": torch.ones((), device="meta")},
            ValueError,
            "denominator: expected a 0-d tensor on cpu, got one",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
        ({"ignore_index": 3.5}, TypeError, "ignore_index: expected an int, got 3.5"),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef: expected a finite number, got inf"),
        ({"token_weight": torch.zeros(3)}, ValueError, "token_weight: expected a 0-d tensor or shape"),
        ({"labels": torch.full((2, 3), 99)}, ValueError, "labels: expected -100 or 0 <= label < 11, got 99"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    (policy, positive, negative, labels, advantages), _ = inputs(vocabulary=11, shape=(2, 3))
    call = {"policy_logits": policy, "positive_logits": positive, "negative_logits": negative, "labels": labels,
            "advantages": advantages, **change}  # fmt: skip
    with pytest.raises(error, match=message):
        contrastive_policy_loss(**call)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_compiled_equals_eager_bit_for_bit(backend, compiler, surrogate):
    if compiler == "inductor" and backend not in ("cpu:portable", "triton"):
        pytest.skip("once through a compiler is enough: the op is opaque to it")
    torch._dynamo.reset()
    tensors, rows = inputs(torch.bfloat16)
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)
    rows = {name: oracle.place(backend, value) for name, value in rows.items()}

    def step(policy):
        return contrastive_policy_loss(policy, *others, surrogate=surrogate, kl_coef=0.1, backend=backend, **rows)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaf = policy.detach().requires_grad_()
        out = function(leaf)
        out.loss.backward()
        results.append((out.loss, out.ratio, out.clipped.float(), leaf.grad, out.credit.advantages))
    for eager, compiled in zip(*results, strict=True):
        oracle.assert_same_bits(compiled, eager)


def test_the_op_is_registered_as_torch_wants_it(backend):
    tensors, rows = inputs(vocabulary=65, shape=(4,))
    policy, *others = (oracle.place(backend, tensor) for tensor in tensors)
    old, weight, ref = (oracle.place(backend, value) for value in rows.values())
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.5, 0.2, 0.28, 0.1, 0.01, 4.0, 1.0, 1.0)]
    arguments = (*others, old, weight, ref, None, *numbers, None, -100, "ppo", True)
    torch.library.opcheck(
        torch.ops.cepo_kernels.policy_loss.default, (policy.detach().requires_grad_(), *arguments, True, backend)
    )
    torch.library.opcheck(
        torch.ops.cepo_kernels.policy_loss_.default, (policy.clone(), *arguments, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_it_is_listed():
    assert "contrastive_policy_loss" in cepo_kernels.backend_report().chosen


def test_an_impossible_token_at_the_lowest_bound_adds_nothing(backend):
    """Its ratio is 0, and so is what -inf times that adds."""
    logits = torch.zeros(2, 5)
    logits[0, 3] = -math.inf
    tensors = (logits, None, None, torch.tensor([3, 1]), torch.ones(2))
    old = torch.full((2,), -1.0)
    out, gradient = run(backend, tensors, surrogate="cispo", clip_low=1.0, old_logprobs=old)
    assert out.loss.item() == pytest.approx(0.5 * math.exp(1.0 - math.log(5)) * math.log(5), rel=1e-5)
    assert gradient.isfinite().all()
