"""Divergences at a vocabulary of 151,936 on the CPU: time, bytes per second and error; then from hidden states.

Every contender sums the divergence of the rows; with gradient, it also makes the student's. Every round runs a plain
read of the two tensors' bytes and each contender once. The error is the relative one of the sum against float64, and
that of the gradient relative to the largest entry of a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import line, race
from torch import Tensor

import cepo_kernels
from cepo_kernels import backends

VOCABULARY = 151_936
WIDTH, HEAD = 1024, 49_152  # of the runs from hidden states
ROUNDS = 7
CLIP, TOP_K = 0.05, 100
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}

Contender = Callable[[Tensor, Tensor], Tensor]

needs_native = pytest.mark.skipif(
    backends.unavailable("cpu", "cpu", "divergence") is not None, reason="no native divergence here"
)


def eager(kind: str) -> Contender:
    """16-bit logits upcast first, as everybody's documentation advises."""

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        if kind == "forward_kl":
            return F.kl_div(q, p, reduction="sum", log_target=True)
        if kind == "reverse_kl":
            return F.kl_div(p, q, reduction="sum", log_target=True)
        m = torch.logaddexp(q, p) - math.log(2.0)
        return (F.kl_div(m, p, reduction="sum", log_target=True) + F.kl_div(m, q, reduction="sum", log_target=True)) / 2

    return run


def ours(kind: str, backend: str = "auto") -> Contender:
    return lambda student, teacher: cepo_kernels.divergence(student, teacher, kind=kind, backend=backend).sum()


def contenders(kind: str, isa: str | None) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run here, ours first, and why the others cannot."""
    found = {"cepo": ours(kind, f"cpu:{isa}" if isa else "cpu")}
    absent: dict[str, str] = {}
    if isa == "avx2":
        torch._inductor.config.cpp.simdlen = 256
    found["torch.compile"] = torch.compile(eager(kind), fullgraph=True, dynamic=False)
    found["eager"] = eager(kind)
    try:
        from trl.experimental.gkd import GKDTrainer

        found["TRL generalized_jsd_loss"] = lambda student, teacher: GKDTrainer.generalized_jsd_loss(
            student.float()[None], teacher.float()[None], beta=BETAS[kind], reduction="sum"
        )
    except ImportError as error:
        absent["TRL"] = f"{error}; `pip install .[bench]`"
    absent["Liger"] = "its JSD is a Triton kernel for GPUs"
    return found, absent


def with_gradient(contender: Contender) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def run(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        total = contender(student, teacher)
        (gradient,) = torch.autograd.grad(total, student)
        return total.detach(), gradient

    return run


def make_inputs(rows: int, dtype: torch.dtype, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    student = torch.randn(rows, VOCABULARY).mul_(3)
    return student.to(dtype), (student + gap * torch.randn(rows, VOCABULARY)).to(dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+gradient"])
def test_throughput(
    benchmark: Any, tables: list[dict[str, Any]], request: pytest.FixtureRequest, gradient: bool, kind: str, dtype: str
) -> None:
    from cepo_kernels.backends.cpu import plain_read

    torch._dynamo.reset()  # its limit of compilations is per function, and every case shares one
    rows = request.config.getoption("--rows")
    inputs = make_inputs(rows, DTYPES[dtype])
    found, absent = contenders(kind, request.config.getoption("--isa"))
    runs = {name: with_gradient(run) if gradient else torch.no_grad()(run) for name, run in found.items()}
    few = inputs[0][:8], inputs[1][:8]
    errors = {name: error(run, few, kind, gradient) for name, run in runs.items()}
    flat = torch.ones(2 * rows * VOCABULARY * inputs[0].element_size() // 4)
    calls: dict[str, Callable[[], Any]] = {"plain read": lambda: plain_read(flat)}
    calls |= {name: (lambda run=run: run(*inputs)) for name, run in runs.items()}
    benchmark.group = f"divergence {kind} {'forward+gradient' if gradient else 'forward'} {dtype}"
    medians = race(benchmark, calls, ROUNDS)
    table = [line("plain read", medians.pop("plain read"), None, moved=flat.nbytes)]
    for name, seconds in medians.items():
        share = None if gradient else table[0]["ms"] / (seconds * 1e3)
        moved = flat.nbytes * 3 // 2 if gradient else flat.nbytes
        table.append(line(name, seconds, medians["cepo"], moved=moved, share=share, error=errors.get(name)))
    title = f"{benchmark.group}: N = {rows}, V = {VOCABULARY:,}, two tensors"
    tables.append({"group": benchmark.group, "title": title, "rows": table, "absent": absent})


def clipped_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (p.exp() * (p - q)).clamp(max=CLIP).sum()


def top_k_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The others as one entry, in the plain way that cancels where they are few."""
    student, teacher = student.float(), teacher.float()
    chosen, columns = student.topk(TOP_K, -1)
    q = chosen - student.logsumexp(-1, keepdim=True)
    p = teacher.gather(-1, columns) - teacher.logsumexp(-1, keepdim=True)
    q, p = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()], -1) for x in (q, p))
    return (q.exp() * (q - p)).sum()


AS_TRAINED: dict[str, tuple[dict[str, Any], Contender]] = {
    "forward_kl": ({"kind": "forward_kl"}, eager("forward_kl")),
    f"forward_kl, clip {CLIP}": ({"kind": "forward_kl", "clip": CLIP}, clipped_kl),
    "reverse_kl": ({"kind": "reverse_kl"}, eager("reverse_kl")),
    f"reverse_kl, top {TOP_K}": ({"kind": "reverse_kl", "top_k": TOP_K}, top_k_kl),
}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", AS_TRAINED)
def test_close_rows(
    benchmark: Any, tables: list[dict[str, Any]], request: pytest.FixtureRequest, how: str, dtype: str
) -> None:
    """Of rows .005 nats apart, as a student and its own weights with a hint may be, gradient included."""
    torch._dynamo.reset()
    rows = request.config.getoption("--rows")
    inputs = make_inputs(rows, DTYPES[dtype], 0.1)
    options, formula = AS_TRAINED[how]
    found: dict[str, Contender] = {
        "cepo": lambda student, teacher: cepo_kernels.divergence(student, teacher, **options).sum(),
        "torch.compile": torch.compile(formula, fullgraph=True, dynamic=False),
        "eager": formula,
    }
    runs = {name: with_gradient(run) for name, run in found.items()}
    calls = {name: (lambda run=run: run(*inputs)) for name, run in runs.items()}
    benchmark.group = f"divergence of close rows, {how}, forward+gradient {dtype}"
    medians = race(benchmark, calls, ROUNDS)
    table = [line(name, seconds, medians["cepo"]) for name, seconds in medians.items()]
    title = f"{benchmark.group}: N = {rows}, V = {VOCABULARY:,}"
    tables.append({"group": benchmark.group, "title": title, "rows": table, "absent": {}})


def error(run: Callable[..., Any], inputs: tuple[Tensor, Tensor], kind: str, gradient: bool) -> float:
    wide = inputs[0].double(), inputs[1].double()
    if not gradient:
        expected = ours(kind)(*wide)
        return float((run(*inputs).double() - expected).abs() / expected)
    expected = with_gradient(ours(kind))(*wide)[1]
    got = run(*inputs)[1].double()
    return float(((got - expected).abs().amax(1) / expected.abs().amax(1)).max())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_from_hidden_states(
    benchmark: Any, tables: list[dict[str, Any]], request: pytest.FixtureRequest, kind: str, dtype: str
) -> None:
    """With the gradients of the student's hidden states and head."""
    torch._dynamo.reset()
    rows = request.config.getoption("--rows")
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, WIDTH).to(DTYPES[dtype]) for _ in range(2))
    head = (torch.randn(HEAD, WIDTH) * 0.05).to(DTYPES[dtype])

    def formula(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        return eager(kind)(F.linear(student, head), F.linear(teacher, head.detach()))

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "cepo": lambda student, teacher, head: cepo_kernels.linear_divergence(student, teacher, head, kind=kind).sum(),
        "torch.compile": torch.compile(formula, fullgraph=True, dynamic=False),
        "eager": formula,
    }
    with contextlib.suppress(ImportError):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        found["TRL chunked_divergence"] = lambda student, teacher, head: ChunkedDivergenceFunction.apply(
            student, head, None, teacher, head.detach(), None, BETAS[kind]
        )[0].sum()

    def gradient(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        run(student.detach().requires_grad_(), teacher, head.detach().requires_grad_()).backward()

    calls = {name: (lambda run=run: gradient(run)) for name, run in found.items()}
    benchmark.group = f"divergence from hidden states, {kind} {dtype}"
    medians = race(benchmark, calls, ROUNDS)
    table = [line(name, seconds, medians["cepo"]) for name, seconds in medians.items()]
    title = f"{benchmark.group}: N = {rows}, H = {WIDTH}, V = {HEAD:,}, gradients included"
    tables.append({"group": benchmark.group, "title": title, "rows": table, "absent": {}})
