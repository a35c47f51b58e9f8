"""From hidden states on the CPU: log-probs and the policy loss, against the matrix products that they need.

The share is of the time of the products (float32 or 16-bit, whichever is faster here) of the same shapes that the
arithmetic needs: one forward, four with the gradient of a trainable head, two with a frozen one, five for the policy
loss over three contexts. "16-bit logits" is `logits_dtype=bfloat16`, what the peers compute for bfloat16 operands;
"made again" is for more rows than one chunk holds, where no logits are kept for the backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interleaved import line, race
from linear_contenders import Run, gradient, peers
from torch import Tensor

import cepo_kernels
from cepo_kernels import backends, linear_products

ROWS, WIDTH, VOCABULARY = 512, 1024, 49_152
ROUNDS = 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = {"forward": 1, "forward+backward": 4, "frozen head": 2, "policy loss": 5}


def made_again(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with chunks that hold a quarter of the rows."""

    def run() -> None:
        whole = linear_products.LOGITS_BYTES
        linear_products.LOGITS_BYTES = ROWS * VOCABULARY
        try:
            call()
        finally:
            linear_products.LOGITS_BYTES = whole

    return run


@pytest.mark.skipif(backends.unavailable("cpu", "cpu") is not None, reason=str(backends.unavailable("cpu", "cpu")))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_linear(benchmark: Any, tables: list[dict[str, Any]], kind: str, dtype: str) -> None:
    torch.manual_seed(0)
    contexts = [torch.randn(ROWS, WIDTH).to(DTYPES[dtype]) for _ in range(3)]
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.05).to(DTYPES[dtype])
    labels, advantages = torch.randint(VOCABULARY, (ROWS,)), torch.randn(ROWS)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return cepo_kernels.linear_token_logprobs(hidden, weight, labels, **options).logprobs

    def loss(**options: Any) -> None:
        leaves = contexts[0].detach().requires_grad_(), weight.detach().requires_grad_()
        cepo_kernels.linear_contrastive_policy_loss(
            leaves[0], *contexts[1:], leaves[1], labels, advantages, **options
        ).loss.backward()

    sixteen = {"logits_dtype": torch.bfloat16}
    runs: dict[str, Run] = {"cepo": ours}
    if dtype == "bf16":
        runs["cepo, 16-bit logits"] = partial(ours, **sixteen)
    if kind != "policy loss":
        runs |= peers()
    calls: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        if kind == "forward":
            calls[name] = torch.no_grad()(lambda run=run: run(contexts[0], weight, labels))
        else:
            frozen = kind == "frozen head"
            calls[name] = lambda run=run, frozen=frozen: gradient(run, contexts[0], weight, labels, frozen)
    if kind == "policy loss":
        calls["cepo"] = loss
        if dtype == "bf16":
            calls["cepo, 16-bit logits"] = partial(loss, **sixteen)
    if kind == "forward+backward":
        for name in [name for name in calls if name.startswith("cepo")]:
            calls[f"{name}, made again"] = made_again(calls[name])
    wide, wide_weight = contexts[0].float(), weight.float()
    calls["product, fp32"] = lambda: wide @ wide_weight.t()
    if dtype == "bf16":
        calls["product, bf16"] = lambda: contexts[0] @ weight.t()
    benchmark.group = f"linear {kind} {dtype}"
    medians = race(benchmark, calls, ROUNDS)
    product = PRODUCTS[kind] * min(seconds for name, seconds in medians.items() if name.startswith("product"))
    table = [
        line(name, seconds, medians["cepo"], share=seconds / product)
        for name, seconds in medians.items()
        if not name.startswith("product")
    ]
    table.append(line(f"{PRODUCTS[kind]} x the product", product, None, share=1.0))
    _finish(tables, benchmark.group, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rows"), [("log-probs", ROWS), ("log-probs", 4 * ROWS), ("policy loss", ROWS)])
def test_rows_without_a_coefficient_cost_nothing(
    benchmark: Any, tables: list[dict[str, Any]], kind: str, rows: int, dtype: str
) -> None:
    """The backward of the log-probs, and the whole policy loss, with the coefficient of every second row 0."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, WIDTH).to(DTYPES[dtype])
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.05).to(DTYPES[dtype])
    labels, every = torch.randint(VOCABULARY, (rows,)), torch.randn(rows)
    half = every * (torch.arange(rows) % 2)
    forwards: list[float] = []

    def leaves() -> tuple[Tensor, Tensor]:
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def forward() -> tuple[Tensor]:
        start = time.perf_counter()
        logprobs = cepo_kernels.linear_token_logprobs(*leaves(), labels).logprobs
        forwards.append(time.perf_counter() - start)
        return (logprobs,)

    def loss(coefficients: Tensor) -> None:
        policy, head = leaves()
        cepo_kernels.linear_contrastive_policy_loss(policy, None, None, head, labels, coefficients).loss.backward()

    benchmark.group = f"linear {kind}, half of the rows"
    if kind == "policy loss":
        calls = {"cepo": partial(loss, half), "all rows": partial(loss, every)}
        found = {"policy loss": race(benchmark, calls, ROUNDS)}
    else:
        calls = {
            "cepo": lambda logprobs: logprobs.backward(half),
            "all rows": lambda logprobs: logprobs.backward(every),
        }
        backward = race(benchmark, calls, ROUNDS, before=forward)
        both = {name: seconds + statistics.median(forwards) for name, seconds in backward.items()}
        found = {"backward": backward, "forward+backward": both}
    for what, medians in found.items():
        table = [
            line(name, seconds, medians["cepo"], share=seconds / medians["all rows"])
            for name, seconds in medians.items()
        ]
        _finish(tables, f"linear {what}, half of the rows {dtype}", table, rows)


def _finish(tables: list[dict[str, Any]], group: str, table: list[dict[str, Any]], rows: int = ROWS) -> None:
    title = f"{group}: N = {rows:,}, H = {WIDTH}, V = {VOCABULARY:,}; share: of the last row"
    tables.append({"group": group, "title": title, "rows": table, "absent": {}})
