"""`alpha: auto` of rl2ml, and what the config makes of the options of an advantage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import assert_equal, train
from test_trainer import small, steps
from tiny import one_thread  # noqa: F401
from torch import Tensor

from cepo import checkpoint, metrics, trainer
from cepo.advantages._auto import DECAY, GRID, START, AutoAlpha, choose, observed, start
from cepo.advantages.rl2ml import population_weight, rl2ml, variance
from cepo.cli import parse
from cepo.errors import InputError
from cepo.parts import load_parts

AUTO: dict[str, Any] = {"advantage": {"name": "rl2ml", "alpha": "auto"}}
NAN = float("nan")


def test_the_state_is_an_exponential_average_of_what_was_counted() -> None:
    rewards = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0.5, 0, 0], [NAN, 1, 1]])
    squared = torch.tensor([[2.0, 9, 9], [NAN, 4, 9], [9, 9, 9], [9, 3, NAN]])
    once = observed(start(3), rewards, squared, 1.0)
    assert torch.allclose(once["histogram"] / (1 - DECAY), torch.tensor([1.0, 1, 1, 0]).double())
    assert torch.allclose(once["scores"] / (1 - DECAY), torch.tensor([2.0 + 4 + 3, 3]).double())
    twice = observed(once, rewards, squared, 0.5)
    assert torch.allclose(
        twice["histogram"], DECAY * once["histogram"] + (1 - DECAY) * torch.tensor([0.0, 2, 1, 0]).double()
    )


@pytest.mark.parametrize("baseline", ["loo", "none"])
@pytest.mark.parametrize("counts", [[5.0, 2, 1, 0, 0], [0.0, 0, 1, 2, 9], [3.0, 1, 1, 1, 3]])
def test_it_is_the_alpha_whose_step_gains_most(counts: list[float], baseline: str) -> None:
    score = 0.8

    def gain(alpha: float) -> float:
        signal = total = 0.0
        for k, share in enumerate(counts):
            p = torch.tensor((k + 0.5) / 5, dtype=torch.float64)
            w, squared = population_weight(p, 4, alpha), (p * (1 - p)) ** 2
            # E|s|^2 = score = the trace of the covariance + |E s|^2, where a success has E s = grad p / p.
            traces = {"right_trace": (score - squared / p**2).clamp(min=0),
                      "wrong_trace": (score - squared / (1 - p) ** 2).clamp(min=0)}  # fmt: skip
            noise = variance(p, 4, alpha, baseline, grad_squared=squared, **traces)
            signal += share * (w * squared).item()
            total += share * (w * w * squared + noise).item()
        return signal**2 / total

    state = {"histogram": torch.tensor(counts).double(), "scores": torch.tensor([2 * score, 2.0]).double()}
    gains = {alpha: gain(alpha) for alpha in GRID}
    assert len(set(gains.values())) == len(GRID)
    assert choose(state, baseline) == max(GRID, key=gains.__getitem__)


def test_it_starts_at_1_until_something_is_known() -> None:
    state = start(4)
    assert choose(state, "loo") == START == 1.0
    silent = observed(state, torch.zeros(3, 4), torch.full((3, 4), NAN), 1.0)
    assert choose(silent, "loo") == START


def test_a_step_uses_earlier_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    observe = AutoAlpha.observe

    def spy(self: AutoAlpha, *args: Tensor) -> None:
        seen.append((args[0], args[1]))
        observe(self, *args)

    monkeypatch.setattr(AutoAlpha, "observe", spy)
    parts, records = steps(small(**AUTO))
    state = start(4)
    for record, step in zip(records, seen, strict=True):
        assert record["alpha"] == choose(state, "loo")
        state = observed(state, *step, 1.0)
    assert all(torch.equal(parts.adaptive.state[name], value) for name, value in state.items())
    assert len({record["alpha"] for record in records}) > 1, "alpha never moved: the test would prove nothing"
    known = seen[0][1][~seen[0][1].isnan()]
    assert known.numel() > 0
    assert (known > 0).all()


def test_a_resumed_run_goes_on_with_the_alpha_it_had(tmp_path: Path) -> None:
    train(tmp_path / "whole", **AUTO)
    train(tmp_path / "halves", **AUTO, train={"steps": 2})
    records = [r for r in metrics.read(tmp_path / "halves") if (r["kind"], r["step"]) != ("eval", 2)]
    (tmp_path / "halves" / metrics.FILE).write_text("".join(f"{metrics.json.dumps(r)}\n" for r in records))
    train(tmp_path / "halves", checkpoint.newest(tmp_path / "halves"), **AUTO)
    assert_equal(tmp_path / "whole", tmp_path / "halves")
    assert metrics.read(tmp_path / "whole")[-2]["alpha"] != START, "a forgotten state would not show"
    with pytest.raises(InputError, match=r"rollout\.group_size: expected 4, .*, got 2"):
        train(tmp_path / "halves", checkpoint.newest(tmp_path / "halves"), **AUTO, rollout={"group_size": 2})


def test_a_step_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise InputError("no")

    monkeypatch.setattr(trainer, "update", fail)
    parts = load_parts(small(**AUTO))
    with pytest.raises(InputError, match="no"):
        trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    assert all((value == 0).all() for value in parts.adaptive.state.values())


def test_the_options_reach_the_advantage() -> None:
    config = small(advantage={"name": "rl2ml", "alpha": 2, "baseline": "none"}, reward={"success_threshold": 0.5})
    rewards = torch.tensor([[0.6, 0.0, 1.0, 0.4]])
    expected = rl2ml(rewards, alpha=2.0, baseline="none", threshold=0.5)
    parts = load_parts(config)
    assert torch.equal(parts.advantage(rewards), expected)
    assert parts.adaptive is None


@pytest.mark.parametrize(
    ("given", "alpha", "baseline"),
    [
        ([], 1.0, "loo"),
        (["--advantage.alpha", "auto"], "auto", "loo"),
        (["--advantage.alpha", "2", "--advantage.baseline", "none"], 2.0, "none"),
    ],
)
def test_what_the_command_line_leaves_open_is_filled_in(given: list[str], alpha: float | str, baseline: str) -> None:
    config, _ = parse("train", ["--advantage.name", "rl2ml", *given])
    assert (config.advantage.alpha, config.advantage.baseline) == (alpha, baseline)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "grpo", "alpha": 1.0}, r"advantage\.alpha: expected none, since advantage grpo has no such option"),
        ({"name": "maxrl", "baseline": "loo"}, r"advantage\.baseline: expected none, since advantage maxrl"),
        ({"name": "rl2ml", "alpha": -0.5}, r"advantage\.alpha: expected auto or a number, at least 0, got -0\.5"),
        ({"name": "rl2ml", "alpha": NAN}, r"advantage\.alpha: .* got nan"),
        ({"name": "rl2ml", "baseline": "mean"}, r"advantage\.baseline: expected one of loo, none, got 'mean'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        small(advantage=options)


@pytest.mark.parametrize(
    ("advantage", "average"), [("grpo", "token"), ("rloo", "token"), ("maxrl", "constant"), ("rl2ml", "constant")]
)
def test_the_average_is_that_which_keeps_the_objective(
    caplog: pytest.LogCaptureFixture, advantage: str, average: str
) -> None:
    with caplog.at_level(logging.WARNING, "cepo"):
        config = small(advantage={"name": advantage})
        load_parts(config)
        assert config.loss.average == average
        assert not caplog.messages
        load_parts(small(advantage={"name": advantage}, loss={"average": "sequence"}))
    kept = f"loss.average: advantage {advantage} keeps its objective under 'constant' alone, not under 'sequence'"
    assert caplog.messages == ([kept] if average == "constant" else [])
