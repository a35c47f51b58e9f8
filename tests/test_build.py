"""The build: what it leaves behind with and without compilers, and that no instruction set leaks into another."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cepo_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")
ISAS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw",
        "-mavx512dq", "-mavx512vl"], "portable": []}  # fmt: skip


def run_setup(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for package in ("cepo", "cepo_kernels"):
        (source / package).mkdir()
        (source / package / "__init__.py").touch()
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("package", ["cepo", "cepo_kernels"])
def test_its_types_come_along(package):
    """Where CI runs this, the package is the installed one."""
    assert Path(importlib.import_module(package).__file__).with_name("py.typed").is_file()


def test_without_compilers_the_install_succeeds_and_says_what_is_missing(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    result = run_setup(tmp_path, PATH=str(empty), CXX="", CUDA_HOME=str(empty), CUDA_PATH=str(empty))
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "cepo: built without cepo_kernels._cpu" in line]
    assert "install g++" in line
    assert not list((tmp_path / "build").rglob("_cpu*.so"))


def failing(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("present", [True, False])
def test_a_failing_compiler_costs_the_extension_and_not_the_install(tmp_path, present):
    cxx = failing(tmp_path / "broken-cxx") if present else "/nonexistent/g++"
    failing(tmp_path / "bin" / "nvcc")  # or a real one would take its time
    result = run_setup(tmp_path, CXX=cxx, CUDA_HOME=str(tmp_path), CUDA_PATH=str(tmp_path), PATH="/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "cepo: built without cepo_kernels._cpu" in line]
    assert ("the compiler failed" if present else "cannot run the C++ compiler '/nonexistent/g++'") in line
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "build").rglob("_cpu*.so"))


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.skipif(backends.unavailable("cpu:portable", "cpu") is not None, reason="no native build here")
@pytest.mark.parametrize("isa", ISAS)
def test_every_symbol_of_an_instruction_set_stays_in_its_namespace(tmp_path, isa):
    if isa != "portable" and os.uname().machine != "x86_64":
        pytest.skip(f"{isa} is x86-64 only")
    # Unoptimised, so that nothing is inlined away and every symbol that could be shared shows.
    command = ["g++", "-std=c++17", "-O0", "-DCEPO_X86", *ISAS[isa], "-c", str(ROOT / f"csrc/cpu/rows_{isa}.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "rows.o")], check=True)
    listing = subprocess.run(["nm", "-C", str(tmp_path / "rows.o")], check=True, capture_output=True, text=True).stdout
    shared = [line for line in listing.splitlines() if re.search(r" [TWVu] ", line)]
    assert len(shared) > 20
    # The last is what nm cannot read: names of lambdas of lambdas.
    inside = re.compile(rf"cepo::{isa}::|cepo::{isa}_kernels\(\)| _ZZ?NK?4cepo{len(isa)}{isa}")
    leaked = [line for line in shared if not inside.search(line)]
    assert leaked == []


def test_the_cuda_extension_loads_without_a_driver():
    extension = pytest.importorskip("cepo_kernels._cuda", reason="built without nvcc")
    if torch.cuda.is_available():
        pytest.skip("a driver is here")
    with pytest.raises(RuntimeError, match=r"driver|device"):
        extension.probe()


@pytest.mark.gpu
def test_the_cuda_extension_reaches_the_device():
    extension = pytest.importorskip("cepo_kernels._cuda", reason="built without nvcc")
    major, minor = torch.cuda.get_device_capability()
    assert extension.probe() == 100 * major + 10 * minor
