"""Argument checks, made once by the ops before anything is launched. Each error names the argument."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_logits(name: str, logits: Tensor, labels: Tensor, sharded: bool = False) -> None:
    """``logits`` must be (*labels.shape, V) of a floating dtype with a contiguous last dimension.

    ``sharded``: V is one rank's part of the vocabulary, which may be empty.
    """
    _check_layout(name, logits, sharded)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name}: expected leading shape {tuple(labels.shape)} as labels have, got {tuple(logits.shape)}"
        )
    _same_device(name, logits, labels)


def check_tensor(name: str, value: object) -> None:
    """Dense, and nothing that `torch.func` or forward-mode autograd differentiates."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    # Their tangents would be lost without a word.
    if not torch.compiler.is_compiling() and _is_differentiated(value):
        raise TypeError(
            f"{name}: expected a tensor that a backward differentiates, got one that torch.func or forward mode would"
        )


def _is_differentiated(tensor: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Logits of two models for the same rows and columns; their dtypes may differ."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _check_layout(name, logits)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected shape {tuple(student.shape)} as student_logits have, got {tuple(teacher.shape)}"
        )
    _same_device("teacher_logits", teacher, student, "student_logits")


def _check_layout(name: str, logits: Tensor, sharded: bool = False) -> None:
    check_tensor(name, logits)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {logits.dtype}")
    if logits.ndim == 0 or (logits.shape[-1] == 0 and not sharded):
        raise ValueError(f"{name}: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {logits.stride()}")
    leading = list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))
    if sharded and len(leading) > 2 and any(s != n * t for (_, s), (n, t) in itertools.pairwise(leading)):
        raise ValueError(f"{name}: expected leading dimensions that view as one, got strides {logits.stride()}")


def check_teacher(name: str, teacher: Tensor | None, policy: Tensor, labels: Tensor, sharded: bool = False) -> None:
    """A teacher's logits must have the policy's vocabulary; its dtype may differ."""
    if teacher is None:
        return
    check_logits(name, teacher, labels, sharded)
    if teacher.shape[-1] != policy.shape[-1]:
        raise ValueError(f"{name}: expected V = {policy.shape[-1]} as policy_logits have, got {teacher.shape[-1]}")


def check_labels(labels: Tensor) -> None:
    """Labels must be int32 or int64."""
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels: expected int32 or int64, got {labels.dtype}")


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    _fits("ignore_index", ignore_index)


def _fits(name: str, value: int) -> None:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value:.3g}")


def check_backend(backend: str) -> None:
    """A name; whether there is such a backend is told by the choice."""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {type(backend).__name__}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_row_values(name: str, value: Tensor | None, labels: Tensor, *, boolean: bool = False, each: str = "") -> None:
    """One value per row: 0-d, or as many dimensions as the labels, each 1 or equal. With ``each``, the labels' name:
    of their shape."""
    if value is None:
        return
    check_tensor(name, value)
    if boolean and value.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {value.dtype}")
    if not boolean and not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    shape = tuple(labels.shape)
    if each and value.shape != shape:
        per_rollout = value.numel() == 1 or (len(shape) > 1 and value.shape[0] == shape[0] == value.numel())
        hint = "; sequence-level ratios need contrastive_logprobs" if per_rollout and name == "old_logprobs" else ""
        raise ValueError(f"{name}: expected shape {shape} as {each} have, got {tuple(value.shape)}{hint}")
    if value.ndim == 0:
        _near(name, value, labels)
        return
    _same_device(name, value, labels)
    if value.ndim != labels.ndim or any(got not in (1, size) for got, size in zip(value.shape, shape, strict=True)):
        hint = ""
        if labels.ndim == 2 and value.ndim == 1 and value.shape[0] == shape[0]:
            hint = f"; for one value per rollout pass {name}[:, None]"
        raise ValueError(
            f"{name}: expected a 0-d tensor or shape {shape} with any dimension 1, got {tuple(value.shape)}{hint}"
        )


def scalar(name: str, value: float | Tensor, labels: Tensor | None = None) -> Tensor:
    """A number or 0-d tensor, on the CPU or the labels' device, as a 0-d tensor.

    The addition is what lets `torch.compile` take a Python float as an input of the graph: a schedule of fifty values
    compiles once, where a constant would compile fifty times.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name}: expected a number or a 0-d tensor of one, got {value.dtype}")
        _near(name, value, labels)
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.float64, device="cpu") + value
    try:
        return torch.full((), value, dtype=torch.float64, device="cpu")
    except (OverflowError, RuntimeError):
        raise ValueError(f"{name}: expected a number that float64 can hold, got a larger one") from None


def row_options(
    labels: Tensor, temperature: float | Tensor, logit_scale: float | Tensor, logit_softcap: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Temperature (0-d or one per row), scale and cap as tensors."""
    if isinstance(temperature, Tensor):
        check_row_values("temperature", temperature, labels)
        temperature = temperature.detach()
    else:
        temperature = scalar("temperature", temperature)
    cap = None if logit_softcap is None else scalar("logit_softcap", logit_softcap, labels)
    return temperature, scalar("logit_scale", logit_scale, labels), cap


def check_hidden(name: str, hidden: Tensor, labels: Tensor, weight: Tensor, rows: str = "labels") -> None:
    """``hidden`` must be (*labels.shape, H) for a head (V, H), and share its device; ``rows`` is the labels' name."""
    check_tensor(name, hidden)
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {hidden.dtype}")
    expected = (*labels.shape, weight.shape[1])
    if tuple(hidden.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, of the {rows} and the head, got {tuple(hidden.shape)}")
    _same_device(name, hidden, labels, rows)


def check_head(
    weight: Tensor, bias: Tensor | None, labels: Tensor, prefix: str = "", rows: str = "labels", sharded: bool = False
) -> None:
    """A head is (V, H), floating, on the device of the labels, whose name is ``rows``; its bias (V,).

    ``sharded`` as for `check_logits`.
    """
    for name, tensor, dimensions in ((f"{prefix}lm_head_weight", weight, 2), (f"{prefix}lm_head_bias", bias, 1)):
        if tensor is None and dimensions == 1:
            continue
        check_tensor(name, tensor)
        assert tensor is not None
        if tensor.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.ndim != dimensions or (tensor.numel() == 0 and not sharded):
            gathers = "; under ZeRO-3 call a LogprobHead, which gathers it, or use deepspeed.zero.GatheredParameters"
            hint = gathers if tensor.numel() == 0 else ""
            shape = "(V, H)" if dimensions == 2 else "(V,)"
            raise ValueError(f"{name}: expected shape {shape}, not empty, got {tuple(tensor.shape)}{hint}")
        _same_device(name, tensor, labels, rows)
    if bias is not None and bias.shape[0] != weight.shape[0]:
        expected = f"expected shape ({weight.shape[0]},) as the head has"
        raise ValueError(f"{prefix}lm_head_bias: {expected}, got {tuple(bias.shape)}")


def check_logits_dtype(dtype: torch.dtype | None, hidden: Tensor, weight: Tensor) -> None:
    """The dtype of the matrix products: None for the best, or a 16-bit one, which float64 does not go through."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_dtype: expected None, bfloat16 or float16, got {dtype}")
    if dtype is not None and torch.float64 in (hidden.dtype, weight.dtype):
        raise ValueError(f"logits_dtype: expected None for float64 hidden states or head, got {dtype}")


def check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Every label is ``ignore_index`` or a column. For CPU backends: elsewhere it would stall the queue."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise ValueError(f"labels: expected {ignore_index} or 0 <= label < {vocabulary}, got {int(labels[wrong][0])}")


def check_values(
    labels: Tensor,
    ignore_index: int,
    lam: Tensor,
    eps_w: Tensor,
    temperature: Tensor,
    logit_scale: Tensor,
    logit_softcap: Tensor | None,
) -> None:
    """Values that live on the CPU; reading those of an accelerator would stall its queue."""
    check_credit_values(lam, eps_w)
    check_option_values(labels, ignore_index, temperature, logit_scale, logit_softcap)


def check_option_values(
    rows: Tensor, idle: int, temperature: Tensor, logit_scale: Tensor, logit_softcap: Tensor | None
) -> None:
    """The same for the options; a temperature counts where ``rows`` do not hold ``idle``."""
    _within("logit_scale", logit_scale, "a positive finite number (1e-30 to 1e30)", lambda v: 1e-30 <= v <= 1e30)
    if logit_softcap is not None:
        _within(
            "logit_softcap", logit_softcap, "a positive finite number (1e-30 to 1e30)", lambda v: 1e-30 <= v <= 1e30
        )
    if temperature.ndim == 0:
        _within("temperature", temperature, "a positive finite number (1e-30 to 1e30)", lambda v: 1e-30 <= v <= 1e30)
    elif temperature.device.type == "cpu":
        wrong = (rows != idle) & ~((temperature >= 1e-30) & (temperature <= 1e30))
        if wrong.any():
            got = float(temperature.expand(wrong.shape)[wrong][0])
            raise ValueError(f"temperature: expected a positive finite number for every scored row, got {got}")


def check_credit_values(lam: Tensor, eps_w: Tensor) -> None:
    """``lam`` in [0, 1] and ``eps_w`` in [0, 1), where they live on the CPU."""
    _within("lam", lam, "a number in [0, 1]", lambda v: 0 <= v <= 1)
    _within("eps_w", eps_w, "a number in [0, 1)", lambda v: 0 <= v < 1)


def check_surrogate(surrogate: str, known: tuple[str, ...]) -> None:
    if surrogate not in known:
        hint = "; sequence-level ratios need contrastive_logprobs" if surrogate in ("gspo", "sequence") else ""
        raise ValueError(f"surrogate: expected one of {', '.join(known)}; got {surrogate!r}{hint}")


def check_loss_values(
    clip_low: Tensor, clip_high: Tensor, kl_coef: Tensor, entropy_coef: Tensor, denominator: Tensor
) -> None:
    """Values that live on the CPU, as in `check_values`."""
    _within("clip_low", clip_low, "a number in [0, 1]", lambda v: 0 <= v <= 1)
    _within("clip_high", clip_high, "a number of at least 0", lambda v: v >= 0)
    _within("kl_coef", kl_coef, "a finite number", lambda v: abs(v) < float("inf"))
    _within("entropy_coef", entropy_coef, "a finite number", lambda v: abs(v) < float("inf"))
    _within("denominator", denominator, "a positive finite number", lambda v: 0 < v < float("inf"))


def check_divergence(kind: str, top_k: int | None) -> None:
    known = ("forward_kl", "reverse_kl", "jsd")
    if kind not in known:
        raise ValueError(f"kind: expected one of {', '.join(known)}; got {kind!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt))):
        raise TypeError(f"top_k: expected an int or None, got {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_k is not None:
        _fits("top_k", top_k)


def check_divergence_values(beta: float, clip: float | None) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if clip is not None and not 0 <= clip < float("inf"):
        raise ValueError(f"clip: expected a finite number of at least 0, or None; got {clip}")


def check_in_place(policy: Tensor, teachers: dict[str, Tensor | None], whose: str = "policy_logits") -> None:
    """The gradient may be written over ``policy`` only if nobody else needs those bytes."""
    base = policy._base if policy._is_view() else None
    if policy.is_leaf or (base is not None and base.is_leaf):
        what = "a leaf tensor" if base is None else "a view of a leaf tensor"
        raise ValueError(f"inplace_grad: {whose} is {what}, whose values the gradient would overwrite")
    reach = 0  # of the dimensions within
    for size, stride in sorted(zip(policy.shape, policy.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and policy.numel():
            if stride <= reach:
                raise ValueError(f"inplace_grad: {whose} is an expanded tensor, whose rows share memory")
            reach += (size - 1) * stride
    first, last = _extent(policy)
    for name, teacher in teachers.items():
        if teacher is not None:
            start, end = _extent(teacher)
            if start < last and first < end:
                raise ValueError(f"inplace_grad: {whose} shares memory with {name}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last that a tensor can touch."""
    if tensor.numel() == 0:
        return 0, 0
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _within(name: str, value: Tensor, expected: str, holds: object) -> None:
    assert callable(holds)
    if value.device.type == "cpu" and not holds(number := float(value)):
        raise ValueError(f"{name}: expected {expected}, got {number}")


def _same_device(name: str, tensor: Tensor, other: Tensor, others: str = "labels") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {others} have, got {tensor.device}")


def _near(name: str, value: Tensor, labels: Tensor | None) -> None:
    """A 0-d tensor may stay on the CPU, and without labels on any device whose values can be read."""
    if value.device.type == "cpu" or (value.device.type != "meta" if labels is None else value.device == labels.device):
        return
    where = "cpu" if labels is None or labels.device.type == "cpu" else f"cpu or {labels.device}"
    raise ValueError(f"{name}: expected a 0-d tensor on {where}, got one on {value.device}")
