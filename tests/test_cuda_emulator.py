"""The CUDA emulator: kernels that are right give right results in every order, and each planted bug is caught."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
INCLUDES = ["-I", str(TESTS), "-I", str(TESTS.parent / "csrc" / "cuda")]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
COMPILE = ["g++", "-std=c++17", "-DCEPO_EMULATE", *INCLUDES]
ORDERS = ["forward", "reverse", "random"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

COLUMNS, CHUNK = 384, 64
ROWS = [[(row * COLUMNS + column) % 7 for column in range(COLUMNS)] for row in range(2)]
FLOAT = 4
READ_ONCE = 2 * COLUMNS * FLOAT
KERNELS = {  # bytes read, bytes written, results
    "block_sum": (READ_ONCE, 2 * 96 * FLOAT, [sum(row) for row in ROWS for _ in range(96)]),
    "cluster_sum": (READ_ONCE, 8 * FLOAT, [sum(row) for row in ROWS for _ in range(4)]),
    "bulk_load_sum": (READ_ONCE, 2 * CHUNK * FLOAT, [sum(row[i::CHUNK]) for row in ROWS for i in range(CHUNK)]),
    "unaligned_sum": (READ_ONCE, 2 * FLOAT, [sum(row[1:-1]) for row in ROWS]),
    "bulk_store_double": (READ_ONCE, READ_ONCE, [2 * x for row in ROWS for x in row]),
}

POISON = "use-after-poison"
OVERRUN = "heap-buffer-overflow"
DEADLOCK = (
    r"deadlock: .*threads 0-31 wait in block_barrier at cuda_emulator_bugs.cpp:\d+; .*threads 32-95 have returned"
)
WRONG = "wrong result"
BUGS = [  # kernel, bug, what the emulator says, the orders that show it
    ("block_sum", "no block barrier", WRONG, ORDERS),
    ("block_sum", "shared memory overrun", OVERRUN, ORDERS),
    ("block_sum", "row overrun", OVERRUN, ORDERS),
    ("block_sum", "lane outside the mask", "lane 16 is not in its own mask", ["forward"]),
    ("block_sum", "lane of the mask elsewhere", "lane 0 is in another", ["forward"]),
    (
        "block_sum",
        "lane that has returned",
        r"threads 0-0 have returned; .*threads 1-31 wait in shuffle_xor",
        ["reverse"],
    ),
    ("block_sum", "masks that differ", "is in another", ORDERS),
    ("block_sum", "barrier in one branch", DEADLOCK, ORDERS),
    ("block_sum", "barriers in two branches", "others of the block are in block_barrier at", ORDERS),
    ("cluster_sum", "no cluster barrier before reading", WRONG, ORDERS),
    ("cluster_sum", "no cluster barrier before the end", "block 0 has returned", ["forward"]),
    ("cluster_sum", "no cluster barrier before the end", POISON, ["random"]),
    ("bulk_load_sum", "no wait", POISON, ORDERS),
    ("bulk_load_sum", "parity that never turns", POISON, ORDERS),
    ("bulk_load_sum", "parity of the phase after", POISON, ORDERS),
    ("bulk_load_sum", "wait once too often", r"deadlock: .*wait in wait .*phase 3: 0 of unannounced bytes", ORDERS),
    ("bulk_load_sum", "no announcement", r"deadlock: .*phase 0: 256 of unannounced bytes", ORDERS),
    ("bulk_load_sum", "too few bytes", "more bytes are loaded than announced", ORDERS),
    ("bulk_load_sum", "too many bytes", r"deadlock: .*phase 0: 256 of 272 bytes", ORDERS),
    ("bulk_load_sum", "misaligned load", "not a multiple of 16 bytes", ORDERS),
    (
        "bulk_load_sum",
        "load into a buffer in use",
        r"deadlock: .*phase 1: 256 of 256 bytes|use-after-poison",
        ["random"],
    ),
    ("unaligned_sum", "unit before the row", OVERRUN, ORDERS),
    ("unaligned_sum", "unit after the row", OVERRUN, ORDERS),
    ("unaligned_sum", "unit read strictly", "AddressSanitizer: (unknown-crash|heap-buffer-overflow)", ORDERS),
    ("unaligned_sum", "column outside the row", WRONG, ORDERS),
    ("bulk_store_double", "store's source overwritten", "overwritten before bulk_stores_read", ORDERS),
    ("bulk_store_double", "no fence", "written without before_bulk_store", ORDERS),
    ("bulk_store_double", "fence by one thread", "written without before_bulk_store", ["forward", "random"]),
    ("bulk_store_double", "store before the block has written", "overwritten before bulk_stores_read", ["forward"]),
    ("bulk_store_double", "return before the store has read", "returned while a bulk_store", ORDERS),
    ("bulk_store_double", "reads what it stored", POISON, ORDERS),
    ("cluster_sum", "half a cluster", "invalid configuration", ["forward"]),
    ("block_sum", "1025 threads", "invalid configuration", ["forward"]),
    ("block_sum", "too much shared memory", "invalid argument", ["forward"]),
]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel, perhaps with a bug, in an order."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks as x86-64 Linux does")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulator")
    probe = ["g++", *SANITIZERS, "-x", "c++", "-", "-o", folder / "probe"]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs g++ with AddressSanitizer and UndefinedBehaviorSanitizer")
    program = folder / "kernels"
    source = TESTS / "cuda_emulator_bugs.cpp"
    subprocess.run(
        [*COMPILE, "-O1", "-g", "-Wall", "-Wextra", "-Werror", *SANITIZERS, source, "-o", program], check=True
    )
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:symbolize=0"}

    def run(kernel: str, bug: str, order: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
        command = [program, kernel, bug, order, str(seed)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    return run


@pytest.mark.parametrize(("order", "seed"), [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(5))])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_is_right_is_right_in_every_order(run, kernel, order, seed):
    result = run(kernel, "", order, seed)
    assert result.returncode == 0, result.stderr
    read, written, *values = map(float, result.stdout.split())
    assert (read, written, values) == KERNELS[kernel]


@pytest.mark.parametrize(("kernel", "bug", "message", "orders"), BUGS, ids=[bug[1] for bug in BUGS])
def test_a_planted_bug_is_caught(run, kernel, bug, message, orders):
    for order in orders:
        result = run(kernel, bug, order)
        if message == WRONG:
            assert result.returncode == 0, result.stderr
            values = list(map(float, result.stdout.split()))[2:]
            assert any(math.isnan(x) for x in values), f"{order}: {values}"
        else:
            assert result.returncode != 0, f"{order}: {result.stdout}"
            assert re.search(message, result.stderr), f"{order}: {result.stderr}"


def test_every_bug_in_the_kernels_is_tested():
    planted = set(re.findall(r'bug\("([^"]+)"\)', (TESTS / "cuda_emulator_bugs.cpp").read_text()))
    assert planted == {bug for _, bug, _, _ in BUGS}


def test_a_static_shared_variable_does_not_compile(run):
    kernel = '#include "device.h"\n__global__ void kernel() { %s float x[4]; (void)x; }'
    for qualifier, compiles in [("", True), ("__shared__", False)]:
        command = [*COMPILE, "-fsyntax-only", "-x", "c++", "-"]
        result = subprocess.run(command, input=kernel % qualifier, text=True, capture_output=True, check=False)
        assert (result.returncode == 0) == compiles, result.stderr
