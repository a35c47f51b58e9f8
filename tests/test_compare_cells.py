"""Whose a finished cell is: what it was made of, and what of that has changed since."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import refused
from test_compare import ROOT, SMALL, fake, plan_of, write
from tiny import one_thread  # noqa: F401

from cepo import checkpoint, trainer
from cepo.cli import main
from cepo.compare import cells, command, files
from cepo.compare import plan as planning
from cepo.compare.cells import Store
from cepo.compare.plan import Cell, Plan, load
from cepo.config import Config, RewardConfig, TaskConfig, TrainConfig
from cepo.parts import Parts


def test_the_hash_is_of_all_that_changes_a_number_and_nothing_else(tmp_path: Path) -> None:
    def final(lr: float = 3e-4, seed: int = 0, method: str = "cepo", **changes: Any) -> Cell:
        return plan_of(tmp_path, **changes).final("addition", method, lr, seed)

    cell = final()
    others = [
        final(base={**SMALL["base"], "rollout": {"prompts": 5}}),
        final(methods={**SMALL["methods"], "cepo": {"credit": {"lam": 0.4}}}),
        final(tasks={"addition": {"rollout": {"temperature": 0.9}}}),
        final(test_problems=9),
        final(pass_at={"k": 3, "problems": 4}),
        final(lr=1e-4),
        final(seed=1),
        final(method="grpo"),
        plan_of(tmp_path).tuning("addition", "cepo", 3e-4, 0),
    ]
    assert len({cell.hash, *(other.hash for other in others)}) == 10
    assert final(base={**SMALL["base"], "checkpoint": {"every": 7}}, cell_seconds=1).hash == cell.hash
    assert replace(cell, config=replace(cell.config, run_dir="elsewhere")).hash == cell.hash


def test_an_option_that_came_later_leaves_finished_cells_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Later(TrainConfig):
        momentum: float = 0.9

    def later(cell: Cell, **train: Any) -> Cell:
        return replace(cell, config=replace(cell.config, train=Later(**asdict(cell.config.train) | train)))

    def defaults_become(**train: Any) -> None:
        usual = asdict(Config().check())
        for module in (planning, cells):
            monkeypatch.setattr(module, "defaults", lambda: {**usual, "train": usual["train"] | train})

    cell, store = plan_of(tmp_path).final("addition", "cepo", 3e-4, 0), Store(tmp_path)
    assert cell.content["train"] == {"steps": 2}
    fake(store, cell, 0.6)
    then = cell.hash
    defaults_become(momentum=0.9)
    assert later(cell).hash == then
    assert store.get(later(cell)) is not None
    assert store.stale(later(cell)) is None
    assert store.get(later(cell, momentum=0.5)) is None
    assert "(train.momentum: 0.9, now 0.5)" in str(store.stale(later(cell, momentum=0.5)))
    # A default that changes makes other cells of those that leave it alone, though their hashes agree.
    defaults_become(lr=1e-3)
    changed = replace(cell, config=replace(cell.config, train=replace(cell.config.train, lr=1e-3)))
    assert changed.hash == then
    assert store.get(changed) is None
    fake(store, changed, 0.6)
    assert store.get(changed) is not None


def test_cells_of_another_configuration_are_refused_or_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = plan_of(tmp_path), Store(tmp_path / "out")
    fake(store, plan.final("addition", "cepo", 3e-4, 1), 0.6)
    directory = tmp_path / "out" / plan.final("addition", "grpo", 3e-4, 0).directory
    checkpoint.create_run(str(directory), "", lambda _: command_dump(plan))
    changed = write(tmp_path, {**SMALL, "base": {**SMALL["base"], "train": {"steps": 3}}})
    message = refused(capsys, "compare", changed, "--out", str(tmp_path / "out"))
    assert "got 2 of another configuration" in message
    assert "train.steps: 2, now 3" in message
    assert "--redo" in message
    assert store.get(plan.final("addition", "cepo", 3e-4, 1)) is not None
    assert "got 2 of" in refused(capsys, "compare", changed, "--out", str(tmp_path / "out"), "--report-only")
    monkeypatch.setattr(command, "run", lambda cell, store, keep: store.put(cell, {"error": "not run"}))
    assert main(["compare", changed, "--out", str(tmp_path / "out"), "--redo"]) == 1
    assert store.get(load(changed).final("addition", "cepo", 3e-4, 1)) is not None
    assert not directory.exists()


def test_a_file_that_changes_makes_other_cells_of_those_that_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, lines = tmp_path / "r.py", tmp_path / "task.jsonl"
    reward.write_text("def f(**_):\n    return None\n")
    lines.write_text("{}")
    methods = {"grpo": {"credit": {"name": "uniform"}}, "own": {"reward": {"name": f"{reward}:f"}}}
    tasks = {"addition": {}, "lines": {"task": {"name": f"jsonl:{lines}"}}}
    path, out = write(tmp_path, {**SMALL, "methods": methods, "tasks": tasks}), tmp_path / "out"
    plan, store = load(path), Store(tmp_path / "out")

    def finals() -> list[Cell]:
        return [plan.final(task, method, 3e-4, 0) for task in tasks for method in methods]

    def current() -> list[bool]:
        return [store.get(cell) is not None for cell in finals()]

    before = finals()
    for cell in before:
        fake(store, cell, 0.6)
    monkeypatch.setattr(trainer, "train", lambda *_: 1 / 0)
    begun = plan.final("addition", "own", 3e-4, 1)  # it leaves its run, and a result that is taken away
    assert "ZeroDivisionError" in cells.run(begun, store, False)["error"]
    store.path(begun).unlink()
    assert store.stale(plan.final("addition", "own", 3e-4, 1)) is None
    reward.write_text("def f(**_):\n    return [1.0]\n")
    assert current() == [True, False, True, False]
    message = refused(capsys, "compare", path, "--out", str(out), "--report-only")
    assert f"got 3 of another configuration, the first {out}/cells/addition-own-lr0.0003-seed0.json" in message
    assert f"(content of reward.name: '{before[1].files['reward.name']}', now '" in message
    left = store.stale(plan.final("addition", "own", 3e-4, 1))
    assert str(left).startswith(f"{out / begun.directory} (content of reward.name: ")
    lines.write_text("{}\n")
    assert current() == [True, False, False, False]
    assert "content of task.name" in str(store.stale(finals()[2]))
    reward.unlink()
    assert str(store.stale(finals()[1])).endswith("now None)")
    assert {after.hash for after in finals()} & {cell.hash for cell in before} == {before[0].hash}


def test_a_model_that_changes_makes_other_cells_of_those_that_were_made_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "judge/checkpoints/step-000001"):
        Path(name).mkdir(parents=True)
        Path(name, "model.safetensors").write_bytes(name.encode())
    methods = {"grpo": {}, "judged": {"reward": {"name": "cross_model_entropy", "verifier": "judge"}}}
    plan = plan_of(tmp_path, base={**SMALL["base"], "policy": {"model": "policy"}}, methods=methods)
    store = Store(tmp_path / "out")

    def finals() -> list[Cell]:
        return [plan.final("addition", method, 3e-4, 0) for method in methods]

    def current() -> list[bool]:
        return [store.get(cell) is not None for cell in finals()]

    embedded = plan_of(tmp_path).final("addition", "cepo", 3e-4, 0)
    assert embedded.models == files.models(Config()) == {}
    before = finals()
    for cell in before:
        fake(store, cell, 0.6)
    monkeypatch.setattr(trainer, "train", lambda *_: 1 / 0)
    monkeypatch.setattr(cells, "load_parts", lambda *_: Parts.__new__(Parts))
    monkeypatch.setattr(trainer, "check_prompts", lambda *_: None)
    begun = plan.final("addition", "judged", 3e-4, 1)
    assert "error" in cells.run(begun, store, False)
    store.path(begun).unlink()
    assert store.stale(plan.final("addition", "judged", 3e-4, 1)) is None
    Path("judge/checkpoints/step-000002").mkdir()
    assert current() == [True, False]
    assert str(store.stale(finals()[1])).split("(")[1].startswith("content of reward.verifier: '")
    assert str(store.stale(plan.final("addition", "judged", 3e-4, 1))).startswith(
        f"{tmp_path / 'out' / begun.directory} (c"
    )
    Path("policy/model.safetensors").write_bytes(b"Policy")  # as long as before
    assert current() == [False, False]
    Path("policy").rename("elsewhere")
    Path("judge").rename("put away")
    assert current() == [True, True], "there is nothing to compare with"
    assert [cell.hash for cell in before] == [cell.hash for cell in finals()]


def test_a_module_s_file_is_the_one_that_would_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(reward=RewardConfig("mine.scores:f"), task=TaskConfig())
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = [files.digests(config)]  # type: ignore[arg-type]
    for name, text in (("mine/scores.py", "f = 1"), ("mine/scores.py", "f = 10"), ("mine/scores/__init__.py", "f = 1")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        assert files.digests(config) == seen[-1], "what this process imported"  # type: ignore[arg-type]
        files._of_module.cache_clear()
        seen.append(files.digests(config))  # type: ignore[arg-type]
    assert seen[0] == {"reward.name": None}
    assert seen[1] == seen[3] != seen[2]
    assert files.digests(Config()) == {}


def test_kept_cells_are_those_of_their_plan() -> None:
    results = ROOT / "benchmarks" / "results" / "addition_more"
    plan, store = load(ROOT / "examples" / "compare" / "addition_more.yaml"), Store(results)
    assert {c.name for c in plan.every() if store.get(c)} == {file.stem for file in (results / "cells").glob("*.json")}


def command_dump(plan: Plan) -> str:
    from cepo.cli import dump

    return dump(plan.final("addition", "grpo", 3e-4, 0).config)


def test_a_damaged_cell_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write(tmp_path, SMALL)
    path = tmp_path / cells.FOLDER / "addition-base.json"
    path.parent.mkdir()
    whole = {"hash": "", "config": {}, "kind": "base", "curve": [{"sampled": 0.5, "greedy": 0.5}]}
    spoilt = [{**whole, **change} for change in ({"config": None}, {"curve": []}, {"curve": [{"sampled": 99.0}]})]
    for text in ('{"hash": ', "[]", "{}", *map(json.dumps, spoilt)):
        path.write_text(text)
        assert "addition-base.json: expected the numbers of a cell" in refused(
            capsys, "compare", plan, "--out", str(tmp_path)
        )
