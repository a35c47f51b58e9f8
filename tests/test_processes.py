"""Many processes train what one does: in float64 to rounding; and what fails in one ends all, soon and in one line."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_trainer import small
from tiny import Sums, one_thread, tiny_policy  # noqa: F401
from tiny_vision import Processor, picture, tiny_qwen3_vl

from cepo import adapters, checkpoint, cli, metrics, trackers, trainer
from cepo.config import LoraConfig
from cepo.errors import InputError, ProcessError
from cepo.parts import Parts, load_parts
from cepo.policy import make_policy
from cepo.processes import ALONE, Alone, Launched
from cepo.prompts import with_images
from cepo.rewards import cross_model_entropy
from cepo.tasks import Problem

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STEPS = 2


@dataclass
class Lottery(Sums):
    """A task that a random model gets right half the time, and that says why not and how to."""

    separator: str = "1"

    def train(self, index: int, seed: int) -> Problem:
        return replace(super().train(index, seed), data={"solution": f"{index}#{seed}"})

    def parse_answer(self, completion: str) -> str | None:
        return completion[:3] or None

    def accepts(self, answer: str, problem: Problem) -> bool:
        return sum(map(ord, answer)) % 2 == 0

    def feedback(self, completion: str, problem: Problem) -> str | None:
        return "it is odd"


class Shown(Lottery):
    """The same with a picture, of one of two sizes, beside two of three problems."""

    def train(self, index: int, seed: int) -> Problem:
        problem = super().train(index, seed)
        shown = with_images(problem.text, [picture(16 + 16 * (index % 2), 16)])
        return replace(problem, prompt=shown) if index % 3 else problem


CASES: dict[str, dict[str, Any]] = {
    "cepo": {"train": {"updates_per_batch": 2, "prompts_per_pass": 1}, "teacher": {"negative": "own"}},
    "auto": {"advantage": {"name": "rl2ml", "alpha": "auto"}, "credit": {"name": "shuffled"}},
    "rredcot": {"credit": {"name": "rredcot"}, "rredcot": {"centre": "others", "min_entropy": 0.1}},
    "sdpo": {"loss": {"name": "sdpo"}},
    "lora": {"policy": {"lora": LoraConfig(r=4)}},
    "opsd": {"loss": {"name": "opsd"}, "policy": {"lora": LoraConfig(r=4)}},  # its teacher shares what does not learn
    "verifier": {"reward": {"name": "cross_model_entropy"}, "teacher": {"share_prefix": False}},
    "certainty": {"reward": {"name": "self_certainty"}},
    "images": {"train": {"prompts_per_pass": 1}},
}
SHARDED = ("cepo", "sdpo", "rredcot", "certainty", "lora", "opsd", "images")


def parts_of(folder: Path, case: str, many: Alone, start: Path | None = None, **sections: Any) -> Parts:
    """In float64, a model with some weights that no rollout reaches."""
    config = small(
        rollout={"prompts": 3, "group_size": 4},
        eval={"problems": 1},
        checkpoint={"every": 1, "keep": 9},
        **{
            **CASES[case],
            "policy": {"model": str(folder / "model"), **CASES[case].get("policy", {})},
            "train": {"steps": STEPS, "lr": 1e-2, **CASES[case].get("train", {}), **sections},
        },
    )
    config.reward.verifier = config.reward.verifier and str(folder / "model")
    parts = replace(load_parts(config, processes=many), task=Lottery())
    if case == "images":
        sees = replace(make_policy(*tiny_qwen3_vl()), eos_ids=parts.policy.eos_ids)
        parts = replace(parts, policy=sees, task=Shown())
    for model in (parts.policy.model, *([parts.self_teacher.model] if parts.self_teacher else [])):
        model.double()
    if start is not None:
        if parts.config.policy.lora:
            peft.set_peft_model_state_dict(parts.policy.model, saved_weights(start), adapter_name=adapters.NAME)
        else:
            parts.policy.model.load_state_dict(saved_weights(start), strict=False)
    return parts


def trained(folder: Path, run: Path, case: str, many: Alone = ALONE, start: Path | None = None, **sections: Any) -> Any:
    """Rollouts and advantages of the steps of a run that is written to `run`."""
    seen: list[Any] = []
    original, load = trainer.make_batch, cross_model_entropy.load_policy

    def spy(parts: Parts, rollouts: Any, advantages: torch.Tensor, *rest: Any) -> Any:
        seen.append((rollouts.responses, advantages))
        return original(parts, rollouts, advantages, *rest)

    def in_float64(config: Any) -> Any:
        policy = load(config)
        policy.model.double()
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_batch", spy)
        patch.setattr(cross_model_entropy, "load_policy", in_float64)
        patch.setattr(Processor, "save_pretrained", lambda self, path: self.tokenizer.save_pretrained(path))
        many.first("folder", lambda: run.mkdir(exist_ok=True))
        records = list(trainer.train(parts_of(folder, case, many, start, **sections), run, start))
    assert records[-1]["step"] == STEPS
    return seen


def refuse(*given: Any) -> None:
    raise InputError("no account")


def worker(folder: str, rank: str) -> None:
    """One of two processes: trains every case, replicated and divided, then fails in every way."""
    torch.set_num_threads(1)
    where, many = Path(folder), Launched()
    assert (many.rank, many.world) == (int(rank), 2)
    for case in CASES:
        seen = {case: trained(where, where / f"many-{case}", case, many)}
        if case in SHARDED:
            many.sharded = True
            run = where / f"divided-{case}"
            many.first("copy", lambda run=run, case=case: shutil.copytree(where / f"one-{case}", run))
            first = run / checkpoint.FOLDER / "step-000001"
            seen["divided"] = trained(where, run, case, many, first, gradient_checkpointing=True)
            many.sharded = False
        torch.save(seen, where / f"seen-{case}-{rank}.pt")

    with pytest.MonkeyPatch.context() as patch:  # what the first does alone is told to the other all the same
        patch.setattr(trackers, "check", lambda names: None)
        patch.setattr(trackers, "_started", refuse)
        with pytest.raises(InputError, match="^process 0: no account$" if many.rank else "^no account$"):
            cli._train_in(
                many, ["--log.trackers", "[wandb]", "--run_dir", str(where / "untold"), "--eval.problems", "1"]
            )

    def fails(error: Exception) -> Any:
        def compute() -> int:
            if many.rank:
                raise error
            return 1

        return compute

    for given, kind in ((InputError("bad"), InputError), (KeyError("bug"), (KeyError, ProcessError)[not many.rank])):
        with pytest.raises(kind, match=r"bad|bug") as told:
            many.gather("a test", fails(given))
        assert many.rank or str(told.value).startswith("process 1: ")
    with pytest.raises(ProcessError, match=r"is at '(here|there)', and"):
        many.gather("there" if many.rank else "here", lambda: None)
    assert many.gather("a test", lambda: many.rank) == [0, 1]  # none of these left anything behind
    if many.rank:
        os._exit(0)
    before = time.monotonic()
    with pytest.raises(ProcessError, match="has died or does not answer"):
        many.gather("a test", lambda: None)
    assert time.monotonic() - before < 10


def launch(*command: str, rank: int | None = None, port: int = 0) -> subprocess.Popen[str]:
    """A process as launchers start it."""
    ranks = {} if rank is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **ranks}
    environment.pop("COVERAGE_PROCESS_START", None)
    return subprocess.Popen([sys.executable, *command], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def saved_weights(saved: Path) -> dict[str, torch.Tensor]:
    (file,) = saved.glob("*model.safetensors")
    return load_file(file)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimiser's averages at the end."""
    last = checkpoint.newest(run)
    assert last is not None
    assert last.name == f"step-{STEPS:06d}"
    moments = torch.load(last / checkpoint.STATE)["optimizer"]["state"]
    return saved_weights(last) | {f"{i}.{n}": v for i, s in moments.items() for n, v in s.items()}


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value - theirs[name]).norm() <= 1e-12 * value.norm(), (one.name, other.name, name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process, then two, trained every case."""
    folder = tmp_path_factory.mktemp("two")
    policy = tiny_policy(tie_word_embeddings=True)
    policy.model.generation_config.eos_token_id = [*policy.eos_ids, *range(30, 46)]  # else it would hardly ever end
    policy.model.save_pretrained(folder / "model")
    policy.tokenizer.save_pretrained(folder / "model")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(trained(folder, folder / f"one-{case}", case), folder / f"seen-{case}.pt")
    torch.set_num_threads(before)
    port = free_port()
    code = "import sys, test_processes; test_processes.worker(*sys.argv[1:])"
    workers = [launch("-c", code, str(folder), str(rank), rank=rank, port=port) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(two: Path, case: str) -> None:
    expected = torch.load(two / f"seen-{case}.pt")
    assert all((advantages != 0).any() for _, advantages in expected) or case in ("sdpo", "opsd")
    for rank in range(2):
        for where, seen in torch.load(two / f"seen-{case}-{rank}.pt").items():
            for (responses, advantages), (its, theirs) in zip(expected[-len(seen) :], seen, strict=True):
                assert responses == its, where
                assert torch.equal(advantages, theirs) or case in ("verifier", "certainty")
    assert_same(two / f"one-{case}", two / f"many-{case}")
    mine, theirs = (metrics.read(two / f"{how}-{case}") for how in ("one", "many"))
    assert all(line["gradient_norm"] > 0 for line in mine if line["kind"] == "train")
    times = ("seconds", "tokens_per_second")
    for line, other in zip(mine, theirs, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - set(times):
            wanted = pytest.approx(line[name], rel=1e-5) if isinstance(line[name], float) else line[name]
            assert other[name] == wanted, name


@pytest.mark.parametrize("case", SHARDED)
def test_a_divided_model_goes_on_from_a_whole_one_to_the_same_weights(two: Path, case: str) -> None:
    assert_same(two / f"one-{case}", two / f"divided-{case}")


def test_one_process_goes_on_from_two(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "many-cepo", tmp_path / "run")
    trained(two, tmp_path / "run", "cepo", start=tmp_path / "run" / checkpoint.FOLDER / "step-000001")
    assert_same(two / "one-cepo", tmp_path / "run")


def children(of: int) -> dict[int, int]:
    """Rank of each child process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0") if parent == of else []
        except OSError:
            continue
        found |= {int(v[5:]): int(path.name) for v in environment if v.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_process_that_dies_ends_the_run_with_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--run_dir", str(run), "--rollout.prompts", "2", "--rollout.group_size", "2", "--eval.problems", "2",
               "--train.steps", "1000", "--checkpoint.every", "1", "--rollout.max_new_tokens", "4"]  # fmt: skip
    launcher = launch("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
                      "-m", "cepo", "train", *options)  # fmt: skip
    while launcher.poll() is None and not (run.is_dir() and checkpoint.saved(run)):
        time.sleep(0.01)
    found = children(launcher.pid)
    os.kill(found[1], signal.SIGKILL)
    try:
        output, _ = launcher.communicate(timeout=60)
    finally:
        launcher.terminate()
    assert launcher.returncode
    assert output.count("cepo: error: ") == 1, output
    assert f"`cepo train --resume {run}` continues from the last checkpoint" in output
    assert checkpoint.newest(run) is not None  # and whole
    assert not Path(f"/proc/{found[0]}").exists()
