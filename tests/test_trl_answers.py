"""In TRL: which answers are read from the data and from completions, and which are refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from tiny import one_thread, tiny_policy  # noqa: F401

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from test_trl import DATA, RIGHT, WRONG, correct, lucky, make, prompt, say, step
from trl import GRPOConfig

from cepo.errors import InputError
from cepo.integrations.trl import CEPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_answers_are_read_and_compared_as_told(tmp_path: Path) -> None:
    said = say("x:8", "x:seven", "x:7", "x:7")
    more = {"rollout_func": said, "parse_answer": lambda text: text.partition(":")[2]}
    reward = lambda completions, **_: [float(c[0]["content"] == "x:7") for c in completions]  # noqa: E731
    for accepts, answer in ((lambda a, right: a in ("8", right), "seven"), (lambda a, right: a == right, "8")):
        trainer = make(tmp_path, reward=reward, more={**more, "accepts": accepts})
        told: list[str] = []
        original = trainer._tokenize_prompts
        trainer._tokenize_prompts = lambda prompts, o=original, t=told: (
            t.append(prompts[0][-1]["content"]) or o(prompts)
        )
        step(trainer, DATA[:2])
        assert told[1:] == [f"0+4\nHint: the answer is {a}." for a in ("7", answer)]


def test_answers_that_are_missing_are_named(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for value in (" ", ["7"], math.nan, True):
        message = rf"answer_column: .*, a text or a number, in column answer, got {re.escape(repr(value))}$"
        with pytest.raises(InputError, match=message):
            step(trainer, [{"prompt": prompt("1+2"), "answer": value}] * 2)
    for value, row in ((None, 7), (" ", 7), (["7"], 0), (True, 0)):
        column = [*["7" if row else value] * 7, value]
        told = "column answer or solution, got" if value is None else f"column answer, got {re.escape(repr(value))}"
        with pytest.raises(InputError, match=rf"^answer_column: .* in {told}.*, row {row} of train_dataset$"):
            make(tmp_path, data=[{"prompt": prompt("1+2"), "answer": answer} for answer in column])
    trainer = make(tmp_path, reward=correct, more={"parse_answer": lambda _: 7, "rollout_func": say(RIGHT, WRONG)})
    with pytest.raises(InputError, match=r"^parse_answer: expected to return a text or None, got 7$"):
        step(trainer, DATA[:2])
    with pytest.raises(TypeError, match="args: expected a CEPOConfig, got GRPOConfig"):
        CEPOTrainer(tiny_policy().model, lucky, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(("credit", "metric"), [("cepo", "evidence_right"), ("rredcot", "value_outcome")])
def test_a_weighted_sum_is_right_up_to_its_rounding(tmp_path: Path, credit: str, metric: str) -> None:
    weights = [0.1, 0.35, 0.35, 0.2]  # as float32 they sum to less than 1
    trainer = make(
        tmp_path, reward=[correct] * 4, reward_weights=weights, credit=credit, more={"rollout_func": say(RIGHT, WRONG)}
    )
    step(trainer, DATA[:2])
    found = trainer._metrics["train"][f"cepo/{metric}"][0]
    assert found == (0.5 if credit == "rredcot" else pytest.approx(found))  # NaN: none is right
