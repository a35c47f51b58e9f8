"""Builds the native kernels with ninja: `cepo_kernels._cpu`, and `cepo_kernels._cuda` where nvcc is found.

Nothing here needs torch: the extensions take addresses and strides, so one build serves every torch. Without a
compiler, or when one fails, the install goes on and the reference backend does the work.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
    "portable": "",
}
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }"
BFLOAT16_PROBE = "#include <immintrin.h>\nint main() { return sizeof(__m512bh) != 64; }"
BFLOAT16_FLAGS = f"{ISA_FLAGS['avx512']} -mavx512bf16"
# No contraction: a row's bits must not depend on which call the compiler happened to inline.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi"
NVCC_FLAGS = "--threads 0 -std=c++17 -O3 -fmad=false -Xfatbin -compress-all"
DEPENDENCIES = "  depfile = $out.d\n  deps = gcc"
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


class NinjaBuild(build_ext):
    """Writes a build.ninja per extension; a failure costs that extension, never the install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rules = cpu_rules(target) if ext.name.endswith("_cpu") else cuda_rules(target)
            (folder / "build.ninja").write_text(rules)
            result = subprocess.run([*ninja(), "-C", str(folder)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                print(result.stdout, result.stderr, file=sys.stderr)
                raise MissingToolError(f"the compiler failed on {ext.name} (its output stands above)")
        except (MissingToolError, OSError, ImportError) as reason:  # ninja itself may be missing or not run
            print(f"cepo: built without {ext.name}: {reason}", file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        built = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists() or self._built(ext)]
        self.extensions = built
        super().copy_extensions_to_source()

    def _built(self, ext: Extension) -> bool:
        return (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()


class MissingToolError(Exception):
    """What is missing, and how to get it."""


def ninja() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise MissingToolError("ninja is missing; `pip install ninja` provides it") from None
        return [found]


def cpu_rules(target: Path) -> str:
    cxx = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if cxx is None:
        raise MissingToolError("no C++17 compiler; install g++ or clang++ and install cepo again for the fast CPU path")
    try:
        import pybind11
    except ImportError:
        raise MissingToolError("pybind11 is missing; `pip install pybind11` provides it") from None
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    openmp = "-fopenmp" if accepts(cxx, "-fopenmp", OPENMP_PROBE) else ""
    link = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    flags = f"{CXX_FLAGS} {openmp}" + (" -DCEPO_X86" if X86 else "")
    objects = [(ROOT / "csrc/bindings.cpp", "".join(f" -isystem {escape(path)}" for path in includes))]
    objects += [
        (ROOT / f"csrc/cpu/rows_{isa}.cpp", more) for isa, more in ISA_FLAGS.items() if X86 or isa == "portable"
    ]
    if X86 and accepts(cxx, "-mavx512bf16", BFLOAT16_PROBE):  # newer than C++17
        flags += " -DCEPO_AVX512BF16"
        objects.append((ROOT / "csrc/cpu/product_avx512bf16.cpp", BFLOAT16_FLAGS))
    lines = [
        f"rule compile\n  command = {cxx} -MD -MF $out.d {flags} $more -c $in -o $out\n{DEPENDENCIES}",
        f"rule link\n  command = {cxx} -shared -o $out $in {openmp} {link}",
    ]
    lines += [f"build {source.stem}.o: compile {escape(source)}\n  more = {more}" for source, more in objects]
    lines += [f"build {escape(target)}: link {' '.join(f'{source.stem}.o' for source, _ in objects)}"]
    return "\n".join(lines) + "\n"


def cuda_rules(target: Path) -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise MissingToolError(
            "no nvcc; the Triton kernels serve GPUs. Set CUDA_HOME to a CUDA 12.8+ toolkit to add it"
        )
    import pybind11

    wanted = os.environ.get("CEPO_CUDA_ARCHITECTURES", "").split() or CUDA_ARCHITECTURES
    newest = wanted[-1]
    targets = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    targets.append(f"-gencode arch=compute_{newest},code=compute_{newest}")
    includes = " ".join(
        f"-isystem {escape(path)}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    # No contraction, here too; the kernels say where they mean a fused multiply-add.
    flags = f"{NVCC_FLAGS} -Xcompiler -fPIC,-fvisibility=hidden {' '.join(targets)} {includes}"
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    lines = [
        f"rule compile\n  command = {escape(nvcc)} {flags} -MD -MF $out.d -c $in -o $out\n{DEPENDENCIES}",
        f"rule link\n  command = {escape(nvcc)} -shared -cudart static $in -o $out",
    ]
    lines += [f"build {source.stem}.o: compile {escape(source)}" for source in sources]
    lines += [f"build {escape(target)}: link {' '.join(f'{source.stem}.o' for source in sources)}"]
    return "\n".join(lines) + "\n"


def find_nvcc() -> Path | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    return next((path for path in candidates if path.is_file()), None)


def accepts(cxx: str, flag: str, program: str) -> bool:
    try:
        probe = subprocess.run(
            [*cxx.split(), flag, "-x", "c++", "-", "-o", os.devnull],
            input=program,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise MissingToolError(f"cannot run the C++ compiler {cxx!r}: {error.strerror}; set CXX to another") from None
    return probe.returncode == 0


def escape(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("cepo_kernels._cpu", []), Extension("cepo_kernels._cuda", [])],
    cmdclass={"build_ext": NinjaBuild},
)
