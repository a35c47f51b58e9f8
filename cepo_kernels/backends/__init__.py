"""One module per backend, and the choice between them.

A backend module has four functions: ``unavailable(device_type) -> str | None`` (None, or why it cannot run there),
``forward(ForwardInputs, ForwardOutputs)``, ``backward(BackwardInputs)`` and ``policy_loss(LossInputs, LossOutputs)``;
it may have ``divergence(DivergenceInputs, DivergenceOutputs)``. It never checks arguments: the op did. ``notes`` says
what a forward's stats are to `sharded`, which merges them: "exponents" (a reference in powers of two, the sum of the
others), "logits" (a reference in logits, the sum) or "".
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Protocol, cast

import torch

from ..rows import (
    BackwardInputs,
    DivergenceInputs,
    DivergenceOutputs,
    ForwardInputs,
    ForwardOutputs,
    LossInputs,
    LossOutputs,
)
from . import tables

logger = logging.getLogger("cepo_kernels")

VARIANTS = ("cpu:avx512", "cpu:avx2", "cpu:portable", "cuda:streaming", "cuda:cluster")
NAMES = ("triton", "cuda", "cpu", "reference", *VARIANTS)
# On a GPU `tables.FASTEST` comes first.
_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}


_registered: dict[str, Backend] = {}


class Backend(Protocol):
    """The functions of a backend module."""

    notes: str
    unavailable: Callable[[str], str | None]
    forward: Callable[[ForwardInputs, ForwardOutputs], None]
    backward: Callable[[BackwardInputs], None]
    policy_loss: Callable[[LossInputs, LossOutputs], None]
    divergence: Callable[[DivergenceInputs, DivergenceOutputs], None]


@cache
def load(name: str) -> Backend:
    """The backend called ``name``; ``cpu:avx2`` is the ``cpu`` backend held to one instruction set."""
    module, _, variant = name.partition(":")
    found = importlib.import_module(f".{module}", __name__)
    return cast(Backend, found.Variant(variant) if variant else found)


@cache
def unavailable(name: str, device_type: str, function: str = "forward") -> str | None:
    """None when the backend's ``function`` runs on tensors of this device type here, else the reason in one line."""
    backend = load(name)
    return backend.unavailable(device_type) or (None if hasattr(backend, function) else f"it has no {function} yet")


def register(name: str, backend: Backend) -> None:
    """Give a name, never used before, to a backend that serves some calls only."""
    _registered[name] = backend


@cache
def choose(name: str, device_type: str, dtype: torch.dtype, function: str = "forward") -> Backend:
    """The backend for a call of ``function``: ``name``, or for "auto" the fastest that can run, which is logged once.

    A forward and its backward have one backend.

    Raises:
        ValueError: the name is unknown, or float64 logits were given to a backend other than ``reference``.
        RuntimeError: the named backend cannot run on this machine or device.
    """
    if name == "auto":
        for candidate in preference(device_type, dtype, function):
            if unavailable(candidate, device_type, function) is None:
                logger.info("cepo_kernels uses the %s backend: %s of %s on %s", candidate, function, dtype, device_type)
                if (first := preference(device_type, dtype, function)[0]) != candidate == "reference":
                    reason = unavailable(first, device_type, function)
                    logger.warning("cepo_kernels runs on plain PyTorch, slowly: %s", reason)
                return load(candidate)
    if name in _registered:
        return _registered[name]
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}; got {name!r}")
    if dtype == torch.float64 and name != "reference":
        raise ValueError(f"backend: float64 logits need backend='reference' or 'auto'; got {name!r}")
    reason = unavailable(name, device_type, function)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
    return load(name)


def preference(device_type: str, dtype: torch.dtype, function: str = "forward") -> tuple[str, ...]:
    """Backends that ``auto`` tries, in order."""
    if dtype == torch.float64:
        return ("reference",)
    names = _PREFERENCE.get(device_type, ("reference",))
    first = measured(function) if device_type == "cuda" else None
    return names if first is None else (first, *(name for name in names if name != first))


def measured(function: str) -> str | None:
    """The backend that was measured fastest on a GPU like this one, if any was."""
    capability = compute_capability()
    return None if capability is None else tables.FASTEST.get((function, capability))


@cache
def compute_capability() -> tuple[int, int] | None:
    """Of the current CUDA device; None where there is none."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()
