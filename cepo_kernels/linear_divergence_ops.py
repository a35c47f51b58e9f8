"""The op behind `linear_divergence`: two heads applied to a bounded number of rows at a time, and their divergences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .divergence_ops import HOW, Call, is_uniform, times_rows
from .divergence_ops import result_dtype as wider
from .linear_ops import _chosen, _empty_gradients, _pieces, _refuse_create_graph, of_live_rows
from .linear_products import Gradients, Head, Products, result_dtype
from .loss_ops import is_batched, is_last, times
from .rows import DivergenceOutputs

_HEADS = "Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor teacher_weight, Tensor? teacher_bias"
ops.library.define(
    f"linear_divergence({_HEADS}, {HOW.replace('Tensor? weight', 'Tensor? row_weight')}, bool[] needs, "
    "ScalarType? logits_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
linear_divergence = torch.ops.cepo_kernels.linear_divergence.default


def _values(
    student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor, logits_dtype: torch.dtype | None
) -> Tensor:
    """Unfilled, in the dtype that divergences of the logits would have."""
    pairs = ((student, weight), (teacher, teacher_weight))
    logits = [x.new_empty(0, dtype=result_dtype(x, head, logits_dtype)) for x, head in pairs]
    return student.new_empty(student.shape[:-1], dtype=wider(*logits))


def _linear_divergence(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, teacher_weight: Tensor,
    teacher_bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *how, needs, logits_dtype, backend = rest
    values = _values(student, teacher, weight, teacher_weight, logits_dtype).zero_()
    call = Call(values.shape, weight.shape[0], student.device, values.dtype, (*how, backend))
    students, teachers = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    of_student = Products(Head(weight, bias), students, logits_dtype, call.backend)
    of_teacher = Products(Head(teacher_weight, teacher_bias), teachers, logits_dtype, call.backend)
    gradients = Gradients(of_student, students, needs)
    flat = values.view(-1)
    scored = torch.ones_like(flat, dtype=torch.bool) if call.weight is None else call.weight != 0
    logits: Tensor | None = None
    others: Tensor | None = None
    for rows in _pieces(_chosen(scored), of_student.piece(2)):
        logits = of_student.logits(students[rows], None if logits is None else logits[: rows.numel()])
        others = of_teacher.logits(teachers[rows], None if others is None else others[: rows.numel()])
        part, gradient = flat.new_empty(rows.shape), logits.unsqueeze(0) if any(needs) else None
        call.run(logits.unsqueeze(0), others.unsqueeze(0), rows, DivergenceOutputs(part, gradient))
        flat[rows] = part
        if any(needs):
            gradients.add(rows, logits)
    grad_hidden, grad_weight, grad_bias = gradients.results()
    return values, grad_hidden.view(student.shape) if needs[0] else grad_hidden, grad_weight, grad_bias


def _fake(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, teacher_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, needs, logits_dtype, _ = rest
    values = _values(student, teacher, weight, teacher_weight, logits_dtype)
    return values, *_empty_gradients(student, weight, bias, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.tensors = [x is None or isinstance(x, Tensor) for x in inputs]
    ctx.others = [None if is_tensor else x for x, is_tensor in zip(inputs, ctx.tensors, strict=True)]
    ctx.save_for_backward(*output[1:], *(x for x, is_tensor in zip(inputs, ctx.tensors, strict=True) if is_tensor))


def _common(upstream: Tensor, weight: Tensor | None) -> Tensor | None:
    """What came from above, if it is the same for all scored rows; None also where that cannot be looked at: it waits
    for the device, as the work that it may save would."""
    if is_uniform(upstream):
        return upstream.sum() if upstream.numel() <= 1 else upstream[(0,) * upstream.ndim]
    capturing = upstream.is_cuda and torch.cuda.is_current_stream_capturing()
    if type(upstream) is not Tensor or is_batched(upstream) or capturing:
        return None
    scored = upstream.reshape(-1) if weight is None else upstream[(weight != 0).expand(upstream.shape)]
    return scored[:1].sum() if bool((scored == scored[:1]).all()) else None


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward, times what came from above; the head's again if that differs among rows."""
    if upstream is None:
        return (None,) * len(ctx.others)
    _refuse_create_graph(upstream)
    saved, needs = ctx.saved_tensors, ctx.others[-3]  # read once: a checkpoint makes them again for each reading
    gradients = saved[:3]
    found: list[Tensor | None] = [None, None, None]
    tensors = iter(saved[3:])
    inputs = [next(tensors) if is_tensor else x for x, is_tensor in zip(ctx.others, ctx.tensors, strict=True)]
    weight = inputs[6]
    if not is_uniform(upstream) and not (needs[1] or needs[2]):
        found[0] = times_rows(gradients[0], of_live_rows(upstream, gradients[0]))
    elif (factor := _common(upstream, weight)) is not None:
        last = is_last(factor)
        found = [times(gradient, factor, last).to(gradient.dtype) for gradient in gradients]
    else:
        inputs[6] = upstream if weight is None else torch.where(weight == 0, 0.0, weight * upstream)
        found = list(linear_divergence(*inputs)[1:])
    hidden, weight, bias = (x if wanted else None for x, wanted in zip(found, needs, strict=True))
    return hidden, None, weight, bias, *(None,) * (len(ctx.others) - 4)


ops.library.impl("linear_divergence", _linear_divergence, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::linear_divergence", _fake, lib=ops.library)
torch.library.register_autograd("cepo_kernels::linear_divergence", _backward, setup_context=_save, lib=ops.library)
