"""The vocabulary-parallel merge as a backend of one process, which holds every tile of a row.

As a plugin it puts the suite that all backends share to the merge, edges, bits and gradients included:

    PYTHONPATH=tests pytest -p sharded_alone -k emulated tests
    TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p sharded_alone -p interpreter_rounding -k emulated tests
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch.distributed as dist

from cepo_kernels import backends, checks
from cepo_kernels.backends.sharded import Piece, Shard, Sharded
from cepo_kernels.rows import BackwardInputs, ForwardInputs, ForwardOutputs, LossInputs, LossOutputs

TILE = 1000
INNER = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu", "reference")


class Alone:
    notes = ""

    def __init__(self, inner: str) -> None:
        self.inner = inner

    def unavailable(self, device_type: str) -> str | None:
        return backends.unavailable(self.inner, device_type)

    def _merged(self, inputs: ForwardInputs | BackwardInputs) -> Sharded:
        vocabulary = inputs.policy.shape[-1]
        checks.check_label_range(inputs.labels, vocabulary, inputs.options.ignore_index)
        pieces = tuple(Piece(0, first, min(first + TILE, vocabulary)) for first in range(0, vocabulary, TILE))
        shard = Shard(dist.group.WORLD, 0, 0, vocabulary, vocabulary, pieces)  # type: ignore[arg-type]
        return Sharded(backends.load(self.inner), shard)

    def forward(self, inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
        self._merged(inputs).forward(inputs, outputs)

    def backward(self, inputs: BackwardInputs) -> None:
        self._merged(inputs).backward(inputs)

    def policy_loss(self, inputs: LossInputs, outputs: LossOutputs) -> None:
        self._merged(inputs.forward).policy_loss(inputs, outputs)


KNOWN = {f"emulated:merged {name}": Alone(name) for name in INNER}
_load, _choose = backends.load, backends.choose


def _pick(name: str, *rest: Any) -> Any:
    return KNOWN[name] if name in KNOWN else _choose(name, *rest)


_pick.cache_clear = _choose.cache_clear  # type: ignore[attr-defined]
backends.load = lambda name: KNOWN[name] if name in KNOWN else _load(name)  # type: ignore
backends.choose = _pick  # type: ignore
backends.NAMES = (*backends.NAMES, *KNOWN)
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
