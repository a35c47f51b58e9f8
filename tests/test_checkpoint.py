"""Checkpoints and run directories: whole or absent, and a run that was killed ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_trainer import small
from tiny import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from cepo import checkpoint, metrics, trainer
from cepo.cli import main
from cepo.config import Config
from cepo.errors import InputError
from cepo.parts import load_parts

TIMES = ("seconds", "tokens_per_second")


def train(run: Path, start: Path | None = None, **sections: Any) -> None:
    run.mkdir(exist_ok=True)
    (run / checkpoint.CONFIG).write_text("{}\n")
    for _ in trainer.train(load_parts(config(**sections), start and str(start)), run, start):
        pass


def config(**sections: Any) -> Config:
    return small(**{"checkpoint": {"every": 1, "keep": 9}, "rollout": {"prompts": 3, "group_size": 4}, **sections})


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], Any, list[dict[str, Any]]]:
    """Final weights, optimizer state, and metrics but for the times."""
    path = checkpoint.newest(run)
    assert path is not None
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in metrics.read(run)]
    return load_file(path / "model.safetensors"), torch.load(path / checkpoint.STATE)["optimizer"]["state"], records


def assert_equal(one: Path, other: Path) -> None:
    (weights, state, records), (weights2, state2, records2) = outcome(one), outcome(other)
    assert records == records2
    assert weights.keys() == weights2.keys()
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)
    for index, values in state.items():
        assert all(torch.equal(values[name], state2[index][name]) for name in values)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "halves", train={"steps": 1})
    metrics.append(tmp_path / "halves", {"kind": "train", "step": 2, "reward": "of a step that was never saved"})
    with (tmp_path / "halves" / metrics.FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    # The first half ended there, and so has an evaluation of its own.
    records = [r for r in metrics.read(tmp_path / "halves") if (r["kind"], r["step"]) != ("eval", 1)]
    (tmp_path / "halves" / metrics.FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    train(tmp_path / "halves", checkpoint.newest(tmp_path / "halves"))
    assert_equal(tmp_path / "whole", tmp_path / "halves")


def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    options = ["--rollout.prompts", "4", "--rollout.group_size", "4", "--train.steps", "6", "--eval.problems", "8",
               "--eval.every", "2", "--checkpoint.every", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment.pop("COVERAGE_PROCESS_START", None)

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "cepo", "train", *arguments], env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def records(run: Path) -> int:
        return len(metrics.read(run)) if run.is_dir() else 0

    assert start("--run_dir", str(whole), *options).wait(120) == 0
    rng = random.Random(0)
    for target in (2, 5):
        fresh = not killed.is_dir()
        process = start(*(["--run_dir", str(killed), *options] if fresh else ["--resume", str(killed)]))
        while process.poll() is None and records(killed) < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))  # somewhere in a step, an evaluation or a save
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed.is_dir()
    assert start("--resume", str(killed)).wait(120) == 0
    assert_equal(whole, killed)


def test_a_checkpoint_is_a_model_that_transformers_loads(tmp_path: Path) -> None:
    train(tmp_path / "run", train={"steps": 1})
    path = checkpoint.newest(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert next(model.parameters()).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert model.generation_config.eos_token_id is not None


def test_only_the_newest_are_kept_and_nothing_temporary(tmp_path: Path) -> None:
    train(tmp_path / "run", checkpoint={"every": 1, "keep": 2})
    assert sorted(os.listdir(tmp_path / "run" / checkpoint.FOLDER)) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    train(run, train={"steps": 2})
    last = checkpoint.newest(run)
    assert last is not None
    file = last / (checkpoint.MANIFEST if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: file.write_bytes(content),
        "cut": lambda: file.write_bytes(content[:-100]),
        "remove": file.unlink,
        "manifest": lambda: file.write_text("{"),
    }[damage]()
    assert main(["train", "--resume", str(run)]) == 2
    message = capsys.readouterr().err.strip()
    previous = last.with_name("step-000001")
    assert message.count("\n") == 0
    assert "is damaged" in message
    assert f"--resume {previous}" in message
    train(run, previous, train={"steps": 3})
    train(tmp_path / "whole", train={"steps": 3})
    assert checkpoint.newest(run) is not None
    weights, _, _ = outcome(run)
    expected, _, _ = outcome(tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("manifest", ["[]", '{"files": []}', '{"files": {}}', '{"step": 2, "files": {}}', "\xff"])
def test_a_manifest_of_another_shape_is_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str
) -> None:
    path = tmp_path / checkpoint.FOLDER / "step-000002"
    path.mkdir(parents=True)
    (tmp_path / checkpoint.CONFIG).write_text("{}\n")
    (path / checkpoint.MANIFEST).write_bytes(manifest.encode("latin-1"))
    assert main(["train", "--resume", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is damaged (manifest.json: " in message


@pytest.mark.parametrize("tail", [b"\xff", b"5\n", b"[]\n", b'{"kind": "train"}\n', b'{"kind"'])
def test_metrics_are_read_up_to_what_is_no_record(tmp_path: Path, tail: bytes) -> None:
    record = {"kind": "train", "step": 1}
    (tmp_path / metrics.FILE).write_bytes(json.dumps(record).encode() + b"\n" + tail)
    assert metrics.read(tmp_path) == [record]


def test_an_older_state_with_a_generator_still_loads(tmp_path: Path) -> None:
    parts = load_parts(config())
    optimizer = trainer.make_optimizer(parts)
    before = torch.get_rng_state()
    torch.save({"optimizer": optimizer.state_dict(), "generator": torch.zeros(1)}, tmp_path / checkpoint.STATE)
    checkpoint.load_state(tmp_path, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    (tmp_path / checkpoint.CONFIG).write_text("{}\n")
    path = checkpoint.save(tmp_path, 1, parts.policy.model, parts.policy.tokenizer, optimizer.state_dict(), 1)
    assert set(torch.load(path / checkpoint.STATE)) == {"optimizer"}


def test_two_processes_never_train_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / checkpoint.CONFIG).write_text("{}\n")
    code = f"from pathlib import Path; from cepo.checkpoint import lock\nwith lock(Path({str(tmp_path)!r})): "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", f"{code}print('held', flush=True); input()"], env=environment,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"cepo: error: another process trains in {tmp_path}\n"
    other.communicate("\n")
    with checkpoint.lock(tmp_path):
        pass


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4060800 vs 4060692"),
]


@pytest.mark.parametrize("failure", FULL, ids=lambda failure: type(failure).__name__)
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    run = tmp_path / "run"
    train(run, train={"steps": 1})

    def full(*args: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(InputError, match=r"cannot write .*step-000002.*No space left on device") as error:
        train(run, checkpoint.newest(run), train={"steps": 3})
    assert "\n" not in str(error.value)
    assert os.listdir(run / checkpoint.FOLDER) == ["step-000001"]
    monkeypatch.undo()
    train(run, checkpoint.newest(run), train={"steps": 3})
    train(tmp_path / "whole", train={"steps": 3})
    weights, _, _ = outcome(run)
    expected, _, _ = outcome(tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / metrics.FILE).symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left on device"):
        metrics.append(tmp_path, {"step": 1})


def test_a_new_run_never_touches_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = checkpoint.create_run(None, "name", lambda path: path)
    second = checkpoint.create_run(None, "name", lambda path: path)
    assert (str(first), str(second)) == ("runs/name", "runs/name-2")
    assert (second / checkpoint.CONFIG).read_text() == "runs/name-2"
    with pytest.raises(InputError, match="exists already; continue it with --resume runs/name"):
        checkpoint.create_run("runs/name", "", lambda path: path)
    Path("empty").mkdir()
    assert str(checkpoint.create_run("empty", "", lambda path: path)) == "empty"
    assert Path("empty", checkpoint.CONFIG).read_text() == "empty"
    with pytest.raises(InputError, match="exists already"):
        checkpoint.create_run("empty", "", lambda path: path)
    Path("closed").mkdir()

    def refuse(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as changed:
        changed.setattr(Path, "mkdir", refuse)
        with pytest.raises(InputError, match="run_dir: cannot write closed: Permission denied"):
            checkpoint.create_run("closed", "", lambda path: path)
    with pytest.raises(InputError), checkpoint.replacing(first, fresh=True) as temporary:
        temporary.mkdir()
    assert (first / checkpoint.CONFIG).exists()
    assert sorted(os.listdir("runs")) == ["name", "name-2"]
