"""Vocabulary-parallel calls: what the ranks of a group tell each other before any of them counts on the others.

Each rank brings some columns of the logits, or rows of the head. The ranks exchange one small tensor of facts, for
which the host waits; if one of them was called wrongly, or if they disagree, all of them raise, and none hangs. (Unless
what one calls its ``tp_group`` is no group: then it has nobody to tell.)
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, checks

if TYPE_CHECKING:  # else imported by the first call that has a group
    from .backends.sharded import Piece, Shard

_FACTS = 64  # int64 in a status; the last ones are spare
_FIXED = ("failed", "names", "columns", "vocab_start", "lowest", "highest", "vocab_size", "number of rows")
_MAY_DIFFER = _FIXED[2:6]
_VALUES = ("labels", "ignore_index", "lam", "eps_w", "temperature", "logit_scale", "logit_softcap")
_LOSS_VALUES = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "denominator")
Where = tuple[Any, int | None, int | None]  # tp_group, vocab_size, vocab_start
Op = TypeVar("Op", bound=Callable[..., Any])
_names: dict[tuple[Shard, int], str] = {}


def outside_graphs(op: Op) -> Op:
    """Take a call over a group out of the graphs of `torch.compile`: what the ranks exchange is not for it to see."""

    @functools.wraps(op)
    def call(*args: Any, **options: Any) -> Any:
        plain = options.get("tp_group") is None and all(map(_is_plain, (*args, *options.values())))
        if torch.compiler.is_compiling() and not plain:
            return torch.compiler.disable(op)(*args, **options)
        return op(*args, **options)

    return cast(Op, call)


class Meeting:
    """The checks of a call stand in its ``with`` block, which ends with `bring`; then ``backend`` and ``columns`` hold.

    Without a group it does nothing. With one, ``columns`` is how many of this rank's columns belong to the vocabulary,
    and ``backend`` the name of one that answers for all of it.
    """

    def __init__(self, group: Any, vocab_size: int | None, vocab_start: int | None, backend: str) -> None:
        if group is not None:
            _check_group(group)
        self.group, self.backend, self.sharded = group, backend, group is not None
        self.vocab_size, self.vocab_start = vocab_size, vocab_start

    def __enter__(self) -> Meeting:
        for name, value in (("vocab_size", self.vocab_size), ("vocab_start", self.vocab_start)):
            if value is not None and self.group is None:
                raise ValueError(f"{name}: expected None without tp_group, got {value}")
        return self

    def bring(self, tensors: dict[str, Tensor | None], columns: int, **facts: Any) -> None:
        """What this rank has: logits or hidden states and head by name, its columns, and what all ranks share.

        Of a shared tensor with one more dimension than the labels, hidden states, the scored rows count.
        """
        checks.check_backend(self.backend)
        if self.group is None:
            return
        for name, value in (("vocab_size", self.vocab_size), ("vocab_start", self.vocab_start)):
            if value is not None and (type(value) is not int or not 0 <= value < 1 << 62):
                raise ValueError(f"{name}: expected None or a number of columns, got {value!r}")
        checks.check_values(**{name: facts[name] for name in _VALUES})
        if "denominator" in facts:
            checks.check_loss_values(**{name: facts[name] for name in _LOSS_VALUES})
        dtypes = {f"{name} dtype": None if x is None else x.dtype for name, x in tensors.items()}
        wide = torch.float64 if torch.float64 in dtypes.values() else torch.float32
        self.inner = backends.choose(self.backend, facts["labels"].device.type, wide)
        gradients = {f"{name} requires_grad": torch.is_grad_enabled() and x is not None and x.requires_grad
                     for name, x in tensors.items()}  # fmt: skip
        self.brought, self.ignore_index = columns, facts["ignore_index"]
        self.facts = {"labels": facts["labels"], **dtypes, **gradients, "backend": self.inner.notes, **facts}

    def true(self, tensor: Any, dimension: int = -1) -> Any:
        """A tensor, if there is one, without the columns that are padding."""
        if tensor is None or self.group is None or tensor.shape[dimension] == self.columns:
            return tensor
        return tensor.narrow(dimension, 0, self.columns)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.group is not None and (error is None or isinstance(error, Exception)):
            self._meet(error is not None)

    def _meet(self, failed: bool) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.zeros(_FACTS, dtype=torch.int64, device=device)
        mine[0] = int(failed)
        names, error = [*_FIXED] if failed else [*_FIXED, *self.facts], None
        if not failed:
            try:
                for index, value in enumerate(self._status(names)):
                    mine[index] = value
            except Exception as raised:  # whatever it is, the others wait for what this rank says
                mine[0], error = 1, raised
        everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(everyone, mine, group=self.group)
        if error is not None:
            raise error
        if not failed:
            self._conclude(names, torch.stack(everyone).tolist())

    def _status(self, names: list[str]) -> list[int | Tensor]:
        labels = self.facts["labels"]
        scored = labels != self.ignore_index
        chosen = labels[scored]
        lowest, highest = (chosen.min(), chosen.max()) if chosen.numel() else (0, 0)
        start, size = (-1 if value is None else value for value in (self.vocab_start, self.vocab_size))
        fixed = [0, _number(names, scored), self.brought, start, lowest, highest, size, labels.numel()]
        return [*fixed, *(_number(value, scored) for value in self.facts.values())]

    def _conclude(self, names: list[str], statuses: list[list[int]]) -> None:
        told = [dict(zip(names, status, strict=False)) for status in statuses]
        for rank, fact in enumerate(told):
            if fact["failed"]:
                raise ValueError(f"tp_group: its rank {rank} was called with a wrong argument, which its error names")
        for name in names:
            values = [fact[name] for fact in told]
            if name not in _MAY_DIFFER and len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise ValueError(_difference(name, values[0], values[other], other))
        from .backends.sharded import Shard, Sharded

        pieces, vocabulary = _layout(told)
        lowest, highest = told[0]["lowest"], told[0]["highest"]
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"labels: expected {self.ignore_index} or 0 <= label < {vocabulary}, got {wrong}")
        rank = dist.get_rank(self.group)
        held = [sum(p.stop - p.first for p in pieces if p.rank == r) for r in range(len(told))]
        start = next((p.first for p in pieces if p.rank == rank), 0)
        shard = Shard(self.group, rank, start, vocabulary, max(held), pieces)
        self.columns = held[rank]
        key = (shard, id(self.inner))
        if key not in _names:
            _names[key] = f"shard:{len(_names)}"
            backends.register(_names[key], cast(backends.Backend, Sharded(self.inner, shard)))
        self.backend = _names[key]


def _difference(name: str, first: int, second: int, rank: int) -> str:
    if name == "names":
        return f"tp_group: expected the same op on every rank, but that of rank {rank} is not that of rank 0"
    if name in ("vocab_size", "number of rows"):
        what = name if name == "vocab_size" else "labels"
        values = [None if value < 0 else value for value in (first, second)]
        rows = "" if name == "vocab_size" else " number of rows"
        return (
            f"{what}: expected the same{rows} on every rank, got {values[0]} on rank 0 and {values[1]} on rank {rank}"
        )
    hint = "; under FSDP call a LogprobHead, which gathers the head" if name == "labels" else ""
    hint = "; broadcast what one of them has" if name.endswith(("hidden", "hidden_states")) else hint
    argument, _, what = name.partition(" ")
    expected = f"{argument}: expected the same {what} on every rank of tp_group".replace("  ", " ")
    if first in _TOLD and second in _TOLD:
        return f"{expected}, got {_TOLD[first]} on rank 0 and {_TOLD[second]} on rank {rank}"
    return f"{expected}, but rank {rank} differs from rank 0{hint}"


def _layout(told: list[dict[str, int]]) -> tuple[tuple[Piece, ...], int]:
    """The pieces of all ranks in the vocabulary's order, and its size."""
    from .backends import sharded

    columns, starts = [fact["columns"] for fact in told], [fact["vocab_start"] for fact in told]
    if min(starts) < 0:
        if max(starts) >= 0:
            raise ValueError("vocab_start: expected a number on every rank or None on every rank, got both")
        starts = [sum(columns[:rank]) for rank in range(len(columns))]
    vocabulary = told[0]["vocab_size"]
    vocabulary = max(start + n for start, n in zip(starts, columns, strict=True)) if vocabulary < 0 else vocabulary
    pieces: list[Piece] = []
    reached, last = 0, None
    for start, rank in sorted((start, rank) for rank, start in enumerate(starts)):
        stop = min(start + columns[rank], vocabulary)
        if start >= stop:
            continue
        if start < reached:
            raise ValueError(f"vocab_start: ranks {last} and {rank} both hold column {start}")
        if start > reached:
            break
        pieces += sharded.pieces_of(rank, start, stop)
        reached, last = stop, rank
    if reached < vocabulary or not pieces:
        raise ValueError(f"vocab_size: expected shards that hold columns 0 to {vocabulary}, but none holds {reached}")
    return tuple(pieces), vocabulary


def _check_group(group: Any) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"tp_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("tp_group: expected a group that this process belongs to")


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


_TOLD = {_checksum(value): value for value in (None, False, True, *checks.LOGITS_DTYPES)}  # by their checksums


def _number(value: Any, scored: Tensor) -> int | Tensor:
    """An int64 that tells values apart: a checksum of a tensor's bits, where it lives, or of anything's repr."""
    if not isinstance(value, Tensor):
        return _checksum(value)
    value = value.detach()
    found: Tensor | int = _checksum((value.dtype, tuple(value.shape)))
    # A fresh copy either way, so that several of its elements may be read as one integer.
    rows = value[scored] if value.ndim > scored.ndim else value.clone().reshape(1, -1)
    size = math.gcd(8, rows.shape[1] * rows.element_size()) if rows.numel() else rows.element_size()
    bits = rows.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).long()
    for _ in range(bits.ndim):
        # Odd factors: each is invertible modulo 2^64, so that one changed integer always shows.
        factors = torch.arange(bits.shape[-1], device=bits.device) * 0x5851F42D4C957F2E + 0x14057B7EF767814F
        bits = (bits * factors).sum(-1)
    found += bits
    return found


def local_head(weight: Tensor, bias: Tensor | None, where: Where) -> tuple[Tensor, Tensor | None, Where]:
    """A head's own tensors on this rank, and group, size and start, which a DTensor that is ``Shard(0)`` implies."""
    if _is_plain(weight) and _is_plain(bias):
        return weight, bias, where
    from torch.distributed.tensor import DTensor

    try:
        return _local_head(weight, bias, where)
    except (TypeError, ValueError):
        group = where[0]
        if group is None and isinstance(weight, DTensor) and weight.device_mesh.ndim == 1:
            group = weight.device_mesh.get_group()
        with Meeting(group, None, None, ""):  # the other ranks wait for this one
            raise


def _local_head(weight: Tensor, bias: Tensor | None, where: Where) -> tuple[Tensor, Tensor | None, Where]:
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        if isinstance(bias, DTensor):
            raise TypeError(f"lm_head_bias: expected no DTensor, as lm_head_weight is {type(weight).__name__}")
        return weight, bias, where
    over = [dimension for dimension, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(over) > 1 or not all(weight.placements[dimension].is_shard(0) for dimension in over):
        raise ValueError(
            "lm_head_weight: expected a DTensor that is Shard(0) over at most one dimension of its mesh and Replicate "
            f"over the others, got {weight.placements}"
        )
    if isinstance(bias, DTensor) and bias.placements != weight.placements:
        raise ValueError(f"lm_head_bias: expected the head's {weight.placements}, got {bias.placements}")
    if over:
        if any(value is not None for value in where):
            raise ValueError("tp_group: expected None (vocab_size and vocab_start too) for a head that is a DTensor")
        mesh, vocab_size = weight.device_mesh, weight.shape[0]
        start = min(vocab_size, mesh.get_local_rank(over[0]) * -(-vocab_size // mesh.size(over[0])))
        where = mesh.get_group(over[0]), vocab_size, start
    return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, where


def local(name: str, tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, or what a replicated DTensor holds on every rank."""
    if _is_plain(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(f"{name}: expected a tensor or a replicated DTensor, got {tensor.placements}")
    return tensor.to_local()


def _is_plain(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or type(tensor) in (Tensor, nn.Parameter)
