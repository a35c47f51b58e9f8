"""The plans of `cepo compare`: what they may say, what is told of the others, and that the examples are plans."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused
from test_compare import ROOT, SMALL, plan_of, write

from cepo import axes
from cepo.cli import main
from cepo.compare.plan import load
from cepo.compare.results import supervision
from cepo.config import Config, CreditConfig, RewardConfig, RredcotConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {}}, ["keys", "methods", "'method'"]),
        ({"seeds": None}, ["seeds", "list", "None"]),
        ({"seeds": []}, ["seeds", "[]"]),
        ({"seeds": [1, 1]}, ["seeds", "different", "[1, 1]"]),
        ({"seeds": [-1]}, ["seeds", "[0, 2^63)"]),
        ({"methods": {}}, ["methods", "{}"]),
        ({"methods": {"grpo": {}, "base": {}}}, ["methods", "untrained"]),
        ({"methods": {"grpo": {}, "a-b": {}}}, ["methods", "'a-b'"]),
        ({"methods": {"grpo": None}}, ["methods.grpo", "{} for none", "None"]),
        ({"methods": {"grpo": {}, "cepo": {"credit": {"nam": "cepo"}}}}, ["methods.cepo", "--credit.nam"]),
        ({"methods": {"grpo": {"magic": {}}}}, ["methods.grpo", "credit", "'magic'"]),
        ({"methods": {"grpo": {"credit": {"name": "magic"}}}}, ["methods.grpo", "credit.name", "'magic'"]),
        ({"methods": {"grpo": {"train": {"steps": 9}}}}, ["methods.grpo", "all methods share", "'train'"]),
        ({"methods": {"grpo": {"rollout": {"group_size": 9}}}}, ["methods.grpo", "all methods share", "'rollout'"]),
        ({"methods": {"grpo": {"reward": {"success_threshold": 0.5}}}},
         ["methods.grpo", "all methods share", "'reward.success_threshold'"]),
        ({"methods": {"grpo": {}, "cepo": {"credit": {"name": "cepo", "lam": 0.5}}}},
         ["methods.cepo: expected another config than methods.grpo on addition, got the same"]),
        ({"reference": "dapo"}, ["reference", "grpo, cepo", "'dapo'"]),
        ({"metric": "best"}, ["metric", "sampled, greedy", "'best'"]),
        ({"base": {"train": {"seed": 3}}}, ["base", "train.seed", "left to seeds"]),
        ({"base": {"train": {"lr": 3}}, "tuning": {"lr": [1], "seeds": [9]}}, ["base", "train.lr", "tuning.lr"]),
        ({"base": {"eval": {"split": "test"}}}, ["base", "eval.split"]),
        ({"base": {"resume": "runs/x"}}, ["base", "'resume'"]),
        ({"base": {"train": None}}, ["base", "train"]),
        ({"base": {"train": {"steps": date(2026, 1, 1)}}}, ["base", "train.steps", "2026-01-01"]),
        ({"tasks": {"addition": {"task": {"name": "magic"}}}}, ["'magic'", "addition"]),
        ({"tasks": {"addition": {"train": {"steps": 0}}}}, ["tasks.addition", "train.steps", "at least 1"]),
        ({"tuning": {"lr": [1e-4]}}, ["tuning", "lr and seeds"]),
        ({"tuning": {"lr": [1e-4, 0.0001], "seeds": [9]}}, ["tuning.lr", "different"]),
        ({"tuning": {"lr": [-1], "seeds": [9]}}, ["tuning.lr", "above 0"]),
        ({"tuning": {"lr": [1e-4], "seeds": [1, 9]}}, ["tuning.seeds", "none of seeds", "[1]"]),
        ({"test_problems": 0}, ["test_problems", "at least 1", "0"]),
        ({"pass_at": 8}, ["pass_at", "k and problems", "8"]),
        ({"pass_at": None}, ["pass_at", "k and problems", "None"]),
        ({"pass_at": {"k": 0, "problems": 1}}, ["pass_at.k", "at least 1"]),
        ({"pass_at": {"k": 2, "problems": 9}}, ["pass_at.problems", "at most test_problems, 8, got 9"]),
        ({"cell_seconds": -1}, ["cell_seconds", "above 0"]),
    ],
)  # fmt: skip
def test_a_bad_plan_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    message = refused(capsys, "compare", write(tmp_path, {**SMALL, **changes}), "--out", str(tmp_path / "out"))
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods:\n  cepo: {}\n  grpo: {}\n  cepo: {}\n", ["line 2", "each key once", "'cepo' twice"]),
        ("methods: [", ["plan.yaml", "YAML"]),
        ("methods: &x [*x]", ["plan.yaml", "recursive", "line 1"]),
        ("", ["expected methods, tasks, seeds", "None"]),
        ("methods: {grpo: {}}\ntasks: {addition: {}}\n", ["seeds", "to be there"]),
    ],
)
def test_a_file_that_is_no_plan_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    message = refused(capsys, "compare", str(tmp_path / "plan.yaml"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], ["PLAN", "nowhere.yaml"]),
        ([], ["required: plan"]),
        (["nowhere.yaml", "--limit-seconds", "-1"], ["--limit-seconds", "at least 0"]),
        (["nowhere.yaml", "--limit-seconds", "soon"], ["soon"]),
        (["nowhere.yaml", "--magic"], ["--magic"]),
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    message = refused(capsys, "compare", *arguments)
    assert all(word in message for word in words), message


def test_a_report_needs_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "compare", write(tmp_path, SMALL), "--out", str(tmp_path / "out"), "--report-only")
    assert "--out: expected a directory with cells" in message


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("base: {loss: {clip_low: 1e-1}}\nmethods: {grpo: {}}\ntasks: {addition: {}}\nseeds: [0]\n"
                    "tuning: {lr: [1e-4, 3e-4], seeds: [1]}\n")  # fmt: skip
    plan = load(path)
    assert plan.rates == [1e-4, 3e-4]
    assert plan.configs["addition", "grpo"].loss.clip_low == 0.1
    assert (plan.test_problems, plan.pass_at) == (2000, {"k": 8, "problems": 256})
    path.write_text(path.read_text() + "test_problems: 100\n")
    assert load(path).pass_at == {"k": 8, "problems": 100}


def test_what_counts_as_success_is_said_by_the_base_or_a_task(tmp_path: Path) -> None:
    threshold = {"reward": {"success_threshold": 0.5}}
    tasks = {"addition": threshold, "strict": {}}
    plan = plan_of(tmp_path, base={"reward": {"success_threshold": 0.75}}, tasks=tasks)
    found = {key: config.reward.success_threshold for key, config in plan.configs.items()}
    assert {found["addition", method] for method in ("base", "grpo", "cepo")} == {0.5}
    assert {found["strict", method] for method in ("base", "grpo", "cepo")} == {0.75}


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "compare").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_plans(path: Path) -> None:
    assert len(load(path).methods) >= 2


@pytest.mark.parametrize("axis", ["rewards", "credit", "losses"])
def test_every_member_says_what_supervision_it_takes(axis: str, tmp_path: Path) -> None:
    for name in axes.members(axis):
        assert isinstance(axes.module(axis, name).SUPERVISION, tuple), f"cepo/{axis}/{name}.py needs SUPERVISION"
    config = plan_of(tmp_path).configs["addition", "cepo"]
    assert supervision(config) == ["verifier", "answer"]


@pytest.mark.parametrize(
    ("reward", "credit", "told"),
    [
        ("self_certainty", "uniform", ["none"]),
        ("self_certainty", "rlsd", ["answer"]),
        ("self_certainty", "cepo", ["verifier", "answer"]),
        ("self_certainty", "shuffled", ["verifier", "answer"]),
        ("self_certainty", "rredcot", ["verifier", "answer"]),
        ("json:dumps", "rredcot", ["a function's own", "answer"]),
        ("json:dumps", "cepo", ["a function's own", "verifier", "answer"]),
    ],
)
def test_a_credit_that_reads_outcomes_was_told_of_them(reward: str, credit: str, told: list[str]) -> None:
    config = Config(reward=RewardConfig(reward), credit=CreditConfig(credit), rredcot=RredcotConfig(mode="scale"))
    assert supervision(config) == told


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["compare", "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("PLAN.yaml", "--limit-seconds", "--keep-weights", "--report-only", "--redo"))
