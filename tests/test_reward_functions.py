"""A reward that is somebody's function: called as TRL calls it, believed only if it answers as it should."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import small, steps
from tiny import one_thread  # noqa: F401

from cepo import axes, checkpoint, metrics
from cepo.cli import main
from cepo.config import AdvantageConfig, RewardConfig
from cepo.errors import InputError
from cepo.progress import follow
from cepo.tasks import Problem

NAN = float("nan")
PROBLEMS = [Problem("1+1", "2", {"level": 3}), Problem([{"role": "user", "content": "2+2"}], "4", {"prompt": "x"})]


def reward(file: Path, body: str, timeout: float | None = None) -> Any:
    """`body` as the function f of a file, and as the reward of a run."""
    file.write_text(f"import time\n\n{body}\n")
    config = SimpleNamespace(reward=RewardConfig(f"{file}:f", timeout_s=timeout))
    function = axes.module("rewards", config.reward.name).load(config)
    return lambda: function([p.prompt for p in PROBLEMS], ["a", "b"], [[5], [6, 7]], problem=PROBLEMS, truncated=[0, 1])


@pytest.mark.parametrize("keyword", ["", "async "])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_gets_what_trl_would_give(tmp_path: Path, keyword: str, timeout: float | None) -> None:
    body = f"{keyword}def f(completions, prompts, **columns):\n    calls.append((prompts, completions, columns))\n"
    call = reward(tmp_path / "r.py", "calls = []\n\n" + body + "    return [1, None]", timeout)
    assert call() == [1.0, None]
    ((prompts, completions, columns),) = sys.modules["cepo_reward_r"].calls
    assert prompts == ["1+1", [{"role": "user", "content": "2+2"}]]
    assert completions == ["a", [{"role": "assistant", "content": "b"}]]
    assert columns == {"completion_ids": [[5], [6, 7]], "level": [3, None], "answer": ["2", "4"], "problem": PROBLEMS,
                       "truncated": [0, 1]}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None], [1.0, None]),
        ((True, NAN), [1.0, None]),
        (torch.tensor([0.5, NAN]), [0.5, None]),
        (np.array([1, 2]), [1.0, 2.0]),
        ([np.float32(0.5), torch.tensor(2)], [0.5, 2.0]),
        ([1.0], "expected 2 rewards, one per completion, got 1"),
        ([1.0] * 3, "expected 2 rewards, one per completion, got 3"),
        (None, "expected a list of 2 rewards, got a NoneType"),
        ({0: 1.0}, "expected a list of 2 rewards, got a dict"),
        (torch.tensor(1.0), "expected a list of 2 rewards, got a float"),
        ([1.0, "2"], "expected None or numbers of float32's range, got '2' for completion 1"),
        ([1.0, -math.inf], "expected None or numbers of float32's range, got -inf for completion 1"),
        ([1.0, -(10**5000)], "expected None or numbers of float32's range, got -inf for completion 1"),
        ([1.0, 1e308], "expected None or numbers of float32's range, got 1e+308 for completion 1"),
        ([1.0, [2.0]], "expected None or numbers of float32's range, got [2.0] for completion 1"),
        (
            [1.0, np.array([1.0, 2.0])],
            "expected None or numbers of float32's range, got array([1., 2.]) for completion 1",
        ),
    ],
)
def test_its_answer_is_checked(tmp_path: Path, values: Any, expected: Any) -> None:
    call = reward(tmp_path / "r.py", "def f(**columns):\n    return ANSWER")
    sys.modules["cepo_reward_r"].ANSWER = values  # type: ignore[attr-defined]
    if isinstance(expected, list):
        assert call() == expected
        return
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == f"reward {tmp_path}/r.py:f: {expected}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(**columns):\n    raise KeyError('x\\ny')", r"r.py:f: raised KeyError: 'x\\ny'"),
        ("def f(**columns):\n    raise SystemExit(3)", "r.py:f: raised SystemExit: 3"),
        (
            "import asyncio\n\nasync def f(**columns):\n    raise asyncio.CancelledError",
            "r.py:f: raised CancelledError: ",
        ),
        ("def f(prompts):\n    return []", "r.py:f: raised TypeError: .*unexpected keyword"),
        ("def g(**columns):\n    pass", "reward.name: cannot load '.*r.py:f': AttributeError: .* 'f'"),
        ("f = 3", "reward.name: expected '.*r.py:f' to be a function, got a int"),
        ("1 / 0", "reward.name: cannot load '.*': ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_one_that_fails_is_named(tmp_path: Path, body: str, message: str, timeout: float | None) -> None:
    with pytest.raises(InputError, match=message) as error:
        reward(tmp_path / "r.py", body, timeout)()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["import", "call", "failure"])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_it_sets_for_all_of_torch_does_not_outlive_it(tmp_path: Path, where: str, timeout: float | None) -> None:
    sets = "torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64)"
    failing = "\n    1 / 0" if where == "failure" else ""
    first = sets if where == "import" else ""
    body = f"import torch\n{first}\n\ndef f(**columns):\n    {sets}{failing}\n    return [1, 2]"
    try:
        call = reward(tmp_path / "r.py", body, timeout)
        assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (True, torch.float32)
        with pytest.raises(InputError, match="division") if failing else nullcontext():
            call()
        assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (True, torch.float32)
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["no.such.module:f", "nowhere.py:f", "math:", ":f"])
def test_one_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"reward.name: cannot load '{name}': "):
        axes.module("rewards", name).load(SimpleNamespace(reward=RewardConfig(name)))


def test_a_module_of_the_working_directory_is_found_and_trains_as_the_verifier_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = (
        "def f(completions, task, problem, **columns):\n    return [task.score(*p) for p in zip(completions, problem)]"
    )
    (tmp_path / "my_own_rewards.py").write_text(body)
    assert "" not in sys.path[:1]
    _, mine = steps(small(reward={"name": "my_own_rewards:f"}), n=1)
    _, theirs = steps(small(), n=1)
    assert mine[0]["loss"] == theirs[0]["loss"]
    assert mine[0]["accuracy"] == theirs[0]["accuracy"] > 0
    assert "" not in sys.path[:1]


def test_no_reward_at_all_has_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.py").write_text("def f(prompts, **columns):\n    return [None] * len(prompts)")
    _, records = steps(small(reward={"name": f"{tmp_path}/r.py:f"}), n=1)
    assert (records[0]["reward"], records[0]["unscored"]) == (None, 1.0)
    follow([{"kind": "train", "step": 1, **records[0]}], 1)
    assert "reward 0" not in capsys.readouterr().err


def test_options_that_do_not_belong_are_refused() -> None:
    for options, message in (
        ({"timeout_s": 1.0}, "reward.timeout_s: expected none, since reward verifier is no function of yours, got 1.0"),
        ({"name": "a:b", "timeout_s": 0.0}, "reward.timeout_s: expected a number above 0, got 0.0"),
        ({"name": "a:b", "empty": 1.0}, "reward.empty: expected none"),
        ({"success_threshold": float("nan")}, "reward.success_threshold: expected a finite number, got nan"),
        ({"success_threshold": float("-inf")}, "reward.success_threshold: expected a finite number, got -inf"),
        (
            {"name": "cross_model_entropy", "empty": float("nan")},
            "reward.empty: expected a finite number, or null, got",
        ),
        ({"name": "no_such"}, "reward.name: expected one of .*package.module:function, got 'no_such'"),
    ):
        with pytest.raises(InputError, match=message):
            small(reward=options)
    assert small(reward={"name": "a:b"}, advantage={"name": "maxrl"}).advantage == AdvantageConfig("maxrl")


def test_one_that_hangs_ends_the_run_with_an_error_and_what_was_done_saved(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import time\n\ncalls = 0\n\n\ndef f(completions, **columns):\n    global calls\n    calls += 1\n"
        "    if calls > 2:\n        time.sleep(3600)\n    return [float(len(c)) for c in completions]\n"
    )
    command = [sys.executable, "-m", "cepo", "train", "--reward.name", f"{tmp_path}/r.py:f", "--reward.timeout_s", "3",
               "--rollout.prompts", "2", "--rollout.group_size", "2", "--train.steps", "9", "--eval.problems", "4",
               "--eval.every", "0", "--run_dir", str(tmp_path / "run")]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"cepo: error: reward {tmp_path}/r.py:f: expected its rewards within reward.timeout_s = 3 s, got none"
    )
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert checkpoint.step_of(newest) == 2
    assert [r["step"] for r in metrics.read(tmp_path / "run") if r["kind"] == "train"] == [1, 2]
    # An evaluation of the run is by the task's own check, and runs no code of another's.
    (tmp_path / "r.py").unlink()
    assert main(["eval", "--policy.model", str(tmp_path / "run"), "--eval.problems", "4"]) == 0
