"""`cepo compare`: what it runs, what it never runs twice, and that its table says what the cells say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import yaml
from tiny import one_thread  # noqa: F401

from cepo import checkpoint, metrics, trainer
from cepo.cli import main, parse
from cepo.compare import cells, command, table
from cepo.compare.cells import Record, Store
from cepo.compare.plan import Cell, Plan, load
from cepo.compare.results import chosen, summarise
from cepo.parts import Parts

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {
    "base": {
        "rollout": {"prompts": 4, "group_size": 4},
        "train": {"steps": 2},
        "eval": {"problems": 6, "every": 1},
        "checkpoint": {"every": 1},
    },
    "methods": {"grpo": {"credit": {"name": "uniform"}}, "cepo": {"credit": {"name": "cepo"}}},
    "tasks": {"addition": {}},
    "seeds": [0, 1],
    "test_problems": 8,
    "pass_at": {"k": 2, "problems": 4},
}
TUNED = {**SMALL, "tuning": {"lr": [1e-4, 1e-3], "seeds": [100]}}
TIMES = ("seconds", "seconds_per_active_step", "evaluation_seconds", "wall_seconds", "resumed_from_step")


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def plan_of(folder: Path, content: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return load(write(folder, {**(content or SMALL), **changes}))


def written(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("results.json", "results.md", "results.png")]


def read(out: Path) -> dict[str, Record]:
    return {path.stem: json.loads(path.read_text()) for path in (out / cells.FOLDER).glob("*.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: plan.yaml, and its cells and results in out/."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["compare", write(folder, TUNED), "--out", str(folder / "out")]) == 0
    return folder


def test_every_cell_is_a_normal_run_and_a_small_file(whole: Path) -> None:
    out, plan = whole / "out", load(whole / "plan.yaml")
    records = read(out)
    assert len(records) == len(plan) == 1 + 2 * (2 + 2)
    for record in records.values():
        assert len(json.dumps(record)) < 5000
        if record["kind"] == "base":
            continue
        run = out / record["task"] / record["method"] / f"lr{record['lr']:g}-seed{record['seed']}"
        config, _ = parse("train", ["--config", str(run / checkpoint.CONFIG)])
        assert (config.train.lr, config.train.seed) == (record["lr"], record["seed"])
        assert config.credit.name == {"grpo": "uniform", "cepo": "cepo"}[record["method"]]
        assert config.eval.split == {"tuning": "validation", "final": "test"}[record["kind"]]
        assert config.eval.problems == record["held_out"] == {"tuning": 6, "final": 8}[record["kind"]]
        steps = [r for r in metrics.read(run) if r["kind"] == "train"]
        evals = [r for r in metrics.read(run) if r["kind"] == "eval"]
        assert [p["step"] for p in record["curve"]] == ([0, 2] if record["kind"] == "tuning" else [0, 1, 2])
        assert [(p["sampled"], p["greedy"]) for p in record["curve"]] == [(r["sampled"], r["greedy"]) for r in evals]
        assert record["generated_tokens"] == sum(r["tokens"] for r in steps)
        assert record["curve"][-1]["training_seconds"] == pytest.approx(sum(record["seconds"].values()))
        assert record["wall_seconds"] > sum(record["seconds"].values()) + record["evaluation_seconds"]
        assert (run / "curves.png").is_file()
        assert not (run / checkpoint.FOLDER).exists(), "weights of a finished cell are dropped"


def test_the_table_is_what_the_cells_say(whole: Path) -> None:
    summary = json.loads((whole / "out" / "results.json").read_text())
    records = read(whole / "out")
    task = summary["tasks"]["addition"]
    base = records["addition-base"]
    assert task["base"] == {"sampled": base["curve"][0]["sampled"], "greedy": base["curve"][0]["greedy"],
                            "pass_at": base["pass_at"]["accuracy"]}  # fmt: skip
    ends: dict[str, list[float]] = {}
    for name, method in task["methods"].items():
        tuning = {lr: records[f"addition-{name}-lr{lr}-seed100"]["curve"][-1]["sampled"] for lr in ("0.0001", "0.001")}
        assert {f"{each['lr']:g}": each["mean"] for each in method["tried"]} == tuning
        assert method["lr"] == (1e-3 if tuning["0.001"] > tuning["0.0001"] else 1e-4)
        finals = [records[f"addition-{name}-lr{method['lr']:g}-seed{seed}"] for seed in (0, 1)]
        ends[name] = [record["curve"][-1]["sampled"] for record in finals]
        assert method["sampled"] == {"values": ends[name], "mean": mean(ends[name]), "sd": stdev(ends[name])}
        assert method["seconds_per_step"] == pytest.approx(
            mean(sum(record["seconds"].values()) / record["steps"] for record in finals)
        )
    pairs = [one - other for one, other in zip(ends["cepo"], ends["grpo"], strict=True)]
    assert task["methods"]["cepo"]["difference"]["mean"] == pytest.approx(mean(pairs))
    assert "difference" not in task["methods"]["grpo"]
    assert summary["cells"] == {"planned": 9, "finished": 9, "failed": {}, "too_long": {}}
    table = (whole / "out" / "results.md").read_text()
    assert f"| **grpo** | {mean(ends['grpo']):.3f} +- {stdev(ends['grpo']):.3f} |" in table
    assert "| verifier, answer |" in table
    assert "FAILED" not in table


def test_methods_met_on_equal_terms_and_the_table_says_so(whole: Path) -> None:
    checks = json.loads((whole / "out" / "results.json").read_text())["tasks"]["addition"]["checks"]
    assert all(check["held"] for check in checks)
    for words in ("training problems", "first rollouts", "initial accuracy", "held-out problems", "steps", "held out"):
        for kind in ("tuning", "final"):
            assert any(words in check["what"] and check["what"].startswith(kind) for check in checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(training_problems="others"), "the same training problems"),
        (lambda record: record.update(held_out_problems="others"), "the same held-out problems"),
        (lambda record: record["curve"][0].update(sampled=0.1), "the same initial accuracy"),
        (lambda record: record.update(steps=3), "the same steps"),
        (lambda record: record["start"].update(tokens=1), "the same first rollouts"),
        (lambda record: record.update(in_both=2), "no training problem is held out"),
    ],
)
def test_unequal_terms_are_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: str
) -> None:
    shutil.copytree(whole / "out" / cells.FOLDER, tmp_path / cells.FOLDER)
    path = next((tmp_path / cells.FOLDER).glob("addition-cepo-*-seed1.json"))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    assert main(["compare", str(whole / "plan.yaml"), "--out", str(tmp_path), "--report-only"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1
    assert words in failed[0]


def test_what_is_finished_is_never_run_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole / "out" / cells.FOLDER, tmp_path / cells.FOLDER)  # no run directory is left
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("a cell was run"))
    for options in ([], ["--report-only"]):
        assert main(["compare", str(whole / "plan.yaml"), "--out", str(tmp_path), *options]) == 0
        assert written(tmp_path) == written(whole / "out")


def test_a_killed_comparison_continues_and_ends_the_same(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from cepo import trainer
from cepo.cli import main
original = trainer.train_step
def fatal(parts, optimizer, step, observe=None):
    if (parts.config.credit.name, step) == ("cepo", 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(parts, optimizer, step, observe)
trainer.train_step = fatal
main(sys.argv[1:])
"""
    methods = dict(reversed(SMALL["methods"].items()))
    plan, environment = write(tmp_path, {**SMALL, "methods": methods, "seeds": [0]}), {**os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = subprocess.run([sys.executable, "-c", code, "compare", plan, "--out", str(killed)], env=environment,
                             cwd=tmp_path,  # or the checkout, without kernels, would stand before what is installed
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    (finished,) = (killed / cells.FOLDER).iterdir()
    then = finished.stat().st_mtime_ns
    assert main(["compare", plan, "--out", str(killed), "--keep-weights"]) == 0
    assert finished.stat().st_mtime_ns == then
    assert main(["compare", plan, "--out", str(straight)]) == 0
    resumed, expected = read(killed), read(straight)
    steps = {name: record.get("resumed_from_step") for name, record in resumed.items()}
    assert steps == {"addition-base": None, "addition-cepo-lr0.0003-seed0": 1, "addition-grpo-lr0.0003-seed0": 0}
    for records in (resumed, expected):
        for record in records.values():
            for name in TIMES:
                record.pop(name, None)
            for point in record["curve"]:
                del point["training_seconds"]
    assert resumed == expected
    assert checkpoint.newest(killed / "addition" / "cepo" / "lr0.0003-seed0") is not None
    assert checkpoint.newest(straight / "addition" / "cepo" / "lr0.0003-seed0") is None


def test_a_failed_cell_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = trainer.train_step

    def failing(parts: Parts, optimizer: torch.optim.Optimizer, step: int, observe: Any) -> trainer.Record:
        if parts.config.credit.name == "cepo":
            raise RuntimeError("the cat\nsat on it")
        return original(parts, optimizer, step, observe)

    plan, out = write(tmp_path, {**SMALL, "seeds": [0]}), tmp_path / "out"
    monkeypatch.setattr(trainer, "train_step", failing)
    assert main(["compare", plan, "--out", str(out)]) == 1
    name, told = "addition-cepo-lr0.0003-seed0", "RuntimeError: the cat sat on it"
    captured = capsys.readouterr()
    assert f"{name} failed: {told}" in captured.out
    assert f"[3/3] {name}: failed: {told}" in captured.err
    assert "2 of 3 are finished" in captured.out
    assert read(out)[name]["traceback"][-2:] == ["RuntimeError: the cat", "sat on it"]
    monkeypatch.undo()
    assert main(["compare", plan, "--out", str(out)]) == 0
    assert "3 of 3 are finished" in capsys.readouterr().out
    assert "error" not in read(out)[name]


def test_no_cell_starts_after_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", write(tmp_path, TUNED), "--out", str(tmp_path / "out"), "--limit-seconds", "0"]) == 1
    captured = capsys.readouterr()
    assert "no more cells are started after 0 s" in captured.err
    assert "0 of 9 are finished" in captured.out
    assert not (tmp_path / "out" / cells.FOLDER).exists()


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert main(["compare", write(tmp_path, SMALL), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "cepo: interrupted; the same command continues where this one stopped\n"


# From here on, cells are made by hand.


def fake(store: Store, cell: Cell, end: float, **changes: Any) -> None:
    curve = [{"step": step, "sampled": value, "greedy": 0.5, "training_seconds": step / 2}
             for step, value in ((0, 0.5), (2, end))]  # fmt: skip
    store.put(cell, {
        "curve": curve, "start": {"tokens": 9, "accuracy": 0.5}, "end": {}, "steps": 2, "optimizer_steps": 2,
        "generated_tokens": 99, "seconds": {"rollout": 0.6, "teacher": 0.3, "credit": 0.1}, "evaluation_seconds": 1.0,
        "seconds_per_active_step": 0.5, "training_problems": f"those of {cell.seed}", "held_out_problems": cell.kind,
        "held_out": 8, "in_both": 0, "pass_at": None, "software": {"torch": "0"}, "rollouts_per_step": 16,
        "resumed_from_step": 0, "wall_seconds": 3.0, **changes,
    })  # fmt: skip


def test_the_rate_is_the_best_in_tuning_and_the_smallest_of_equals(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tuning={"lr": [1e-3, 1e-4, 3e-4], "seeds": [100, 101]})
    store = Store(tmp_path)
    ends = {1e-4: (0.5, 0.7), 3e-4: (0.6, 0.6), 1e-3: (0.9, 0.2)}
    for lr, values in ends.items():
        for seed, value in zip((100, 101), values, strict=True):
            assert chosen(plan, store, "addition", "grpo") is None, "cells are missing"
            fake(store, plan.tuning("addition", "grpo", lr, seed), value)
    assert chosen(plan, store, "addition", "grpo") == 1e-4
    fake(store, plan.tuning("addition", "grpo", 1e-3, 101), 0.4)
    assert chosen(plan, store, "addition", "grpo") == 1e-3
    store.put(plan.tuning("addition", "grpo", 1e-3, 101), {"error": "too hot"})
    assert chosen(plan, store, "addition", "grpo") == 1e-4
    assert chosen(plan, store, "addition", "cepo") is None
    assert summarise(plan, store)["cells"]["failed"] == {"addition-grpo-lr0.001-seed101": "too hot"}


def test_without_tuning_the_rate_is_the_base_s(tmp_path: Path) -> None:
    assert chosen(plan_of(tmp_path), Store(tmp_path), "addition", "cepo") == 3e-4


def test_differences_are_paired_corrected_and_judged(tmp_path: Path) -> None:
    credits = {name: {"credit": {"name": name}} for name in ("uniform", "cepo", "rlsd")}
    plan = plan_of(tmp_path, methods=credits, reference="uniform", seeds=[0, 1, 2, 3], cell_seconds=2)
    store = Store(tmp_path)
    ends = {"uniform": (0.5, 0.6, 0.7, 0.8), "cepo": (0.6, 0.71, 0.79, 0.9), "rlsd": (0.4, 0.7, 0.6, 0.8)}
    for name, values in ends.items():
        for seed, value in enumerate(values):
            fake(store, plan.final("addition", name, 3e-4, seed), value)
    summary = summarise(plan, store)
    methods = summary["tasks"]["addition"]["methods"]
    cepo, rlsd = methods["cepo"]["difference"], methods["rlsd"]["difference"]
    # .1, .11, .09, .1: mean .1, sd .00816, t = 24.5 with 3 degrees of freedom, whose .975 quantile is 3.182.
    assert (cepo["n"], cepo["mean"], cepo["sd"]) == (4, pytest.approx(0.1), pytest.approx(0.0081650, rel=1e-4))
    assert (cepo["low"], cepo["high"]) == (pytest.approx(0.0870078, rel=1e-4), pytest.approx(0.1129922, rel=1e-4))
    assert cepo["p"] == pytest.approx(1.4913e-4, rel=1e-3)
    assert cepo["p_holm"] == pytest.approx(2 * cepo["p"])
    assert rlsd["p_holm"] == rlsd["p"] > 0.5
    assert (cepo["verdict"], rlsd["verdict"]) == ("better", "not separated")
    assert 0 < rlsd["detectable"] < rlsd["detectable_holm"]
    assert methods["cepo"]["area"]["values"] == pytest.approx([0.55, 0.605, 0.645, 0.7])
    assert methods["cepo"]["area_difference"]["mean"] == pytest.approx(0.05)
    assert methods["cepo"]["seconds_per_step"] == pytest.approx(0.5)
    assert methods["cepo"]["credit_seconds_per_step"] == pytest.approx(0.2)
    assert len(summary["cells"]["too_long"]) == 12
    fake(store, plan.final("addition", "cepo", 3e-4, 3), 0.9, software={"torch": "1"})
    assert summarise(plan, store)["software"] == [{"torch": "0"}, {"torch": "1"}]


def test_an_unfinished_comparison_compares_the_seeds_that_both_have(tmp_path: Path) -> None:
    plan, store = plan_of(tmp_path), Store(tmp_path)
    for name, seed in (("grpo", 0), ("grpo", 1), ("cepo", 1)):
        fake(store, plan.final("addition", name, 3e-4, seed), 0.6 + seed / 10)
    command.report(plan, tmp_path)
    difference = json.loads((tmp_path / "results.json").read_text())["tasks"]["addition"]["methods"]["cepo"]
    assert (difference["difference"]["n"], difference["difference"]["mean"]) == (1, 0)
    assert difference["difference"]["verdict"] == "not separated"
    assert "+0.0, n = 1" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("tests", "told"),
    [(None, []), (2000, []), (64, ["The task has 64 test problems only.", ""]),
     (38, ["The task has 38 test problems only; pass@8 is of these.", ""])],
)  # fmt: skip
def test_a_task_that_runs_out_of_problems_is_told(tests: int | None, told: list[str]) -> None:
    plan = {"rates": [], "test_problems": 2000, "pass_at": {"k": 8, "problems": 64}}
    assert table._notes(plan, {"test_problems": tests, "methods": {}}) == told
