"""Every CUDA kernel compiled, without a GPU, for the architectures that setup.py names.

No spills, two blocks of 512 threads on a multiprocessor, of a divergence one, and the loads and stores that the design
counts on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text()
ARCHITECTURES = re.findall(r'"(\w+)"', re.search(r"CUDA_ARCHITECTURES = \((.*)\)", SETUP)[1])
FLAGS = re.search(r'NVCC_FLAGS = "(.*?) -Xfatbin', SETUP)[1].split()
# Sources, and how many kernels each holds.
ROW_KERNELS = {"forward": 6, "policy_loss": 4, "cluster": 4, "divergence": 8}
KERNELS = {**ROW_KERNELS, "rescale": 3, "bandwidth": 2}
STATIC_SHARED = 8192  # bytes of a block, beside which a cluster's rows lie: two such blocks fit anywhere
REGISTERS = 65536 // (2 * 512)
REGISTERS_OF_PAIRS = 65536 // 512  # a block on a multiprocessor: fewer rows in flight for the L2 to hold


def sources_of(architecture: str) -> list[str]:
    """All; those of pairs of rows, which take a minute each, for one architecture without clusters and one with."""
    return [source for source in KERNELS if source != "divergence" or architecture in ("80", "90a")]


class Needs(NamedTuple):
    registers: int
    spills: int
    shared: int


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    triton = find_spec("triton")
    places = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump") or next(
        (found for place in places if (found := shutil.which(place / "cuobjdump"))), None
    )


pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def built(request, tmp_path_factory):
    """An architecture, what ptxas says of its kernels by source, and where the binaries are."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    running = {
        source: subprocess.Popen(
            [nvcc(), *FLAGS, f"-arch=sm_{request.param}", "-cubin", "-Xptxas", "-v",
             ROOT / "csrc" / "cuda" / f"{source}.cu", "-o", folder / f"{source}.cubin"],
            stderr=subprocess.PIPE, text=True,
        )
        for source in sources_of(request.param)
    }  # fmt: skip
    said = {source: process.communicate()[1] for source, process in running.items()}
    for source, process in running.items():
        assert process.returncode == 0, said[source]
        assert "warning" not in said[source], said[source]
    return request.param, said, folder


def kernels(said: str) -> dict[str, Needs]:
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    found = re.findall(pattern, said, re.DOTALL)
    shared = [re.search(r"(\d+) bytes smem", rest) for *_, rest in found]
    return {
        name: Needs(int(used), int(spills), int(bytes_[1]) if bytes_ else 0)
        for (name, spills, used, _), bytes_ in zip(found, shared, strict=True)
    }


def test_no_kernel_spills_and_two_blocks_fit(built):
    architecture, said, _ = built
    for source in sources_of(architecture):
        count = KERNELS[source]
        found = kernels(said[source])
        assert len(found) == count, (architecture, source, list(found))
        for name, needs in found.items():
            assert needs.spills == 0, (architecture, name, needs)
            most = REGISTERS_OF_PAIRS if source == "divergence" else REGISTERS
            assert needs.registers <= most, (architecture, name, needs)
            assert needs.shared <= STATIC_SHARED, (architecture, name, needs)


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
def test_logits_move_sixteen_bytes_at_a_time(built):
    architecture, _, folder = built
    for source in ROW_KERNELS.keys() & set(sources_of(architecture)):
        dump = subprocess.run([cuobjdump(), "-sass", folder / f"{source}.cubin"], capture_output=True, text=True,
                              check=True).stdout  # fmt: skip
        code = dict(re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", dump, re.DOTALL))
        assert len(code) == ROW_KERNELS[source]
        has_clusters = int(re.match(r"\d+", architecture)[0]) >= 90
        for name, text in code.items():
            if source == "cluster" and not has_clusters:
                continue  # an empty kernel, never launched
            assert re.search(r"LDG\.E\S*\.128", text), (architecture, name)
            writes = "backward" in name or source != "forward"
            assert bool(re.search(r"STG\.E\S*\.128", text)) == writes, (architecture, name)
            assert ("UBLKCP" in text) == (source == "cluster"), (architecture, name)
