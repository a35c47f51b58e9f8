"""The CUDA kernels as a backend on this CPU, through `cuda_emulator.h`: csrc/cuda compiled by g++, bindings included.

As a plugin it adds the emulated backends to the suite that all backends share, which then takes its time:

    PYTHONPATH=tests pytest -p cuda_emulated -k emulated tests
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cepo_kernels import backends
from cepo_kernels.backends import cuda
from cepo_kernels.rows import BackwardInputs, ForwardInputs, ForwardOutputs, LossInputs, LossOutputs, RowOptions

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-DCEPO_EMULATE", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
# Where Python was started with AddressSanitizer, as `test_cuda_sanitized` does.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
FLAGS += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZED else ["-O2"]
MODULE = "_cuda_emulated"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
NAMES = ("emulated", "emulated:values", "emulated:auto")


def missing() -> str | None:
    """None, or what the emulator lacks here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator switches stacks as x86-64 Linux does"
    return None if shutil.which("g++") else "needs g++"


@functools.cache
def module() -> ModuleType:
    """The bindings and kernels, built once per process."""
    import pybind11

    folder = Path(tempfile.mkdtemp(prefix="cepo-emulated-"))
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(TESTS), str(CSRC / "cuda")]
    flags = [*FLAGS, *(flag for path in includes for flag in ("-I", path))]
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    commands = [
        ["g++", *flags, "-x", "c++", "-c", str(source), "-o", made]
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        list(compilers.map(functools.partial(subprocess.run, check=True), commands))
    target = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", *flags, "-shared", *objects, "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(MODULE, target)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    shutil.rmtree(folder)
    return loaded


class Emulated(cuda.Variant):
    """The CUDA backend on the emulator. With ``values``, no number of a call can be read by the host."""

    def __init__(self, kernel: str = "streaming", values: bool = False, shared_limit: int = 227 * 1024) -> None:
        super().__init__(kernel)
        self.values, self.shared_limit = values, shared_limit

    @property
    def extension(self) -> ModuleType:
        return module()

    def unavailable(self, device_type: str) -> str | None:
        return missing()

    @contextlib.contextmanager
    def _launch(self, tensor: Tensor) -> Iterator[int]:
        yield 0

    def _shared_limit(self, device: torch.device) -> int:
        return self.shared_limit

    def _can_read(self, number: Tensor) -> bool:
        return not self.values


_OPTIONS = RowOptions(torch.ones(()), torch.ones(()), None, -100)
_HALF, _NONE = torch.full((), 0.5), torch.zeros(())


def raw_forward(
    policy: Tensor, positive: Tensor | None, negative: Tensor | None, labels: Tensor, advantages: Tensor | None
) -> ForwardOutputs:
    """All that the forward writes, (N, V) logits given as they lie in memory and labels unchecked."""
    count = len(labels)
    outputs = ForwardOutputs(*(torch.empty(count) for _ in ForwardOutputs._fields[:-1]), torch.zeros(count, 4))
    logits = (None if x is None else x[None] for x in (policy, positive, negative))
    KNOWN["emulated"].forward(ForwardInputs(*logits, labels, advantages, None, _HALF, _HALF, _OPTIONS), outputs)
    return outputs


def raw_backward(policy: Tensor, labels: Tensor, g: float, h: float, found: ForwardOutputs, out: Tensor) -> Tensor:
    """The gradient of ``g log p + h H``, written to ``out``, which may be the policy's logits."""
    upstream = (torch.full((len(labels),), g), torch.full((len(labels),), h))
    kept = (found.logprobs, found.entropy, found.stats)
    KNOWN["emulated"].backward(BackwardInputs(out[None], policy[None], labels, *upstream, *kept, _OPTIONS))
    return out


def raw_loss(
    backend: Emulated, policy: Tensor, positive: Tensor, negative: Tensor, labels: Tensor, advantages: Tensor,
    gradient: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """All that the fused loss, without KL and entropy bonus, writes, labels unchecked; the gradient where told to."""
    count = len(labels)
    gradient = torch.empty(policy.shape, dtype=policy.dtype) if gradient is None else gradient
    forward = ForwardOutputs(*(torch.empty(count) for _ in ForwardOutputs._fields))._replace(stats=torch.empty(0))
    outputs = LossOutputs(forward, torch.empty(count), torch.empty(count), torch.empty(count, dtype=torch.bool),
                          gradient[None])  # fmt: skip
    logits = (policy[None], positive[None], negative[None])
    inputs = ForwardInputs(*logits, labels, advantages, None, _HALF, _HALF, _OPTIONS)
    backend.policy_loss(LossInputs(inputs, None, None, None, "ppo", (_HALF, _HALF, _NONE, _NONE, _HALF)), outputs)
    named = {**forward._asdict(), **outputs._asdict()}
    return {name: value for name, value in named.items() if name not in ("forward", "stats")}


KNOWN: dict[str, Emulated] = {
    "emulated": Emulated(),
    "emulated:values": Emulated(values=True),
    "emulated:auto": Emulated("auto"),
}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Makes the emulated backends known by name."""
    load, choose, names = backends.load, backends.choose, backends.NAMES
    backends.load = lambda name: KNOWN[name] if name in KNOWN else load(name)  # type: ignore[assignment]
    backends.choose = lambda name, *rest: KNOWN[name] if name in KNOWN else choose(name, *rest)  # type: ignore
    backends.NAMES = (*names, *NAMES)  # type: ignore[assignment]
    yield
    backends.load, backends.choose, backends.NAMES = load, choose, names


_for_the_process = contextlib.ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    _for_the_process.enter_context(registered())
