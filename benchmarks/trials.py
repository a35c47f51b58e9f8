"""Runs of the trainer that start in no time, as forks of a process that has loaded everything; what became of them."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  # before the fork, as all that a run imports
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cepo import checkpoint, metrics, trainer
from cepo.cli import main, parse
from cepo.parts import load_parts
from cepo.policy import EMBEDDED
from cepo.report import samples

STEPS = 4
SMALL = ["--rollout.prompts", "2", "--rollout.group_size", "4", "--train.steps", str(STEPS), "--eval.problems", "4",
         "--eval.every", "2", "--checkpoint.every", "1", "--report.every", "2", "--report.prompts", "1"]  # fmt: skip
KINDS = {  # each keeps another state
    "cepo": SMALL,
    "alpha auto": [*SMALL, "--advantage.name", "rl2ml", "--advantage.alpha", "auto"],
    "sdpo": [*SMALL, "--loss.name", "sdpo"],
    "opsd": [*SMALL, "--loss.name", "opsd"],
}
TIMES = ("seconds", "tokens_per_second")
HUNG = 900  # seconds


def start(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child that runs a command, and writes what it says to `log`; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        before()
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def ends(arguments: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The status of a command and what it said; -1 if it hung."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        pid = start(arguments, log, before)
        end = time.monotonic() + HUNG
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return -1, "it hung: " + log.read_text(errors="replace")
            time.sleep(0.005)


def one_error(told: str) -> bool:
    """Whether a command ended with one line that says why, whatever its bar showed before it."""
    errors = [line for line in told.splitlines() if line.startswith("cepo: error: ")]
    return len(errors) == 1 and told.strip().endswith(errors[0]) and "Traceback" not in told


def whole_run(run: Path, options: list[str]) -> tuple[Path, float]:
    """An undisturbed run and its seconds."""
    before = time.perf_counter()
    status, told = ends(["train", "--run_dir", str(run), *options])
    if status:
        raise RuntimeError(f"{run.name}: status {status}: {told}")
    return run, time.perf_counter() - before


def start_of(run: Path, options: list[str]) -> list[str]:
    """What begins or continues a run."""
    return ["train", "--resume", str(run)] if run.is_dir() else ["train", "--run_dir", str(run), *options]


def kill_one(arguments: list[str], run: Path, rng: random.Random, moment: str, seconds: float) -> str | None:
    """Start a run and kill it at any moment or in the midst of a save; where that was, None if it had ended."""
    began = time.time()

    def partial() -> list[Path]:
        found = [*run.glob("checkpoints/.*.partial"), *run.glob("tokens/.*.partial"), *run.glob(".*.partial")]
        return [path for path in found if _ctime(path) >= began]

    with tempfile.TemporaryDirectory() as folder:
        pid = start(arguments, Path(folder, "log"))
        until = time.monotonic() + (rng.uniform(0, seconds) if moment == "any" else HUNG)
        skip = rng.randrange(2)  # saves to let pass
        seen: set[str] = set()
        while time.monotonic() < until:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return None
            seen |= (
                {path.name for path in run.glob("checkpoints/.*.partial") if _ctime(path) >= began}
                if moment == "save"
                else set()
            )
            if len(seen) > skip:
                time.sleep(rng.uniform(0, 0.08))
                break
            time.sleep(0.0005)
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not run.is_dir():
        return "before there was a run"
    kinds = {path.parent.name for path in partial()}
    if "checkpoints" in kinds:
        return "in the midst of a checkpoint"
    if kinds:
        return "in the midst of another file"
    return "elsewhere" if checkpoint.saved(run) else "before the first checkpoint"


def _ctime(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except OSError:
        return 0.0


def difference(whole: Path, run: Path) -> str:
    """Where two runs differ in more than their times and their names; "" if nowhere."""
    if left := [str(path.relative_to(run)) for path in run.rglob(".*.partial")]:
        return f"left behind: {left}"
    ours, theirs = (sorted(p.name for p in (one / "checkpoints").iterdir()) for one in (run, whole))
    if ours != theirs:
        return f"checkpoints {ours}, not {theirs}"
    for name in ours:
        files = [one / "checkpoints" / name / "model.safetensors" for one in (run, whole)]
        if files[0].read_bytes() != files[1].read_bytes():
            return f"the weights of {name}"
        states = [torch.load(file.with_name(checkpoint.STATE), weights_only=True) for file in files]
        if not _same(*states):
            return f"the state of {name}"
    records = [[{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(one)] for one in (run, whole)]
    if records[0] != records[1]:
        return "the metrics"
    for one, other in ((run, whole), (whole, run)):
        for path in (one / "tokens").glob("*"):
            if (other / "tokens" / path.name).read_bytes() != path.read_bytes():
                return f"tokens/{path.name}"
    return ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def weights_differ(whole: Path, run: Path) -> str:
    """ "" if the last weights of two runs are the same."""
    files = [one / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors" for one in (whole, run)]
    return "" if files[0].read_bytes() == files[1].read_bytes() else "other weights"


def damaged(run: Path) -> str:
    """What is wrong with the checkpoints of a run that are not temporary; "" if nothing."""
    for path in checkpoint.all_of(run):
        try:
            checkpoint.verify(path)
        except ValueError as error:
            return str(error)
    return ""


def damages(content: bytes, rng: random.Random) -> list[tuple[str, bytes | None]]:
    """A file's content in the ways that disks and people spoil it; None: removed."""
    found: list[tuple[str, bytes | None]] = [("removed", None), ("one byte more", content + b"\0")]
    if content:
        found += [("emptied", b""), ("cut in half", content[: len(content) // 2]), ("one byte short", content[:-1])]
        for _ in range(3):
            changed = bytearray(content)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            found.append(("one bit flipped", bytes(changed)))
        at = rng.randrange(len(content))
        zeroed = content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
        found += [("64 bytes zeroed", zeroed)] if zeroed != content else []
    return found


def fill(ballast: Path, room: int) -> None:
    """Leave `room` bytes of a file system."""
    free = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file:
        for _ in range(max(0, free - room) // 4096):
            file.write(b"\1" * 4096)


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bring_code(folder: Path) -> dict[str, str]:
    """Files that run code where a loader lets them: "refused" for each, or what happened."""
    canary, run = folder / "canary", folder / "code"
    whole_run(run, [*SMALL, "--train.steps", "1"])
    path = checkpoint.all_of(run)[-1]

    def bombed(file: Path) -> None:
        with file.open("wb") as out:
            pickle.dump(Bomb(canary), out, protocol=2)  # the one that torch takes without a word

    def sealed() -> None:
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        manifest["files"] = {name: checkpoint._digest(path / name) for name in manifest["files"]}
        (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    def model(name: str) -> Path:
        return Path(shutil.copytree(EMBEDDED, folder / name))

    def in_state() -> list[str]:
        bombed(path / checkpoint.STATE)
        sealed()
        return ["train", "--resume", str(run), "--train.steps", "2"]

    def in_weights() -> list[str]:
        made = model("weights")
        (made / "model.safetensors").unlink()
        bombed(made / "pytorch_model.bin")
        return ["eval", "--policy.model", str(made), "--eval.problems", "4"]

    def in_modelling() -> list[str]:
        made = model("modelling")
        content = json.loads((made / "config.json").read_text()) | {"model_type": "canary"}
        content["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        (made / "config.json").write_text(json.dumps(content))
        (made / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
        return ["eval", "--policy.model", str(made), "--eval.problems", "4"]

    def in_yaml() -> list[str]:
        (folder / "bad.yaml").write_text(f"train: {{steps: !!python/object/apply:os.mkdir ['{canary}']}}\n")
        return ["train", "--config", str(folder / "bad.yaml")]

    found = {}
    tried = {
        "a pickle in place of state.pt, its checksum renewed": in_state,
        "a pickle as weights": in_weights,
        "a model with modelling code": in_modelling,
        "a YAML tag": in_yaml,
    }
    for name, make in tried.items():
        status, told = ends(make())
        fine = status == 2 and one_error(told) and not canary.exists()
        found[name] = "refused" if fine else f"status {status}, {'' if canary.exists() else 'not '}run: {told[-300:]}"
    return found


def without_network() -> None:
    """Make every attempt at a connection the end of the process."""

    def refuse(*args: Any, **options: Any) -> None:
        os.write(2, f"a connection was tried: {args[-1]!r}\n".encode())
        os._exit(97)

    socket.socket.connect = socket.socket.connect_ex = refuse  # type: ignore[assignment,method-assign]
    socket.getaddrinfo = socket.create_connection = refuse  # type: ignore[assignment]


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def allocated() -> int:
    """Bytes that malloc has given out and nobody has freed; Python keeps its small objects elsewhere."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def endless_run(folder: Path, each: Callable[[dict[str, Any]], bool]) -> None:
    """A run of a very small model, with all that a run does now and then, until `each` of its records says no."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    options = {
        "policy.model": folder / "model", "rollout.prompts": 2, "rollout.group_size": 2, "rollout.max_new_tokens": 2,
        "train.steps": 10**8, "train.lr": 1e-5, "credit.lam_steps": 0, "reward.name": "self_certainty",
        "eval.every": 250, "eval.problems": 4, "checkpoint.every": 250, "report.every": 250,
    }  # fmt: skip
    config, _ = parse("train", [f"--{name}={value}" for name, value in options.items()])
    run = folder / "run"
    run.mkdir()
    (run / checkpoint.CONFIG).write_text("{}\n")
    for record in trainer.train(load_parts(config), run):
        if not each(record):
            break
        if record["kind"] == "eval":  # a file a sample is what a run of that many steps would leave
            for path in samples.files(run).values():
                path.unlink()


def slope(values: torch.Tensor, blocks: int = 20) -> tuple[float, float]:
    """Of values, one a step, the rise per step and its standard error, by least squares through the means of blocks."""
    size = len(values) // blocks
    means = values[: size * blocks].view(blocks, size).mean(1)
    at = torch.arange(blocks, dtype=torch.float64) * size
    at = at - at.mean()
    rise = (at * means).sum() / (at * at).sum()
    left = means - means.mean() - rise * at
    return rise.item(), ((left * left).sum() / (blocks - 2) / (at * at).sum()).sqrt().item()
