"""The worked tasks: their format, and the gates of their model before methods are compared on it."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import one_thread  # noqa: F401

from cepo import metrics
from cepo.assets import embedded_model
from cepo.assets.build import accuracy, load, slip_evidence
from cepo.assets.build_worked import HINTS, SLIPS, attempt, draw_batches, example, follows_hint, hint
from cepo.cli import main
from cepo.config import HINT, SIBLING_HINT, SOLUTION_HINT
from cepo.tasks import Problem
from cepo.tasks.addition import SPLITS
from cepo.tasks.worked import FORMS, Worked, render, right_results

pytest.importorskip("reasoning_gym")
DATASETS = list(FORMS)


@pytest.fixture(scope="module", params=DATASETS)
def task(request: pytest.FixtureRequest) -> Worked:
    return Worked(request.param)


@pytest.fixture(scope="module")
def problems(task: Worked) -> list[Problem]:
    return task.split("validation", 300)


@pytest.mark.parametrize(
    ("dataset", "prompt", "solution"),
    [
        ("number_sorting", "up 47190", "0:4719;1:479;4:79;7:9#01479"),
        ("number_sorting", "down 33616", "6:3316;6:331;3:31;3:1#66331"),
        ("number_filtering", ">4: 729351", "7y;2n;9y;3n;5y;1n#795"),
        ("number_filtering", "<=4: 729354", "7n;2y;9n;3y;5n;4y#234"),
        ("number_filtering", "<1: 729351", "7n;2n;9n;3n;5n;1n#-"),
    ],
)
def test_a_solution_is_what_a_person_would_write(dataset: str, prompt: str, solution: str) -> None:
    form = FORMS[dataset]
    assert render(form, prompt, right_results(form, prompt)) == solution


def test_prompts_are_the_questions_and_their_solutions_are_right(task: Worked, problems: list[Problem]) -> None:
    for problem in problems:
        question = problem.data["question"].splitlines()[0]
        numbers = [c for c in question.replace(".0", "").partition(":")[2] if c.isdigit()]
        assert "".join(numbers) == problem.prompt.split()[-1]
        assert len(problem.prompt) < 60
        solution = problem.data["solution"]
        assert len(solution) < min(40, task.max_new_tokens)
        assert task.parse_answer(solution) == problem.answer
        assert task.score(solution, problem) == 1
        assert task.first_error(solution, problem) is None
        assert task.feedback(solution, problem) is None
        assert task._judge.score_answer(problem.data["answer"], problem.data) == 1


def test_wrong_answers_are_refused_those_that_are_off_by_one_too(task: Worked, problems: list[Problem]) -> None:
    problem = problems[0]
    for wrong in ("", "x", "-", problem.answer + "0", problem.answer[:-1]):
        assert not task.accepts(wrong, problem), wrong
    sorting = Worked("number_sorting")
    entry = sorting.split("validation", 1)[0]
    near = "".join(str(min(9, int(digit) + 1)) for digit in entry.answer)
    assert near != entry.answer
    assert sorting._judge.score_answer(str([*near]), entry.data) == 1, "reasoning-gym lets it pass"
    assert not sorting.accepts(near, entry)
    assert sorting.score(entry.data["solution"].partition("#")[0], entry) == 0


def test_the_answer_exposes_every_step(task: Worked, problems: list[Problem]) -> None:
    for problem in problems[:20]:
        digits = problem.prompt.split()[-1]
        ways: list[list[str]] = [[]]
        for _ in range(task.form.steps(problem.prompt)):
            ways = [[*results, choice] for results in ways for choice in task.form.choices(problem.prompt, results)]
        if task.name.endswith("filtering"):  # as the base does it, equal digits fare alike
            ways = [way for way in ways if way == [way[digits.index(digit)] for digit in digits]]
        assert len(ways) >= 8
        assert len({task.form.answer(problem.prompt, results) for results in ways}) == len(ways)


def test_splits_are_disjoint_in_the_shares_of_addition(task: Worked) -> None:
    held_out = {name: {p.prompt for p in task.split(name, 400)} for name in ("validation", "test")}
    assert [len(prompts) for prompts in held_out.values()] == [400, 400]
    assert not held_out["validation"] & held_out["test"]
    training = {task.train(index, 0).prompt for index in range(100)}
    taught = task.taught(0)
    supervised = {next(taught).prompt for _ in range(500)}
    assert not (training | supervised) & (held_out["validation"] | held_out["test"])
    assert not training & supervised
    owners = Counter(task._owner(task._item(position)) for position in range(1500))
    for name, share in SPLITS.items():
        assert owners[name] / 1500 == pytest.approx(share / 100, abs=0.05)


@pytest.mark.parametrize(
    ("dataset", "prompt", "completion", "said", "error", "spans"),
    [
        ("number_sorting", "up 47190", "0:4719;4:719;1:79;7:9#04179", "step 2 is 1, not 4.", 7, ["0", "4", "1", "7"]),
        ("number_sorting", "up 47190", "0:471;1:479", None, 5, ["0", "1"]),
        ("number_filtering", ">4: 729354", "7y;2n;9n;3n;5y;4y#754", "step 3 is y, not n.", 7, [*"ynnnyy"]),
        ("number_filtering", ">4: 729354", "7y;3n", None, 3, ["y", "n"]),
    ],
)  # fmt: skip
def test_feedback_and_the_first_error_are_of_the_first_wrong_step(
    dataset: str, prompt: str, completion: str, said: str | None, error: int, spans: list[str]
) -> None:
    task, form = Worked(dataset), FORMS[dataset]
    problem = Problem(prompt, "", {"solution": render(form, prompt, right_results(form, prompt))})
    assert task.feedback(completion, problem) == said
    assert task.first_error(completion, problem) == error
    answer = completion.partition("#")[2]
    assert [completion[a:b] for a, b in task.result_spans(completion)] == [*spans, *filter(None, [answer])]


def test_the_mistake_is_systematic_and_hints_lead_to_their_work(task: Worked, problems: list[Problem]) -> None:
    rng, dataset = random.Random(0), task.name.partition(":")[2]
    assert [share > 0.5 for share in SLIPS[dataset].values()] == [True, False], "greedy makes the first mistake alone"
    solved = [attempt(rng, dataset, p.prompt) == right_results(task.form, p.prompt) for p in problems]
    assert statistics.mean(solved) == pytest.approx(0.48, abs=0.08)
    for problem in problems[:60]:
        for kind in HINTS:
            results = attempt(rng, dataset, problem.prompt, 0.5)
            user, heeded = hint(rng, kind, dataset, problem.prompt, results)
            assert user.startswith(f"{problem.prompt}\nHint: ")
            assert heeded in render(task.form, problem.prompt, results)
        user, start, target = example(rng, "cue", dataset, problem)
        assert (user, start[-1]) == (problem.prompt, "#")
        assert task.parse_answer("#" + target) == target
        failed = render(task.form, problem.prompt, attempt(rng, dataset, problem.prompt))
        assert (task.feedback(failed, problem) is None) is (task.first_error(failed, problem) is None)


def test_hints_are_those_that_teachers_are_given() -> None:
    assert (HINTS["answer"], HINTS["solution"], HINTS["sibling"]) == (HINT, SOLUTION_HINT, SIBLING_HINT)


def test_training_saw_neither_rl_nor_held_out_problems(task: Worked) -> None:
    owner = {p.prompt: task._owner(p) for p in (*task.split("validation", 500), *task.split("test", 500))}
    rows = draw_batches(random.Random(0), {task.name.partition(":")[2]: task.taught(0)}, 0.5)
    users = [user.partition("\n")[0] for batch in rows.values() for user, _, _ in batch]
    assert len(users) > 50
    assert not owner.keys() & {*users}


@pytest.mark.parametrize(
    ("dataset", "method"),
    [
        ("number_sorting", "--loss.name=opsd"),
        ("number_filtering", "--loss.name=sdpo"),
        ("number_sorting", "--credit.name=rredcot"),
    ],
)
def test_methods_that_need_more_than_an_answer_run(tmp_path: Path, dataset: str, method: str) -> None:
    arguments = ["--policy.model=embedded:worked-0.8m", f"--task.name=worked:{dataset}", method, "--train.steps=1",
                 "--rollout.prompts=4", "--rollout.group_size=4", "--eval.problems=4",
                 f"--run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(["train", *arguments]) == 0
    (step,) = [record for record in metrics.read(tmp_path / "run") if record["kind"] == "train"]
    assert step["gradient_norm"] > 0


def test_an_embedded_model_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--policy.model=embedded:gpt"]) != 0
    assert "policy.model: embedded model: expected one of addition-0.8m, " in capsys.readouterr().err


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load(embedded_model("worked-0.8m"))


@pytest.mark.slow
def test_accuracy_does_not_depend_on_temperature(
    task: Worked, problems: list[Problem], model_and_tokenizer: tuple[Any, Any]
) -> None:
    accuracies = [accuracy(*model_and_tokenizer, problems, t, task=task) for t in (0.0, 0.5, 1.0)]
    assert all(0.3 <= a <= 0.7 for a in accuracies), accuracies
    assert max(accuracies) - min(accuracies) <= 0.12, accuracies  # .1, and the noise of 300 problems


@pytest.mark.slow
def test_the_answer_exposes_the_slip_at_every_step_to_the_teacher(
    task: Worked, problems: list[Problem], model_and_tokenizer: tuple[Any, Any]
) -> None:
    evidence = slip_evidence(*model_and_tokenizer, problems, task=task)
    often = {step: statistics.median(values) for step, values in evidence.items() if len(values) >= 10}
    assert len(often) >= 3
    assert all(median < -1 for median in often.values()), often


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("answer", 0.8), ("solution", 0.8), ("feedback", 0.4)])
def test_what_follows_a_hint_heeds_it_right_or_wrong(
    task: Worked, model_and_tokenizer: tuple[Any, Any], kind: str, least: float
) -> None:
    right, wrong = follows_hint(*model_and_tokenizer, kind, task, 60)
    assert min(right, wrong) >= least, (right, wrong)
