"""What a GPU's measurements go through: the tables of launches and choices, ncu's report, the README's table."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import cepo_kernels
from cepo_kernels import backends
from cepo_kernels.backends import tables

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import contenders  # noqa: E402
import dram  # noqa: E402
import gpu_linear  # noqa: E402
import readme  # noqa: E402
import tune  # noqa: E402

HOPPER = (9, 0)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU on which every backend says that it can run, as far as a choice is concerned."""
    monkeypatch.setattr(backends, "compute_capability", lambda: HOPPER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda *_: None)
    monkeypatch.setattr(tables, "FASTEST", {})


def group(kind, vocabulary=32_000, dtype="torch.bfloat16", **ms):
    rows = [{"name": name, "ms": value, "share": 1 / value, "peak_mib": 3.0} for name, value in ms.items()]
    return {"kind": kind, "vocabulary": vocabulary, "dtype": dtype, "rows": rows}


def test_triton_runs_where_nothing_was_measured(hopper):
    assert backends.preference("cuda", torch.bfloat16)[0] == "triton"
    report = cepo_kernels.backend_report()
    assert set(report.basis.values()) == {"not measured on this device (compute capability 9.0)"}
    assert "not measured on this device" in str(report)


def test_a_measurement_decides_for_its_op_and_its_gpu_alone(hopper):
    tables.FASTEST[("policy_loss", HOPPER)] = "cuda"
    tables.FASTEST[("forward", (8, 0))] = "cuda"
    report = cepo_kernels.backend_report()
    assert report.chosen["contrastive_policy_loss"]["cuda"] == "cuda"
    assert report.chosen["contrastive_logprobs"]["cuda"] == "triton"
    assert "cuda measured fastest on compute capability 9.0: contrastive_policy_loss" in str(report)
    assert backends.preference("cuda", torch.float64, "policy_loss") == ("reference",)
    assert backends.preference("cpu", torch.float32, "policy_loss") == ("cpu", "reference")


def test_every_choice_rests_on_a_measurement_that_is_kept():
    kept = [json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("gpu-*.json")]
    for choice in tables.FASTEST.items():
        line = tune.source((), dict([choice])).splitlines()[-2]
        assert any(line in of.get("tables", "") for of in kept), f"{choice}: no file in benchmarks/results says so"


@pytest.mark.parametrize("vocabulary", [1, 256, 257, 1024, 2048, 2049, 151_936, 2**30])
def test_lanes_depend_on_the_vocabulary_alone(vocabulary):
    launches = [tables.launch(vocabulary, dtype, False) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert len({(launch.block, launch.unroll) for launch in launches}) == 1
    assert all(launch.block % 32 == 0 for launch in launches)


def test_the_fastest_launch_is_found_and_the_table_left_as_it_was():
    before = tables.LAUNCHES

    def measure(vocabulary, dtype):
        launch = tables.launch(vocabulary, dtype, False)
        wanted = (64, 1, 2) if vocabulary == 256 else (512, 8, 2) if dtype == torch.float32 else (512, 4, 3)
        return 1.0 + sum(a != b for a, b in zip((launch.block, launch.warps, launch.stages), wanted, strict=True))

    lines = tune.launches(measure)
    assert tables.LAUNCHES is before
    assert lines[0] == (256, 64, {2: tables.Threads(1, 2), 4: tables.Threads(1, 2)})
    assert lines[-1] == (2**31 - 1, 512, {2: tables.Threads(4, 3), 4: tables.Threads(8, 2)})
    groups = [group("forward", cuda=1.0, triton=2.0), group("separate", cuda=3.0, triton=2.0),
              group("fused", cuda=2.0, triton=1.9), group("fused", cuda=1.0),
              group("divergence", cuda=1.0, triton=1.1)]  # fmt: skip
    best = tune.fastest(groups, HOPPER)
    assert best == {("forward", HOPPER): "cuda", ("policy_loss", HOPPER): "triton", ("divergence", HOPPER): "cuda"}
    names = {"Threads": tables.Threads}
    exec(tune.source(lines, best), names)
    assert (list(names["LAUNCHES"]), names["FASTEST"]) == (lines, best)


def test_the_tables_stand_in_their_file_as_they_are_printed():
    printed = tune.source(tables.LAUNCHES, {})
    file = Path(tables.__file__).read_text()
    assert printed[: printed.index("FASTEST")].strip() in file


def test_ncus_report_is_held_against_the_model(capsys):
    line = '"{}","1","python","host","stream_rows","1","7","{}","byte","{}"'
    report = ["==PROF== Connected to process 1",
              '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Metric Name",'
              '"Metric Unit","Metric Value"',
              line.format(0, "dram__bytes_read.sum", "1,000"), line.format(0, "dram__bytes_write.sum", "500"),
              line.format(1, "dram__bytes_read.sum", "2,000"), line.format(1, "dram__bytes_write.sum", "0"),
              "==PROF== Disconnected"]  # fmt: skip
    seen = dram.measured("\n".join(report))
    assert seen == [1500, 2000]
    assert dram.compare(seen, [("a", 1450), ("b", 2000)])
    assert not dram.compare(seen, [("a", 1500), ("b", 2200)])
    assert capsys.readouterr().out.count("OFF") == 1
    with pytest.raises(SystemExit, match="expected 1 kernels"):
        dram.compare(seen, [("a", 1500)])
    with pytest.raises(SystemExit, match="expected bytes"):
        dram.measured("\n".join(report).replace('"byte"', '"Mbyte"'))
    with pytest.raises(SystemExit, match="column names"):
        dram.measured("==ERROR== no permission")


def test_the_readmes_table_is_empty_until_a_gpu_has_run_and_then_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    empty = readme.gpu()
    assert "Not yet measured" in empty
    assert len(rows := empty.splitlines()[4:]) == 7
    assert all(row.endswith("|  |  |  |  |  |") for row in rows)
    groups = [group("forward", cuda=2.0, triton=1.25, eager=12.5, **{"TRL 1.16.0": 2.5, "quack 0.3": 5.0}),
              group("fused", cuda=2.0, triton=2.5, TRL=3.0), group("separate", cuda=2.0, triton=2.5)]  # fmt: skip
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "date": "2026-12-01"}
    (tmp_path / "gpu-nvidia-h200.json").write_text(json.dumps({"machine": machine, "groups": groups}))
    full = readme.gpu()
    assert "yet" not in full
    cells = [row.split("|")[4].strip() for row in full.splitlines()[4:]]
    dashes = "Liger -, quack 4.00x, torch.compile -"
    assert cells == ["80%", "50%", "50%", "-", "2.00x, -, 1.50x", dashes, "10.00x; 3"]


def test_contenders_are_named_with_their_versions_or_why_they_are_absent(monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy
    liger = types.SimpleNamespace(liger_cross_entropy=cross_entropy)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", types.SimpleNamespace())  # has lost the function
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2")
    monkeypatch.setattr(contenders, "trl", lambda: 1 / 0)
    found, absent = contenders.others()
    assert list(found) == ["Liger 1.2"]
    assert absent["TRL"] == "ZeroDivisionError: division by zero"
    assert absent["quack"].startswith("ImportError: cannot import name 'cross_entropy'")
    logits = [torch.randn(5, 70) for _ in range(3)]
    rest = (*logits[1:], torch.tensor([1, 2, 3, 4, 69]), torch.randn(5))
    want = contenders.with_gradient(contenders.eager)(logits[0], *rest)
    for got, value in zip(contenders.with_gradient(found["Liger 1.2"])(logits[0], *rest), want, strict=True):
        torch.testing.assert_close(got, value)


def test_every_contender_from_hidden_states_computes_the_same_in_every_kind(tmp_path, monkeypatch):
    """At a tiny shape on the CPU; what is measured there is made up, and stands in the table."""
    given = gpu_linear.inputs(6, 16, 90, "cpu")
    runs, per_row = gpu_linear.peers(), []
    want = runs["eager"](given[0][0], *given[1:3])
    for name, run in runs.items():
        if name in ("eager", *gpu_linear.SUMS[:1]) or name.startswith("TRL"):
            found = run(given[0][0], *given[1:3])
            sums = name in gpu_linear.SUMS
            per_row += [] if sums else [name]
            torch.testing.assert_close(found.float(), want.sum() if sums else want, rtol=0.05, atol=0.05)
    assert per_row[:1] == ["eager"]
    called = []

    def medians(calls):
        for name, call in calls.items():
            if name != "torch.compile":  # which takes long, and is eager's formula
                call()
                called.append(name)
        return {name: 2.0 if name == "products" else 4.0 for name in called}, dict.fromkeys(called, 2**20), {}

    monkeypatch.setattr(gpu_linear, "medians", medians)
    groups = []
    for kind in gpu_linear.PRODUCTS:
        called.clear()
        groups.append(gpu_linear.group(kind, 6, 16, 90, "cpu"))
        assert {"products", "cepo", "cepo, 4 GiB of logits", *per_row} <= set(called)
        assert ("F.linear_cross_entropy" in called) == ("F.linear_cross_entropy" in runs and kind != "policy loss")
    assert [round(group["rows"][0]["tflop_per_s"] * 2e9 / (2 * 6 * 16 * 90)) for group in groups] == [3, 2, 4, 5]
    for column in readme.LINEAR_COLUMNS:
        for group in groups:
            group.update(n=column[0], width=column[1])
        break
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_linear().startswith("Not yet measured.")
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "date": "2026-12-01"}
    (tmp_path / "gpu-nvidia-h200.json").write_text(json.dumps({"machine": machine, "groups": [], "linear": groups}))
    cells = [row.split("|")[3].strip() for row in readme.gpu_linear().splitlines()[4:]]
    assert cells[:4] == ["50%"] * 4
    assert cells[5] == "-, -, -"
    assert cells[-1] == "1, 1"


@pytest.mark.parametrize("tools", [("ncu",), ("compute-sanitizer",), ("compute-sanitizer", "ncu")], ids=" ".join)
def test_a_run_without_a_tool_has_failed_and_any_run_writes_the_readmes_table(tmp_path, tools):
    """The script by itself: whatever it calls is there in name alone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "head", "tr", "mkdir", "mktemp", "rm", "env"):
        (programs / name).symlink_to(shutil.which(name))
    for name in ("nvidia-smi", "python", *tools):
        (programs / name).write_text('#!/bin/bash\necho "called: $*"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "benchmarks").mkdir()
    script = shutil.copy(BENCHMARKS / "run_gpu.sh", tmp_path / "benchmarks")
    environment = {"PATH": str(programs), "PYTHON": "python", "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (len(tools) < 2), done.stdout + done.stderr
    for name in ("ncu", "compute-sanitizer"):
        assert (f"-- failed: {name} is not on the PATH" in done.stdout) == (name not in tools)
    assert "called: benchmarks/readme.py" in done.stdout
