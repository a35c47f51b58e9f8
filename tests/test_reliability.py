"""Small portions of benchmarks/reliability.py: what is fuzzed, broken, damaged or cut off ends in one line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import one_thread  # noqa: F401

from cepo import card, checkpoint, metrics, trainer
from cepo.cli import main
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.policy import EMBEDDED
from cepo.report import curves

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import broken_steps
import fuzz_inputs
import fuzz_ops

QUICK = ["--train.steps", "1", "--rollout.prompts", "2", "--rollout.group_size", "2", "--eval.problems", "2"]


def test_random_calls_of_the_ops_agree_with_the_reference_or_are_refused_by_name() -> None:
    found = [fuzz_ops.one(number) for number in range(800)]
    assert [wrong for _, wrong in found if wrong] == []
    assert {outcome for outcome, _ in found} == {"agrees", "refused", "not possible"}


def test_a_wrong_result_would_be_found() -> None:
    """Were the bounds of the fuzz wide enough for everything, it would prove nothing."""
    missed = 0
    for number in range(40):
        make = fuzz_ops.Maker(f"0/{number}")
        call = {k: v for k, v in make.call("token_logprobs").items() if v is not None}
        want = fuzz_ops.run("token_logprobs", fuzz_ops.doubled(call), 1.0, False)
        for name, value in want.items():
            moved = {**want, name: torch.where(value == 0, 0.0, value * 1.001)}
            if value.count_nonzero() and value.isfinite().all():
                missed += fuzz_ops.compare("token_logprobs", call, moved, want, 1.0) is None and name != "gradient"
    assert missed == 0


@pytest.mark.parametrize(("what", "count"), [("configs", 40), ("files", 300)])
def test_random_configs_and_files_are_read_or_refused_in_one_line(what: str, count: int) -> None:
    found = fuzz_inputs.fuzz(what, count)
    assert found["wrong"] == []
    assert set(found["outcomes"]) == {"read", "refused"}


@pytest.mark.parametrize(
    "case",
    [
        "NaN in a weight",
        "NaN in the logits of two steps, and of two",
        "NaN in the logits of groups without a gradient",
        "an infinite gradient",
        "a task whose score raises",
    ],
)
def test_what_is_not_finite_is_skipped_named_and_never_saved(tmp_path: Path, case: str) -> None:
    assert broken_steps.run(case, tmp_path / "run")[1] is None


def test_max_skipped_of_zero_never_ends_a_run(tmp_path: Path) -> None:
    parts = load_parts(small(train={"steps": 5, "max_skipped": 0}, rollout={"prompts": 1, "group_size": 2}))
    weight = next(parts.policy.model.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    records = trainer.train(parts, tmp_path)
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 5


def whole(path: Path, **files: bytes) -> Path:
    """A checkpoint of these files, as far as its manifest knows."""
    path.mkdir(parents=True)
    (path.parent.parent / checkpoint.CONFIG).write_text("{}\n")
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    digests = {file.name: checkpoint.digest(file) for file in sorted(path.iterdir())}
    manifest = {"step": int(path.name.removeprefix("step-")), "files": digests}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1))
    return path


def test_a_picture_holds_no_more_of_a_long_run_than_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_MOST", 50)
    lines = [{"kind": "train", "step": step, "entropy": 1.0, "length": 2.0} for step in range(1, 1001)]
    lines += [{"kind": "eval", "step": step, "greedy": 0.5} for step in (0, 999, 1000)]
    (tmp_path / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, evals = curves._drawn(tmp_path)
    assert [record["step"] for record in steps] == list(range(32, 1001, 32))
    assert steps[0] == {"step": 32, "entropy": 1.0}
    assert [record["step"] for record in evals] == [0, 999, 1000]


def test_a_damaged_record_costs_what_is_damaged_and_nothing_else(tmp_path: Path) -> None:
    train = {"kind": "train", "step": 2, "accuracy": 0.5, "entropy": 1.0, "lam": 0.5, "seconds": {"update": 1.0}}
    evaluated = {"kind": "eval", "step": 2, "split": "test", "problems": 8, "sampled": 0.5, "greedy": 0.25}
    lines = [train, {**train, "seconds": {"update": "x"}}, evaluated]
    for record in (train, evaluated):
        for key in record.keys() - {"kind", "step"}:
            lines.append({name: value for name, value in record.items() if name != key})
            lines += [{**record, key: value} for value in ("x", None, [], {}, 10**400)]
    lines.append({**train, "step": 10**20})
    (tmp_path / checkpoint.CONFIG).write_text("{}\n")
    (tmp_path / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.draw(tmp_path).stat().st_size > 10_000
    curves.overlay([tmp_path], tmp_path / "runs.svg")
    steps, evals = curves._drawn(tmp_path)
    assert sum("entropy" in record for record in steps) == len(steps) - 6  # ways to damage it
    assert {"step": 2, "sampled": 0.5, "greedy": 0.25} in evals
    assert "| 2 | test | 8 | 0.500 | 0.250 |" in card.text(tmp_path, 2)


def test_no_flipped_bit_of_a_manifest_makes_it_another_checkpoint(tmp_path: Path) -> None:
    path = whole(tmp_path / checkpoint.FOLDER / "step-000012", state_pt=b"state", model_safetensors=b"weights")
    file = path / checkpoint.MANIFEST
    content = file.read_bytes()
    for at in range(len(content)):
        for bit in (0, 2, 6):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with suppress(InputError):  # or else it is whitespace that was flipped, and says the same
                assert checkpoint.verify(path) == 12


class Bomb:
    """Makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_or_model_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, run = tmp_path / "canary", tmp_path / "run"
    path = whole(run / checkpoint.FOLDER / "step-000001", state_pt=pickle.dumps(Bomb(canary), protocol=2))
    with pytest.raises(InputError, match=r"state.pt: expected tensors and plain values alone, got ") as error:
        checkpoint.load_state(path, torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))
    assert "\n" not in str(error.value)
    shutil.copytree(EMBEDDED, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    content |= {"model_type": "canary", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    config.write_text(json.dumps(content))
    (tmp_path / "model" / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    assert main(["eval", "--policy.model", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not canary.exists()


def test_a_state_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / checkpoint.STATE)
    with pytest.raises(InputError, match="expected the state of this model's optimiser"):
        checkpoint.load_state(tmp_path, torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))


def test_a_damaged_line_of_metrics_costs_that_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"kind": "train", "step": step} for step in range(1, 5)]
    lines = [json.dumps(record) for record in records]
    lines[1] = lines[1].replace('"step"', '"stfp"')
    (tmp_path / metrics.FILE).write_text("\n".join([*lines, '{"kind": "tr']))
    with caplog.at_level(logging.WARNING, "cepo"):
        metrics.cut_back(tmp_path, 3)
    assert metrics.read(tmp_path) == [records[0], records[2]]
    assert "left out 1 lines that are no records, the first is 2" in caplog.text


def test_a_run_killed_after_its_last_save_is_tidied_by_the_next_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run_dir", str(run), "--checkpoint.keep", "1", *QUICK]) == 0
    last = checkpoint.all_of(run)[-1]
    shutil.copytree(last, last.with_name("step-000000"))
    (run / "curves.png").rename(run / ".curves.png.partial")
    assert main(["train", "--resume", str(run)]) == 0
    assert checkpoint.all_of(run) == [last]
    assert (run / "curves.png").exists()
    assert not list(run.glob(".*.partial"))


def test_no_command_asks_a_network_for_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        tried.append(arguments)
        raise OSError("no network here")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"),
                        (socket, "create_connection")):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    run = str(tmp_path / "run")
    assert main(["train", "--run_dir", run, *QUICK]) == 0
    assert main(["eval", "--policy.model", run, "--eval.problems", "2"]) == 0
    assert tried == []
