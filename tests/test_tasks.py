"""Every task: splits that never meet, answers judged strictly, bad input named in one line."""

import json
import random

import pytest

from cepo.tasks import Task, available_tasks, get_task
from cepo.tasks._answers import final_answer, same_answer, stated
from cepo.tasks.addition import SPLITS, Addition, columns, draw, render, split_of


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"jsonl:{path}"


def records(n):
    return [{"prompt": f"question {i}", "answer": i} for i in range(n)]


@pytest.fixture(params=["addition", "reasoning_gym:chain_sum", "worked:number_filtering", "jsonl"])
def task(request, tmp_path):
    if request.param.startswith(("reasoning_gym", "worked")):
        pytest.importorskip("reasoning_gym")
    return get_task(write(tmp_path / "file.jsonl", *records(100)) if request.param == "jsonl" else request.param)


def test_every_task_is_found_by_name_and_keeps_the_protocol(task):
    assert isinstance(task, Task)
    assert available_tasks() == ["addition", "hf", "jsonl", "reasoning_gym", "worked"]


def test_a_training_problem_is_a_function_of_index_and_seed(task):
    first = [task.train(i, 1) for i in range(20)]
    assert [task.train(i, 1) for i in reversed(range(20))] == first[::-1]
    assert [task.train(i, 2) for i in range(20)] != first


def test_splits_are_fixed_distinct_and_disjoint_from_training(task):
    prompts = {name: [p.prompt for p in task.split(name, 60)] for name in ("validation", "test")}
    prompts["train"] = [task.train(i, seed).prompt for seed in range(3) for i in range(200)]
    for name in ("validation", "test"):
        assert len(set(prompts[name])) == len(prompts[name])
        assert [p.prompt for p in task.split(name, 5)] == prompts[name][:5]
    sets = [set(texts) for texts in prompts.values()]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_a_task_accepts_its_own_answer_and_no_other(task):
    for problem in task.split("validation", 10):
        assert task.accepts(problem.answer, problem)
        assert task.accepts(f" {problem.answer}\n", problem)
        assert not task.accepts(problem.answer + "1", problem)
        assert task.score("", problem) == 0
        assert task.parse_answer("") is None


def test_held_out_splits_are_checked_by_name_and_size(task):
    with pytest.raises(ValueError, match=r"split: expected one of validation, test, got 'train'"):
        task.split("train", 5)
    with pytest.raises(ValueError, match="n: expected at least 1"):
        task.split("test", 0)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("subtraction", {}, "expected one of addition, hf, jsonl, reasoning_gym, worked"),
        ("_answers", {}, "expected one of addition, hf, jsonl, reasoning_gym, worked"),
        ("addition:4", {}, "takes no argument, got '4'"),
        ("addition", {"digits": 4}, "expected options among max_new_tokens, got 'digits'"),
        ("reasoning_gym:no_such", {}, "chain_sum.*got 'no_such'"),
        ("reasoning_gym:chain_sum", {"no_such": 1}, "no_such"),
        ("reasoning_gym:chain_sum", {"min_terms": 9, "max_terms": 2}, "reasoning_gym:chain_sum: .*max_terms"),
        ("worked", {}, "expected one of number_sorting, number_filtering, got ''"),
        ("worked:number_sorting", {"max_numbers": 9}, "expected options among max_new_tokens, got 'max_numbers'"),
        ("jsonl", {}, "expected a path"),
        ("jsonl:/no/such.jsonl", {}, "cannot read '/no/such.jsonl': No such file"),
    ],
)
def test_an_unknown_task_or_option_is_named(spec, options, message):
    if spec.startswith(("reasoning_gym", "worked:")):
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message) as error:
        get_task(spec, **options)
    assert "\n" not in str(error.value)


def test_addition_writes_what_a_person_would():
    assert render(columns(437, 285)) == "75:12;38:12;42:7#722"
    assert render(columns(999, 999)) == "99:18;99:19;99:19#1998"
    rng = random.Random(0)
    for _ in range(500):
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        assert render(columns(a, b)).endswith(f"#{a + b}")


def test_addition_splits_by_sum_not_by_order_and_in_the_stated_shares():
    rng = random.Random(0)
    pairs = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(5000)]
    owners = [split_of(a, b) for a, b in pairs]
    assert owners == [split_of(b, a) for a, b in pairs]
    for name, share in SPLITS.items():
        assert owners.count(name) / len(owners) == pytest.approx(share / 100, abs=0.02)
    assert {split_of(*draw(rng, "sft")) for _ in range(200)} == {"sft"}
    assert {split_of(p.data["a"], p.data["b"]) for p in Addition().split("test", 500)} == {"test"}


def test_addition_finds_the_first_wrong_character():
    task = Addition()
    problem = task.train(0, 0)
    right = problem.data["solution"]
    assert task.first_error(right, problem) is None
    assert task.first_error(right.replace(":", ":x"), problem) == right.index(":") + 1
    assert task.first_error(right[:5], problem) == 5
    assert task.first_error(right + "0", problem) == len(right)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("1+1=2#722", "722"), ("#12#722 ", "722"), ("722", None), ("#722 or #723?", None), ("#", None), ("#-3", None)],
)
def test_addition_reads_only_the_last_cued_number(completion, answer):
    assert Addition().parse_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2 </answer>", "2"),
        ("so \\boxed{\\frac{1}{2}} it is\nbye", "\\frac{1}{2}"),
        ("first\n#### 42", "42"),
        ("thinking\nThe final answer is -4.", "-4"),
        ("thinking\nAnswer: 3.5", "3.5"),
        ("42", "42"),
        ("maybe 41\nor 42", None),
        ("<answer></answer>", None),
        ("\\boxed{1", "\\boxed{1"),
        ("", None),
    ],
)
def test_a_final_answer_must_be_marked_or_stand_alone(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,000", "1000.0", True),
        (" -1,234,567.5", "-1234567.50", True),
        ("1,2", "12", False),
        ("3,14", "314", False),
        ("1,0000", "10000", False),
        ("1_0", "10", False),
        ("1/2", "0.5", True),
        ("Paris ", "paris", True),
        ("a  b", "A b", True),
        ("2", "3", False),
        ("1/0", "1/0", True),
        ("1e999999999", "1", False),
        ("12", "123", False),
    ],
)
def test_answers_compare_as_numbers_then_as_text(a, b, same):
    assert same_answer(a, b) is same


def test_reasoning_gym_gives_no_credit_for_a_partial_match_unless_asked():
    pytest.importorskip("reasoning_gym")
    strict, partial = get_task("reasoning_gym:chain_sum"), get_task("reasoning_gym:chain_sum", binary=False)
    problem = strict.split("validation", 1)[0]
    hedged = f"<answer>{problem.answer} or more</answer>"
    assert strict.score(hedged, problem) == 0
    assert 0 < partial.score(hedged, problem) < 1
    assert strict.score(f"I think so.\n<answer>{problem.answer}</answer>", problem) == 1
    assert strict.score(f"It could be {problem.answer}\nor not", problem) == 0


def test_reasoning_gym_says_when_a_dataset_has_few_distinct_questions():
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = get_task("reasoning_gym:basic_arithmetic", allow_parentheses=False, allow_negation=False, **options)
    held_out = [p.prompt for p in task.split("test", 500)]
    assert 0 < len(held_out) < 500
    assert len(set(held_out)) == len(held_out)


@pytest.mark.parametrize("name", ["spell_backward", "ab", "rubiks_cube", "gsm_symbolic"])
def test_reasoning_gym_datasets_of_every_kind_work(name):
    pytest.importorskip("reasoning_gym")
    task = get_task(f"reasoning_gym:{name}", instruction="")
    for problem in [task.train(0, 0), *task.split("test", 2)]:
        assert problem.prompt == problem.data["question"].strip()
        assert task.accepts(problem.answer, problem) is (name != "rubiks_cube")  # which tells no answer, only checks
        assert task.score("nonsense\n\\boxed{", problem) == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (7.0, "7"), (-2.0, "-2"), (2.5, "2.5"), (2.0**53, str(2**53)), (1e16, "1e+16"), (7**30, f"{7**30}")],
)  # fmt: skip
def test_whole_numbers_are_stated_as_such(value, text):
    assert stated(value) == text


def test_a_solution_takes_no_other_fields_place(tmp_path):
    lines = [{**record, "work": "w", "solution": None} for record in records(4)]
    assert get_task(write(tmp_path / "f.jsonl", *lines), solution_key="work").train(0, 0).data["solution"] == "w"
    lines[2]["solution"] = "s"
    spec = write(tmp_path / "f.jsonl", *lines)
    with pytest.raises(ValueError, match=r"line 3: expected no field 'solution' beside .* 'work', .* got 's'$"):
        get_task(spec, solution_key="work")
    assert {p.data["solution"] for p in get_task(spec).training_problems()} <= {None, "s"}


def test_jsonl_keeps_other_fields_and_honours_its_own_split(tmp_path):
    spec = write(
        tmp_path / "f.jsonl",
        {"question": "a?", "result": 1, "split": "train", "level": 3},
        "",
        {"question": "b?", "result": "x", "split": "test"},
    )
    task = get_task(spec, prompt_key="question", answer_key="result")
    assert task.train(7, 0).data["level"] == 3
    assert [p.answer for p in task.split("test", 10)] == ["x"]
    with pytest.raises(ValueError, match="expected a line whose split is 'validation'"):
        task.split("validation", 1)


def test_jsonl_sees_every_training_line_once_an_epoch(tmp_path):
    task = get_task(write(tmp_path / "f.jsonl", *records(10), records(1)[0]))
    epochs = [[task.train(8 * epoch + i, 0).prompt for i in range(8)] for epoch in range(3)]
    assert len(set(epochs[0])) == 8
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "expected at least one line of JSON, got an empty file"),
        (["", "  "], "expected at least one line of JSON, got an empty file"),
        ([*records(3), "{oops"], "line 4: expected a JSON object, got b'{oops'"),
        ([*records(3), "", "[1, 2]"], "line 5: expected a JSON object, got list"),
        ([{"prompt": "a"}], "line 1: expected a field 'answer', got 'prompt'"),
        ([{"prompt": " ", "answer": 1}], "line 1: expected 'prompt' to be a non-empty string"),
        ([{"prompt": "a", "answer": None}], "line 1: expected 'answer' to be a non-empty string or a number, got None"),
        ([{"prompt": "a", "answer": True}], "line 1: expected 'answer'"),
        ([{"prompt": "a", "answer": 1, "split": "dev"}], "line 1: expected 'split' to be one of train, validation"),
        ([*records(3), {"prompt": "question 1", "answer": 9}], "line 4: expected one answer .* line 2 differs"),
        ([*records(3), {"prompt": "b", "answer": 9, "split": "test"}], "'split' on every line or on none, got 1 of 4"),
        (records(2), "expected at least 3 distinct prompts to split, got 2"),
    ],
)
def test_a_bad_jsonl_file_names_its_line(tmp_path, lines, message):
    spec = write(tmp_path / "f.jsonl", *lines)
    with pytest.raises(ValueError, match=message) as error:
        get_task(spec)
    assert "\n" not in str(error.value)


def test_a_jsonl_file_that_is_not_utf8_names_its_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": 1}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        get_task(f"jsonl:{path}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "\\ud800", "answer": "1"}', "surrogate"),
        ('{"prompt": "1", "answer": "\\udc00"}', "surrogate"),
        ("[" * 200_000, "JSON object"),
        ('{"prompt": "1", "answer": %s}' % ("7" * 6000), "JSON object"),
        ('{"prompt": "1", "answer": NaN}', "a number, got nan"),
        ('{"prompt": "1", "answer": -Infinity}', "a number, got -inf"),
        ('{"prompt": "1", "answer": 1e400}', "a number, got inf"),
    ],
    ids=["prompt", "answer", "deep", "digits", "nan", "infinity", "overflow"],
)
def test_a_line_that_python_cannot_take_is_told_by_number(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"file.jsonl, line 2: expected .*{words}") as error:
        get_task(write(tmp_path / "file.jsonl", {"prompt": "a", "answer": "b"}, line))
    assert len(str(error.value)) < 500


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "file.jsonl", *records(10))
    assert len(get_task("jsonl:~/file.jsonl").training_problems()) == 8
