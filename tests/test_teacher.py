"""The teachers: which answers they are told, in which words, and that sharing a prefix changes next to nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401

from cepo import teacher
from cepo.config import HINT, TeacherConfig
from cepo.errors import InputError
from cepo.policy import Policy, continued_states, encode, make_policy, prefill, render, response_logits, response_states
from cepo.tasks import Problem

TASK = Sums()
PROBLEM = Problem("3+4", "7")
BOTH = ("positive", "negative")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def told(policy: Policy, teachers: teacher.Teachers, b: int) -> str | None:
    """The answer in the negative context of rollout b."""
    index = teachers.negative[b]
    if index is None:
        return None
    return str(policy.tokenizer.decode(teachers.prefixes[index]).partition("answer is ")[2].partition(".")[0])


def build(policy: Policy, completions: list[str], rewards: list[float | None], truncated: tuple[int, ...] = (),
          **options: str) -> teacher.Teachers:  # fmt: skip
    rollouts = rollouts_of(policy, [PROBLEM], completions, truncated)
    return teacher.build(policy, TeacherConfig(**options), TASK, rollouts, rewards, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completions", "rewards", "truncated", "expected"),
    [
        (["a#7", "b#8", "c#9"], [1.0, 0.0, 0.0], (), "8"),  # the first of the worst
        (["a#7", "b#8", "c#9"], [1.0, 0.5, 0.0], (), "9"),  # the lowest reward
        (["a#7", "b#8", "c#9"], [1.0, 0.0, 0.0], (1,), "9"),  # never a truncated one
        (["a#7", "b", "c#9"], [1.0, 0.0, 0.0], (), "9"),  # the first that states an answer
        (["a#7", "b#07", "c#9"], [1.0, 0.0, 0.0], (), "9"),  # never one the task accepts in another form
        (["a#7", "b#8", "c#9"], [1.0, None, 0.0], (), "9"),  # never one that could not be scored
        (["a#7", "one\ntwo", "c"], [1.0, 0.0, 0.0], (), "two"),  # no answer stated: the last line
        (["a#7", "7", "c"], [1.0, 0.0, 0.0], (), "c"),  # the last line is checked as well
        (["a#7", "x" * 100, "c"], [1.0, 0.0, 0.0], (), "x" * 64),  # at most 64 tokens of it
        (["a#7", "b#8"], [1.0, 0.0], (1,), None),  # nothing usable: RLSD
        (["a#7", "b#7"], [1.0, 1.0], (), None),
    ],
)
def test_the_choice_of_a_wrong_answer(
    policy: Policy,
    completions: list[str],
    rewards: list[float | None],
    truncated: tuple[int, ...],
    expected: str | None,
) -> None:
    teachers = build(policy, completions, rewards, truncated)
    assert [told(policy, teachers, b) for b in range(len(completions))] == [expected] * len(completions)
    assert len(teachers.prefixes) == 1 + (expected is not None)


def test_negative_own_tells_each_wrong_rollout_its_own_answer(policy: Policy) -> None:
    completions, rewards = ["a#7", "b#8", "c#9", "d#5", "e"], [1.0, 0.0, 0.0, 0.0, 0.0]
    group = build(policy, completions, rewards, (3,))
    own = build(policy, completions, rewards, (3,), negative="own")
    assert [told(policy, group, b) for b in range(5)] == ["8"] * 5
    assert [told(policy, own, b) for b in range(5)] == ["8", "8", "9", "8", "e"]
    assert group.statistics["negative_shared"] == 0.25
    assert own.statistics["negative_shared"] == 0.5
    assert own.statistics["negative_last_line"] == 0.25


def test_templates_are_rendered_with_the_prompt_as_one_text(policy: Policy) -> None:
    hint = teacher.teacher_context(policy, TeacherConfig(), PROBLEM, "8")
    assert hint == encode(policy, render(policy, "3+4\nHint: the answer is 8."))
    splice = teacher.teacher_context(policy, TeacherConfig(template="splice"), PROBLEM, "8")
    assert splice == [*encode(policy, render(policy, "3+4")), *encode(policy, "8\n")]
    assert HINT == "{prompt}\nHint: the answer is {answer}."
    braces = Problem("{x} {", "{0}")
    assert policy.tokenizer.decode(teacher.teacher_context(policy, TeacherConfig(), braces, "{y}")).count("{") == 3


@pytest.mark.parametrize("changes", [{}, {"template": "splice"}, {"negative": "own"}])
def test_a_shared_prefix_gives_what_separate_full_passes_give(policy: Policy, changes: dict[str, str]) -> None:
    problems = [PROBLEM, Problem("100+11", "111"), Problem("1+1", "2")]
    rollouts = rollouts_of(
        policy, problems, ["a#7", "b#8", "#7", "ccc#9", "1#111", "2#112", "3", "#0", "x#2"] + ["#2"] * 3
    )
    rewards = [
        TASK.score(text, p) for text, p in zip(rollouts.completions, rollouts.per_rollout(problems), strict=True)
    ]
    shared = TeacherConfig(**changes)  # type: ignore[arg-type]
    teachers = teacher.build(policy, shared, TASK, rollouts, rewards, 1.0)
    rows = [0, 1, 3, 5, 6, 8, 9]
    one = teacher.teacher_states(policy, shared, teachers, BOTH, rollouts, rows)
    other = teacher.teacher_states(policy, replace(shared, share_prefix=False), teachers, BOTH, rollouts, rows)
    assert one.positive is not None
    assert one.negative is not None
    assert one.negative_mask is not None
    assert torch.equal(one.negative_mask, other.negative_mask)
    assert one.negative_mask.tolist() == [b < 8 for b in rows for _ in rollouts.responses[b]]
    for mine, theirs in ((one.positive, other.positive), (one.negative, other.negative)):
        assert (mine.log_softmax(-1) - theirs.log_softmax(-1)).abs().max() < 1e-5


def test_each_prefix_goes_through_the_model_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(teacher, "prefill", lambda _, prefixes: seen.append(len(prefixes)) or prefill(policy, prefixes))
    rollouts = rollouts_of(policy, [PROBLEM, Problem("1+1", "2")], ["a#7", "b#8", "c#9", "d#7"] * 2)
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    teachers = teacher.build(policy, TeacherConfig(), TASK, rollouts, rewards, 1.0)
    teacher.teacher_states(policy, TeacherConfig(), teachers, BOTH, rollouts, list(range(8)))
    assert seen == [4]


def test_a_one_token_prefix_needs_no_prefill(policy: Policy) -> None:
    contexts, responses = [[7], [9]], [[10, 11, 1], [12, 1]]
    shared = continued_states(policy, prefill(policy, contexts), [0, 1], responses)
    assert torch.allclose(shared, response_states(policy, contexts, responses), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_equal_rollouts_go_through_the_model_once(policy: Policy, shared: bool) -> None:
    contexts, index = [[7, 5], [9], [7, 5]], [0, 1, 0, 0, 1, 2]
    responses = [[10, 11, 1], [10, 11, 1], [10, 11, 1], [12, 1], [10, 11, 1], [12, 1]]
    prefixes, seen = prefill(policy, contexts), []

    def states(some: list[int]) -> torch.Tensor:
        told = [responses[b] for b in some]
        if shared:
            return continued_states(policy, prefixes, [index[b] for b in some], told)
        return response_states(policy, [contexts[index[b]] for b in some], told)

    def watch(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["input_ids"].shape[0])

    hook = policy.model.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    together = states(list(range(6)))
    hook.remove()
    assert seen == [4 if shared else 3]  # a prefix that is there twice is two
    assert torch.allclose(together, torch.cat([states([b]) for b in range(6)]), atol=1e-5)


def test_equal_contexts_are_counted_and_give_no_evidence(policy: Policy) -> None:
    class Blind(Sums):
        def accepts(self, answer: str, problem: Problem) -> bool:
            return False

    rollouts = rollouts_of(policy, [PROBLEM], ["a#7", "b#7"])
    teachers = teacher.build(policy, TeacherConfig(), Blind(), rollouts, [0.0, 1.0], 1.0)
    assert teachers.positive == teachers.negative == [0, 0]
    assert teachers.statistics["negative_same_as_positive"] == 1
    out = teacher.teacher_states(policy, TeacherConfig(), teachers, BOTH, rollouts, [0, 1])
    assert out.positive is not None
    assert out.negative is not None
    assert torch.equal(out.positive, out.negative)


def test_rlsd_asks_for_no_negative_teacher(policy: Policy) -> None:
    rollouts = rollouts_of(policy, [PROBLEM], ["a#7", "b#8"])
    teachers = teacher.build(policy, TeacherConfig(), TASK, rollouts, [1.0, 0.0], 1.0)
    out = teacher.teacher_states(policy, TeacherConfig(), teachers, ("positive",), rollouts, [0, 1])
    assert out.negative is None
    assert out.negative_mask is None


def test_a_teacher_context_longer_than_the_models_is_refused() -> None:
    small = tiny_policy(max_position_embeddings=12)
    with pytest.raises(InputError, match="teacher context of prompt '3\\+4': expected at most 12 tokens"):
        build(small, ["a#7", "b#8"], [1.0, 0.0])


def test_logits_come_from_response_rows_only_and_match_the_whole_model(policy: Policy) -> None:
    contexts, responses = [[7, 8, 9, 10], [11, 12]], [[13, 1], [14, 15, 16, 1]]
    got = response_logits(policy, contexts, responses)
    expected = []
    for context, response in zip(contexts, responses, strict=True):
        whole = policy.model(torch.tensor([context + response])).logits[0]
        expected.append(whole[len(context) - 1 : -1])
    assert got.shape == (6, len(policy.tokenizer))
    assert torch.allclose(got, torch.cat(expected), atol=1e-4)


def test_a_model_whose_head_is_more_than_a_matrix_is_run_whole(policy: Policy) -> None:
    original = policy.model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    contexts, responses = [[7, 8, 9]], [[13, 1]]
    plain = response_logits(policy, contexts, responses)
    try:
        policy.model.forward = doubled
        wrapped = make_policy(policy.model, policy.tokenizer)
        assert not wrapped.split_head
        assert torch.allclose(response_logits(wrapped, contexts, responses), 2 * plain, atol=1e-4)
    finally:
        policy.model.forward = original


def test_a_wrong_answer_too_long_for_the_context_is_left_out() -> None:
    long = "7" * 60
    need = len(teacher.teacher_context(tiny_policy(), TeacherConfig(), PROBLEM, long)) + 62
    for context, missing in ((need, False), (need - 1, True)):
        teachers = build(tiny_policy(max_position_embeddings=context), [f"#{long}", "b#7"], [0.0, 1.0])
        assert (teachers.negative[0] is None) == missing
