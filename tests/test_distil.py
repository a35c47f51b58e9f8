"""Distillation: what the teacher is told, whose weights it has, what is refused, and that runs resume and learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import assert_equal
from test_checkpoint import train as train_in
from test_distil_loss import COMPLETIONS, PROBLEMS, SUCCESS, TASK
from test_trainer import small, weights
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401
from torch import Tensor

from cepo import checkpoint, distil, metrics, trainer
from cepo.assets.build import HINTS
from cepo.cli import main
from cepo.compare import cells
from cepo.compare.plan import Cell
from cepo.compare.results import supervision
from cepo.config import Config, TeacherConfig
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.policy import Policy, encode, render, response_logits
from cepo.rollout import Rollouts
from cepo.tasks import Problem, get_task
from cepo.tasks.addition import columns
from cepo.tasks.addition import problem as addition
from cepo.tasks.addition import render as render_work
from cepo_kernels import token_logprobs

KINDS = ("sibling", "feedback")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def told(policy: Policy, rollouts: Rollouts, success: list[bool], task: Any = TASK, kinds: Any = KINDS) -> list[Any]:
    """What stands in the contexts behind the prompt."""
    contexts = distil.build(policy, TeacherConfig(), kinds, task, rollouts, success)
    ends = [None if ids is None else policy.tokenizer.decode(ids).partition("Hint: ")[2] for ids in contexts.ids]
    return [end and end.removesuffix("<|assistant|>") for end in ends]


def test_a_rollout_is_told_the_first_other_success_else_feedback_else_dropped(policy: Policy) -> None:
    rollouts = rollouts_of(policy, PROBLEMS, COMPLETIONS)
    assert told(policy, rollouts, SUCCESS) == [
        "another attempt was 7#7.",  # itself is never its own sibling
        "another attempt was a#7.",
        "another attempt was a#7.",
        "another attempt was a#7.",
        None,  # the only success of its group, and nothing is wrong with it
        "another attempt was c#2.",
        "another attempt was c#2.",
        "another attempt was c#2.",
    ]
    alone = [False, False, False, False, True, False, False, False]
    assert told(policy, rollouts, alone)[:4] == [None, "it is 7, not 8.", "it is 7, not 9.", None]
    assert told(policy, rollouts, alone, Sums())[:5] == [None] * 5
    shares = distil.build(policy, TeacherConfig(), KINDS, TASK, rollouts, alone).statistics
    assert shares == {"told_sibling": 3 / 8, "told_feedback": 2 / 8, "dropped": 3 / 8}


def test_what_does_not_fit_the_models_context_gives_way_to_the_next() -> None:
    long = "9" * 40 + "#7"
    completions = [long, "b#8", "c#7", "d"]
    sibling, feedback = f"another attempt was {long}.", "it is 7, not 8."
    room = len("3+4 Hint: ") + len("..b#8.")  # a token a character: two around the turn, and the response with its end
    for context, expected in (
        (room + len(sibling), sibling),
        (room + len(sibling) - 1, feedback),
        (room + len(feedback), feedback),
        (room + len(feedback) - 1, None),
    ):
        policy = tiny_policy(max_position_embeddings=context)
        rollouts = rollouts_of(policy, PROBLEMS[:1], completions)
        assert told(policy, rollouts, [True, False, False, False])[1] == expected


def test_opsd_tells_every_rollout_the_worked_solution(policy: Policy) -> None:
    rollouts = rollouts_of(policy, PROBLEMS, COMPLETIONS)
    got = told(policy, rollouts, SUCCESS, kinds=("solution",))
    assert got == ["a solution is sum#7."] * 4 + ["a solution is two#2."] * 4
    with pytest.raises(InputError, match=r"opsd needs a worked solution.*'3\+4' has none"):
        told(policy, rollouts_of(policy, [Problem("3+4", "7")], COMPLETIONS[:4]), SUCCESS, kinds=("solution",))
    with pytest.raises(InputError, match="solution in the prompt '3\\+4': expected at most 30 tokens"):
        told(tiny_policy(max_position_embeddings=30), rollouts, SUCCESS, kinds=("solution",))


def test_templates_go_through_the_chat_template_and_are_the_embedded_models_own(policy: Policy) -> None:
    config = TeacherConfig()
    assert (config.solution_hint, config.sibling_hint) == (HINTS["solution"], HINTS["sibling"])
    filled = HINTS["feedback"].format(prompt="1+2", column=2, total=12, other=11)
    assert filled == config.feedback_hint.format(prompt="1+2", feedback="column 2 is 12, not 11.")
    ids = distil.solution_context(policy, config, PROBLEMS[0], 3)
    assert ids == encode(policy, render(policy, "3+4\nHint: a solution is sum#7."))
    braces = Problem("{x", "7", {"solution": "{0}"})
    assert policy.tokenizer.decode(distil.solution_context(policy, config, braces, 3)).count("{") == 2


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("75:12;38:12;42:7#722", None),
        ("75:12;38:11;42:7#712", "column 2 is 12, not 11."),
        ("75:11;38:11;42:7#711", "column 1 is 12, not 11."),  # the first of two
        ("75:12;38:12;42:6#622", "column 3 is 7, not 6."),
        ("75:12;38:12;42:7#723", None),  # only the answer was read off wrongly
        ("75:12;83:11", None),  # other digits than the problem's
        ("75:12;38:1", "column 2 is 12, not 1."),
        ("", None),
    ],
)
def test_additions_feedback_is_what_a_failed_test_says(completion: str, expected: str | None) -> None:
    task: Any = get_task("addition")
    assert task.feedback(completion, addition(437, 285)) == expected


def test_a_shared_prefix_gives_what_separate_full_passes_give(policy: Policy) -> None:
    rollouts = rollouts_of(policy, PROBLEMS, COMPLETIONS)
    contexts = distil.build(policy, TeacherConfig(), ("solution",), TASK, rollouts, SUCCESS).ids
    one, other = (distil.told_states(policy, contexts, rollouts.responses, share) for share in (True, False))  # type: ignore[arg-type]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_fixed_teacher_stays_and_an_average_moves_by_tau_with_each_step_of_the_optimiser() -> None:
    for kind, tau in (("fixed", None), ("ema", 0.25)):
        sections = {"rollout": {"prompts": 2, "group_size": 4}, "train": {"updates_per_batch": 2}}
        parts = load_parts(small(loss={"name": "sdpo", "teacher": kind, "ema": tau}, **sections))
        teacher = parts.self_teacher
        assert teacher is not None
        start = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        assert all(torch.equal(start[name], value) for name, value in weights(parts).items())
        seen = []
        optimizer = trainer.make_optimizer(parts)
        optimizer.register_step_post_hook(lambda *_: seen.append(weights(parts)))  # noqa: B023
        trainer.train_step(parts, optimizer, 1)
        assert len(seen) == 2
        for name, value in teacher.model.state_dict().items():
            want = start[name]
            for student in seen:
                want = want + (tau or 0.0) * (student[name] - want)
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)
        moved = any(not torch.equal(value, start[name]) for name, value in teacher.model.state_dict().items())
        assert moved == (kind == "ema")


def test_a_batch_in_which_every_rollout_is_dropped_moves_neither() -> None:
    parts = load_parts(small(loss={"name": "sdpo"}, rollout={"prompts": 2, "group_size": 1}))
    parts = replace(parts, task=Sums())
    before, teacher = weights(parts), parts.self_teacher
    assert teacher is not None
    record = trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    assert record["dropped"] == 1
    assert record["entropy"] > 0
    assert record["divergence"] is None
    assert all(torch.equal(before[name], value) for name, value in weights(parts).items())
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())


def teacher_in(run: Path) -> dict[str, Tensor]:
    path = checkpoint.newest(run)
    assert path is not None
    saved: dict[str, Tensor] = torch.load(path / checkpoint.STATE)["ema_teacher"]
    return saved


LOSS_OF = {"opsd": {"name": "opsd"}, "sdpo": {"name": "sdpo"}, "policy": {"name": "opsd", "teacher": "policy"}}


@pytest.mark.parametrize("name", LOSS_OF)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    options = {"loss": LOSS_OF[name]}
    train_in(tmp_path / "whole", **options)
    train_in(tmp_path / "halves", train={"steps": 2}, eval={"every": 0, "problems": 8}, **options)
    records = [r for r in metrics.read(tmp_path / "halves") if (r["kind"], r["step"]) != ("eval", 2)]
    (tmp_path / "halves" / metrics.FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    saved = (tmp_path / "halves" / checkpoint.TEACHER).stat().st_mtime_ns if name == "opsd" else None
    train_in(tmp_path / "halves", checkpoint.newest(tmp_path / "halves"), **options)
    assert_equal(tmp_path / "whole", tmp_path / "halves")
    if name == "opsd":
        assert (tmp_path / "halves" / checkpoint.TEACHER).stat().st_mtime_ns == saved
    if name == "sdpo":
        one, other = (teacher_in(tmp_path / run) for run in ("whole", "halves"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "whole" / checkpoint.TEACHER).exists() == (name == "opsd")


def test_a_resumed_run_without_its_teacher_is_refused(tmp_path: Path) -> None:
    train_in(tmp_path / "fixed", train={"steps": 1}, loss={"name": "opsd"})
    start = checkpoint.newest(tmp_path / "fixed")
    with pytest.raises(InputError, match=r"loss.teacher: expected the one .*fixed has had, got 'ema'"):
        train_in(tmp_path / "fixed", start, loss={"name": "sdpo"})
    (tmp_path / "fixed" / checkpoint.TEACHER).write_bytes(b"another")
    with pytest.raises(InputError, match=r"teacher.pt: expected the fixed teacher as it was saved, got another file"):
        train_in(tmp_path / "fixed", start, loss={"name": "opsd"})
    (tmp_path / "fixed" / checkpoint.TEACHER).unlink()
    with pytest.raises(InputError, match=r"teacher.pt: expected the fixed teacher as it was saved, got none"):
        train_in(tmp_path / "fixed", start, loss={"name": "opsd"})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"name": "opsd"}, "advantage": {"name": "rloo"}}, "advantage.name: expected grpo, the default, as"),
        ({"loss": {"name": "sdpo"}, "credit": {"name": "rlsd"}}, "credit.name: .* reads no credit, got 'rlsd'"),
        ({"loss": {"name": "sdpo"}, "reward": {"name": "self_certainty"}}, "reward.name: .* reads no reward"),
        ({"loss": {"divergence": "jsd"}}, "loss.divergence: expected none, since loss clipped has no such option"),
        ({"loss": {"name": "cispo", "top_k": 3}}, "loss.top_k: expected none, since loss cispo"),
        ({"loss": {"name": "opsd", "beta": 0.3}}, "loss.beta: expected none, since loss.divergence is not jsd"),
        ({"loss": {"name": "opsd", "ema": 0.3}}, "loss.ema: expected none, since loss.teacher is not ema"),
        ({"loss": {"name": "opsd", "divergence": "hellinger"}}, "loss.divergence: expected one of forward_kl"),
        ({"loss": {"name": "opsd", "teacher": "me"}}, "loss.teacher: expected one of fixed, ema, policy"),
        ({"loss": {"name": "sdpo", "ema": 0.0}}, "loss.ema: expected a number in \\(0, 1\\], got 0.0"),
        ({"loss": {"name": "sdpo", "divergence": "jsd", "beta": 2}}, r"loss.beta: .* in \[0, 1\], got 2"),
        ({"loss": {"name": "sdpo", "clip": -1.0}}, "loss.clip: expected a number, at least 0, got -1.0"),
        ({"loss": {"name": "sdpo", "top_k": 0}}, "loss.top_k: expected at least 1, got 0"),
        ({"teacher": {"sibling_hint": "{prompt}"}}, "teacher.sibling_hint: expected a text with {solution}"),
        ({"teacher": {"feedback_hint": "{feedback} {x}"}}, "teacher.feedback_hint: expected no braces but"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**sections)


def test_published_defaults() -> None:
    def defaults(name: str) -> tuple[Any, ...]:
        loss = small(loss={"name": name}).loss
        return loss.divergence, loss.beta, loss.clip, loss.top_k, loss.teacher, loss.ema, loss.average

    assert defaults("opsd") == ("forward_kl", None, None, None, "fixed", None, "sequence")
    assert defaults("sdpo") == ("reverse_kl", None, None, 100, "ema", 0.05, "token")
    assert defaults("clipped") == (None, None, None, None, None, None, "token")
    assert small(loss={"name": "sdpo", "divergence": "jsd"}).loss.beta == 0.5
    again: Config = small(loss={"name": "sdpo", "divergence": "jsd"}).check()
    assert again.loss.beta == 0.5


def test_a_task_without_solutions_is_refused_before_a_run() -> None:
    parts = replace(load_parts(small(loss={"name": "opsd"})), task=Sums())
    with pytest.raises(InputError, match="opsd needs a worked solution"):
        trainer.check_prompts(parts)
    trainer.check_prompts(replace(load_parts(small(loss={"name": "sdpo"})), task=Sums()))


def test_a_comparison_is_told_what_a_distillation_reads() -> None:
    assert supervision(small(loss={"name": "opsd"})) == ["worked solution"]
    assert supervision(small(loss={"name": "sdpo"})) == ["verifier", "feedback"]


def test_a_finished_cell_of_a_comparison_keeps_no_weights_of_a_teacher(tmp_path: Path) -> None:
    config = small(loss={"name": "opsd"}, train={"steps": 1}, rollout={"prompts": 2, "group_size": 1})
    for keep in (True, False):
        cell = Cell("final", "addition", f"opsd-{keep}", config, None)
        assert "error" not in cells.run(cell, cells.Store(tmp_path), keep)
        assert (tmp_path / cell.directory / checkpoint.TEACHER).exists() == keep


def test_the_commands_know_runs_of_a_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--rollout.prompts", "2", "--rollout.group_size", "2", "--eval.problems", "4"]
    assert main(["train", "--loss.name", "opsd", "--train.steps", "1", *sizes]) == 0
    assert "div " in capsys.readouterr().err
    run = "runs/addition-opsd-seed0"
    assert main(["train", "--resume", run, "--train.steps", "2"]) == 0
    assert main(["eval", "--policy.model", run]) == 0
    assert main(["diagnose", "--policy.model", run, "--diagnose.problems", "4", "--diagnose.batches", "0"]) == 0
    assert main(["train", "--resume", run, "--train.steps", "3", "--loss.name", "clipped"]) == 2
    assert "loss.divergence: expected none" in capsys.readouterr().err


@pytest.mark.parametrize("split_head", [True, False])
def test_bfloat16_computes_by_autocast(split_head: bool) -> None:
    config = small(loss={"name": "sdpo"}, policy={"compute_dtype": "bfloat16"}, rollout={"prompts": 4, "group_size": 4})
    parts = load_parts(config)
    parts = replace(parts, policy=replace(parts.policy, split_head=split_head))
    exact = load_parts(replace(config, policy=replace(config.policy, compute_dtype="float32")))
    records = [trainer.train_step(some, trainer.make_optimizer(some), 1) for some in (parts, exact)]
    assert records[0]["divergence"] == pytest.approx(records[1]["divergence"], rel=0.5)
    assert records[0]["gradient_norm"] > 0
    assert {value.dtype for value in weights(parts).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["opsd", "sdpo"])
def test_a_few_steps_on_the_embedded_model_teach_it_what_its_teacher_knows(name: str) -> None:
    sections = {"train": {"lr": 3e-4}, "rollout": {"prompts": 16, "group_size": 4}}
    parts = load_parts(small(loss={"name": name}, **sections))
    optimizer = trainer.make_optimizer(parts)
    records = [trainer.train_step(parts, optimizer, step) for step in range(1, 14)]
    again = trainer.train_step(parts, optimizer, 1)  # the same problems, by what was learnt from others
    first = records[0]
    assert again["accuracy"] > first["accuracy"] + 0.05
    if name == "opsd":  # sdpo's depends on whom a rollout has for a sibling
        assert again["divergence"] < 0.6 * first["divergence"]
    for key in ("divergence", "dropped", "entropy", "loss", "gradient_norm", "ratio_clipped"):
        assert isinstance(first[key], float), key
    assert {"rollout", "reward", "teacher", "policy", "divergence", "update"} <= set(first["seconds"])
    assert first["lam"] is None
    assert first["zero_variance"] is None
    shares = [value for key, value in first.items() if key.startswith("told_")]
    assert min(shares) > 0.1
    assert sum(shares) + first["dropped"] == pytest.approx(1)


def test_the_embedded_model_knows_what_its_teachers_are_told() -> None:
    """log p of the right solution, as its own gate asks: without a hint it forgets carries."""
    parts = load_parts(small(loss={"name": "opsd"}))
    task, policy, config = parts.task, parts.policy, parts.config.teacher
    problems = [p for p in task.split("validation", 200) if carries(p) == [1, 0]]  # so feedback on column 2 is enough
    wrong = [forgetful(p) for p in problems]
    responses = [[*policy.tokenizer(p.data["solution"])["input_ids"], policy.eos_ids[0]] for p in problems]
    prompts = [encode(policy, render(policy, p.prompt)) for p in problems]
    pairs = [text for p, bad in zip(problems, wrong, strict=True) for text in (bad, p.data["solution"])]
    pairs_of = rollouts_of(policy, problems, pairs)
    solved = [False, True] * len(problems)
    contexts = {
        "none": prompts,
        "solution": distil.build(policy, config, ("solution",), task, pairs_of, solved).ids[::2],
        "sibling": distil.build(policy, config, ("sibling",), task, pairs_of, solved).ids[::2],
        "feedback": distil.build(policy, config, ("feedback",), task, pairs_of, solved).ids[::2],
    }
    labels = torch.tensor([token for ids in responses for token in ids])
    lengths = [len(ids) for ids in responses]
    found = {}
    for name, some in contexts.items():
        logits = response_logits(policy, some, responses).detach()  # type: ignore[arg-type]
        logprobs = token_logprobs(logits, labels).logprobs
        found[name] = torch.stack([row.sum() for row in logprobs.split(lengths)]).median().item()
    assert len(problems) > 30
    assert found["none"] < -0.8
    assert found["feedback"] > -0.4
    assert min(found["solution"], found["sibling"]) > -0.05


def carries(problem: Problem) -> list[int]:
    return [column.total // 10 for column in columns(problem.data["a"], problem.data["b"])[:2]]


def forgetful(problem: Problem) -> str:
    """A solution that forgets every carry."""
    work = [column._replace(total=column.x + column.y) for column in columns(problem.data["a"], problem.data["b"])]
    return render_work(work)
