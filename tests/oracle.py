"""What the public ops promise, in float64 NumPy, and the bounds that they promise it within.

No formula is shared with the package: a log-prob is minus a chain of `logaddexp` over every column's distance to the
label, the entropy is a plain sum of -p log p pivoted on the largest column, so that no step cancels. Slow and exact;
`test_ops_values` holds it against fifty digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import cepo_kernels

Array = np.ndarray[Any, np.dtype[np.float64]]

RELATIVE = 1e-5  # log p, 1 - p, entropy
LOG_ROUNDING = 2.0**-22  # absolute, of log p_j off the label inside the entropy's gradient: float32's rounding near 1
CAP_ROUNDING = 2.0**-22  # absolute, of the cap's slope 1 - tanh^2
TINY = 2.0**-126  # the smallest normal float32: an output below it may be anything as small
NATIVE = (torch.bfloat16, torch.float16, torch.float32)  # what every backend takes; float64 is the reference's
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (*NATIVE, torch.float64)}
HALF_SUBNORMAL = {dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 for dtype in UNIT_ROUNDOFF}


class Expected(NamedTuple):
    """As `cepo_kernels.ContrastiveLogprobs`, each (N,) float64."""

    logprobs: Array
    positive_logprobs: Array | None
    negative_logprobs: Array
    evidence: Array | None
    weight: Array | None
    advantages: Array | None
    entropy: Array


class Gradient(NamedTuple):
    """A gradient (N, V) and the sum of the magnitudes it is made of, in which its error is measured."""

    value: Array
    magnitude: Array


def device_of(backend: str) -> str:
    return "cuda" if backend.startswith(("triton", "cuda")) and torch.cuda.is_available() else "cpu"


def array(value: Any, shape: tuple[int, ...]) -> Array:
    """A number or tensor as float64, broadcast to ``shape`` and flattened."""
    as_array = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else np.float64(value)
    return np.broadcast_to(as_array, shape).reshape(-1)


def transform(
    logits: Array, temperature: Array, logit_scale: float = 1.0, logit_softcap: float | None = None
) -> tuple[Array, Array]:
    """``cap tanh(scale x / cap) / T`` of (N, V) and its derivative in x."""
    inverse = (1.0 / temperature)[:, None]
    if logit_softcap is None:
        return logits * logit_scale * inverse, np.broadcast_to(logit_scale * inverse, logits.shape)
    inner = logits * logit_scale / logit_softcap
    with np.errstate(over="ignore"):
        slope = logit_scale * inverse / np.cosh(inner) ** 2
    return logit_softcap * np.tanh(inner) * inverse, slope


def impossible(x: Array) -> bool:
    """A row that has no distribution: its results are NaN."""
    return bool(np.isnan(x).any() or (x == np.inf).any() or (x == -np.inf).all())


def log_probability(x: Array, column: int) -> float:
    """``log softmax(x)[column]``, to full relative precision at both ends."""
    if impossible(x):
        return float("nan")
    if x[column] == -np.inf:
        return float("-inf")
    distances = x - x[column]
    distances[[0, column]] = distances[[column, 0]]  # the label's 0 first: the chain grows from it
    return -float(np.logaddexp.reduce(distances))


def entropy(x: Array) -> float:
    """Entropy in nats of ``softmax(x)``."""
    if impossible(x):
        return float("nan")
    top = int(x.argmax())
    log_p = (x - x[top]) + log_probability(x, top)
    p = np.exp(log_p)
    return float(-(p[p > 0] * log_p[p > 0]).sum())


def logprobs(logits: Tensor, labels: Tensor, ignore_index: int = -100, **options: Any) -> Array:
    """(N,) log-probs of (..., V) logits; 0 in ignored rows."""
    x, _ = transformed(logits, labels, **options)
    return np.array([
        0.0 if label == ignore_index else log_probability(row, label)
        for row, label in zip(x, labels.reshape(-1).tolist(), strict=True)
    ])  # fmt: skip


def transformed(logits: Tensor, labels: Tensor, temperature: Any = 1.0, **options: Any) -> tuple[Array, Array]:
    raw = logits.detach().double().cpu().reshape(-1, logits.shape[-1]).numpy()
    return transform(raw, array(temperature, tuple(labels.shape)), **options)


def contrastive(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, labels: Tensor, advantages: Tensor | None = None,
    *, negative_mask: Tensor | None = None, lam: float = 0.5, eps_w: float = 0.5, ignore_index: int = -100,
    **options: Any,
) -> Expected:  # fmt: skip
    """Every output of `cepo_kernels.contrastive_logprobs`."""
    shape = tuple(labels.shape)
    scored = labels.reshape(-1).cpu().numpy() != ignore_index
    options["ignore_index"] = ignore_index
    own = logprobs(policy, labels, **options)
    from_negative = own
    if negative is not None:
        use = np.ones(scored.shape, bool) if negative_mask is None else array(negative_mask, shape) != 0
        from_negative = np.where(use, logprobs(negative, labels, **options), own)
    del options["ignore_index"]
    x, _ = transformed(policy, labels, **options)
    spread = np.array([entropy(row) if keep else 0.0 for row, keep in zip(x, scored, strict=True)])
    group = None if advantages is None else np.where(scored, array(advantages, shape), 0.0)
    if positive is None:
        return Expected(own, None, from_negative, None, None, group, spread)
    from_positive = logprobs(positive, labels, ignore_index=ignore_index, **options)
    evidence, weight, token = credit(from_positive, from_negative, group, lam, eps_w)
    if weight is not None:
        weight = np.where(scored, weight, 0.0)
    return Expected(own, from_positive, from_negative, evidence, weight, token, spread)


def credit(
    positive: Array, negative: Array, advantages: Array | None, lam: float, eps_w: float
) -> tuple[Array, Array | None, Array | None]:
    """Evidence, weight and token advantage, case by case as the contract states them."""
    with np.errstate(invalid="ignore"):
        evidence = np.where(np.isneginf(positive) & np.isneginf(negative), 0.0, positive - negative)
    if advantages is None:
        return evidence, None, None
    with np.errstate(over="ignore", invalid="ignore"):
        weight = np.where(advantages == 0, 1.0, np.exp(np.sign(advantages) * evidence).clip(1 - eps_w, 1 + eps_w))
        token = np.where(advantages == 0, 0.0, advantages * ((1 - lam) + lam * weight))
    return evidence, weight, token


def logits_gradient(
    logits: Tensor, labels: Tensor, grad_logprobs: Any = None, grad_entropy: Any = None, *, ignore_index: int = -100,
    **options: Any,
) -> Gradient:  # fmt: skip
    """Gradient of ``sum(grad_logprobs * logprobs + grad_entropy * entropy)`` in the logits as stored."""
    x, slope = transformed(logits, labels, **options)
    shape = tuple(labels.shape)
    value, magnitude = np.zeros_like(x), np.zeros_like(x)
    for row, label in enumerate(labels.reshape(-1).tolist()):
        if label == ignore_index:
            continue
        if impossible(x[row]):
            value[row] = magnitude[row] = np.nan
            continue
        top = int(x[row].argmax())
        log_p = (x[row] - x[row, top]) + log_probability(x[row], top)
        p = np.exp(log_p)
        if grad_logprobs is not None:
            upstream = array(grad_logprobs, shape)[row]
            one = -p
            one[label] = -np.expm1(log_probability(x[row], label))
            value[row] += upstream * one
            magnitude[row] += np.abs(upstream * one)
        if grad_entropy is not None:
            upstream = array(grad_entropy, shape)[row]
            spread = entropy(x[row])
            with np.errstate(invalid="ignore"):
                value[row] -= upstream * np.where(p > 0, p * (log_p + spread), 0.0)
                size = np.abs(log_p) + spread + LOG_ROUNDING / RELATIVE
                magnitude[row] += np.abs(upstream) * np.where(p > 0, p * size, 0.0)
    # Where a cap saturates, 1 - tanh^2 has float32's absolute precision, not its relative one.
    capped = options.get("logit_softcap") is not None
    free = array(1.0 / options.get("temperature", 1.0), shape)[:, None] * options.get("logit_scale", 1.0)
    return Gradient(value * slope, magnitude * (np.abs(slope) + capped * free * CAP_ROUNDING / RELATIVE))


# --- running a backend, and the bounds -------------------------------------------------------------------------------


def place(backend: str, value: Any) -> Any:
    return value.to(device_of(backend)) if isinstance(value, Tensor) and value.ndim else value


def run(
    backend: str, policy: Tensor, positive: Any, negative: Any, labels: Tensor, advantages: Any = None, **options: Any
):  # type: ignore[no-untyped-def]
    """`contrastive_logprobs` on the backend's device; entropy asked for unless told otherwise."""
    tensors = [place(backend, tensor) for tensor in (policy, positive, negative, labels, advantages)]
    options = {"return_entropy": True, **{name: place(backend, value) for name, value in options.items()}}
    return cepo_kernels.contrastive_logprobs(*tensors, backend=backend, **options)


def gradient_of(
    backend: str, logits: Tensor, labels: Tensor, grad_logprobs: Any = None, grad_entropy: Any = None, **options: Any
) -> Tensor:
    """The gradient that `token_logprobs` gives, in the logits' dtype, shape (N, V)."""
    leaf = place(backend, logits.detach()).requires_grad_()
    wants = grad_entropy is not None
    out = cepo_kernels.token_logprobs(
        leaf, place(backend, labels), return_entropy=wants, backend=backend,
        **{name: place(backend, value) for name, value in options.items()},
    )  # fmt: skip
    pairs = [(out.logprobs, grad_logprobs), (out.entropy, grad_entropy)]
    outputs = [output for output, upstream in pairs if upstream is not None]
    upstreams = [
        torch.as_tensor(upstream, dtype=output.dtype, device=output.device).expand(output.shape)
        for output, upstream in pairs
        if upstream is not None
    ]
    (gradient,) = torch.autograd.grad(outputs, leaf, upstreams)
    return gradient.reshape(-1, gradient.shape[-1]).cpu()


def assert_close(got: Tensor, want: Array, relative: float, absolute: Any = TINY, name: str = "") -> None:
    """Every element within ``absolute + relative |want|``; NaN and infinities where expected and nowhere else."""
    actual = got.detach().double().cpu().reshape(want.shape).numpy()
    finite = np.isfinite(want)
    same = np.where(np.isnan(want), np.isnan(actual), actual == want)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - want)
        excess = error - (relative * np.abs(want) + absolute)
    bad = np.where(finite, ~(excess <= 0), ~same)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        allowed = np.broadcast_to(relative * np.abs(want) + absolute, want.shape)
        worst = float(np.nanmax(np.where(bad & finite, error / allowed, 0.0)))
        raise AssertionError(
            f"{name}{list(first)}: got {actual[first]!r}, want {want[first]!r}; {int(bad.sum())} of {bad.size} wrong, "
            f"up to {worst:.3g} times the bound"
        )


def assert_forward(got: Any, want: Expected, but: tuple[str, ...] = ()) -> None:
    """All outputs, ``but`` those named, within the numerics contract."""
    for name in {"logprobs", "positive_logprobs", "negative_logprobs", "entropy"}.difference(but):
        value, expected = getattr(got, name), getattr(want, name)
        if value is None:
            assert expected is None or name == "entropy", f"{name} is missing"
            continue
        assert_close(value, expected, RELATIVE, name=name)
    for name, relative, absolute in (
        ("evidence", 2.0**-24, 4e-6),
        ("weight", 5e-6, 0.0),
        ("advantages", 5e-6, 1e-44),
    ):
        value, expected = getattr(got, name), getattr(want, name)
        assert (value is None) == (expected is None), f"{name}: {'missing' if value is None else 'not asked for'}"
        if value is not None:
            assert_close(value, expected, relative, absolute, name=name)


def assert_gradient(
    got: Tensor, want: Gradient, dtype: torch.dtype, relative: float = RELATIVE, roundings: int = 1
) -> None:
    """Within ``relative`` of its terms' magnitudes, then rounded once to ``dtype``, subnormals ``roundings`` times."""
    assert got.dtype == dtype
    allowed = relative * want.magnitude + UNIT_ROUNDOFF[dtype] * np.abs(want.value) * (1 + 2 * relative)
    allowed = allowed + HALF_SUBNORMAL[dtype] * roundings + 1e-33  # p = 1e-30 is where the contract's range ends
    largest = torch.finfo(dtype).max
    clipped = np.where(np.abs(want.value) > largest, np.copysign(np.inf, want.value), want.value)
    assert_close(got, clipped, 0.0, allowed, name="gradient")


def bits(tensor: Tensor | None) -> Tensor | None:
    """Something that `torch.equal` compares bit by bit, NaN and signed zeros included."""
    if tensor is None:
        return None
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(width).cpu()


def assert_same_bits(got: Tensor | None, want: Tensor | None, name: str = "") -> None:
    if got is None or want is None:
        assert got is want, f"{name}: {'missing' if got is None else 'not expected'}"
        return
    assert got.shape == want.shape, f"{name}: shapes {tuple(got.shape)} and {tuple(want.shape)}"
    differ = bits(got) != bits(want)
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {differ.numel()} differ, first {got.cpu()[differ][0]!r} "
        f"for {want.cpu()[differ][0]!r}"
    )


def logits_like(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, spread: float = 3.0, offset: float = 0.0
) -> Tensor:
    """Normal logits of the given spread around ``offset``, rounded to ``dtype``; the seed decides everything."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + offset).to(dtype)


def labels_like(shape: tuple[int, ...], vocabulary: int, seed: int, ignored: float = 0.0) -> Tensor:
    """Uniform labels; the share ``ignored`` of them -100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
