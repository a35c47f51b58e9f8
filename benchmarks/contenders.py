"""Who is compared: each computes the log-probs of three logits tensors and the token credit, from the same inputs.

A contender is a function of (policy, positive, negative, labels, advantages) to (logprobs, token advantages). Eager
PyTorch upcasts 16-bit logits first, as its documentation advises; the packages' functions are called as they call them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

import cepo_kernels
from cepo_kernels import backends

Contender = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LAM, EPS_W = 0.5, 0.5


def credit(logprobs: Tensor, positive: Tensor, negative: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    evidence = (positive - negative).detach()
    weight = torch.exp(advantages.sign() * evidence).clamp(1 - EPS_W, 1 + EPS_W)
    return logprobs, advantages * ((1 - LAM) + LAM * weight)


def eager(
    policy: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    def logprob(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    with torch.no_grad():
        teachers = logprob(positive), logprob(negative)
    return credit(logprob(policy), *teachers, advantages)


def ours(backend: str) -> Contender:
    def run(
        policy: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = cepo_kernels.contrastive_logprobs(
            policy, positive, negative, labels, advantages, lam=LAM, eps_w=EPS_W, backend=backend
        )
        assert out.advantages is not None
        return out.logprobs, out.advantages

    return run


def trl() -> Contender:
    from trl.trainer.utils import selective_log_softmax

    def run(
        policy: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teachers = [
                selective_log_softmax(x.unsqueeze(1), labels.unsqueeze(1)).squeeze(1) for x in (positive, negative)
            ]
        logprobs = selective_log_softmax(policy.unsqueeze(1), labels.unsqueeze(1)).squeeze(1)
        return credit(logprobs, *teachers, advantages)

    return run


def from_cross_entropy(cross_entropy: Callable[..., Tensor]) -> Contender:
    """Log-probs as minus a cross-entropy for each row, of three calls."""

    def run(
        policy: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teachers = [-cross_entropy(x, labels, reduction="none") for x in (positive, negative)]
        return credit(-cross_entropy(policy, labels, reduction="none"), *teachers, advantages)

    return run


def liger() -> Contender:
    """Where a gradient is wanted it is made in the forward, over the logits, as `contrastive_policy_loss` can."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return from_cross_entropy(liger_cross_entropy)


def quack() -> Contender:
    from quack.cross_entropy import cross_entropy

    return from_cross_entropy(cross_entropy)


def others() -> tuple[dict[str, Contender], dict[str, str]]:
    """The packages that can be imported, by name and version, and why the others cannot."""
    found: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, package, make in (
        ("TRL", "trl", trl),
        ("Liger", "liger-kernel", liger),
        ("quack", "quack-kernels", quack),
    ):
        try:
            found[f"{name} {importlib.metadata.version(package)}"] = make()
        except Exception as error:  # whatever importing others' code may raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, absent


def on_cpu(isa: str | None) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can run on this machine's CPU, ours first, and why the others cannot.

    ``isa`` "avx2" holds us and torch.compile to AVX2; eager PyTorch is held to it by ATEN_CPU_CAPABILITY=avx2 alone.
    """
    found: dict[str, Contender] = {"cepo": ours(f"cpu:{isa}" if isa else "cpu")}
    absent: dict[str, str] = {}
    if isa == "avx2":
        torch._inductor.config.cpp.simdlen = 256
    for name in () if isa else ("cpu:avx512", "cpu:avx2", "cpu:portable"):
        reason = backends.unavailable(name, "cpu")
        if reason is None:
            found[f"cepo {name}"] = ours(name)
        else:
            absent[f"cepo {name}"] = reason
    found["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    found["eager"] = eager
    try:
        import trl as package

        found[f"TRL {package.__version__}"] = trl()
    except ImportError as error:
        absent["TRL"] = f"{error}; `pip install .[bench]`"
    return found, absent


def divergences() -> dict[str, Callable[..., Any]]:
    """Functions of (student, teacher) logits to the JSD's sum over the rows and the student's gradient."""

    def eager_jsd(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum()

    values: dict[str, Callable[..., Tensor]] = {
        "eager": eager_jsd, "torch.compile": torch.compile(eager_jsd, fullgraph=True, dynamic=False)
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        from trl.experimental.gkd import GKDTrainer

        values["TRL"] = lambda b, a: GKDTrainer.generalized_jsd_loss(b.float(), a.float(), reduction="sum")
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.jsd import LigerJSD

        values["Liger"] = lambda b, a: LigerJSD()(b.float().log_softmax(-1), a.float().log_softmax(-1)) * len(b)
    for name in ("triton", "cuda"):
        if backends.unavailable(name, "cuda", "divergence") is None:
            values[name] = lambda b, a, name=name: cepo_kernels.divergence(b, a, kind="jsd", backend=name).sum()

    def with_gradient(value: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        found = value(student, teacher)
        (gradient,) = torch.autograd.grad(found, student)
        return found.detach(), gradient

    return {name: partial(with_gradient, value) for name, value in values.items()}


def with_gradient(contender: Contender) -> Contender:
    """Forward, then the gradient of ``-sum(logprobs * advantages)`` in the policy's logits."""

    def run(policy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        policy = policy.detach().requires_grad_()
        logprobs, advantages = contender(policy, *rest)
        (gradient,) = torch.autograd.grad(-(logprobs * advantages).sum(), policy)
        return logprobs.detach(), gradient

    return run


def fused(backend: str) -> Contender:
    """The same gradient from the fused loss, on policy."""

    def run(policy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        policy = policy.detach().requires_grad_()
        out = cepo_kernels.contrastive_policy_loss(
            policy, *rest, lam=LAM, eps_w=EPS_W, denominator=1.0, backend=backend
        )
        (gradient,) = torch.autograd.grad(out.loss, policy)
        return out.credit.logprobs, gradient

    return run
