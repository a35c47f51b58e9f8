"""Who is compared from hidden states: each computes one context's log-probs of the labels, or their sum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def peers() -> dict[str, Run]:
    found: dict[str, Run] = {"torch.compile": torch.compile(eager, fullgraph=True, dynamic=False), "eager": eager}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda hidden, weight, labels: (
            -F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
        )
    with contextlib.suppress(ImportError):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        found["TRL chunked_logprob"] = lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, 32768, None, 1.0, ()
        )[0]
    if torch.cuda.is_available():  # it has no other kernels
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            found["Liger"] = lambda hidden, weight, labels: (
                -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
            )
    return found


def gradient(run: Run, hidden: Tensor, weight: Tensor, labels: Tensor, frozen: bool) -> None:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
    run(hidden, weight, labels).sum().backward()
