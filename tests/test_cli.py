"""The command line: what it prints, and that every bad input is one clear line and status 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_policy

from cepo import __version__, metrics, trainer
from cepo.cli import main, parse
from cepo.config import Config
from cepo.errors import InputError
from cepo.parts import Parts
from cepo.policy import EMBEDDED, threads
from cepo.progress import follow
from cepo.report import curves

QUICK = ["--train.steps", "2", "--rollout.prompts", "3", "--rollout.group_size", "4", "--eval.problems", "8"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories land in a place of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that answers these arguments."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cepo: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert len(captured.err) < 500
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frain"], ["train", "eval", "doctor", "'frain'"]),
        (["train", "--train.stepz", "3"], ["stepz"]),
        (["train", "extra"], ["extra"]),
        (["train", "--credit.name", "magic"], ["credit.name", "cepo", "rlsd", "uniform", "'magic'"]),
        (["train", "--advantage.name", "magic"], ["advantage.name", "grpo", "'magic'"]),
        (["train", "--reward.name", "magic"], ["reward.name", "verifier", "'magic'"]),
        (["train", "--loss.name", "magic"], ["loss.name", "clipped", "'magic'"]),
        (["train", "--loss.average", "mean"], ["loss.average", "sequence", "'mean'"]),
        (["train", "--task.name", "magic"], ["addition", "jsonl", "'magic'"]),
        (["train", "--task.options", '{"magic": 1}'], ["magic", "max_new_tokens"]),
        (["train", "--policy.model", "./nowhere"], ["policy.model", "./nowhere"]),
        (["train", "--policy.device", "abacus"], ["policy.device", "abacus"]),
        (["train", "--policy.compute_dtype", "int8"], ["policy.compute_dtype", "float32", "int8"]),
        (["train", "--rollout.group_size", "1"], ["rollout.group_size", "at least 2", "1"]),
        (["train", "--rollout.temperature", "9e-31"], ["rollout.temperature", "[1e-30, 1e30]", "9e-31"]),
        (["eval", "--eval.temperature", "1.1e30"], ["eval.temperature", "[1e-30, 1e30]", "1.1e+30"]),
        (["train", "--rollout.prompts", "0"], ["rollout.prompts", "at least 1"]),
        (["train", "--rollout.prompts", "many"], [" rollout.prompts: expected int, got many"]),
        (["train", "--log.trackers", "tensorboard"], [" log.trackers: expected list, got tensorboard"]),
        (["train", "--processes.shard", "maybe"], [" processes.shard: expected one of bool, null, got maybe"]),
        (["train", "--policy.lora.r", "2.5"], [" policy.lora.r: expected int, got 2.5"]),
        (["train", "--policy.lora.s", "2"], [" policy.lora: has no option s"]),
        (
            ["train", "--credit.name", "rredcot", "--advantage.name", "rloo"],
            ["advantage.name", "rredcot.mode", "'rloo'"],
        ),
        (["train", "--rredcot.mode", "magic"], ["rredcot.mode", "scale", "'magic'"]),
        (["train", "--credit.lam", "1.5"], ["credit.lam", "[0, 1]", "1.5"]),
        (["train", "--credit.eps_w", "1"], ["credit.eps_w", "[0, 1)", "1"]),
        (["train", "--train.lr", "-1"], ["train.lr", "above 0"]),
        (["train", "--train.lr", "nan"], ["train.lr", "nan"]),
        (["train", "--train.steps", "0"], ["train.steps", "at least 1"]),
        (["train", "--eval.split", "train"], ["eval.split", "validation", "'train'"]),
        (["train", "--checkpoint.keep", "0"], ["checkpoint.keep", "at least 1"]),
        (["train", "--teacher.template", "x"], ["teacher.template", "hint", "splice"]),
        (["train", "--teacher.hint", "no answer"], ["teacher.hint", "{answer}"]),
        (["train", "--teacher.hint", "{answer} {x}"], ["teacher.hint", "{x}"]),
        (["train", "--teacher.hint", "{answer.x} {answer}"], ["teacher.hint", "{answer.x}"]),
        (["train", "--teacher.hint", "{answer[x]}"], ["teacher.hint", "{answer[x]}"]),
        (["train", "--train.seed", str(1 << 63)], ["train.seed", "[0, 2^63)"]),
        (["train", "--eval.seed", "-1"], ["eval.seed", "[0, 2^63)", "-1"]),
        (["train", "--policy.device", "meta"], ["policy.device", "'meta'"]),
        (["train", "--task.options", '{"max_new_tokens": 0}'], ["task.options", "at least 1", "0"]),
        (["train", "--task.options", '{"max_new_tokens": -4}'], ["task.options", "at least 1", "-4"]),
        (["train", "--task.options", '{"max_new_tokens": "abc"}'], ["task.options", "whole number", "'abc'"]),
        (["train", "--task.options", "&x {a: *x}"], ["options", "inside itself"]),
        (["train", "--resume", ""], ["--resume", "''"]),
        (["train", "--resume="], ["--resume", "''"]),
        (["train", "--resum", "runs/x"], ["--resum"]),
        (["train", "--backend", "abacus"], ["backend", "abacus"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--resume", "nowhere"], ["--resume", "nowhere"]),
        (["train", "--resume"], ["--resume"]),
        (["train", "--rollout.max_new_tokens", "2000"], ["1024", "2000"]),
        (["train", "--run_dir", "/dev/null/run"], ["/dev/null/run"]),
        (["eval", "--eval.problems", "0"], ["eval.problems", "at least 1"]),
        (["eval", "--task.name", "jsonl:nowhere.jsonl"], ["nowhere.jsonl"]),
        (["doctor", "--help-me"], ["--help-me"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, arguments: list[str], words: list[str]
) -> None:
    message = refused(capsys, *arguments)
    for word in words:
        assert word in message
    assert not any(elsewhere.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"}\n', ["line 2", "answer"]),
        ('{"prompt": "1+1", "answer": "2"}\nnot json\n', ["line 2"]),
    ],
)
def test_a_bad_jsonl_file_is_told_by_line(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, content: str, words: list[str]
) -> None:
    Path("bad.jsonl").write_text(content)
    message = refused(capsys, "train", "--task.name", "jsonl:bad.jsonl")
    assert all(word in message for word in ["bad.jsonl", *words])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"train: {stepz: 3}", ["stepz"]),
        (b"train: [", ["bad.yaml"]),
        (b"magic: 1", ["magic"]),
        (b"train: 3", ["bad.yaml", "train: expected a section, got 3"]),
        (b"train:", ["bad.yaml", "train: expected a section, got None"]),
        (b"rollout: {temperature: null}", ["rollout.temperature: expected a value, got None"]),
        (b"", ["bad.yaml", "expected sections, got None"]),
        (b"\x89PNG\xff\x00", ["bad.yaml", "expected a YAML file"]),
        (b"resume: runs/x", ["--resume", "on the command line"]),
        (b"task: {options: &x {a: *x}}", ["bad.yaml", "recursive", "line 1"]),
        (b"train: {steps: 3,\n steps: 4}", ["bad.yaml", "line 1", "each key once", "'steps' twice"]),
    ],
)
def test_a_bad_yaml_file_is_one_line(capsys: pytest.CaptureFixture[str], text: bytes, words: list[str]) -> None:
    Path("bad.yaml").write_bytes(text)
    message = refused(capsys, "train", "--config", "bad.yaml")
    assert all(word in message for word in words)


def test_a_bad_file_for_one_section_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    assert "YAML file" in refused(capsys, "train", "--train", "bad.yaml")


def one_more_layer(config: bytes) -> bytes:
    content = json.loads(config)
    layers = [*content["layer_types"], "full_attention"]
    return json.dumps({**content, "layer_types": layers, "num_hidden_layers": len(layers)}).encode()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model.safetensors", lambda content: content[:1000], "cannot load"),
        ("model.safetensors", lambda content: b"", "cannot load"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 128', b'"hidden_size": 64'), "its config"),
        ("config.json", one_more_layer, "lack"),
    ],
    ids=["cut", "empty", "shapes", "layers"],
)
def test_a_damaged_model_is_one_line(
    capfd: pytest.CaptureFixture[str], file: str, change: Callable[[bytes], bytes], words: str
) -> None:
    shutil.copytree(EMBEDDED, "model")
    content = Path("model", file).read_bytes()
    Path("model", file).write_bytes(change(content))
    assert Path("model", file).read_bytes() != content
    message = refused(capfd, "eval", "--policy.model", "./model")
    assert "policy.model" in message
    assert "./model" in message
    assert words in message


def test_a_run_without_a_checkpoint_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    assert "policy.model: the run 'run' has no checkpoint" in refused(capsys, "eval", "--policy.model", "run")


def test_a_prompt_longer_than_the_context_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": f"{i} " * 600, "answer": str(i)}) for i in range(10)]
    Path("long.jsonl").write_text("\n".join(lines))
    message = refused(capsys, "train", "--task.name", "jsonl:long.jsonl", *QUICK)
    assert "expected at most 1024 tokens, the model's context" in message


def test_train_leaves_everything_a_run_should_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "--credit.name", "rlsd"]) == 0
    captured = capsys.readouterr()
    assert "sampled accuracy" in captured.out
    run = Path("runs/addition-rlsd-seed0")
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["credit"] == {"name": "rlsd", "lam": 0.5, "lam_steps": 50, "eps_w": 0.2}
    assert resolved["run_dir"] == str(run)
    assert [(r["kind"], r["step"]) for r in metrics.read(run)] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    assert (run / curves.FILE).read_bytes().startswith(b"\x89PNG")
    for word in ("reward", "acc", "H ", "flat", "lam", "ev+", "ev-", "clip", "tok/s", "rollout", "credit"):
        assert word in captured.err
    assert main(["eval", "--policy.model", str(run), "--eval.split", "test"]) == 0
    assert "8 problems of test: sampled" in capsys.readouterr().out  # the run's own number, and what is given here
    # The finished run repeats from its own resolved config, and can be taken further.
    assert parse("train", ["--config", str(run / "config.yaml")])[0].credit.lam_steps == 50
    picture = (run / curves.FILE).stat().st_mtime_ns
    for options in ([], ["--train.steps", "2"]):
        assert main(["train", "--resume", str(run), *options]) == 0
        assert capsys.readouterr().err == f"nothing to do: {run} has all 2 steps\n"
    assert (run / curves.FILE).stat().st_mtime_ns == picture
    before = (run / "config.yaml").read_bytes()
    for option, value, word in (
        ("--train.steps", "1", "at least 2"),
        ("--policy.model", "elsewhere", "'embedded'"),
        ("--policy.gguf_file", "x.gguf", "None"),
        ("--run_dir", "other", f"'{run}'"),
    ):
        message = refused(capsys, "train", "--resume", str(run), option, value)
        assert option in message
        assert word in message
    assert (run / "config.yaml").read_bytes() == before
    assert main(["train", "--resume", str(run), "--train.steps", "3"]) == 0
    assert metrics.read(run)[-1]["step"] == 3
    assert refused(capsys_cleared(capsys), "train", *QUICK, "--run_dir", str(run)).count("--resume") == 1


def capsys_cleared(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    capsys.readouterr()
    return capsys


def test_options_override_yaml_which_overrides_the_defaults() -> None:
    Path("mine.yaml").write_text("credit: {name: rlsd, lam: 0.3}\ntrain: {steps: 7}\n")
    config, _ = parse("train", ["--config", "mine.yaml", "--train.steps", "9"])
    assert (config.credit.name, config.credit.lam, config.credit.eps_w, config.train.steps) == ("rlsd", 0.3, 0.2, 9)
    assert config.train.lr == Config().train.lr


def test_help_says_what_every_option_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    summary = capsys.readouterr().out
    assert all(command in summary for command in ("train", "eval", "doctor"))
    with pytest.raises(SystemExit) as status:
        main(["train", "--help"])
    assert status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "configuration file" not in text
    for words in (
        "cpu:avx512",
        "--credit.eps_w",
        "the weight is clipped to",
        "--resume",
        "optimiser steps on each batch",
        "hint",
    ):
        assert words in text


def test_the_doctor_checks_what_can_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "contrastive_logprobs ->" in out
    assert "reference on cpu" in out
    assert "ok" in out
    assert "WRONG" not in out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-c", "import sys; from cepo.cli import main; sys.exit(main(['--help']))"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cepo {__version__}\n"


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupt_names_what_can_be_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    original = trainer.train_step

    def interrupted(parts: Parts, optimizer: torch.optim.Optimizer, step: int, observe: Any) -> trainer.Record:
        if step == 2:
            raise KeyboardInterrupt
        return original(parts, optimizer, step, observe)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert main(["train", *QUICK, "--checkpoint.every", "1" if saved else "20", "--run_dir", "mine"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    offer = "; `cepo train --resume mine` continues from the last checkpoint" if saved else ""
    assert last == f"cepo: interrupted{offer}"


def record(step: int, **changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("reward", "accuracy", "entropy", "zero_variance", "lam", "evidence_right",
                             "evidence_wrong", "weight_clipped"), 0.25)  # fmt: skip
    seconds = {"rollout": 0.5, "teacher": 0.2, "policy": 0.1, "credit": 0.1, "update": 0.1}
    return {"kind": "train", "step": step, **numbers, "tokens_per_second": 1e4, "skipped_updates": 0,
            "seconds": seconds, **changes}  # fmt: skip


def test_progress_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    follow([record(step, skipped_updates=step > 41, not_finite="loss") for step in range(41, 61)], 60, done=40)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if "/60 [" in line]
    assert "40/60" in bars[0]
    assert "60/60" in bars[-1]
    assert "s/step" in bars[-1]
    assert "reward 0.25 acc 0.25]" in bars[-1]
    assert [line[:9] for line in lines if line.startswith("step")] == [f"step {s:4d}" for s in range(42, 61, 3)]
    for word in ("lam 0.25", "ev+ 0.25", "ev- 0.25", "clip 0.25", "H 0.250", "tok/s 10000", "rollout 50%"):
        assert sum(word in line for line in lines) == 7
    (warning,) = [line for line in lines if line.startswith("warning: step 42")]
    assert "loss not finite" in warning


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cepo import doctor

    monkeypatch.setattr(doctor, "self_test", lambda backend, device: 1e-3)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_parsing_needs_neither_torch_nor_transformers_for_a_mistake_in_the_command() -> None:
    code = "import sys; from cepo.cli import main; main(['frain']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_small_model_takes_one_thread_and_gives_the_others_back() -> None:
    policy = tiny_policy()
    before = torch.get_num_threads()
    for wanted, expected in ((0, 1), (2, 2)):
        with threads(policy, wanted):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == before


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)
