"""Backends to run every promise against, one seed for all of hypothesis, and buffers that start as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from hypothesis import settings

from cepo_kernels import backends, linear_products
from cepo_kernels.backends import sharded

settings.register_profile("one-seed", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("one-seed")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # or they would wait for each other's threads
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

BACKENDS: list[Any] = ["reference", "cpu:portable", "cpu:avx2", "cpu:avx512"]
if torch.cuda.is_available():
    BACKENDS += [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda", "cuda:streaming")]
elif os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS.append("triton")
BACKENDS += [name for name in backends.NAMES if name.startswith("emulated")]  # with `-p cuda_emulated`


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs here; tensors go to `oracle.device_of` it."""
    name: str = request.param
    reason = backends.unavailable(name, oracle.device_of(name))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def _has_divergence(request: pytest.FixtureRequest) -> None:
    """Skips the backends that have no divergence yet."""
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend")
        reason = backends.unavailable(name, oracle.device_of(name), "divergence")
        if reason is not None:
            pytest.skip(f"{name}: {reason}")


@pytest.fixture(scope="class")
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN, so that an element which a kernel forgets to write is seen, whatever malloc returns."""

    def poison(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
            buffer: torch.Tensor = allocate(*args, **kwargs)
            return buffer.fill_(float("nan")) if buffer.dtype.is_floating_point else buffer

        return allocated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch, "empty_strided", poison(torch.empty_strided))
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        yield


@pytest.fixture(params=["one chunk", "many chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that rows, and the columns of a head of width 24, come in several pieces with a last one of another
    size; and in tiles of the vocabulary where the native CPU backend has them so."""
    if request.param == "many chunks":
        monkeypatch.setattr(sharded, "TILE", 90)
        monkeypatch.setattr(linear_products, "LOGITS_BYTES", 0)  # then 16 rows
        monkeypatch.setattr(linear_products, "TILE_BYTES", 100 * 24 * 4)


# Some of theirs take minutes: first, or one of several workers would be left alone with them at the end.
SLOW = ("test_cuda_sanitized.py", "test_triton.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))
