"""The matrix products between hidden states and logits.

Logits exist for one chunk of rows, or of columns, only, in float32 (float64 where an input is), never rounded below the
accumulation of the product; or in 16 bits, rounded as a linear layer rounds them, where a caller asks for that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from .backends import sharded

if TYPE_CHECKING:
    from .backends import Backend

LOGITS_BYTES = 256 << 20  # of a chunk's logits, all contexts together
LEAST_ROWS = 16  # of a chunk, however many columns there are
CACHE_BYTES = 24 << 20  # of a piece's logits: a CPU's cache holds them, and malloc keeps memory of up to 32 MiB
PIECE_ROWS = 126  # of a piece, all contexts together, however many columns: enough to have packed the head for
ENOUGH_ROWS = 84  # for a native product to make gradients of hidden states of: fewer, and it mostly packs the head
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
    16-bit ``logits_dtype`` logits are rounded to it, and without such a product all operands and results. On a `Shard`
    of the vocabulary the widest decides on chunks, and gradients of hidden states are summed over the ranks."""

    def __init__(
        self, head: Head, hidden: Tensor, logits_dtype: torch.dtype | None, backend: Backend | None = None,
        others: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.head, self.backend = head, backend
        self.sharded = cast("sharded.Sharded | None", backend if hasattr(backend, "shard") else None)
        self.result = result_dtype(hidden, head.weight, logits_dtype)
        self.sums = torch.promote_types(self.result, torch.float32)  # of what is added up chunk by chunk
        # A context of more digits than the policy's has to keep them.
        alike = {x.dtype for x in (hidden, *others, head.weight)} == {hidden.dtype}
        sixteen = alike and hidden.dtype.itemsize == 2 and self.result != torch.float64
        inner = self.sharded.inner if self.sharded else backend
        product = getattr(inner, "product", None)
        native = sixteen and hidden.dtype == torch.bfloat16 and self.result != torch.float16 and hidden.is_cpu
        self.product = product if native else None
        unrounded = sixteen and hidden.is_cuda and self.result == torch.float32
        self.operand = hidden.dtype if self.product or unrounded else self.result
        fresh = getattr(inner, "empty", torch.empty) if hidden.is_cpu else torch.empty
        self.fresh = cast("Callable[..., Tensor]", fresh)
        self.device = hidden.device

    def rows(self, contexts: int) -> int:
        widest = self.sharded.shard.widest if self.sharded else self.head.weight.shape[0]
        return chunk_rows(contexts, widest, self.result)

    def piece(self, contexts: int) -> int:
        """Rows whose logits exist at a time where nothing keeps them; of native products what a cache holds."""
        if not self.product or self.sharded:  # whose ranks all make the same calls
            return self.rows(contexts)
        cached = CACHE_BYTES // (max(1, self.head.weight.shape[0]) * self.result.itemsize)
        return min(self.rows(contexts), max(PIECE_ROWS, cached) // contexts)

    def tile_rows(self, contexts: int) -> int | None:
        """Rows whose logits exist at a time where they come in tiles of the vocabulary, as torch's own product on a CPU
        would have it: all columns of a few rows read the head more often, those of all rows are memory never touched
        before. None: they come row by row."""
        native = bool(self.backend and self.backend.notes) and self.device.type == "cpu"
        few = self.head.weight.shape[0] < 2 * sharded.TILE
        if not native or self.product or self.sharded or self.result != torch.float32 or few:
            return None
        at_most = min(CACHE_BYTES, LOGITS_BYTES) // (contexts * sharded.TILE * self.result.itemsize)
        return max(LEAST_ROWS, at_most)

    def room(self, rows: int) -> Tensor:
        """For the logits of a tile of so many rows."""
        return torch.empty(rows * sharded.TILE, dtype=self.result, device=self.device)

    def of_columns(self, first: int, stop: int) -> Products:
        """The same with a part of the head."""
        part = copy.copy(self)
        weight, bias = self.head
        part.head = Head(weight[first:stop], None if bias is None else bias[first:stop])
        return part

    def empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Room for (rows, V)."""
        return self.fresh((rows, self.head.weight.shape[0]), dtype=dtype, device=self.device)

    def _grow(self, into: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``into``, of dtype ``sums``, with the product of ``a`` and ``b`` added; None: the product alone, for which
        nothing is zeroed, as it comes or, where it can, in ``dtype``."""
        if self.product:
            out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype or self.sums) if into is None else into
            self.product(out, a, b, into is not None)
            return out
        a, b = a.to(self.operand), b.to(self.operand)
        if into is not None and a.dtype == into.dtype:
            return into.addmm_(a, b)
        wide = a.is_cuda and a.dtype != self.sums
        value = torch.mm(a, b, out_dtype=self.sums) if wide else torch.mm(a, b)
        return value if into is None else into.to(self.sums).add_(value)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(M, V) of ``hidden`` (M, H); into ``out`` if that is given."""
        hidden = hidden.to(self.operand)
        out = self.empty(hidden.shape[0], self.result) if out is None else out
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

    def add_weight_gradient(
        self, so_far: Tensor | None, logits_gradient: Tensor, hidden: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """``so_far`` (V, H), if any, grown by the product of (M, V) transposed and (M, H); of the only one, the dtype
        may be ``dtype``."""
        return self._grow(so_far, logits_gradient.t(), hidden, dtype)


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """Of a tensor's gradient until a backward takes it: float16 would lose it before a loss scale arrives."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


class Gathered:
    """Gradients of logits on the way into their products: of few rows a native product would spend its time on packing
    the head, or on adding to a gradient of the head's size. So they are rounded, as the product rounds them, and kept
    until a chunk is full."""

    def __init__(self, products: Products, rows: int, of_head: bool) -> None:
        """There will be at most ``rows``; ``of_head``: the head's gradient is made of them, too."""
        self.products, self.all, self.most = products, rows, min(rows, products.rows(1))
        self.enough = self.most if of_head else min(self.most, ENOUGH_ROWS)
        self.rows: list[Tensor] = []
        self.kept: Tensor | None = None
        self.begun = False

    def add(self, rows: Tensor, logits_gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """What is ready for a product: rows, their (M, V) and whether these are all."""
        first = sum(x.numel() for x in self.rows)
        if first + rows.numel() > self.most:
            yield from self.rest(False)
            first = 0
        if not self.products.product or rows.numel() >= self.enough:
            self.begun = True
            yield rows, logits_gradient, rows.numel() == self.all
            return
        if self.kept is None:
            self.kept = self.products.empty(self.most, torch.bfloat16)
        self.kept[first : first + rows.numel()] = logits_gradient
        self.rows.append(rows)

    def rest(self, last: bool = True) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """The same, of what is left."""
        if self.rows and self.kept is not None:
            rows, only = torch.cat(self.rows), last and not self.begun
            self.rows, self.begun = [], True
            yield rows, self.kept[: rows.numel()], only


class Gradients:
    """The gradients that a call needs, summed in float32 over chunks of the rows of ``hidden`` (N, H)."""

    def __init__(self, products: Products, hidden: Tensor, needs: list[bool]) -> None:
        self.products, self.dtype = products, products.sums if products.sharded else kept_dtype(hidden)
        self.given, self.states = kept_dtype(hidden), hidden
        columns = products.head.weight.shape[:1]

        def zeros(shape: torch.Size, wanted: bool, dtype: torch.dtype = products.sums) -> Tensor:
            return torch.zeros(shape if wanted else (0,), dtype=dtype, device=hidden.device)

        self.hidden = zeros(hidden.shape, needs[0], self.dtype)
        self.weight: Tensor | None = None  # until there are rows
        self.bias = zeros(columns, needs[2])
        self.needs = needs
        self.gathered = Gathered(products, hidden.shape[0], needs[1])

    def add(self, rows: Tensor, logits_gradient: Tensor) -> None:
        """From the gradient (M, V) of the logits of ``rows``."""
        if self.needs[2]:
            self.bias += logits_gradient.sum(0, dtype=self.bias.dtype)
        if self.needs[0] or self.needs[1]:
            self._multiply(self.gathered.add(rows, logits_gradient))

    def _multiply(self, ready: Iterator[tuple[Tensor, Tensor, bool]]) -> None:
        for rows, logits_gradient, only in ready:
            if self.needs[0]:
                self.hidden[rows] = self.products.hidden_gradient(logits_gradient).to(self.dtype)
            if self.needs[1]:
                dtype = kept_dtype(self.products.head.weight) if only else None
                self.weight = self.products.add_weight_gradient(self.weight, logits_gradient, self.states[rows], dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        self._multiply(self.gathered.rest())
        head = self.products.head
        if self.products.sharded and self.needs[0]:
            self.products.sharded.reduce(self.hidden)
        bias = self.bias.to(kept_dtype(head.weight if head.bias is None else head.bias))
        weight = self.weight
        if weight is None:
            weight = self.hidden.new_zeros(head.weight.shape if self.needs[1] else (0,), dtype=self.products.sums)
        return self.hidden.to(self.given), weight.to(kept_dtype(head.weight)), bias
