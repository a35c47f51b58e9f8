"""`cepo doctor`: which backend runs here, and whether it computes what it should."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from cepo_kernels import ContrastiveLogprobs, backend_report, contrastive_logprobs

TOLERANCE = 1e-5
ROWS, VOCABULARY = 64, 32_768


def report() -> bool:
    """Print the machine, the backends and a self-test of those that can run; False if one of them is wrong."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("cepo", "torch", "transformers", "triton"))
    print(f"python {platform.python_version()}, {packages}; {torch.get_num_threads()} threads")
    found = backend_report()
    print(found)
    print(f"\nself-test: contrastive_logprobs, {ROWS} x {VOCABULARY} float32, forward and backward, against float64")
    good = True
    for device, backends in found.reasons.items():
        for name in (name for name, reason in backends.items() if reason is None):
            start = time.perf_counter()
            error = self_test(name, device)
            good &= error <= TOLERANCE
            print(
                f"  {name} on {device}: largest relative error {error:.1e} {'ok' if error <= TOLERANCE else 'WRONG'}"
                f"  ({time.perf_counter() - start:.2f} s)"
            )
    return good


def self_test(backend: str, device: str) -> float:
    """Largest error of a backend against the reference in float64, relative to each result's largest entry."""
    generator = torch.Generator().manual_seed(0)
    logits = [4 * torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(3)]
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    advantages = torch.randn(ROWS, generator=generator)

    def run(name: str, dtype: torch.dtype, where: str) -> list[torch.Tensor]:
        policy, positive, negative = (x.to(where, dtype) for x in logits)
        policy.requires_grad_()
        out: ContrastiveLogprobs = contrastive_logprobs(
            policy, positive, negative, labels.to(where), advantages.to(where, dtype), return_entropy=True, backend=name
        )
        assert out.evidence is not None
        assert out.advantages is not None
        assert out.entropy is not None
        (out.logprobs * out.advantages).sum().backward()
        assert policy.grad is not None
        results = (out.logprobs, out.evidence, out.advantages, out.entropy, policy.grad)
        return [x.detach().double().cpu() for x in results]

    expected, got = run("reference", torch.float64, "cpu"), run(backend, torch.float32, device)
    return max(((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected, strict=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
