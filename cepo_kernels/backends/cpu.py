"""The CPU backend: native row kernels for AVX-512, AVX2 and any other processor, chosen at run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_label_range
from ..rows import (
    BackwardInputs,
    DivergenceInputs,
    DivergenceOutputs,
    ForwardInputs,
    ForwardOutputs,
    LossInputs,
    LossOutputs,
)
from . import native

_cpu: ModuleType | None
try:
    from .. import _cpu  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _cpu = None
    _missing = f"its extension is not built ({error}); a C++17 compiler and a new `pip install` of cepo build it"
    if (checkout := Path(__file__).parents[2]).joinpath("csrc").is_dir():
        _missing = (
            f"Python found the sources in {checkout} before the installed package, and their extension is not built; "
            "start it from another directory, or `pip install -e .` there"
        )

Product = Callable[[Tensor, Tensor, Tensor, bool], None]
ISAS = ("avx512", "avx2", "portable")


class Variant:
    """The backend on one instruction set; without a name, on the best that this processor has."""

    notes = "exponents"

    def __init__(self, isa: str = "") -> None:
        self.isa = isa
        if not isa and _cpu is not None:
            self.isa = next(name for name in ISAS if _cpu.supported(name))

    def unavailable(self, device_type: str) -> str | None:
        """None, or why CPU kernels cannot serve tensors of this device type."""
        if _cpu is None:
            return _missing
        if device_type != "cpu":
            return f"takes CPU tensors only, not {device_type}"
        if not _cpu.supported(self.isa):
            return f"this processor has no {self.isa}"
        return None

    def forward(self, inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
        assert _cpu is not None
        row_temperature, call = native.call(inputs, outputs)
        labels_are_good = _cpu.forward(self.isa, torch.get_num_threads(), *native.shape(inputs.policy), call)
        del row_temperature
        if not labels_are_good:  # then nothing was computed
            check_label_range(inputs.labels, inputs.policy.shape[-1], inputs.options.ignore_index)

    def policy_loss(self, inputs: LossInputs, outputs: LossOutputs) -> None:
        assert _cpu is not None
        row_temperature, call = native.call(inputs.forward, outputs.forward)
        policy, gradient = inputs.forward.policy, outputs.gradient
        labels_are_good = _cpu.policy_loss(
            self.isa,
            torch.get_num_threads(),
            *native.shape(policy),
            call,
            native.logits(gradient),
            (inputs.surrogate == "cispo", *map(float, inputs.numbers)),
            (
                native.address(inputs.old_logprobs),
                native.address(inputs.token_weight),
                native.address(inputs.ref_logprobs),
            ),
            (outputs.losses.data_ptr(), outputs.ratio.data_ptr(), outputs.clipped.data_ptr()),
            native.fresh_bytes(gradient, policy),
        )
        del row_temperature
        if not labels_are_good:
            check_label_range(inputs.forward.labels, policy.shape[-1], inputs.forward.options.ignore_index)

    def backward(self, inputs: BackwardInputs) -> None:
        assert _cpu is not None
        row_temperature, options = native.options(inputs.options)
        _cpu.backward(
            self.isa,
            torch.get_num_threads(),
            *native.shape(inputs.policy),
            *native.backward_call(inputs, options),
            native.fresh_bytes(inputs.gradient, inputs.policy),
        )
        del row_temperature

    def divergence(self, inputs: DivergenceInputs, outputs: DivergenceOutputs) -> None:
        assert _cpu is not None
        row_temperature, call = native.divergence_call(inputs, outputs)
        fresh = native.fresh_bytes(outputs.gradient, inputs.student)
        _cpu.divergence(self.isa, torch.get_num_threads(), *native.shape(inputs.student), call, fresh)
        del row_temperature

    @property
    def product(self) -> Product | None:
        """Products of bfloat16 operands with float32 results, where this instruction set has them."""
        assert _cpu is not None
        return _product if self.isa == "avx512" and _cpu.supported("avx512bf16") else None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, in huge pages where the system has them: it is touched first in a quarter of the time."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if _cpu is not None:
        _cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``out`` (M, N), float32 with contiguous rows, is, or with ``add`` grows by, ``a`` (M, K) times ``b`` (K, N).

    These are bfloat16, or float32 to be rounded to it once. Sums are float32, in an order that neither the number of
    threads nor the other rows and columns change; subnormals count as 0. Without ``add``, ``out`` may be bfloat16, to
    which they are then rounded.
    """
    assert _cpu is not None
    assert out.dtype == torch.float32 or not add
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    sizes = a.shape[0], b.shape[1], a.shape[1]
    left, right = ((x.data_ptr(), native.DTYPES[x.dtype], *x.stride()) for x in (a, b.t()))
    to = out.data_ptr(), native.DTYPES[out.dtype], out.stride(0)
    _cpu.product(torch.get_num_threads(), left, right, *sizes, *to, add)


def plain_read(data: Tensor, isa: str = "avx2") -> float:
    """Sum of contiguous float32 ``data`` by all threads: what benchmarks mean by reading memory and nothing more."""
    if _cpu is None:
        raise RuntimeError(_missing)
    isa = isa if _cpu.supported(isa) else "portable"
    return float(_cpu.plain_read(isa, torch.get_num_threads(), data.data_ptr(), data.numel()))


_best = Variant()
unavailable, forward, backward = _best.unavailable, _best.forward, _best.backward
policy_loss, divergence, notes = _best.policy_loss, _best.divergence, _best.notes
product = None if _cpu is None else _best.product
