"""A model whose weights, gradients and optimiser state are divided among the processes (FSDP2, `fully_shard`).

Where nothing has a gradient (rollouts, rewards, teachers) the weights are made whole for the while, so that processes
need not keep step there: one may generate longer than another. With a gradient they are whole one layer at a time, and
every process goes through as many passes as any other. A model that is not sharded passes through all of this as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cepo.layers import decoder_layers

T = TypeVar("T")
_CALL = "_cepo_call"
_RUNNING = "_cepo_running"
_WHOLE = "_cepo_whole"


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, _CALL)


@torch.no_grad()
def shard(model: Any, device: torch.device, world: int) -> None:
    """Divide `model`, in place; the optimiser is made afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world,))
    # Embedding and head, which may be tied, stay with the whole; so does a vision tower, which not every pass needs.
    units: list[Any] = [*decoder_layers(model.get_decoder()), model]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    for unit, before in zip(units, [model, *units[:-1]], strict=True):
        unit.set_gradient_divide_factor(1.0)  # losses are shares of one sum
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        # Said once: else it follows the forward passes so far, of which processes have different numbers.
        unit.set_modules_to_backward_prefetch([before])
    setattr(model, _CALL, lambda function: function())
    register_fsdp_forward_method(model, _CALL)
    setattr(model, _RUNNING, False)
    setattr(model, _WHOLE, False)
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)  # tells it who is the root
    model.reshard()  # which the root does not do by itself, and the optimiser is to get what stays


def forward(model: Any, function: Callable[[], T], teacher: Any = None, shows: bool = False) -> T:
    """`function()`, which takes gradients through layers and head of `model`; what it returns holds the loss.

    Args:
        teacher: another model, whose head it reads beside that.
        shows: some process has images for `model`, if perhaps not this one, nor in this pass.
    """
    if not is_sharded(model):
        return function()
    setattr(model, _RUNNING, True)
    try:
        with whole(teacher) if teacher not in (None, model) else nullcontext():
            result: T = getattr(model, _CALL)(partial(_reaching_all, model, function) if shows else function)
    finally:
        setattr(model, _RUNNING, False)
    return result


def _reaching_all(model: Any, function: Callable[[], Any]) -> Any:
    """`function()`, whose loss gives weights beside the decoder a gradient even if it shows no image: of zeros.

    Processes sum the gradients that there are, and have to agree on which.
    """
    result = function()
    decoder = {id(p) for p in model.get_decoder().parameters()}
    beside = [p.flatten()[0] for p in model.parameters() if p.requires_grad and id(p) not in decoder]
    return result._replace(loss=result.loss + 0 * torch.stack(beside).sum()) if beside else result


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """All weights in every process, for passes without gradient; every process has to come here."""
    if not is_sharded(model) or getattr(model, _WHOLE):
        yield
        return
    units = _units(model)
    if getattr(model, _RUNNING):  # the root is whole already, and stays so
        units.remove(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    setattr(model, _WHOLE, True)
    try:
        yield
    finally:
        setattr(model, _WHOLE, False)
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def _units(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def weights(model: Any) -> dict[str, Tensor] | None:
    """All weights, for `save_pretrained`; None: those that the model itself has. Every process has to come here."""
    if not is_sharded(model):
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    once: dict[int, Any] = {}  # tied weights stay tied
    for name, value in (state := model.state_dict()).items():
        key = id(parameters.get(name, value))
        state[name] = once[key] = once[key] if key in once else _collected(value)
    return dict(state)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of the whole optimiser, the same for any number of processes. Every process has to come here."""
    state = optimizer.state_dict()
    gathered = {index: {name: _collected(v) for name, v in values.items()} for index, values in state["state"].items()}
    return {**state, "state": gathered}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take such a state, of which a sharded optimiser keeps its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {index: {name: _part(value, parameters[index]) for name, value in values.items()}
           for index, values in state["state"].items()}  # fmt: skip
    optimizer.load_state_dict({**state, "state": own})


def local(parameters: Iterator[nn.Parameter]) -> list[Tensor]:
    """What this process has of each."""
    return [_to_local(p) for p in parameters]


def norm(value: Tensor) -> float:
    """A gradient norm, over all parts."""
    whole_norm: Any = value
    return float(whole_norm.full_tensor() if hasattr(value, "full_tensor") else whole_norm)


def broken_weight(model: nn.Module) -> str | None:
    """The name of a weight of which this process has NaN or infinity; None: of none."""
    return next((name for name, p in model.named_parameters() if not _to_local(p).isfinite().all()), None)


def _to_local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _collected(value: Any) -> Any:
    """The whole of a divided tensor, for the first process, which writes it; the others only give."""
    if not hasattr(value, "full_tensor"):
        return value
    collected = value.full_tensor()
    return collected.cpu() if torch.distributed.get_rank() == 0 else None


def _part(value: Any, parameter: Any) -> Any:
    if not hasattr(parameter, "placements") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
