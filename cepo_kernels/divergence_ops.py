"""The op behind `divergence`, as `torch.library` knows it, and its in-place form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, ops
from .loss_ops import is_batched, rescaled
from .rows import DivergenceInputs, DivergenceOutputs, RowOptions, blocks, row_values

_OPTIONS = "Tensor temperature, Tensor logit_scale, Tensor? logit_softcap"
HOW = f"Tensor? weight, str kind, Tensor beta, Tensor? clip, int? top_k, {_OPTIONS}"
ops.library.define(
    f"divergence(Tensor student, Tensor teacher, {HOW}, bool with_gradient, str backend) -> (Tensor, Tensor)"
)
ops.library.define(f"divergence_(Tensor(a!) student, Tensor teacher, {HOW}, str backend) -> Tensor")
divergence = torch.ops.cepo_kernels.divergence.default
divergence_ = torch.ops.cepo_kernels.divergence_.default


class Call:
    """What all rows of a call share, as a backend takes it: from the ops' arguments ``weight`` to ``backend``."""

    def __init__(self, shape: torch.Size, vocabulary: int, device: torch.device, dtype: torch.dtype,
                 arguments: tuple[Any, ...]) -> None:  # fmt: skip
        weight, kind, beta, clip, self.top_k, temperature, logit_scale, logit_softcap, backend = arguments
        self.backend = backends.choose(backend, device.type, dtype, "divergence")
        self.beta, self.clip = float(beta), None if clip is None else float(clip)
        checks.check_divergence_values(self.beta, self.clip)
        rows = torch.ones_like(temperature) if weight is None else weight
        checks.check_option_values(rows, 0, temperature, logit_scale, logit_softcap)
        self.kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, kind) if kind == "jsd" else kind
        if self.top_k is not None and self.top_k >= vocabulary - 1:
            self.top_k = None
        self.weight = row_values(weight, shape, dtype)
        temperature = temperature if temperature.ndim == 0 else row_values(temperature, shape, temperature.dtype)
        self.options = RowOptions(temperature, logit_scale, logit_softcap, 0)

    def run(self, student: Tensor, teacher: Tensor, rows: Any, outputs: DivergenceOutputs) -> None:
        """Of ``rows``, whose logits are given (O, I, V): a slice or indices; None: all of the call's."""
        everything = rows is None
        temperature = self.options.temperature
        self.backend.divergence(
            DivergenceInputs(
                student, teacher, self.weight if everything or self.weight is None else self.weight[rows], self.kind,
                self.beta, self.clip, self.top_k,
                self.options if everything or temperature.ndim == 0
                else self.options._replace(temperature=temperature[rows]),
            ),
            outputs,
        )  # fmt: skip


def result_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _run(student: Tensor, teacher: Tensor, arguments: tuple[Any, ...], gradient: Tensor | None) -> Tensor:
    *shape, vocabulary = student.shape
    values = torch.empty(shape, dtype=result_dtype(student, teacher), device=student.device)
    call = Call(values.shape, vocabulary, student.device, values.dtype, arguments)
    if values.numel():
        for rows, (student_rows, teacher_rows, gradient_rows) in blocks([student, teacher, gradient]):
            assert student_rows is not None
            assert teacher_rows is not None
            part = values.view(-1) if rows is None else values.view(-1)[rows]
            call.run(student_rows, teacher_rows, rows, DivergenceOutputs(part, gradient_rows))
    return values


def _divergence(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, with_gradient, backend = rest
    gradient = torch.empty(student.shape if with_gradient else (0,), dtype=student.dtype, device=student.device)
    return _run(student, teacher, (*arguments, backend), gradient if with_gradient else None), gradient


def _divergence_in_place(student: Tensor, teacher: Tensor, *arguments: Any) -> Tensor:
    values = _run(student, teacher, arguments, student)
    torch.autograd.graph.increment_version(student)
    return values


def _fake(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values = student.new_empty(student.shape[:-1], dtype=result_dtype(student, teacher))
    return values, student.new_empty(student.shape if rest[-2] else (0,))


def times_rows(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The gradient (..., V) times what came from above for each of its rows; a row of 0 may hold anything."""
    column = upstream.unsqueeze(-1)
    return torch.where(column == 0, 0.0, gradient * column).to(gradient.dtype)


class Fused(torch.autograd.Function):
    """Outside `torch.compile`: the gradient is kept, once, and given away."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, in_place: bool, *arguments: Any) -> Tensor:
        *rest, ctx.backend = arguments
        detached = student.detach()
        values: Tensor
        if in_place:
            values = divergence_(detached, *arguments)
            ctx.gradient = detached
        else:
            values, ctx.gradient = divergence(detached, *rest, True, ctx.backend)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ops.refuse_create_graph()
        if ctx.gradient is None:
            raise RuntimeError("divergence: the first backward took the gradient; compute the divergence again")
        gradient, ctx.gradient = ctx.gradient, None
        if is_batched(upstream):
            gradient = times_rows(gradient, upstream)
        elif upstream.numel() and is_uniform(upstream):
            rescaled(gradient, upstream[(0,) * upstream.ndim], ctx.backend)
        elif upstream.device.type != "cpu" or bool((upstream != 1).any()):
            column = upstream.unsqueeze(-1)
            gradient.mul_(column).masked_fill_(column == 0, 0.0)
        return gradient, *(None,) * 11


def is_uniform(upstream: Tensor) -> bool:
    """Whether every row has the same upstream gradient, known without looking: that of a sum."""
    return upstream.numel() <= 1 or not any(upstream.stride())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None if upstream is None else times_rows(gradient, upstream), *(None,) * 11


ops.library.impl("divergence", _divergence, "CompositeExplicitAutograd")
ops.library.impl("divergence_", _divergence_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::divergence", _fake, lib=ops.library)
torch.library.register_fake(
    "cepo_kernels::divergence_", lambda student, teacher, *rest: _fake(student, teacher, False, "")[0], lib=ops.library
)
torch.library.register_autograd("cepo_kernels::divergence", _backward, setup_context=_save, lib=ops.library)
