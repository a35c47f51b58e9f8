"""A backend for some columns of the vocabulary: another backend's sums, piece by piece, merged over the ranks.

A piece is what one rank holds of a tile, TILE columns of the whole vocabulary. Its sums are made of its own columns
alone, relative to a reference of its own; every rank merges the sums of all pieces, in the vocabulary's order and in
float64. So where shards meet at the end of a tile, a row's bits do not depend on how many there are.

One process that has the whole vocabulary may merge by itself, pieces of logits that need not exist at the same time;
rows that need float64 it leaves to another way.

A kernel wants a label in its row. In a piece that has not the row's, the first column stands in: the kernel leaves it
out, and it is added here. `parallel` sees to it that all ranks make the same calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import reference as definition
from ..rows import BackwardInputs, ForwardInputs, ForwardOutputs, LossInputs, LossOutputs, RowOptions
from . import Backend, reference

TILE = 8192
SLOW = -1.0  # as csrc/rowmath.h's kSlowRow, in stats[1]: this row needs float64
LARGEST = 2.0**22  # of a reference, in powers of two: beyond it float32 exponents will not do
LN2 = math.log(2)


class Piece(NamedTuple):
    """Columns [first, stop) of the vocabulary, within one tile, on one rank."""

    rank: int
    first: int
    stop: int


class Shard(NamedTuple):
    """Which columns of a vocabulary this rank holds, and who holds the others: pieces in the vocabulary's order."""

    group: dist.ProcessGroup | None  # None: this rank is the only one
    rank: int
    start: int
    vocabulary: int
    widest: int  # columns of the largest shard
    pieces: tuple[Piece, ...]


class _Steps:
    """Transformed logits in the inner backend's own steps, with its constants, so that its sums and they compare."""

    def __init__(self, options: RowOptions, notes: str, like: Tensor) -> None:
        temperature, scale = (x.to(like.device, torch.float64) for x in (options.temperature, options.logit_scale))
        cap = None if options.logit_softcap is None else options.logit_softcap.to(like.device, torch.float64)
        unit = ((scale if cap is None else cap) / temperature).expand(like.shape)
        self.unit, self.factor = unit, torch.ones_like(unit)  # unit: nats a step
        self.inner = None if cap is None else scale / cap
        if notes == "exponents":  # of two; float32 as in csrc's Transform
            self.factor, self.unit = (unit * 1.44269504088896340736).float().double(), torch.full_like(unit, LN2)
            self.inner = None if self.inner is None else self.inner.float().double()

    def of(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of raw logits (n,) or (n, V) of some rows."""
        factor = self.factor[rows].view(-1, *[1] * (logits.ndim - 1))
        x = logits.double()
        if self.inner is not None:
            x = torch.where(x == torch.inf, x, torch.tanh(x * self.inner))
        return x * factor


class Sharded:
    """``inner`` on a `Shard`: logits are this rank's columns, labels the vocabulary's."""

    def __init__(self, inner: Backend, shard: Shard) -> None:
        self.inner, self.shard, self.notes = inner, shard, inner.notes

    def unavailable(self, device_type: str) -> str | None:
        return self.inner.unavailable(device_type)

    def reduce(self, partial: Tensor) -> None:
        """Sum a gradient over the ranks, in place."""
        if partial.numel() and self.shard.group is not None:
            dist.all_reduce(partial, group=self.shard.group)

    def forward(self, inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
        given, start = inputs.contexts(), self.shard.start
        self.merge(inputs, outputs, lambda piece: [x[..., piece.first - start : piece.stop - start] for x in given])

    def merge(
        self, inputs: ForwardInputs, outputs: ForwardOutputs, columns: Callable[[Piece], Sequence[Tensor]]
    ) -> Tensor:
        """``forward``, of ``inputs`` whose logits are not read: those of a piece, context by context, are asked for.

        Returns (N,) bool, the rows that are left to do: none of a group's.
        """
        labels, options, shard = inputs.labels, inputs.options, self.shard
        *flat, stats = (buffer.zero_() for buffer in outputs)
        outputs = ForwardOutputs._make([*(buffer.view(-1) for buffer in flat), stats])
        live = labels != options.ignore_index
        steps = _Steps(options, self.notes, labels)
        with_entropy = outputs.entropy.numel() > 0
        used = live if inputs.negative_mask is None else live & inputs.negative_mask
        given = ((inputs.policy, live), (inputs.positive, live), (inputs.negative, used))
        reads = [read for logits, read in given if logits is not None]
        mine, late = self._sums(columns, reads, labels, options, steps, with_entropy)
        sums, own = self._exchange(mine)
        unit = steps.unit.repeat(len(reads))
        top, shares = _relative(sums[..., 0], sums[..., 1], unit)
        log_total = shares.sum(1).log()
        odds = log_total + (top - own) * unit
        found = iter(F.logsigmoid(-odds).split(labels.numel()))
        logprobs, positive, negative = (None if logits is None else next(found) for logits, _ in given)
        assert logprobs is not None
        if negative is not None:
            negative = torch.where(used, negative, logprobs)
        rows = live.nonzero().squeeze(1)
        reference.put(
            inputs, outputs, rows, logprobs[rows], *(x if x is None else x[rows] for x in (positive, negative))
        )
        odds, top, log_total, unit = (x[: labels.numel()] for x in (odds, top, log_total, unit))
        entropy = torch.zeros_like(odds)
        if with_entropy:
            stops = torch.tensor([piece.stop for piece in shard.pieces], device=labels.device)
            where = torch.bucketize(labels, stops, right=True).clamp(max=len(shard.pieces) - 1)
            entropy = _merged_entropy(shares[: labels.numel()], sums[: labels.numel(), :, 2], odds, where)
            outputs.entropy[rows] = entropy[rows].to(outputs.entropy.dtype)
        if outputs.stats.numel():
            stats = self._stats(top, log_total, odds, entropy, steps, outputs.stats.dtype)
            outputs.stats[rows] = stats[rows].to(outputs.stats.dtype)
            if shard.group is None:
                late |= outputs.stats[:, 1] == SLOW
        return late

    def backward(self, inputs: BackwardInputs) -> None:
        gradient, policy, labels = inputs.gradient, inputs.policy, inputs.labels
        columns, inner = policy.shape[-1], policy.shape[1]
        if columns == 0:
            return
        g, h = (None if x is None else x.to(inputs.logprobs.dtype) for x in (inputs.grad_logprobs, inputs.grad_entropy))
        inputs = inputs._replace(
            grad_logprobs=g, grad_entropy=h, logprobs=inputs.logprobs.view(-1), entropy=inputs.entropy.view(-1)
        )
        live = labels != inputs.options.ignore_index
        moved = live & sum((x != 0 for x in (g, h) if x is not None), torch.zeros_like(live))
        held = (labels >= self.shard.start) & (labels < self.shard.start + columns)
        local = torch.where(held, labels - self.shard.start, -1)
        slow = moved & (inputs.stats[:, 1] == SLOW)
        late = [
            (rows, self._slow_gradient(inputs, rows, local[rows]))
            for rows in reference.chunks(slow.nonzero().squeeze(1), columns)
        ]
        if self.notes:
            fast = live & ~slow
            options = inputs.options._replace(ignore_index=-1)
            # The stand-ins' own gradients, from rows of two columns whose second is the label's.
            edge = F.pad(policy[..., :1], (0, 1))
            edge_labels = torch.where(fast, 1, -1)
            inputs = inputs._replace(labels=torch.where(fast, local.clamp(min=0), -1), options=options)
            self.inner.backward(inputs)
            self.inner.backward(inputs._replace(gradient=edge, policy=edge, labels=edge_labels))
            gradient[..., 0] = torch.where(held.view(-1, inner), gradient[..., 0], edge[..., 0])
        else:
            gradient.zero_()
        for rows, values in late:
            gradient[rows // inner, rows % inner] = values

    def policy_loss(self, inputs: LossInputs, outputs: LossOutputs) -> None:
        made = outputs.forward
        stats = made.logprobs.new_zeros((made.logprobs.numel(), 4))
        reference.policy_loss(inputs, outputs._replace(forward=made._replace(stats=stats)), self.forward, self.backward)

    def _sums(
        self, columns: Callable[[Piece], Sequence[Tensor]], reads: list[Tensor], labels: Tensor, options: RowOptions,
        steps: _Steps, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of every piece here origin, total and, of the policy, entropy; at last the label's steps: (C N, 3 P + 1). And
        the rows that are left to do, (N,)."""
        width, late = 2 + with_entropy, torch.zeros_like(labels, dtype=torch.bool)
        out = labels.new_zeros((len(reads), labels.numel(), width * self._most() + 1), dtype=torch.float64)
        for index, piece in enumerate(piece for piece in self.shard.pieces if piece.rank == self.shard.rank):
            for context, (logits, read) in enumerate(zip(columns(piece), reads, strict=True)):
                held = read & (labels >= piece.first) & (labels < piece.stop)
                local = torch.where(read, torch.where(held, labels - piece.first, 0), -1)
                origin, total, entropy, own, slow = self._piece(
                    logits, local, options, steps, with_entropy and context == 0
                )
                late |= slow
                pair = torch.stack([origin, own], 1), torch.stack([total, torch.ones_like(own)], 1)
                whole, parts = _relative(*pair, steps.unit)
                whole = torch.where(parts.sum(1) == 0, -torch.inf, whole)
                found = [torch.where(held, origin, whole), torch.where(held, total, parts.sum(1)), entropy][:width]
                out[context, :, width * index : width * (index + 1)] = torch.stack(found, 1)
                out[context, :, -1] += torch.where(held, own, 0.0)
        return out.flatten(0, 1), late

    def _most(self) -> int:
        """Pieces of the rank that has most."""
        return max(Counter(piece.rank for piece in self.shard.pieces).values())

    def _piece(
        self, logits: Tensor, labels: Tensor, options: RowOptions, steps: _Steps, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Origin and total of the columns but the label's, the entropy of all, the label's steps, and whether a row is
        left to do: each (N,)."""
        outer, inner, vocabulary = logits.shape
        every = torch.arange(labels.numel(), device=labels.device)
        own = logits.gather(-1, labels.clamp(min=0).view(outer, inner, 1)).view(-1)
        own = steps.of(torch.where(own == torch.inf, torch.nan, own), every)
        origin, total, entropy = own.new_zeros(3, labels.numel())
        slow = labels >= 0
        if self.notes:
            zero = torch.zeros((), dtype=torch.float32, device="cpu")
            nothing = torch.empty(0, dtype=torch.float32, device=labels.device)
            made = ForwardOutputs(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)._replace(
                logprobs=nothing.new_empty(labels.shape),
                entropy=nothing.new_empty(labels.shape if with_entropy else (0,)),
                stats=nothing.new_zeros((labels.numel(), 4)),
            )
            options = options._replace(ignore_index=-1)
            self.inner.forward(ForwardInputs(logits, None, None, labels, None, None, zero, zero, options), made)
            origin, total = made.stats[:, 0].double(), made.stats[:, 1].double()
            origin = torch.where(total == 0, -torch.inf, origin)
            entropy = made.entropy.double() if with_entropy else entropy
            slow &= made.logprobs.isnan() | (made.stats[:, 1] == SLOW)
        if self.shard.group is None:
            if slow.any():
                empty = slow & (logits.amax(-1).view(-1) == -torch.inf)
                origin = torch.where(empty, -torch.inf, origin)
                total, entropy = (torch.where(empty, 0.0, x) for x in (total, entropy))
                slow &= ~empty
            return origin, total, entropy, own, slow
        for rows in reference.chunks(slow.nonzero().squeeze(1), vocabulary):
            x, at = steps.of(logits[rows // inner, rows % inner], rows), labels[rows]
            terms = definition.row_terms(x * steps.unit[rows].unsqueeze(1), at)
            origin[rows] = x.scatter(1, at.unsqueeze(1), -torch.inf).amax(1)
            total[rows], entropy[rows] = terms.log_total.exp(), terms.entropy
        return origin, total, entropy, own, torch.zeros_like(slow)

    def _exchange(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of all pieces in order, (M, K, 2 or 3), and the label's steps (M,), from every rank's."""
        shard, everyone, most = self.shard, [mine], self._most()
        if shard.group is not None:
            everyone = [torch.empty_like(mine) for _ in range(shard.group.size())]
            dist.all_gather(everyone, mine.contiguous(), group=shard.group)
        width = (mine.shape[1] - 1) // most
        unread = [iter(each[:, :-1].split(width, 1)) for each in everyone]
        sums = torch.stack([next(unread[piece.rank]) for piece in shard.pieces], 1)
        return sums, torch.stack([each[:, -1] for each in everyone]).sum(0)  # all but the label's owner have 0

    def _stats(
        self, top: Tensor, log_total: Tensor, odds: Tensor, entropy: Tensor, steps: _Steps, dtype: torch.dtype
    ) -> Tensor:
        """What the inner backend's backward wants to know of a row, or `_slow_gradient`."""
        unit, complement, known = steps.unit, odds.sigmoid(), log_total > -torch.inf
        level = (top * unit + log_total) / LN2
        logit = top / steps.factor  # exact, and within float32 where the logits are
        high = logit.to(dtype).double()
        slow = [high, torch.full_like(top, SLOW), logit - high, log_total]
        if self.notes == "logits":
            origin = torch.where(known, top + log_total / unit, 0.0).float().double()
            log_sum = torch.where(known, (top - origin) * unit + log_total, 0.0)
            log_density = torch.where(complement == 0, 0.0, F.logsigmoid(odds) - log_sum)
            fast = [origin, log_sum.exp(), complement, log_density + entropy]
        else:
            # Two below, as the kernels' own reference may be: what vanishes is that much smaller.
            origin = torch.where(known, level.round() - 2.0, 0.0)
            fast = [origin, torch.where(known, torch.exp2(level - origin), 0.0), complement, torch.zeros_like(top)]
        use_slow = (level.abs() > LARGEST) & known if self.notes else torch.ones_like(known)
        return torch.where(use_slow.unsqueeze(1), torch.stack(slow, 1), torch.stack(fast, 1))

    def _slow_gradient(self, inputs: BackwardInputs, rows: Tensor, local: Tensor) -> Tensor:
        """The gradient of some rows in float64; ``local`` is their labels' column here or -1."""
        inner, columns = inputs.policy.shape[1:]
        raw = inputs.policy[rows // inner, rows % inner]
        steps = _Steps(inputs.options, self.notes, inputs.labels)
        slope = reference.transformed(raw, rows, inputs.options)[1]
        high, _, low, log_total = inputs.stats[rows].double().unbind(1)
        logprobs = inputs.logprobs[rows].double()
        complement = -logprobs.expm1()
        top = (high + low) * steps.factor[rows]
        shifted = (steps.of(raw, rows) - top.unsqueeze(1)) * steps.unit[rows].unsqueeze(1)
        log_others = torch.where(
            (complement == 0).unsqueeze(1), -torch.inf, shifted + (complement.log() - log_total).unsqueeze(1)
        )
        # One more column stands for a label that lies elsewhere.
        at = torch.where(local < 0, columns, local)
        log_others = F.pad(log_others, (0, 1)).scatter(1, at.unsqueeze(1), -torch.inf)
        entropy = inputs.entropy[rows].double() if inputs.entropy.numel() else torch.zeros_like(logprobs)
        found = definition.logits_gradient(
            definition.Rows(logprobs, complement, entropy, log_others, log_others.exp(), log_total),
            F.pad(slope, (0, 1)), at,
            *(None if x is None else x[rows] for x in (inputs.grad_logprobs, inputs.grad_entropy)),
        )  # fmt: skip
        return found[:, :-1].to(inputs.gradient.dtype)


def pieces_of(rank: int, start: int, stop: int) -> list[Piece]:
    """The columns from start to stop, cut where tiles end."""
    cuts = [start, *range((start // TILE + 1) * TILE, stop, TILE), stop]
    return [Piece(rank, first, last) for first, last in pairwise(cuts)]


def _relative(origins: Tensor, totals: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The highest origin (N,), and sums (N, K), each relative to its own origin, relative to that.

    An empty sum has the origin -inf. Origins are subtracted first: however large, nothing cancels.
    """
    top = origins.amax(1)
    top = torch.where(top == -torch.inf, 0.0, top)
    return top, totals * torch.exp((origins - top.unsqueeze(1)) * unit.unsqueeze(1))


def _merged_entropy(shares: Tensor, entropies: Tensor, odds: Tensor, piece: Tensor) -> Tensor:
    """Entropy (N,) of rows cut into K pieces, from each piece's own (N, K).

    ``H = sum m_i (H_i - log m_i)`` with the probability m_i of piece i: every term is positive. ``shares`` (N, K) are
    those of the columns but the label's, which lies in ``piece`` (N,), with ``odds`` against it.
    """
    p, q = (-odds).sigmoid().unsqueeze(1), odds.sigmoid().unsqueeze(1)
    others = q * torch.where(shares == 0, 0.0, shares / shares.sum(1, keepdim=True))
    masses = others.scatter_add(1, piece.unsqueeze(1), p)
    largest = masses.argmax(1, keepdim=True)
    rest = masses.scatter(1, largest, 0.0).sum(1, keepdim=True)  # what the largest lacks, which 1 - m may have lost
    logs = masses.log().scatter(1, largest, torch.log1p(-rest))
    return definition.product(masses, entropies - logs).sum(1)
