"""The real CUDA kernels, in the emulator, under AddressSanitizer and UndefinedBehaviorSanitizer.

`test_cuda_emulator` shows that this finds what it is to find.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulated
import pytest

HERE = Path(__file__).parent
SUITES = (HERE / "test_cuda_memory.py", HERE / "test_cuda_emulated.py")


@pytest.mark.slow
@pytest.mark.skipif(cuda_emulated.missing() is not None, reason=str(cuda_emulated.missing()))
def test_the_kernels_are_clean():
    """Python is not built for it: the runtime, and libstdc++ for its exceptions, have to be there from the start."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("needs g++ with AddressSanitizer")
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Nothing captured within: AddressSanitizer ends the process, and with it what pytest holds back.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", *map(str, SUITES), "-k", "not bytes"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert " passed" in result.stdout
