"""Options without an effect: refused where somebody set them, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cepo import axes, cli
from cepo.compare import plan
from cepo.config import Config
from cepo.config.effects import require_effect
from cepo.errors import InputError

AXES = {"credit": "credit", "loss": "losses"}
SOLUTION = "teacher.solution_hint={prompt} {solution}!"
# option, the method that it says nothing to, why, and one that it does say something to
CASES = [
    ("credit.lam=0.3", "credit.name=uniform", "credit.name uniform", "credit.name=rlsd"),
    ("credit.lam_steps=3", "credit.name=rredcot", "credit.name rredcot", "credit.name=shuffled"),
    ("credit.eps_w=0.5", "credit.name=uniform", "credit.name uniform", "credit.name=cepo"),
    ("credit.eps_w=0.3", "loss.name=opsd", "loss.name opsd", "loss.name=cispo"),
    ("rredcot.mode=scale", "credit.name=cepo", "credit.name cepo", "credit.name=rredcot"),
    ("rredcot.keywords=[so]", "loss.name=sdpo", "loss.name sdpo", "credit.name=rredcot"),
    ("teacher.template=splice", "credit.name=uniform", "credit.name uniform", "credit.name=rlsd"),
    ("teacher.hint={answer}", "credit.name=rredcot", "credit.name rredcot", "credit.name=cepo"),
    ("teacher.hint={answer}", "teacher.template=splice", "teacher.template splice", "teacher.template=hint"),
    ("teacher.splice={answer}", "credit.name=cepo", "teacher.template hint", "teacher.template=splice"),
    ("teacher.negative=own", "credit.name=rlsd", "credit.name rlsd", "credit.name=shuffled"),
    ("teacher.share_prefix=false", "credit.name=uniform", "credit.name uniform", "credit.name=rredcot"),
    ("teacher.skip=false", "loss.name=opsd", "loss.name opsd", "credit.name=uniform"),
    (SOLUTION, "loss.name=sdpo", "loss.name sdpo", "loss.name=opsd"),
    (SOLUTION.replace("solution_hint", "sibling_hint"), "loss.name=clipped", "loss.name clipped", "loss.name=sdpo"),
    ("teacher.feedback_hint={feedback}", "loss.name=opsd", "loss.name opsd", "loss.name=sdpo"),
    ("loss.clip_high=0.3", "loss.name=clipped", "train.updates_per_batch 1", "train.updates_per_batch=2"),
    ("loss.clip_low=0.1", "loss.name=sdpo", "loss.name sdpo", "train.updates_per_batch=2"),
]  # fmt: skip


def made(*options: str) -> Config:
    config = Config()
    for option in options:
        name, _, value = option.partition("=")
        section, _, key = name.partition(".")
        setattr(getattr(config, section), key, value if "{" in value else yaml.safe_load(value))
    return config.check()


@pytest.mark.parametrize(("option", "method", "why", "other"), CASES)
def test_an_option_that_nothing_reads_is_refused_and_where_it_is_read_it_is_not(
    option: str, method: str, why: str, other: str
) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(InputError) as refused:
        require_effect(made(method, option))
    assert str(refused.value).startswith(f"{name}: expected ")
    assert f", the default, as it has no effect with {why}, got " in str(refused.value)
    assert value.strip("[]") in str(refused.value).replace("False", "false")
    require_effect(made(other, option))


def test_train_refuses_it_and_eval_which_looks_at_a_model_whatever_made_it_does_not() -> None:
    with pytest.raises(
        InputError, match=r"credit\.lam: expected 0\.5, the default, as .* credit.name uniform, got 0\.3"
    ):
        cli.parse("train", ["--credit.name=uniform", "--credit.lam=0.3"])
    cli.parse("eval", ["--credit.name=uniform", "--credit.lam=0.3"])


METHODS = [f"{axis}.name={name}" for axis in ("credit", "loss") for name in axes.members(AXES[axis])]


@pytest.mark.parametrize("method", METHODS)
def test_a_default_is_never_refused_nor_what_check_made_of_it(method: str) -> None:
    require_effect(made(method))
    require_effect(made(method).check())


def test_what_a_file_says_has_its_effect_under_its_own_method_which_the_command_line_may_replace(
    tmp_path: Path,
) -> None:
    told = ["--config", str(tmp_path / "mine.yaml"), "--credit.name=uniform"]
    (tmp_path / "mine.yaml").write_text("credit: {name: cepo, lam: 0.3, eps_w: 0.4}")
    assert cli.parse("train", told)[0].credit.name == "uniform"
    with pytest.raises(InputError, match=r"credit\.lam: .* got 0\.2"):
        cli.parse("train", [*told, "--credit.lam=0.2"])
    (tmp_path / "mine.yaml").write_text("rredcot: {centre: others}")
    with pytest.raises(InputError, match=r"rredcot\.centre: .* no effect with credit\.name cepo"):
        cli.parse("train", [*told, "--credit.name=rredcot"])
    (tmp_path / "mine.yaml").write_text("advantage: {alpha: 0.5}")  # nothing by itself
    assert cli.parse("train", [*told, "--advantage.name=rl2ml"])[0].advantage.alpha == 0.5


def test_a_resumed_run_keeps_what_it_was_told_and_takes_no_more_of_it(tmp_path: Path) -> None:
    own = made("credit.name=uniform", "credit.lam=0.3")  # as a run before there was this check
    (tmp_path / "config.yaml").write_text(cli.dump(own))
    (tmp_path / "checkpoints").mkdir()
    resume = ["--resume", str(tmp_path)]
    assert cli.parse("train", resume)[0].credit.lam == 0.3
    with pytest.raises(InputError, match=r"teacher\.negative: expected 'group'"):
        cli.parse("train", [*resume, "--teacher.negative=own"])


def test_in_a_plan_what_is_shared_may_be_for_some_methods_alone(tmp_path: Path) -> None:
    def load(**changes: Any) -> plan.Plan:
        content: dict[str, Any] = {
            "base": {"credit": {"lam": 0.3}, "teacher": {"negative": "own"}},
            "methods": {"grpo": {"credit": {"name": "uniform"}}, "cepo": {}},
            "tasks": {"addition": {"teacher": {"skip": False}}},
            "seeds": [0],
        }
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**content, **changes}))
        return plan.load(tmp_path / "plan.yaml")

    assert [config.credit.lam for config in load().configs.values()] == [0.3] * 3
    for methods in ({"grpo": {"credit": {"name": "uniform", "lam": 0.4}}},
                    {"grpo": {"credit": {"name": "rlsd"}, "rredcot": {"min_entropy": 0.1}}}):  # fmt: skip
        with pytest.raises(InputError, match=r"methods\.grpo: \w+\.\w+: expected .* no effect with credit\.name"):
            load(methods=methods)
