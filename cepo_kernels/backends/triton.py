"""The Triton backend: one kernel launch a pass, for NVIDIA and AMD GPUs; on CPU tensors in Triton's interpreter.

The kernels are in `triton_kernels`, which is imported, and with it Triton, when a call first needs them.
"""

from __future__ import annotations

import contextlib
import functools
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
from .tables import Launch, launch, pair_launch

RESCALE_BLOCK = 4096
# A product and a sum become one operation only where a kernel says so. Left to itself, ptxas spills a predicate or two
# to fit one more program; 128 registers a thread still let four of them share a multiprocessor.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"enable_fp_fusion": False, "maxnreg": 128},
    "hip": {"enable_fp_fusion": False},
}

notes = "logits"


def unavailable(device_type: str) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"it runs on CUDA and ROCm devices, not on {device_type!r}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'cepo[gpu]'"
    if device_type == "cpu" and not isinstance(_kernels().forward_kernel, InterpretedFunction):
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None


def forward(inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
    options = inputs.options
    vocabulary = inputs.policy.shape[-1]
    softcap = options.logit_softcap is not None
    shape = launch(vocabulary, inputs.policy.dtype, softcap)
    scalars = [*_shared(options), inputs.lam, inputs.eps_w]
    values, numbers = _values(scalars, inputs.policy.device)
    with _current(inputs.policy.device):
        _kernels().forward_kernel[(inputs.labels.numel(),)](
            inputs.policy, inputs.positive, inputs.negative,
            inputs.labels, inputs.advantages, inputs.negative_mask, _per_row(options), values,
            *(buffer if buffer.numel() else None for buffer in outputs),
            *_strides(inputs.policy), *_strides(inputs.positive), *_strides(inputs.negative),
            inputs.policy.shape[1], vocabulary, options.ignore_index, *numbers,
            SOFTCAP=softcap, BLOCK=shape.block, UNROLL=shape.unroll,
            **_compile_options(shape),
        )  # fmt: skip


def backward(inputs: BackwardInputs) -> None:
    options = inputs.options
    vocabulary = inputs.policy.shape[-1]
    softcap = options.logit_softcap is not None
    shape = launch(vocabulary, inputs.policy.dtype, softcap)
    values, numbers = _values(_shared(options), inputs.policy.device)
    with _current(inputs.policy.device):
        _kernels().backward_kernel[(inputs.labels.numel(),)](
            inputs.gradient, inputs.policy, inputs.labels, inputs.grad_logprobs, inputs.grad_entropy,
            inputs.logprobs, inputs.entropy if inputs.entropy.numel() else None, inputs.stats,
            _per_row(options), values,
            *_strides(inputs.gradient), *_strides(inputs.policy),
            inputs.policy.shape[1], vocabulary, options.ignore_index, *numbers,
            SOFTCAP=softcap, BLOCK=shape.backward_block, **_compile_options(shape),
        )  # fmt: skip


def policy_loss(inputs: LossInputs, outputs: LossOutputs) -> None:
    given, made, gradient = inputs.forward, outputs.forward, outputs.gradient
    options = given.options
    vocabulary = given.policy.shape[-1]
    softcap = options.logit_softcap is not None
    shape = launch(vocabulary, given.policy.dtype, softcap)
    values, numbers = _values([*_shared(options), given.lam, given.eps_w, *inputs.numbers], given.policy.device)
    with _current(given.policy.device):
        _loss_kernels().policy_loss_kernel[(given.labels.numel(),)](
            given.policy, given.positive, given.negative,
            given.labels, given.advantages, given.negative_mask, _per_row(options), values,
            *(buffer if buffer.numel() else None for buffer in made[:-1]),
            inputs.old_logprobs, inputs.token_weight, inputs.ref_logprobs,
            outputs.losses, outputs.ratio, outputs.clipped, gradient,
            *_strides(given.policy), *_strides(given.positive), *_strides(given.negative), *_strides(gradient),
            given.policy.shape[1], vocabulary, options.ignore_index, *numbers,
            CISPO=inputs.surrogate == "cispo", SOFTCAP=softcap, BLOCK=shape.block, UNROLL=shape.unroll,
            BACKWARD_BLOCK=shape.backward_block, **_compile_options(shape),
        )  # fmt: skip


def divergence(inputs: DivergenceInputs, outputs: DivergenceOutputs) -> None:
    student, options, gradient = inputs.student, inputs.options, outputs.gradient
    vocabulary = student.shape[-1]
    softcap = options.logit_softcap is not None
    shape = pair_launch(vocabulary, student.dtype, softcap, inputs.top_k is not None)
    values, numbers = _values(_shared(options), student.device)
    kind = 3 if (inputs.kind, inputs.beta) == ("jsd", 0.5) else native.KINDS[inputs.kind]
    with _current(student.device):
        _divergence_kernels().divergence_kernel[(outputs.values.numel(),)](
            student, inputs.teacher, inputs.weight, *top_k_threshold(student, inputs.top_k), _per_row(options), values,
            outputs.values, gradient, *_strides(student), *_strides(inputs.teacher), *_strides(gradient),
            student.shape[1], vocabulary, *numbers, inputs.beta, inputs.clip or 0.0,
            KIND=kind, CLIP=inputs.clip is not None, SOFTCAP=softcap, BLOCK=shape.block, UNROLL=shape.unroll,
            BACKWARD_BLOCK=2 * shape.block, **_compile_options(shape),
        )  # fmt: skip


def rescale(gradient: Tensor, factor: Tensor) -> None:
    """``gradient *= factor``, 0-d on the same device, without waiting for it; at 1 nothing is read."""
    size = gradient.numel()
    with _current(gradient.device):
        _loss_kernels().rescale_kernel[(-(-size // RESCALE_BLOCK),)](gradient, factor, size, BLOCK=RESCALE_BLOCK)


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _loss_kernels() -> Any:
    from . import triton_policy_loss

    return triton_policy_loss


@functools.cache
def _divergence_kernels() -> Any:
    from . import triton_divergence

    return triton_divergence


def _compile_options(shape: Launch) -> dict[str, Any]:
    target = "hip" if torch.version.hip else "cuda"
    return {"num_warps": shape.warps, "num_stages": shape.stages, **COMPILE_OPTIONS[target]}


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(logits: Tensor | None) -> tuple[int, int]:
    return (0, 0) if logits is None else (logits.stride(0), logits.stride(1))


def _shared(options: RowOptions) -> list[Tensor | None]:
    return [options.logit_scale, options.logit_softcap, options.temperature if options.temperature.ndim == 0 else None]


def _per_row(options: RowOptions) -> Tensor | None:
    return options.temperature if options.temperature.ndim else None


def _values(scalars: list[Tensor | None], device: torch.device) -> tuple[Tensor | None, list[float]]:
    """The options as numbers; where one lives on the GPU, as a float64 tensor there too, without waiting for it."""
    if all(scalar is None or scalar.device.type == "cpu" for scalar in scalars):
        return None, [1.0 if scalar is None else float(scalar) for scalar in scalars]
    on_device = [
        torch.full((), 1.0 if scalar is None else float(scalar), dtype=torch.float64, device=device)
        if scalar is None or scalar.device.type == "cpu"
        else scalar.to(device, torch.float64)
        for scalar in scalars
    ]
    return torch.stack(on_device), [1.0] * len(scalars)
