"""What `divergence` promises, by the textbook's formulas in extended precision, and the bounds it promises it within.

The plain sum of p log(p / q) cancels where the rows are nearly equal; with 64 bits of mantissa that leaves eight digits
of a divergence of 1e-10. `test_divergence` holds it against fifty digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor

import cepo_kernels

Wide = np.longdouble

KINDS = ("forward_kl", "reverse_kl", "jsd")
VARIANTS = [{"kind": kind} for kind in KINDS] + [{"kind": "jsd", "beta": beta} for beta in (0.01, 0.3, 0.9, 0.0, 1.0)]
CUTS = [{}, {"clip": 0.02}, {"top_k": 20}, {"top_k": 20, "clip": 0.01}]
ROWS = 6


def pair(dtype=torch.float32, vocabulary=900, shape=(ROWS,), gap=1.5, seed=1, offset=0.0):
    """A student, and a teacher whose logits differ from it by about ``gap``."""
    student = oracle.logits_like((*shape, vocabulary), seed, torch.float64)
    teacher = student + oracle.logits_like((*shape, vocabulary), seed + 1, torch.float64, gap, offset)
    return student.to(dtype), teacher.to(dtype)


def row(
    student: Any, teacher: Any, kind: str = "forward_kl", beta: float = 0.5, clip: float | None = None,
    top_k: int | None = None, order: Any = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Of one row of transformed logits: value, the size of what was summed, the gradient, and of what that is made."""
    student, teacher = np.asarray(student, Wide), np.asarray(teacher, Wide)
    if max(abs(x[np.isfinite(x)]).max(initial=0) for x in (student, teacher)) > 1e12:
        # From their tops, or the logarithm of a sum would lose it all.
        student, teacher = (x - (x.max() if np.isfinite(x.max()) else 0) for x in (student, teacher))
    if oracle.impossible(student) or oracle.impossible(teacher):
        return np.nan, np.nan, np.full(student.shape, np.nan), np.full(student.shape, np.nan)
    if top_k is not None and top_k < student.size - 1:
        chosen = np.argsort(-np.asarray(order, np.float64), kind="stable")[:top_k]
        rest = np.setdiff1d(np.arange(student.size), chosen)
        tails = [np.logaddexp.reduce(x[rest]) for x in (student, teacher)]
        entries = [np.append(x[chosen], tail) for x, tail in zip((student, teacher), tails, strict=True)]
        value, size, found, made = row(*entries, kind, beta, clip)
        gradient, magnitude = np.zeros(student.shape), np.zeros(student.shape)
        gradient[chosen], magnitude[chosen] = found[:-1], made[:-1]
        share = np.exp(student[rest] - student[rest].max()) if np.isfinite(tails[0]) else np.zeros(rest.shape)
        share = share / max(share.sum(), 1)
        gradient[rest], magnitude[rest] = share * found[-1], share * made[-1]
        return value, size, gradient, magnitude
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_q, log_p = (x - np.logaddexp.reduce(x) for x in (student, teacher))
        q, p = np.exp(log_q), np.exp(log_p)
        if kind == "jsd":
            log_m = np.logaddexp(log_p + np.log(Wide(beta)), log_q + np.log1p(-Wide(beta)))
            of_p, of_q = (np.where(x > 0, x * (log_x - log_m), 0) for x, log_x in ((p, log_p), (q, log_q)))
            terms = beta * of_p + (1 - beta) * of_q
        else:
            (one, log_one), (other, log_other) = (p, log_p), (q, log_q)
            if kind == "reverse_kl":
                (one, log_one), (other, log_other) = (other, log_other), (one, log_one)
            terms = np.where(one > 0, one * (log_one - log_other), 0)
        kept = np.ones(terms.shape, bool) if clip is None else terms <= clip
        value = np.where(kept, terms, clip if clip is not None else 0).sum()
        # What is cut off leaves no cancellation behind it: probabilities of that size are what the errors are of.
        size = abs(value) + np.where(kept, 0, p + q).sum() + 2e-6 * (clip is not None)
        # A log-ratio is known to within the rounding of the others, whose mean it is measured from.
        gaps = np.where((p > 0) & (q > 0), abs(log_p - log_q), 0)
        usual = min(1.0, float(((p + q) * gaps).sum()))
        if kind == "forward_kl":
            lost = np.where(kept, 0, p).sum()
            gradient = q * (1 - lost) - np.where(kept, p, 0)
            magnitude = np.where(kept, abs(q - p), q) + q * (lost + usual)
        elif kind == "reverse_kl":
            ratio = np.where(q > 0, log_q - log_p, 0)
            level = np.where(kept, terms, 0).sum() - np.where(kept, 0, q).sum()
            gradient = q * np.where(kept, ratio - level, -1 - level)
            magnitude = q * (np.where(kept, abs(ratio), 1) + abs(level) + usual)
            if not np.isfinite(level):
                gradient = magnitude = np.full(q.shape, np.nan)
        else:
            share = np.where(kept & (q > 0), log_q - log_m, 0)
            mean = (q * share).sum()
            gradient = (1 - beta) * q * (share - mean)
            magnitude = (1 - beta) * q * (abs(share) + abs(mean) + usual)
    return value, size, gradient, magnitude


def expected(
    student: Tensor, teacher: Tensor, *, mask: Any = True, token_weight: Any = 1.0, temperature: Any = 1.0,
    logit_scale: float = 1.0, logit_softcap: float | None = None, **how: Any,
) -> tuple[Any, Any, oracle.Gradient]:  # fmt: skip
    """Values (N,), sizes and the gradient (N, V) of what `divergence` is called with; upstream gradients of 1."""
    shape = tuple(student.shape[:-1])
    weights = oracle.array(token_weight, shape) * (oracle.array(mask, shape) != 0)
    raw = [x.detach().double().cpu().reshape(-1, x.shape[-1]).numpy() for x in (student, teacher)]
    warm = oracle.array(temperature, shape)
    x, slope = oracle.transform(raw[0], warm, logit_scale, logit_softcap)
    y, _ = oracle.transform(raw[1], warm, logit_scale, logit_softcap)
    values, sizes = np.zeros(len(x)), np.zeros(len(x))
    gradient, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    for index, weight in enumerate(weights):
        if weight != 0:
            found = row(x[index], y[index], order=raw[0][index], **how)
            values[index], sizes[index] = weight * found[0], abs(weight) * found[1]
            gradient[index], magnitude[index] = weight * found[2], abs(weight) * found[3]
    with np.errstate(invalid="ignore"):
        size = np.abs(slope)
        if logit_softcap is not None:
            size = size + (logit_scale / warm)[:, None] * oracle.CAP_ROUNDING / oracle.RELATIVE
        return values, sizes, oracle.Gradient(gradient * slope, magnitude * size)


def run(backend: str, student: Tensor, teacher: Tensor, upstream: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Values (...) and the gradient (N, V) in the student's dtype."""
    leaf = oracle.place(backend, student).detach().requires_grad_()
    options = {name: oracle.place(backend, value) for name, value in options.items()}
    fed = leaf * 1.0 if options.get("inplace_grad") else leaf
    values = cepo_kernels.divergence(fed, oracle.place(backend, teacher), backend=backend, **options)
    values.sum().backward() if upstream is None else values.backward(oracle.place(backend, upstream))
    return values.detach().cpu(), leaf.grad.reshape(-1, leaf.shape[-1]).cpu()


def check(backend: str, student: Tensor, teacher: Tensor, absolute: float = 1e-15, **options: Any) -> None:
    """Values and gradient within the contract."""
    values, gradient = run(backend, student, teacher, **options)
    want, size, slope = expected(student, teacher, **options)
    assert values.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    allowed = oracle.RELATIVE * np.where(np.isfinite(size), abs(size), 0) + absolute
    oracle.assert_close(values, want, 0.0, allowed, "values")
    oracle.assert_gradient(gradient, slope, student.dtype, 3e-5)


def check_at_clip(backend: str, dtype: torch.dtype, kind: str) -> None:
    """Value and gradient agree on what is clipped, or a gradient does not sum to 0. Orders of columns are roundings."""
    student, teacher = (x.double() for x in pair(dtype, 37, (1,), 0.5))
    log_q, log_p = student[0].log_softmax(0), teacher[0].log_softmax(0)
    log_m = torch.logaddexp(log_p, log_q) - np.log(2)
    of_p = log_p.exp() * (log_p - (log_m if kind == "jsd" else log_q))
    of_q = log_q.exp() * (log_q - (log_m if kind == "jsd" else log_p))
    top = float({"forward_kl": of_p, "reverse_kl": of_q, "jsd": (of_p + of_q) / 2}[kind].max())
    sure, sure_teacher = student.clone(), teacher.clone()
    sure[0, 5], sure_teacher[0, 5] = 40.0, 40.25 if dtype == torch.bfloat16 else 40.02
    order = torch.rand(8, 37, generator=torch.Generator().manual_seed(3)).argsort(1)
    clips = [top * (1 + ulps * 2.0**-24) for ulps in (-2, 0, 2)]
    for one, other, clip in [(sure, sure_teacher, 0.0), *((student, teacher, clip) for clip in clips)]:
        rows = one[0, order].to(dtype), other[0, order].to(dtype)
        _, gradient = run(backend, *rows, kind=kind, clip=clip)
        assert gradient.double().sum(1).abs().max() < 1e-3
        either = [run("reference", *rows, kind=kind, clip=clip * by)[1] for by in (1 - 1e-5, 1 + 1e-5)]
        assert torch.stack([(gradient - x).abs().amax(1) for x in either]).amin(0).max() < 1e-3


def check_masked(backend: str, **options: Any) -> None:
    """A row that is all of the lowest numbers is a uniform one, on either side."""
    student, level = pair(shape=(2,))[0], torch.zeros(2, 900)
    masked = torch.stack([torch.full((900,), torch.finfo(torch.float32).min), torch.full((900,), -1e30)])
    for one, other, like in ((student, masked, (student, level)), (masked, student, (level, student))):
        values, gradient = run(backend, one, other, **options)
        want, slope = run(backend, *like, **options)
        oracle.assert_close(values, want.numpy(), 2 * oracle.RELATIVE)
        torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-8)


def check_distant(backend: str) -> None:
    """Where float32 has no number for the difference of two logits, the right value, or on a GPU none."""
    lowest = torch.finfo(torch.float32).min
    student, teacher = pair(vocabulary=64, shape=(4,))
    student[0], teacher[0, 3] = lowest, 2e38
    student[1], teacher[1] = -2e38, 3e38
    student[2], teacher[2] = 2e38, lowest
    values, gradient = run(backend, student, teacher, kind="jsd")
    want, slope = run("reference", student, teacher, kind="jsd")
    right = torch.isclose(values, want, rtol=1e-5)
    assert right[0 if backend.startswith(("cpu", "reference")) else 3 :].all()
    assert (right | values.isnan()).all()
    assert torch.isclose(gradient, slope, rtol=1e-4, atol=1e-7)[right].all()
    assert gradient[values.isnan()].isnan().all()
