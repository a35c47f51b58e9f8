"""The ops behind `linear`: a head applied to some rows, or columns, at a time, and the row kernels to what comes out.

The contexts of a chunk go through the head in one product; rows that cannot matter go through none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, ops
from .backends import sharded
from .linear_products import Gathered, Gradients, Head, Products, kept_dtype, result_dtype
from .loss_ops import backwards_part, is_last, kernels_part, loss_buffers, returned, scaled, times, total
from .rows import BackwardInputs, ForwardInputs, ForwardOutputs, LossInputs, LossOutputs, RowOptions, row_values

NOTHING, SLOPES, LOGITS = "nothing", "slopes", "logits"  # what a forward keeps for its backward


def _chosen(mask: Tensor) -> Tensor:
    """Indices of the rows to work on; all of them while a CUDA graph is captured, which cannot wait for the number."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(mask.numel(), device=mask.device)
    return mask.nonzero().squeeze(1)


def _pieces(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Of like size; the first is the largest."""
    return rows.tensor_split(-(-rows.numel() // size)) if rows.numel() else ()


class Call:
    """What both forwards share: rows, chunk by chunk, as a backend takes them."""

    def __init__(
        self, contexts: list[Tensor | None], head: Head, labels: Tensor, advantages: Tensor | None,
        negative_mask: Tensor | None, lam: Tensor, eps_w: Tensor, options: RowOptions, outputs: ForwardOutputs,
        logits_dtype: torch.dtype | None, backend: str,
    ) -> None:  # fmt: skip
        shape, dtype = labels.shape, outputs.logprobs.dtype
        self.contexts = [None if x is None else x.reshape(-1, x.shape[-1]) for x in contexts]
        policy = self.contexts[0]
        assert policy is not None
        self.backend = backends.choose(backend, policy.device.type, dtype)
        others = [x for x in self.contexts[1:] if x is not None]
        self.policy, self.products = policy, Products(head, policy, logits_dtype, self.backend, others)
        self.labels = row_values(labels, shape, torch.int64)
        self.advantages, self.mask = row_values(advantages, shape, dtype), row_values(negative_mask, shape, torch.bool)
        self.lam, self.eps_w = lam, eps_w
        self.options = options._replace(temperature=ops.row_temperature(options.temperature, labels))
        self.outputs = ForwardOutputs._make([*(x.view(-1) for x in outputs[:-1]), outputs.stats])
        if policy.device.type == "cpu" and not self.products.sharded:
            checks.check_label_range(self.labels, head.weight.shape[0], options.ignore_index)

    def chunks(self, chosen: Tensor, keep: bool = False) -> Iterator[tuple[Tensor, ForwardInputs]]:
        """Rows and their inputs, logits included, whose memory is the next's too; ``keep``: they may be kept."""
        present = [x for x in self.contexts if x is not None]
        size = (self.products.rows if keep else self.products.piece)(len(present))
        room: Tensor | None = None
        for rows in _pieces(chosen, size):
            states = torch.cat([x[rows] for x in present])
            room = self.products.logits(states, None if room is None else room[: states.shape[0]])
            yield rows, self.inputs(rows, room)

    def inputs(self, rows: Tensor, together: Tensor) -> ForwardInputs:
        """What a backend takes of ``rows``, the logits of all contexts ``together``."""
        logits = iter(together.split(rows.numel()))
        views = [None if x is None else next(logits).unsqueeze(0) for x in self.contexts]
        assert views[0] is not None
        return ForwardInputs(
            views[0], views[1], views[2], self.labels[rows], _of(self.advantages, rows), _of(self.mask, rows),
            self.lam, self.eps_w, _options(self.options, rows),
        )  # fmt: skip

    def tiled(self, chosen: Tensor) -> Tensor:
        """Fill the outputs of rows from tiles of the vocabulary, so that no row's logits exist, where that is faster;
        returns the rows that are left to do."""
        present, columns = [x for x in self.contexts if x is not None], self.products.head.weight.shape[0]
        size = self.products.tile_rows(len(present))
        if size is None or chosen.numel() * columns <= size * sharded.TILE:
            return chosen
        shard = sharded.Shard(None, 0, 0, columns, columns, tuple(sharded.pieces_of(0, 0, columns)))
        merging = sharded.Sharded(self.backend, shard)
        room = self.products.room(min(size, chosen.numel()) * len(present))
        left = []
        for rows in _pieces(chosen, size):
            states, part = torch.cat([x[rows] for x in present]), self.part(rows.numel())
            late = merging.merge(self.inputs(rows, states), part, partial(self._tile, states, rows.numel(), room))
            self.scatter(rows, part)
            left.append(rows[late])
        return torch.cat(left)

    def _tile(self, states: Tensor, count: int, room: Tensor, piece: sharded.Piece) -> list[Tensor]:
        """The logits of a piece of the vocabulary, context by context, in ``room``."""
        tile = room[: states.shape[0] * (piece.stop - piece.first)].view(states.shape[0], -1)
        logits = self.products.of_columns(piece.first, piece.stop).logits(states, tile)
        return [x.unsqueeze(0) for x in logits.split(count)]

    def part(self, count: int) -> ForwardOutputs:
        """Fresh outputs for a chunk of ``count`` rows."""
        *values, stats = self.outputs
        fresh = [x.new_empty(count if x.numel() else 0) for x in values]
        return ForwardOutputs._make([*fresh, stats.new_zeros((count if stats.numel() else 0, ops.STATS))])

    def scatter(self, rows: Tensor, part: ForwardOutputs) -> None:
        for whole, values in zip(self.outputs, part, strict=True):
            if values.numel():
                whole[rows] = values


def _of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _options(options: RowOptions, rows: Tensor) -> RowOptions:
    return options if options.temperature.ndim == 0 else options._replace(temperature=options.temperature[rows])


def _zeroed(outputs: ForwardOutputs) -> ForwardOutputs:
    for buffer in outputs:
        buffer.zero_()
    return outputs


def _forward(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, weight: Tensor, bias: Tensor | None,
    labels: Tensor, advantages: Tensor | None, negative_mask: Tensor | None, lam: Tensor, eps_w: Tensor,
    temperature: Tensor, logit_scale: Tensor, logit_softcap: Tensor | None, ignore_index: int,
    return_entropy: bool, keep: str, logits_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    checks.check_values(labels, ignore_index, lam, eps_w, temperature, logit_scale, logit_softcap)
    outputs, *kept = _forward_buffers(
        policy, positive, negative, weight, bias, labels, advantages, return_entropy, keep, logits_dtype
    )
    _zeroed(outputs)
    options = RowOptions(temperature, logit_scale, logit_softcap, ignore_index)
    call = Call([policy, positive, negative], Head(weight, bias), labels, advantages, negative_mask, lam, eps_w,
                options, outputs, logits_dtype, backend)  # fmt: skip
    if keep == SLOPES:
        for slopes in kept:
            slopes.zero_()
    wanted = [slopes for slopes in kept if keep == SLOPES and slopes.numel()]
    gathered = [Gathered(call.products, labels.numel(), False) for _ in wanted]
    alone = positive is negative is None
    chosen = _chosen(call.labels != ignore_index)
    if keep == NOTHING:
        chosen = call.tiled(chosen)
    for rows, inputs in call.chunks(chosen, keep == LOGITS and alone):
        part = call.part(rows.numel())
        call.backend.forward(inputs, part)
        call.scatter(rows, part)
        if keep == SLOPES:
            _keep_slopes(call, rows, inputs, part, wanted, gathered)
        elif keep == LOGITS and rows.numel() == kept[0].shape[0] and alone:
            kept[0] = inputs.policy[0]
        elif keep == LOGITS:
            kept[0][call.labels == ignore_index] = 0.0
            kept[0][rows] = inputs.policy[0]
    for slopes, rest in zip(wanted, gathered, strict=True):
        _put_slopes(call.products, slopes, rest.rest())
    if keep == SLOPES and call.products.sharded:
        for slopes in kept:
            call.products.sharded.reduce(slopes)
    return (*outputs, *kept)


def _keep_slopes(
    call: Call, rows: Tensor, inputs: ForwardInputs, part: ForwardOutputs, wanted: list[Tensor],
    gathered: list[Gathered],
) -> None:  # fmt: skip
    """The gradients of log p and, where asked for, of the entropy in the hidden states; the last takes the logits'
    place."""
    one = torch.ones_like(part.logprobs)
    for slopes, upstream, ready in zip(wanted, ((one, None), (None, one)), gathered, strict=False):
        into = inputs.policy if slopes is wanted[-1] else torch.empty_like(inputs.policy)
        call.backend.backward(
            BackwardInputs(
                into, inputs.policy, inputs.labels, *upstream, part.logprobs, part.entropy, part.stats, inputs.options
            )
        )
        _put_slopes(call.products, slopes, ready.add(rows, into[0]))


def _put_slopes(products: Products, slopes: Tensor, ready: Iterator[tuple[Tensor, Tensor, bool]]) -> None:
    for rows, logits_gradient, _ in ready:
        slopes[rows] = products.hidden_gradient(logits_gradient).to(slopes.dtype)


def _stand_ins(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, weight: Tensor, logits_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Empty tensors for the logits of each context, of the dtype that theirs would have."""
    like = policy.new_empty(0, dtype=result_dtype(policy, weight, logits_dtype))
    return like, None if positive is None else like, None if negative is None else like


def _forward_buffers(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, weight: Tensor, bias: Tensor | None,
    labels: Tensor, advantages: Tensor | None, return_entropy: bool, keep: str, logits_dtype: torch.dtype | None,
) -> tuple[ForwardOutputs, Tensor, Tensor]:  # fmt: skip
    """Outputs; and what is kept for the backward: of SLOPES the gradients of log p and of the entropy in the hidden
    states, (N, H); of LOGITS the policy's logits, (N, V)."""
    stand_ins = _stand_ins(policy, positive, negative, weight, logits_dtype)
    outputs = ops.forward_buffers(*stand_ins, labels, advantages, return_entropy)
    if keep == LOGITS:
        return outputs, stand_ins[0].new_empty((labels.numel(), weight.shape[0])), stand_ins[0].new_empty(0)

    def slopes(wanted: bool) -> Tensor:
        return outputs.logprobs.new_empty((labels.numel(), weight.shape[1]) if wanted else (0,))

    return outputs, slopes(keep == SLOPES), slopes(keep == SLOPES and return_entropy)


def _backward(
    policy: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, logprobs: Tensor, entropy: Tensor, stats: Tensor, kept: Tensor | None,
    temperature: Tensor, logit_scale: Tensor, logit_softcap: Tensor | None, ignore_index: int, needs: list[bool],
    logits_dtype: torch.dtype | None, backend: str, overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The logits, kept or made again, of the rows whose upstream gradient is not zero, and what follows from theirs;
    ``overwrite``: nobody needs the kept ones as they are."""
    hidden = policy.reshape(-1, policy.shape[-1])
    chosen = backends.choose(backend, policy.device.type, logprobs.dtype)
    products = Products(Head(weight, bias), hidden, logits_dtype, chosen)
    gradients = Gradients(products, hidden, needs)
    flat = row_values(labels, labels.shape, torch.int64)
    g, h = (row_values(x, labels.shape, logprobs.dtype) for x in (grad_logprobs, grad_entropy))
    options = RowOptions(ops.row_temperature(temperature, labels), logit_scale, logit_softcap, ignore_index)
    moved = torch.zeros_like(flat, dtype=torch.bool)
    for values in (g, h):
        if values is not None:
            moved |= values != 0
    taken = _chosen((flat != ignore_index) & moved)
    whole, first, room = kept is not None and taken.numel() == kept.shape[0], 0, hidden.new_empty(0)
    at_once = (whole and overwrite) or products.operand == products.result  # no rounding, or no room for more
    for rows in _pieces(taken, products.rows(1) if at_once else products.piece(1)):
        if whole and kept is not None:
            logits = kept[first : first + rows.numel()]
        if whole and overwrite:
            gradient = logits
        else:
            gradient = room = room[: rows.numel()] if first else products.empty(rows.numel(), products.result)
        if kept is None:
            logits = products.logits(hidden[rows], gradient)
        elif not whole:
            logits = torch.index_select(kept, 0, rows, out=gradient)
        first += rows.numel()
        chosen.backward(
            BackwardInputs(
                gradient.unsqueeze(0), logits.unsqueeze(0), flat[rows], _of(g, rows), _of(h, rows),
                logprobs.view(-1)[rows],
                entropy.view(-1)[rows] if entropy.numel() else entropy, stats[rows], _options(options, rows),
            )
        )  # fmt: skip
        gradients.add(rows, gradient)
    grad_hidden, grad_weight, grad_bias = gradients.results()
    return grad_hidden.view(policy.shape) if needs[0] else grad_hidden, grad_weight, grad_bias


def _policy_loss(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, weight: Tensor, bias: Tensor | None,
    labels: Tensor, advantages: Tensor, old_logprobs: Tensor | None, token_weight: Tensor | None,
    ref_logprobs: Tensor | None, negative_mask: Tensor | None, lam: Tensor, eps_w: Tensor, clip_low: Tensor,
    clip_high: Tensor, kl_coef: Tensor, entropy_coef: Tensor, denominator: Tensor,
    temperature: Tensor, logit_scale: Tensor, logit_softcap: Tensor | None, ignore_index: int, surrogate: str,
    with_entropy: bool, needs: list[bool], logits_dtype: torch.dtype | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    checks.check_values(labels, ignore_index, lam, eps_w, temperature, logit_scale, logit_softcap)
    checks.check_loss_values(clip_low, clip_high, kl_coef, entropy_coef, denominator)
    outputs = _loss_buffers(policy, positive, negative, weight, labels, advantages, with_entropy, logits_dtype)
    _zeroed(outputs.forward)
    for buffer in (outputs.losses, outputs.ratio, outputs.clipped):
        buffer.zero_()
    options = RowOptions(temperature, logit_scale, logit_softcap, ignore_index)
    call = Call([policy, positive, negative], Head(weight, bias), labels, advantages, negative_mask, lam, eps_w,
                options, outputs.forward, logits_dtype, backend)  # fmt: skip
    gradients = Gradients(call.products, call.policy, needs)
    per_row = [row_values(x, labels.shape, outputs.losses.dtype) for x in (old_logprobs, token_weight, ref_logprobs)]
    dtype = _narrowest(policy, weight, logits_dtype)
    numbers = (clip_low, clip_high, kl_coef, entropy_coef, kernels_part(dtype, denominator))
    assert call.advantages is not None
    acts = (call.advantages != 0) | (kl_coef != 0).to(labels.device) | (entropy_coef != 0).to(labels.device)
    for rows, inputs in call.chunks(_chosen((call.labels != ignore_index) & acts)):
        part = call.part(rows.numel())
        losses, ratio = torch.empty_like(part.logprobs), torch.empty_like(part.logprobs)
        clipped = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        old, weights, ref = (_of(values, rows) for values in per_row)
        gradient = inputs.policy if any(needs) else None
        call.backend.policy_loss(
            LossInputs(inputs, old, weights, ref, surrogate, numbers),
            LossOutputs(part, losses, ratio, clipped, gradient),
        )
        call.scatter(rows, part)
        for whole, values in ((outputs.losses, losses), (outputs.ratio, ratio), (outputs.clipped, clipped)):
            whole.view(-1)[rows] = values
        if gradient is not None:
            flat = gradient[0]
            # Rows of weight 0 and the PPO surrogate's clipped ones have no gradient but of a KL or entropy term.
            if _is_zero(kl_coef, entropy_coef):
                still = clipped if surrogate == "ppo" else torch.zeros_like(clipped)
                moved = _chosen(~(still if weights is None else still | (weights == 0)))
                if moved.numel() < rows.numel():
                    rows, flat = rows[moved], flat[moved]
            if rows.numel():
                gradients.add(rows, flat)
    grad_hidden, grad_weight, grad_bias = gradients.results()
    grad_hidden = grad_hidden.view(policy.shape) if needs[0] else grad_hidden
    loss = total(outputs.losses, denominator)
    loss, ratio, clipped, _, *of_forward = returned(loss, outputs, outputs.losses)
    return loss, ratio, clipped, grad_hidden, grad_weight, grad_bias, *of_forward


def _narrowest(policy: Tensor, weight: Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    """float16, whose range a gradient may leave, where a product has it."""
    return torch.float16 if torch.float16 in (policy.dtype, weight.dtype, logits_dtype) else policy.dtype


def _is_zero(*values: Tensor) -> bool:
    return all(value.device.type == "cpu" and float(value) == 0.0 for value in values)


def _loss_buffers(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, weight: Tensor, labels: Tensor,
    advantages: Tensor, with_entropy: bool, logits_dtype: torch.dtype | None,
) -> LossOutputs:  # fmt: skip
    stand_ins = _stand_ins(policy, positive, negative, weight, logits_dtype)
    return loss_buffers(*stand_ins, labels, advantages, with_entropy, False)


_HEAD = "Tensor policy, Tensor? positive, Tensor? negative, Tensor weight, Tensor? bias, Tensor labels"
_TENSORS = ", ".join(["Tensor"] * 10)
ops.library.define(
    f"linear_forward({_HEAD}, Tensor? advantages, Tensor? negative_mask, Tensor lam, Tensor eps_w, {ops.OPTIONS}, "
    f"bool return_entropy, str keep, ScalarType? logits_dtype, str backend) -> ({_TENSORS})"
)
ops.library.define(
    "linear_grad(Tensor policy, Tensor weight, Tensor? bias, Tensor labels, Tensor? grad_logprobs, "
    "Tensor? grad_entropy, Tensor logprobs, Tensor entropy, Tensor stats, Tensor? kept, "
    f"{ops.OPTIONS}, bool[] needs, ScalarType? logits_dtype, str backend) -> (Tensor, Tensor, Tensor)"
)
ops.library.define(
    f"linear_policy_loss({_HEAD}, Tensor advantages, Tensor? old_logprobs, Tensor? token_weight, "
    "Tensor? ref_logprobs, Tensor? negative_mask, Tensor lam, Tensor eps_w, Tensor clip_low, Tensor clip_high, "
    f"Tensor kl_coef, Tensor entropy_coef, Tensor denominator, {ops.OPTIONS}, str surrogate, bool with_entropy, "
    f"bool[] needs, ScalarType? logits_dtype, str backend) -> ({_TENSORS}, Tensor, Tensor, Tensor)"
)
_DENOMINATOR = 17
linear_forward = torch.ops.cepo_kernels.linear_forward.default
linear_grad = torch.ops.cepo_kernels.linear_grad.default
linear_policy_loss = torch.ops.cepo_kernels.linear_policy_loss.default


def _empty_gradients(
    policy: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    bias = weight[:, 0] if bias is None else bias
    hidden, weight, bias = (
        x.new_empty(x.shape if needed else (0,), dtype=kept_dtype(x))
        for x, needed in zip((policy, weight, bias), needs, strict=True)
    )
    return hidden, weight, bias


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    outputs, *kept = _forward_buffers(*inputs[:7], *inputs[-4:-1])
    return (*outputs, *kept)


def _fake_policy_loss(
    policy: Tensor, positive: Any, negative: Any, weight: Tensor, bias: Any, labels: Tensor, advantages: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, with_entropy, needs, logits_dtype, _ = rest
    outputs = _loss_buffers(policy, positive, negative, weight, labels, advantages, with_entropy, logits_dtype)
    loss, ratio, clipped, _, *of_forward = returned(outputs.losses.new_empty(()), outputs, outputs.losses)
    return loss, ratio, clipped, *_empty_gradients(policy, weight, bias, needs), *of_forward


def _refuse_create_graph(*grads: Tensor | None) -> None:
    """Unless torch.compile traces the backward, with autograd on and no real tensors."""
    if any(type(grad) is Tensor for grad in grads):
        ops.refuse_create_graph()


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, _, weight, bias, labels = inputs[:6]
    *options, ignore_index = inputs[10:14]
    outputs = ForwardOutputs(*output[:8])
    ctx.set_materialize_grads(False)
    ctx.keep, ctx.logits_dtype, ctx.backend = inputs[15:]
    ctx.ignore_index, ctx.dtype = ignore_index, policy.dtype
    if ctx.keep == SLOPES:
        ctx.save_for_backward(*output[8:])
    else:
        kept = output[8] if ctx.keep == LOGITS else None
        ctx.save_for_backward(
            policy, weight, bias, labels, outputs.logprobs, outputs.entropy, outputs.stats, kept, *options
        )
    ctx.shape = policy.shape


def of_live_rows(upstream: Tensor, gradient: Tensor) -> Tensor:
    """What came from above (N,), without what is no number for a row that nobody asked for, whose gradient is 0."""
    return upstream.masked_fill((gradient == 0).all(-1), 0.0)


def _backward_forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_create_graph(*grads)
    outputs = ForwardOutputs(*grads[:8])  # type: ignore[arg-type]
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    upstream = (outputs.logprobs, outputs.entropy)
    if ctx.keep == SLOPES:
        for slopes, values in zip(ctx.saved_tensors, upstream, strict=True):
            if values is not None and slopes.numel():
                # A product with 0 would keep the NaN of a row that nobody asked for.
                column = of_live_rows(values.reshape(-1), slopes)[:, None]
                term = torch.where(column == 0, 0.0, slopes * column)
                grad_hidden = term if grad_hidden is None else grad_hidden + term
            elif values is not None and not values.numel():
                grad_hidden = values
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.dtype).view(ctx.shape)
    elif any(values is not None for values in upstream):
        policy, weight, bias, labels, logprobs, entropy, stats, kept, *options = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        last = all(is_last(values) for values in upstream if values is not None)
        run: Any = partial(_backward, overwrite=True) if last else linear_grad
        found = run(
            policy, weight, bias, labels, upstream[0], upstream[1] if entropy.numel() else None, logprobs, entropy,
            stats, kept, *options, ctx.ignore_index, needs, ctx.logits_dtype, ctx.backend,
        )  # fmt: skip
        grad_hidden, grad_weight, grad_bias = (
            x.to(like.dtype) if wanted else None
            for x, like, wanted in zip(found, (policy, weight, bias), needs, strict=True)
        )
    return grad_hidden, None, None, grad_weight, grad_bias, *(None,) * 13


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-3]
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], *inputs[3:5])]
    ctx.narrowest = _narrowest(inputs[0], inputs[3], inputs[-2])
    ctx.save_for_backward(*output[3:6], inputs[_DENOMINATOR])


def _backward_loss(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_create_graph(upstream)
    *gradients, denominator = ctx.saved_tensors
    if upstream is not None:
        last = is_last(upstream)
        upstream = scaled(upstream, backwards_part(ctx.narrowest, denominator))
    hidden, weight, bias = (
        times(gradient, upstream, last).to(dtype) if wanted and upstream is not None else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    )
    return hidden, None, None, weight, bias, *(None,) * 22


for name, implementation in (("forward", _forward), ("grad", _backward), ("policy_loss", _policy_loss)):
    ops.library.impl(f"linear_{name}", implementation, "CompositeExplicitAutograd")
torch.library.register_fake("cepo_kernels::linear_forward", _fake_forward, lib=ops.library)
torch.library.register_fake("cepo_kernels::linear_policy_loss", _fake_policy_loss, lib=ops.library)
torch.library.register_fake(
    "cepo_kernels::linear_grad",
    lambda policy, weight, bias, *rest: _empty_gradients(policy, weight, bias, rest[-3]),
    lib=ops.library,
)
torch.library.register_autograd(
    "cepo_kernels::linear_forward", _backward_forward, setup_context=_save_forward, lib=ops.library
)
torch.library.register_autograd(
    "cepo_kernels::linear_policy_loss", _backward_loss, setup_context=_save_loss, lib=ops.library
)
