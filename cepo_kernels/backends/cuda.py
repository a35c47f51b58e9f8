"""The CUDA backend: csrc/cuda, compiled at install time, for compute capability 8.0 and newer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rows import (
    BackwardInputs,
    DivergenceInputs,
    DivergenceOutputs,
    ForwardInputs,
    ForwardOutputs,
    LossInputs,
    LossOutputs,
    RowOptions,
    top_k_threshold,
)
from . import native

_cuda: ModuleType | None
try:
    from .. import _cuda  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    _cuda = None
    _missing = f"its extension is not built ({error}); nvcc and a new `pip install` of cepo build it"

# Which of the fused loss's kernels: the row streamed twice, or kept on the chip by a cluster of blocks (sm_90 and up).
KERNELS = ("auto", "streaming", "cluster")

_UNUSED = torch.full((), 0.75, dtype=torch.float64)  # stands where the kernels look on the device instead


class Variant:
    """The backend, its fused loss held to one of `KERNELS`."""

    notes = "exponents"

    def __init__(self, kernel: str = "auto") -> None:
        self.kernel = kernel

    @property
    def extension(self) -> Any:
        return _cuda

    def unavailable(self, device_type: str) -> str | None:
        if self.extension is None:
            return _missing
        if device_type != "cuda":
            return f"takes CUDA tensors only, not {device_type}"
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if self.kernel == "cluster" and torch.cuda.get_device_capability() < (9, 0):
            return "clusters need compute capability 9.0 or newer"
        return None

    def forward(self, inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
        values, inputs = self._on_device(inputs)
        keep, call = native.call(inputs, outputs)
        with self._launch(inputs.policy) as stream:
            self.extension.forward(*native.shape(inputs.policy), call, native.address(values), stream)
        del keep

    def backward(self, inputs: BackwardInputs) -> None:
        values, options = self._options_on_device(inputs.options, (), inputs.policy.device)
        keep, numbers = native.options(options)
        with self._launch(inputs.policy) as stream:
            self.extension.backward(
                *native.shape(inputs.policy),
                *native.backward_call(inputs, numbers),
                native.address(values),
                stream,
            )
        del keep

    def policy_loss(self, inputs: LossInputs, outputs: LossOutputs) -> None:
        values, forward = self._on_device(inputs.forward, inputs.numbers)
        keep, call = native.call(forward, outputs.forward)
        numbers = [float(x if self._can_read(x) else _UNUSED) for x in inputs.numbers]
        with self._launch(forward.policy) as stream:
            self.extension.policy_loss(
                *native.shape(forward.policy),
                call,
                native.logits(outputs.gradient),
                (inputs.surrogate == "cispo", *numbers),
                tuple(map(native.address, (inputs.old_logprobs, inputs.token_weight, inputs.ref_logprobs))),
                (outputs.losses.data_ptr(), outputs.ratio.data_ptr(), outputs.clipped.data_ptr()),
                native.address(values),
                self.kernel,
                self._shared_limit(forward.policy.device),
                stream,
            )
        del keep

    def divergence(self, inputs: DivergenceInputs, outputs: DivergenceOutputs) -> None:
        values, options = self._options_on_device(inputs.options, (), inputs.student.device)
        keep, call = native.divergence_call(inputs._replace(options=options), outputs)
        threshold, equals = top_k_threshold(inputs.student, inputs.top_k)
        with self._launch(inputs.student) as stream:
            self.extension.divergence(
                *native.shape(inputs.student),
                call,
                native.address(threshold),
                native.address(equals),
                native.address(values),
                stream,
            )
        del keep, threshold, equals

    def rescale(self, gradient: Tensor, factor: Tensor) -> None:
        """``gradient *= factor``, 0-d float32 on the same device, without waiting for it; at 1 nothing is read."""
        dtype = native.DTYPES[gradient.dtype]
        with self._launch(gradient) as stream:
            self.extension.rescale(gradient.data_ptr(), dtype, gradient.numel(), factor.data_ptr(), stream)

    @contextlib.contextmanager
    def _launch(self, tensor: Tensor) -> Iterator[int]:
        """The address of the stream to queue on, its device being the current one."""
        with torch.cuda.device(tensor.device):
            yield torch.cuda.current_stream(tensor.device).cuda_stream

    def _shared_limit(self, device: torch.device) -> int:
        """Bytes of shared memory that a block of a cluster may have; 0 where there are no clusters."""
        properties = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "shared_memory_per_block_optin", 0)) if properties.major >= 9 else 0

    def _can_read(self, number: Tensor) -> bool:
        """Whether the host knows the number without waiting for the device."""
        return number.device.type == "cpu"

    def _on_device(
        self, inputs: ForwardInputs, numbers: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor | None, ForwardInputs]:
        """As `_options_on_device`, for lam, eps_w and a loss's numbers too."""
        others = (inputs.lam, inputs.eps_w, *numbers)
        values, options = self._options_on_device(inputs.options, others, inputs.policy.device)
        if values is None:
            return None, inputs
        return values, inputs._replace(options=options, lam=_UNUSED, eps_w=_UNUSED)

    def _options_on_device(
        self, options: RowOptions, others: tuple[Tensor, ...], device: torch.device
    ) -> tuple[Tensor | None, RowOptions]:
        """The numbers as ten float64 on the device if any of them lives there, and options that can be read at once."""
        per_row, cap = options.temperature.ndim > 0, options.logit_softcap
        given = [options.logit_scale, cap, None if per_row else options.temperature, *others]
        if all(x is None or self._can_read(x) for x in given):
            return None, options
        values = torch.zeros(10, dtype=torch.float64, device=device)
        for index, x in enumerate(given):
            if x is not None:
                values[index] = float(x) if self._can_read(x) else x
        return values, options._replace(
            temperature=options.temperature if per_row else _UNUSED,
            logit_scale=_UNUSED,
            logit_softcap=None if cap is None else _UNUSED,
        )


_auto = Variant()
unavailable, forward, backward, policy_loss = _auto.unavailable, _auto.forward, _auto.backward, _auto.policy_loss
divergence, rescale, notes = _auto.divergence, _auto.rescale, _auto.notes
