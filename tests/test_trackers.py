"""What surrounds a run: trackers, what launchers say, and layers that are computed twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import one_thread, tiny_policy  # noqa: F401

from cepo import processes, trackers
from cepo.cli import main
from cepo.errors import InputError
from cepo.layers import checkpoint_layers, decoder_layers
from cepo.policy import response_states
from cepo.processes import ALONE


def test_trackers_are_told_what_the_metrics_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    told: list[Any] = []

    class Fake(tracking.GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, main_process_only = "wandb", False, False

        def __init__(self, run_name: str, **options: Any) -> None:
            super().__init__()
            told.append((run_name, options))

        @property
        def tracker(self) -> None: ...

        def start(self) -> None:
            tracking.logger.debug("as the real ones say it, which fails where accelerate knows no processes")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values["train/steps"])
            if values["train/steps"] == 1:
                raise ValueError("no\nkey")

        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            told.append((values, step))
            if step == 4:
                raise OSError("gone")

        def finish(self) -> None:
            told.append("end")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(tracking.PartialState, "_shared_state", {})
    config = small(log={"trackers": ["wandb"]})
    record = {"kind": "train", "step": 3, "reward": 0.5, "lam": None, "seconds": {"rollout": 1.5}}
    assert list(trackers.tracked([record], config, tmp_path)) == [record]
    expected = {"train/reward": 0.5, "train/seconds/rollout": 1.5}
    assert told == [("cepo", {"name": tmp_path.name, "dir": str(tmp_path)}), 3, (expected, 3), "end"]

    told.clear()
    records = [record | {"step": step} for step in (3, 4, 5)]
    assert list(trackers.tracked(records, config, tmp_path)) == records  # which is what was paid for
    assert [entry[1] for entry in told[2:]] == [3, 4]
    assert "log.trackers: wandb failed and is told no more: gone" in caplog.text

    config.train.steps = 1
    with pytest.raises(InputError, match=r"^log\.trackers: wandb cannot be started: no key$"):
        list(trackers.tracked([record], config, tmp_path))


def test_tensorboard_shows_what_it_was_told_and_not_what_a_resumed_run_takes_back(tmp_path: Path) -> None:
    pytest.importorskip("accelerate.tracking")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    config = small(log={"trackers": ["tensorboard"]})

    def line(step: int, reward: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "reward": reward, "lam": None, "seconds": {"rollout": step + 0.5}}

    list(trackers.tracked([{"kind": "eval", "step": 0, "greedy": 0.25}, *map(line, (1, 2, 3), (0.1, 0.2, 0.3))],
                          config, tmp_path))  # fmt: skip
    list(trackers.tracked([line(2, 0.7)], config, tmp_path, done=1))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    read = {name: [(e.step, round(e.value, 6)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert read == {
        "eval/greedy": [(0, 0.25)],
        "train/reward": [(1, 0.1), (2, 0.7)],
        "train/seconds/rollout": [(1, 1.5), (2, 2.5)],
    }


def test_a_tracker_that_is_unknown_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"log\.trackers: expected one of tensorboard, wandb, trackio, got 'abacus'"):
        small(log={"trackers": ["abacus"]})
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(InputError, match=r"log\.trackers: wandb is not installed here: pip install wandb"):
        trackers.check(["wandb"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "expected no, got bf16; --policy.compute_dtype"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "expected 1, got 4; --train.prompts_per_pass"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "got true; --processes.shard true"),
    ],
)
def test_what_a_launcher_is_told_and_the_run_would_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    processes.shards(small(), ALONE)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        processes.shards(small(), ALONE)
    if value == "bf16":
        processes.shards(small(policy={"compute_dtype": "bfloat16"}), ALONE)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "got accelerate launch --cpu, which starts one"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "got OMPI_COMM_WORLD_SIZE=2 of MPI"),
    ],
)
def test_a_launcher_that_would_leave_each_process_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], words: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"processes: expected torchrun or .*, {words}"):
        processes.launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not processes.launched()


def test_one_process_divides_nothing() -> None:
    assert not processes.shards(small(processes={"shard": True}), ALONE)


def test_only_training_takes_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval"]) == 2
    assert capsys.readouterr().err == "cepo: error: eval: expected one process, got 2; only train takes several\n"


def test_checkpointed_layers_run_twice_with_a_gradient_and_give_the_same_bits() -> None:
    gradients, runs = [], []
    for checkpointed in (False, True):
        policy = tiny_policy()
        if checkpointed:
            checkpoint_layers(policy.model)
        counted = decoder_layers(policy.model)[1].self_attn
        calls: list[int] = []
        counted.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        with torch.no_grad():
            response_states(policy, [[5, 6]], [[7, 8]])
        without = len(calls)
        response_states(policy, [[5, 6]], [[7, 8]]).square().sum().backward()
        gradients.append([p.grad for p in policy.model.base_model.parameters()])
        runs.append((without, len(calls) - without))
    assert runs == [(1, 1), (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    other = copy.deepcopy(policy.model)  # as a distillation's teacher is
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    assert other.base_model(input_ids=torch.tensor([[5, 6]])).last_hidden_state.abs().sum() > 0
    assert all(layer.forward.args[0] is layer for layer in decoder_layers(other))
