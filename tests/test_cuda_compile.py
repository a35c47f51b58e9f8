"""The installed CUDA kernels, looked at without a GPU, for the architectures they were compiled for.

Nothing spills, two blocks of 512 threads fit on a multiprocessor, of a divergence one, and the loads and stores that
the design counts on are there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SETUP = (Path(__file__).resolve().parent.parent / "setup.py").read_text()
ARCHITECTURES = re.findall(r'"(\w+)"', re.search(r"CUDA_ARCHITECTURES = \((.*)\)", SETUP)[1])
KERNELS = {  # how many of each kind; all but the last two read rows of logits
    "stream_rows": 8, "stream_backward": 2, "cluster_rows": 4, "stream_divergence": 8, "rescale_pieces": 3,
    "read_units|stream_units": 2,
}  # fmt: skip
READ_ROWS = "stream_rows|stream_backward|cluster_rows|stream_divergence"
STATIC_SHARED = 8192  # bytes of a block, beside which a cluster's rows lie: two such blocks fit anywhere
DRIVERS = 1024  # bytes of it that are the driver's from compute capability 9 on
REGISTERS = 65536 // (2 * 512)
REGISTERS_OF_PAIRS = 65536 // 512  # a block on a multiprocessor: fewer rows in flight for the L2 to hold


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    triton = find_spec("triton")
    places = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump") or next(
        (found for place in places if (found := shutil.which(place / "cuobjdump"))), None
    )


pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="needs an install that found nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump"),
]


def dump(*options: str) -> str:
    extension = find_spec("cepo_kernels._cuda")
    assert extension, "there is an nvcc, and yet the install has no CUDA kernels"
    command = [cuobjdump(), *options, extension.origin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    if f".sm_{request.param}." not in dump("-lelf"):
        pytest.skip(f"the install was not compiled for sm_{request.param} (CEPO_CUDA_ARCHITECTURES)")
    return request.param


def test_no_kernel_spills_and_two_blocks_fit(architecture):
    said = dump("-res-usage", "-arch", f"sm_{architecture}")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    for kind, count in KERNELS.items():
        assert sum(bool(re.search(kind, name)) for name, *_ in found) == count, (kind, found)
    for name, registers, stack, shared, local in found:
        assert int(stack) == int(local) == 0, (name, stack, local)  # where spills would lie
        assert int(registers) <= (REGISTERS_OF_PAIRS if "stream_divergence" in name else REGISTERS), (name, registers)
        assert int(shared) <= STATIC_SHARED + DRIVERS, (name, shared)


def test_logits_move_sixteen_bytes_at_a_time(architecture):
    has_clusters = int(re.match(r"\d+", architecture)[0]) >= 90
    said = dump("-sass", "-arch", f"sm_{architecture}")
    functions = re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", said, re.DOTALL)
    code = {name: text for name, text in functions if re.search(READ_ROWS, name)}
    assert len(code) == sum(count for kind, count in KERNELS.items() if kind in READ_ROWS.split("|"))
    for name, text in code.items():
        if "cluster_rows" in name and not has_clusters:
            continue  # an empty kernel, never launched
        assert re.search(r"LDG\.E\S*\.128", text), name
        only_reads = "stream_rowsILb0" in name  # log-probs
        assert bool(re.search(r"STG\.E\S*\.128", text)) != only_reads, name
        assert ("UBLKCP" in text) == ("cluster_rows" in name), name
