"""From hidden states on a GPU: log-probs and the policy loss, against cuBLAS's own time for the products they need.

The products are of the same operands, bfloat16, into bfloat16, one after the other. "4 GiB of logits" is what a caller
with memory to spare can set; where all logits fit into that, those of a trained head are kept and one product less is
made. Peers that give no log-prob of each row (a sum alone) take no part in the policy loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import contenders
import torch
from events import Call, medians
from linear_contenders import Run, gradient, peers
from torch import Tensor

import cepo_kernels
from cepo_kernels import linear_products

VOCABULARY = 151_936
SHAPES = [(rows, width) for rows in (4096, 8192) for width in (2048, 4096)]
# Of each kind the products for logits, for the gradient of hidden states, and for that of the head.
PRODUCTS = {"forward": (3, 0, 0), "frozen head": (1, 1, 0), "trained head": (2, 1, 1), "policy loss": (3, 1, 1)}
SUMS = ("F.linear_cross_entropy", "Liger")
LOGITS_BYTES = 4 << 30


def inputs(rows: int, width: int, vocabulary: int, device: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Three contexts, head, labels, advantages."""
    torch.manual_seed(0)
    contexts = [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16).mul_(width**-0.5)
    return contexts, weight, torch.randint(vocabulary, (rows,), device=device), torch.randn(rows, device=device)


def bare(kind: str, hidden: Tensor, weight: Tensor) -> Call:
    """The products of a kind and nothing else."""
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        forward, of_hidden, of_weight = PRODUCTS[kind]
        for _ in range(forward):
            torch.mm(hidden, weight.t(), out=logits)
        if of_hidden:
            torch.mm(logits, weight, out=grad_hidden)
        if of_weight:
            torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def ours(kind: str, contexts: list[Tensor], weight: Tensor, labels: Tensor, advantages: Tensor) -> Any:
    if kind == "forward":
        with torch.no_grad():
            return cepo_kernels.linear_contrastive_logprobs(*contexts, weight, labels, advantages)
    if kind == "policy loss":
        leaf, weight = contexts[0].detach().requires_grad_(), weight.detach().requires_grad_()
        out = cepo_kernels.linear_contrastive_policy_loss(leaf, *contexts[1:], weight, labels, advantages)
        return out.loss.backward()  # type: ignore[no-untyped-call]

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return cepo_kernels.linear_token_logprobs(hidden, weight, labels).logprobs

    return gradient(run, contexts[0], weight, labels, kind == "frozen head")


def theirs(run: Run, kind: str, contexts: list[Tensor], weight: Tensor, labels: Tensor, advantages: Tensor) -> Any:
    if kind == "forward":
        with torch.no_grad():
            return [run(hidden, weight, labels) for hidden in contexts]
    if kind == "policy loss":
        leaf, trained = contexts[0].detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.no_grad():
            teachers = [run(hidden, weight, labels) for hidden in contexts[1:]]
        logprobs, credited = contenders.credit(run(leaf, trained, labels), *teachers, advantages)
        return (logprobs * credited).mean().neg().backward()  # type: ignore[no-untyped-call]
    return gradient(run, contexts[0], weight, labels, kind == "frozen head")


def with_logits(call: Call) -> Any:
    with mock.patch.object(linear_products, "LOGITS_BYTES", LOGITS_BYTES):
        return call()


def group(kind: str, rows: int, width: int, vocabulary: int = VOCABULARY, device: str = "cuda") -> dict[str, Any]:
    """One table, in the form of `gpu.group`; the share is of the bare products' speed."""
    given = inputs(rows, width, vocabulary, device)
    mine = partial(ours, kind, *given)
    calls: dict[str, Call] = {"products": bare(kind, given[0][0], given[1])}
    calls |= {"cepo": mine, "cepo, 4 GiB of logits": partial(with_logits, mine)}
    for name, run in peers().items():
        if kind != "policy loss" or name not in SUMS:
            calls[name] = partial(theirs, run, kind, *given)
    milliseconds, peak, absent = medians(calls)
    flop = 2 * sum(PRODUCTS[kind]) * rows * width * vocabulary
    table = [
        {"name": name, "ms": ms, "tflop_per_s": flop / ms / 1e9, "share": milliseconds["products"] / ms,
         "peak_mib": peak[name] / 2**20}
        for name, ms in milliseconds.items()
    ]  # fmt: skip
    title = f"linear {kind} bfloat16: N = {rows}, H = {width}, V = {vocabulary:,}"
    return {"title": title, "kind": kind, "n": rows, "width": width, "vocabulary": vocabulary, "rows": table,
            "absent": absent}  # fmt: skip


def groups() -> Iterator[dict[str, Any]]:
    """Every table, printed as it is made."""
    for rows, width in SHAPES:
        for kind in PRODUCTS:
            found = group(kind, rows, width)
            print(f"\n{found['title']}")
            for row in found["rows"]:
                print(f"  {row['name']:24}{row['ms']:9.2f} ms {row['tflop_per_s']:7.0f} TFLOP/s {row['share']:6.0%} "
                      f"{row['peak_mib']:10.0f} MiB beyond the inputs")  # fmt: skip
            for name, reason in found["absent"].items():
                print(f"  {name:24}{reason}")
            yield found
            torch.cuda.empty_cache()
