"""Hugging Face datasets as tasks, and prompts that are conversations, without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from test_trainer import small, steps
from tiny import one_thread, tiny_policy  # noqa: F401

from cepo.cli import parse
from cepo.config import TeacherConfig
from cepo.errors import InputError
from cepo.policy import make_policy, render
from cepo.rollout import sample
from cepo.tasks import Problem, get_task
from cepo.teacher import teacher_context

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"{i}+{i}", "answer": 2 * i, "level": i % 3} for i in range(40)]
TEXT = {"type": "text", "text": "1+"}
SYSTEM, EARLIER = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stored(path: Path, kind: str) -> str:
    """ROWS in a place of this kind, with ten of them as a test split where it has splits."""
    rows = datasets.Dataset.from_list(ROWS)
    if kind in ("dict", "folder"):
        parts = {"train": rows.select(range(30)), "test": rows.select(range(30, 40))}
        if kind == "dict":
            datasets.DatasetDict(parts).save_to_disk(str(path))
        else:
            path.mkdir()
            for name, part in parts.items():
                part.to_parquet(str(path / f"{name}.parquet"))
        return f"hf:{path}"
    if kind == "disk":
        rows.save_to_disk(str(path))
        return f"hf:{path}"
    file = path.with_suffix(f".{kind}")
    if kind == "parquet":
        rows.to_parquet(str(file))
    else:
        file.write_text("\n".join(map(json.dumps, ROWS)))
    return f"hf:{file}"


@pytest.mark.parametrize("kind", ["dict", "disk", "folder", "parquet", "jsonl"])
def test_every_stored_form_gives_the_same_problems_and_disjoint_splits(tmp_path: Path, kind: str) -> None:
    task = get_task(stored(tmp_path / "data", kind))
    splits = {"train": task.training_problems(), **{name: task.split(name, 99) for name in ("validation", "test")}}
    sizes = (27, 3, 10) if kind in ("dict", "folder") else (32, 4, 4)
    assert tuple(map(len, splits.values())) == sizes
    everyone = [p for problems in splits.values() for p in problems]
    assert sorted(p.prompt for p in everyone) == sorted(row["prompt"] for row in ROWS)
    assert all(p.answer == str(2 * int(p.prompt.partition("+")[0])) and p.data["level"] in (0, 1, 2) for p in everyone)
    if kind in ("dict", "folder"):
        assert [p.prompt for p in splits["test"]] == [row["prompt"] for row in ROWS[30:]]


def test_columns_and_splits_are_named_and_answers_read_from_solutions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"{i}?", "answer": f"work\n#### {i}", "split": "dev"} for i in range(30)]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=whole, dev=whole.select([3, 4])).save_to_disk(str(tmp_path / "d"))
    task = get_task(f"hf:{tmp_path / 'd'}", prompt_key="question", answer_key=None, solution_key="answer",
                    train="train[:20]", validation="dev", test="train[20:25]")  # fmt: skip
    assert [p.answer for p in task.split("validation", 9)] == ["3", "4"]
    assert [p.answer for p in task.split("test", 9)] == ["20", "21", "22", "23", "24"]
    training = task.training_problems()
    assert [p.answer for p in training] == [str(i) for i in range(20) if i not in (3, 4)]
    assert training[0].data["solution"] == "work\n#### 0"
    assert "left out 2 training prompts that are held out" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "dev"}, "expected train to be one of train, test, got 'dev'"),
        ({"test": "train[5"}, r"test: expected a split or a slice of one, split\[a:b\] in rows, got '\[5'"),
        ({"test": "test[9:3]"}, "expected at least one row in 'test.9:3.', got none"),
        ({"validation": "test"}, "expected no prompt in validation and test, got 10"),
        ({"prompt_key": "question"}, "train row 0: expected a field 'question', got 'prompt', 'answer', 'level'"),
        ({"prompt_key": "level"}, "train row 0: expected 'level' to be a non-empty string or a list of messages"),
        ({"answer_key": None}, "answer_key: expected a field, or null and a solution_key"),
        ({"config": "main"}, "expected no config, as .* has none, got 'main'"),
        ({"columns": 1}, "expected options among .* got 'columns'"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        get_task(stored(tmp_path / "data", "dict"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a name or path"),
        ("./nothing", "'./nothing' does not exist"),
        ("nothing.parquet", "'nothing.parquet' does not exist"),
        ("{tmp}/notes.txt", "expected a file of kind .parquet"),
        ("{tmp}/broken.parquet", "cannot load '.*broken.parquet'"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, name: str, message: str) -> None:
    for file in ("notes.txt", "broken.parquet"):
        (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=message) as error:
        get_task(f"hf:{name.format(tmp=tmp_path)}")
    assert "\n" not in str(error.value)


def test_any_other_name_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="task hf: cannot load 'openai/gsm8k': no network"):
        get_task("hf:openai/gsm8k", config="main")
    assert asked == [("openai/gsm8k", "main")]


def conversations(path: Path, n: int = 12) -> str:
    lines = [{"prompt": [SYSTEM, {"role": "user", "content": f"{i}+{i}"}], "answer": 2 * i} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "hf"])
def test_a_conversation_is_kept_rendered_with_its_system_turn_and_hinted_in_its_last(tmp_path: Path, kind: str) -> None:
    policy = tiny_policy()
    problem = get_task(f"{kind}:{conversations(tmp_path / 'c.jsonl')}").train(0, 0)
    assert problem.prompt[0] == SYSTEM
    question = problem.prompt[1]["content"]
    assert problem.text == f"system: s\nuser: {question}"
    turns = [SYSTEM, {"role": "user", "content": "a"}, EARLIER, {"role": "user", "content": question}]
    before = f"<|system|>s<|user|>a<|assistant|>b<|end|><|user|>{question}"
    assert render(policy, turns) == before + "<|assistant|>"
    hinted = teacher_context(policy, TeacherConfig(), Problem(turns, "7"), "7")
    assert hinted == policy.tokenizer(f"{before}\nHint: the answer is 7.<|assistant|>")["input_ids"]
    spliced = teacher_context(policy, TeacherConfig(template="splice"), Problem(turns, "7"), "7")
    assert spliced == policy.tokenizer(f"{before}<|assistant|>7\n")["input_ids"]
    # One turn as a conversation is the text itself, to the last token.
    options: dict[str, Any] = {"group_size": 2, "max_new_tokens": 4, "temperature": 1.0, "key": (0, 1)}
    text, turn = (sample(policy, [Problem(p, "")], **options) for p in ("1+1", [{"role": "user", "content": "1+1"}]))
    assert (text.prompts, text.responses) == (turn.prompts, turn.responses)


def test_a_content_in_parts_is_its_text(tmp_path: Path) -> None:
    turn = {"role": "user", "content": [TEXT, {**TEXT, "text": "1"}]}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": [SYSTEM, turn], "answer": 2, "split": "train"}))
    assert get_task(f"jsonl:{path}").train(0, 0).prompt == [SYSTEM, {"role": "user", "content": "1+1"}]


def test_a_template_that_refuses_a_system_turn_says_so() -> None:
    policy = make_policy(tiny_policy().model, tiny_policy().tokenizer)
    policy.tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' }}"
    with pytest.raises(InputError, match=r"prompt: expected turns .* \['system', 'user'\] of 'system: s.*no system he"):
        render(policy, [SYSTEM, {"role": "user", "content": "1+1"}])


@pytest.mark.parametrize(("credit", "loss"), [("cepo", "clipped"), ("rredcot", "clipped"), ("uniform", "sdpo")])
def test_conversations_train(tmp_path: Path, credit: str, loss: str) -> None:
    sections: dict[str, Any] = {"loss": {"name": loss}} if loss == "sdpo" else {"credit": {"name": credit}}
    task = {"name": f"jsonl:{conversations(tmp_path / 'c.jsonl')}", "options": {"max_new_tokens": 12}}
    _, (record,) = steps(small(task=task, **sections, train={"steps": 1}), n=1)
    assert record["tokens"] > 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "expected 'prompt' to be a non-empty string or a list of messages, got"),
        ([{"role": "user"}], "with a role and a content, both texts, got {'role': 'user'}"),
        ([SYSTEM], "that ends in a user turn with a text, got {'role': 'system'"),
        ([{"role": "user", "content": " "}], "that ends in a user turn with a text"),
        ([{"role": "user", "content": [TEXT, {"type": "image"}]}], "with a role and a content, both texts, got"),
        ("hi", "line 1: expected 'answer' to be a non-empty string or a number, got None"),
    ],
)
def test_a_bad_record_is_told_or_left_out_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: Any, message: str
) -> None:
    path = tmp_path / "c.jsonl"
    good = conversations(path)
    path.write_text(json.dumps({"prompt": prompt, "answer": None}) + "\n" + path.read_text())
    with pytest.raises(ValueError, match=message):
        get_task(f"jsonl:{good}")
    assert len(get_task(f"jsonl:{good}", skip_bad=True).training_problems()) == 8
    assert "left out 1 records that cannot be used" in caplog.text


def test_the_example_is_a_config_that_parses() -> None:
    config, _ = parse("train", ["--config", str(Path(__file__).parent.parent / "examples" / "gsm8k.yaml")])
    assert config.task.options["solution_key"] == "answer"
