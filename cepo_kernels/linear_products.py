"""The matrix products between hidden states and logits.

Logits exist for one chunk of rows only, in float32 (float64 where an input is), never rounded below the accumulation of
the product; or in 16 bits, rounded as a linear layer rounds them, where a caller asks for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends import Backend
    from .backends.sharded import Sharded

LOGITS_BYTES = 256 << 20  # of a chunk's logits, all contexts together
LEAST_ROWS = 16  # of a chunk, however many columns there are
TILE_BYTES = 64 << 20  # of the head's rows that are upcast at a time, where they must be


class Head(NamedTuple):
    """``weight`` (V, H) and ``bias`` (V,) or None, in their own dtypes."""

    weight: Tensor
    bias: Tensor | None

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the vocabulary and their weights in ``dtype``: all at once where nothing has to be converted."""
        vocabulary, width = self.weight.shape
        size = max(1, vocabulary) if self.weight.dtype == dtype else max(1, TILE_BYTES // (width * dtype.itemsize))
        for first in range(0, vocabulary, size):
            tile = slice(first, min(first + size, vocabulary))
            yield tile, self.weight[tile].to(dtype)


def result_dtype(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    return torch.float64 if wide else logits_dtype or torch.float32


def chunk_rows(contexts: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of a chunk whose ``contexts`` together fit into LOGITS_BYTES."""
    return max(LEAST_ROWS, LOGITS_BYTES // (contexts * max(1, vocabulary) * dtype.itemsize))


class Products:
    """Matrix products with a head: 16-bit operands, gradients of logits among them, summed in float32, on a GPU and, in
    bfloat16, where the CPU backend has a ``product``; else upcast, as torch's own on a CPU round their result. With a
    16-bit ``logits_dtype`` all operands and results have that. On a `Shard` of the vocabulary the widest decides on
    chunks, and gradients of hidden states are summed over the ranks."""

    def __init__(
        self, head: Head, hidden: Tensor, logits_dtype: torch.dtype | None, backend: Backend | None = None
    ) -> None:
        self.head = head
        self.sharded = cast("Sharded | None", backend if hasattr(backend, "shard") else None)
        self.result = result_dtype(hidden, head.weight, logits_dtype)
        self.sums = torch.promote_types(self.result, torch.float32)  # of what is added up chunk by chunk
        sixteen = hidden.dtype == head.weight.dtype and hidden.dtype.itemsize == 2 and self.result == torch.float32
        product = getattr(self.sharded.inner if self.sharded else backend, "product", None)
        self.product = product if sixteen and hidden.dtype == torch.bfloat16 and hidden.is_cpu else None
        self.operand = hidden.dtype if sixteen and (hidden.is_cuda or self.product) else self.result

    def rows(self, contexts: int) -> int:
        widest = self.sharded.shard.widest if self.sharded else self.head.weight.shape[0]
        return chunk_rows(contexts, widest, self.result)

    def _grow(self, into: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """``into`` with the product of ``a`` and ``b`` added; None: the product alone, for which nothing is zeroed."""
        if self.product:
            out = torch.empty((a.shape[0], b.shape[1]), dtype=self.sums) if into is None else into
            self.product(out, a, b, into is not None)
            return out
        a, b = a.to(self.operand), b.to(self.operand)
        if into is not None and a.dtype == into.dtype:
            return into.addmm_(a, b)
        wide = a.is_cuda and a.dtype != self.sums
        value = torch.mm(a, b, out_dtype=self.sums) if wide else torch.mm(a, b).to(self.sums)
        return value if into is None else into.add_(value)

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, V) of ``hidden`` (M, H)."""
        hidden = hidden.to(self.operand)
        out = torch.empty((hidden.shape[0], self.head.weight.shape[0]), dtype=self.result, device=hidden.device)
        for tile, weight in self.head.tiles(self.operand):
            if self.product:
                self.product(out, hidden, weight.t(), False)
            elif hidden.dtype == out.dtype:
                torch.mm(hidden, weight.t(), out=out[:, tile])
            else:
                out[:, tile] = torch.mm(hidden, weight.t(), out_dtype=out.dtype)
        if self.head.bias is not None:
            out += self.head.bias
        return out

    def hidden_gradient(self, logits_gradient: Tensor) -> Tensor:
        """(M, H) from (M, V)."""
        out = None
        for tile, weight in self.head.tiles(self.operand):
            out = self._grow(out, logits_gradient[:, tile], weight)
        if out is None:  # a shard of no columns
            out = logits_gradient.new_zeros((logits_gradient.shape[0], self.head.weight.shape[1]), dtype=self.sums)
        return out

    def add_weight_gradient(self, so_far: Tensor | None, logits_gradient: Tensor, hidden: Tensor) -> Tensor:
        """``so_far`` (V, H), if any, grown by the product of (M, V) transposed and (M, H)."""
        return self._grow(so_far, logits_gradient.t(), hidden)


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """Of a tensor's gradient until a backward takes it: float16 would lose it before a loss scale arrives."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


class Gradients:
    """The gradients that a call needs, summed in float32 over chunks of rows."""

    def __init__(self, products: Products, hidden: Tensor, needs: list[bool]) -> None:
        self.products, self.dtype = products, products.sums if products.sharded else kept_dtype(hidden)
        self.given = kept_dtype(hidden)
        columns = products.head.weight.shape[:1]

        def zeros(shape: torch.Size, wanted: bool, dtype: torch.dtype = products.sums) -> Tensor:
            return torch.zeros(shape if wanted else (0,), dtype=dtype, device=hidden.device)

        self.hidden = zeros(hidden.shape, needs[0], self.dtype)
        self.weight: Tensor | None = None  # until there are rows
        self.bias = zeros(columns, needs[2])
        self.needs = needs

    def add(self, rows: Tensor, logits_gradient: Tensor, hidden: Tensor) -> None:
        """From the gradient (M, V) of the logits of ``rows``, whose hidden states are given."""
        if self.needs[0]:
            self.hidden[rows] = self.products.hidden_gradient(logits_gradient).to(self.dtype)
        if self.needs[1]:
            self.weight = self.products.add_weight_gradient(self.weight, logits_gradient, hidden)
        if self.needs[2]:
            self.bias += logits_gradient.sum(0, dtype=self.bias.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        head = self.products.head
        if self.products.sharded and self.needs[0]:
            self.products.sharded.reduce(self.hidden)
        bias = self.bias if head.bias is None else self.bias.to(kept_dtype(head.bias))
        weight = self.weight
        if weight is None:
            weight = self.hidden.new_zeros(head.weight.shape if self.needs[1] else (0,), dtype=self.products.sums)
        return self.hidden.to(self.given), weight.to(kept_dtype(head.weight)), bias
