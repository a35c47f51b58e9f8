"""The Triton backend: its suites in a process that interprets kernels, and in one that compiles them for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = (HERE / "triton_suite.py", HERE / "test_policy_loss.py")
# Of what all backends share, which takes the interpreter some forty minutes: not what autograd and the compiler see,
# which is one for all; of views, dtypes and betas that take one path, one; every kind with every cut.
CASES = (
    "triton_suite or triton and not (vocabulary or compiled or registered or written_over or second_backward or says_so"
    " or differentiable or transposed or dimensions or in_place_has and not dtype1 or exactly_one and not True)"
)
DIVERGENCES = (
    "triton and not (0.3 or 0.9) and (options and bfloat16 or soft_cap and dtype1-15 and not top_k"
    " or it_is_the_formula and dtype0 or keep_their and 2e-05 and 1000 or wholly_masked and jsd and not (beta or clip)"
    " or impossible and dtype2 and not (dtype2-finfo or inf-) or rows_far_apart or broken_row and nan"
    " or first_of_equals or in_place_has or agree_on and dtype0-reverse)"
)


@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpreter", "gpu"])
@pytest.mark.parametrize(
    ("suites", "cases"),
    [(SUITES, CASES), ((HERE / "test_divergence.py",), DIVERGENCES)],
    ids=["log-probs", "divergence"],
)
def test_the_suite_passes(suites, cases, interpreted):
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    plugins = ["-p", "interpreter_rounding"] if interpreted else []
    if interpreted:
        environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *plugins,
        *map(str, suites),
        "-k",
        cases if interpreted else "triton",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_importing_the_package_imports_no_triton():
    script = (
        "import sys, cepo_kernels; cepo_kernels.backend_report(); from cepo_kernels import backends; "
        "import cepo_kernels as k, torch; k.token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)); "
        "assert not any(m == 'triton' or m.startswith('triton.') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_without_triton_the_reason_is_one_line(monkeypatch):
    from cepo_kernels.backends import triton as backend

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    monkeypatch.setitem(sys.modules, "triton.runtime.interpreter", None)
    reason = backend.unavailable("cpu")
    assert reason is not None
    assert "cepo[gpu]" in reason
    assert "\n" not in reason


def test_what_cannot_run_is_said_in_one_line():
    pytest.importorskip("triton", reason="needs Triton")
    from cepo_kernels.backends import triton as backend

    assert "mps" in str(backend.unavailable("mps"))
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in str(backend.unavailable("cpu"))
