"""Which backend each op would use on this machine, and why."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from . import backends

OPS = (
    "token_logprobs",
    "contrastive_logprobs",
    "contrastive_policy_loss",
    "divergence",
    "linear_token_logprobs",
    "linear_contrastive_logprobs",
    "linear_contrastive_policy_loss",
    "linear_divergence",
)


@dataclass(frozen=True)
class BackendReport:
    """``chosen[op][device]`` is a backend's name; ``reasons[device][backend]`` is None where it can run.

    ``basis[op]`` says on what the choice on a GPU rests, ``extensions`` of each compiled extension whether it is there.
    """

    chosen: dict[str, dict[str, str]]
    reasons: dict[str, dict[str, str | None]]
    extensions: dict[str, str]
    basis: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for device, reasons in self.reasons.items():
            lines.append(f"{device} tensors: " + ", ".join(f"{op} -> {self.chosen[op][device]}" for op in self.chosen))
            lines += [f"  {name}: {reason or 'can run'}" for name, reason in reasons.items()]
            if device == "cuda":
                lines += [f"  {text}: {', '.join(ops)}" for text, ops in self._by_basis().items()]
        lines += [f"{name}: {state}" for name, state in self.extensions.items()]
        return "\n".join(lines)

    def _by_basis(self) -> dict[str, list[str]]:
        return {text: [op for op in self.basis if self.basis[op] == text] for text in self.basis.values()}


def backend_report() -> BackendReport:
    """What ``backend="auto"`` picks for bfloat16, float16 and float32 logits, per op and device type.

    float64 logits always take the reference backend, and `contrastive_credit` is plain PyTorch everywhere.
    """
    reasons: dict[str, dict[str, str | None]] = {}
    chosen: dict[str, dict[str, str]] = {op: {} for op in OPS}
    for device in ("cuda", "cpu"):
        candidates = backends.preference(device, torch.bfloat16)
        reasons[device] = {name: backends.unavailable(name, device) for name in candidates}
        if device == "cuda" and not torch.cuda.is_available():
            reasons[device] = dict.fromkeys(candidates, "torch sees no CUDA or ROCm device")
        for op in OPS:
            function = _function(op)
            able = (
                name
                for name in backends.preference(device, torch.bfloat16, function)
                if reasons[device][name] is None and backends.unavailable(name, device, function) is None
            )
            chosen[op][device] = next(able, "none")
    extensions = {name: _state(name) for name in ("cepo_kernels._cpu", "cepo_kernels._cuda")}
    return BackendReport(chosen, reasons, extensions, {op: _basis(_function(op)) for op in OPS})


def _function(op: str) -> str:
    """What a backend is asked for; the ops from hidden states spend their time in matrix products, not there."""
    return {"contrastive_policy_loss": "policy_loss", "divergence": "divergence"}.get(op, "forward")


def _basis(function: str) -> str:
    capability = backends.compute_capability()
    if capability is None:
        return "no CUDA device to choose for"
    where = f"compute capability {capability[0]}.{capability[1]}"
    fastest = backends.measured(function)
    return f"not measured on this device ({where})" if fastest is None else f"{fastest} measured fastest on {where}"


def _state(name: str) -> str:
    try:
        extension = importlib.import_module(name)
    except ImportError as error:
        return f"not built ({error})"
    if hasattr(extension, "openmp"):
        found = "built, with OpenMP" if extension.openmp else "built, without OpenMP: one thread"
        return f"{found}, {'with' if extension.supported('avx512bf16') else 'without'} bfloat16 products here"
    return "built"
