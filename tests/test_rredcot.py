"""RREDCoT: where segments start, what redistributed rewards sum to, which estimators are unbiased; and in the loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import assert_equal, train
from test_trainer import small, steps, weights
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401
from torch import Tensor

from cepo import checkpoint, policy, trainer, update, value
from cepo.config import Config, CreditConfig, RredcotConfig
from cepo.credit import rredcot
from cepo.credit._segments import Splitter, segment_starts
from cepo.errors import InputError
from cepo.metrics import Clock
from cepo.parts import Parts, load_parts
from cepo.policy import Policy
from cepo.processes import ALONE
from cepo.rollout import Rollouts
from cepo.tasks import Problem
from cepo.tasks.addition import Addition

CHOICES = [("return_to_go", "none"), ("return_to_go", "others"), ("difference", "none"), ("scale", "none")]


def characters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def cut(text: str, separators: Sequence[str] = (";", "\n"), keywords: Sequence[str] = ("so", "wait")) -> list[str]:
    ids = [ord(c) for c in text]
    starts = [0, *Splitter(characters, separators, keywords)(ids)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("75:12;38:12;42:7#722", ["75:12;", "38:12;", "42:7#722"]),
        ("one\n\ntwo", ["one\n", "\n", "two"]),
        ("1, so 2. Wait, 3", ["1, so", " 2. Wait", ", 3"]),  # after the keyword, in any case
        ("also swaits", ["also swaits"]),  # not inside a word
        ("so;", ["so", ";"]),  # nothing starts at the end
        ("", [""]),
    ],
)
def test_a_segment_starts_after_a_separator_or_a_keyword(text: str, parts: list[str]) -> None:
    assert cut(text) == parts


def test_markers_may_span_tokens_and_be_left_out() -> None:
    pieces = ["1", "; ", "w", "ai", "t", ",", "\ufffd", "\ufffd", "!"]
    decode: Callable[[Sequence[int]], str] = lambda ids: "".join(pieces[i] for i in ids)  # noqa: E731
    assert Splitter(decode, ["; "], ["wait"])(range(9)) == [2, 5]
    assert Splitter(decode, [], [])(range(9)) == []


texts = st.text(alphabet="ab;\n soSOwait", max_size=25)


@given(past=texts, futures=st.tuples(texts, texts), seed=st.integers(0, 1000), threshold=st.floats(0, 1))
def test_later_tokens_never_move_an_earlier_boundary(
    past: str, futures: tuple[str, str], seed: int, threshold: float
) -> None:
    # Entropies stand for any function of the tokens before.
    found = []
    for future in futures:
        text = past + future
        entropies = [hash((seed, text[:t])) % 100 / 100 for t in range(len(text))]
        candidates = Splitter(characters, [";", "\n"], ["so", "wait"])([ord(c) for c in text])
        starts = segment_starts(candidates, entropies, threshold)
        found.append([t for t in starts if t < len(past)])
    assert found[0] == found[1]


def test_only_boundaries_of_enough_entropy_are_kept() -> None:
    assert segment_starts([2, 4, 6], [0.0, 9.0, 0.5, 9.0, 0.49, 9.0, 0.6], 0.5) == [0, 2, 6]
    assert segment_starts([2, 4], None, 0.5) == [0, 2, 4]


vectors = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(values=vectors, reward=st.floats(-3, 1))
def test_redistributed_rewards_sum_to_what_the_start_did_not_expect(values: Tensor, reward: float) -> None:
    moved = rredcot.redistribute(values, reward)
    assert moved.shape == values.shape
    assert moved.sum().item() == pytest.approx(reward - values[0].item(), abs=1e-12)
    to_go = rredcot.segment_advantages("return_to_go", values, reward, 0.0)
    torch.testing.assert_close(to_go, moved.flip(0).cumsum(0).flip(0), atol=1e-12, rtol=0)
    assert torch.equal(rredcot.segment_advantages("difference", values, reward, 0.0), moved)


@given(values=vectors, reward=st.floats(-3, 1), advantage=st.floats(-2, 2))
def test_scale_keeps_the_advantage_on_average(values: Tensor, reward: float, advantage: float) -> None:
    scaled = rredcot.segment_advantages("scale", values, reward, advantage)
    assert scaled.mean().item() == pytest.approx(advantage, abs=1e-9)
    assert (scaled * advantage >= 0).all()


def test_scale_where_nothing_moves_or_only_one_segment_does() -> None:
    half = torch.full((3,), 0.5, dtype=torch.float64)
    assert rredcot.segment_advantages("scale", half, 0.5, -2.0).tolist() == [-2.0] * 3
    assert rredcot.segment_advantages("scale", half, 1.0, 1.5).tolist() == [0.0, 0.0, 4.5]
    assert rredcot.segment_advantages("scale", half[:1], 0.2, 0.7).tolist() == pytest.approx([0.7])


# Exact enumeration: a policy with one row of logits for every prefix over "ab;", responses of three tokens, and all
# 27 x 27 pairs of responses as groups of two through the member's own `token_advantages`.

LENGTH, ALPHABET = 3, "ab;"
SEQUENCES = list(itertools.product(range(3), repeat=LENGTH))
PREFIXES = [prefix for n in range(LENGTH) for prefix in itertools.product(range(3), repeat=n)]
PAIRS = list(itertools.product(range(27), repeat=2))


class Toy:
    """A random tabular policy, reward and value."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.reward = torch.rand(27, generator=generator, dtype=torch.float64)
        self.value = dict(zip(PREFIXES, torch.rand(len(PREFIXES), generator=generator).double(), strict=True))
        rows = self.logits.log_softmax(-1)
        self.logprobs = torch.stack(
            [torch.stack([rows[PREFIXES.index(y[:t]), y[t]] for t in range(LENGTH)]) for y in SEQUENCES]
        )  # (27, LENGTH)
        self.p = self.logprobs.sum(1).exp()
        entropy = -(rows.exp() * rows).sum(-1).detach()
        self.entropy = dict(zip(PREFIXES, entropy.tolist(), strict=True))
        self.gradient = torch.autograd.grad((self.p * self.reward).sum(), self.logits, retain_graph=True)[0]

    def true_value(self) -> dict[tuple[int, ...], Tensor]:
        p = self.p.detach()
        inside = {x: torch.tensor([y[: len(x)] == x for y in SEQUENCES]) for x in PREFIXES}
        return {x: (p * self.reward)[some].sum() / p[some].sum() for x, some in inside.items()}

    def starts(self, y: tuple[int, ...]) -> list[int]:
        split = Splitter(lambda ids: "".join(ALPHABET[i] for i in ids), [";"], [])
        threshold = sorted(h for x, h in self.entropy.items() if x[-1:] == (2,))[1]  # drops one boundary of four
        return segment_starts(split(y), [self.entropy[y[:t]] for t in range(LENGTH)], threshold)

    def bias(self, monkeypatch: pytest.MonkeyPatch, mode: str, starts: Callable[[tuple[int, ...]], list[int]],
             values: dict[tuple[int, ...], Tensor], centre: str = "none") -> float:  # fmt: skip
        """Of the expected update, relative to the gradient of the expected reward."""
        responses = [list(SEQUENCES[i]) for pair in PAIRS for i in pair]
        problems = [Problem("", "1")] * len(PAIRS)
        rollouts = Rollouts(problems, [[0]] * len(PAIRS), responses, [""] * len(responses), [False] * len(responses))
        rewards = [self.reward[i].item() for pair in PAIRS for i in pair]
        batch = update.Batch(rollouts, torch.zeros(len(responses)), torch.ones(len(responses)), None, 0.0)
        monkeypatch.setattr(value, "segments", lambda parts, b, rows: [starts(tuple(responses[r])) for r in rows])
        monkeypatch.setattr(
            value,
            "answer_values",
            lambda parts, b, rows, cuts: [
                torch.stack([values[tuple(responses[r][:t])] for t in ts]) for r, ts in zip(rows, cuts, strict=True)
            ],
        )
        config = Config(rredcot=RredcotConfig(mode=mode, centre=centre))
        parts: Any = type("Parts", (), {"config": config, "processes": ALONE})
        made = rredcot.token_advantages(parts, batch, [list(range(len(responses)))], rewards, [False] * len(rewards), 1)
        advantages = made.advantages.double().view(len(PAIRS), 2, LENGTH)
        if centre == "own":  # what the config refuses
            gain = torch.tensor([[self.reward[i] - values[()] for i in pair] for pair in PAIRS])
            advantages = advantages - gain.mean(1)[:, None, None]
        both = torch.tensor(PAIRS)
        weight = self.p.detach()[both].prod(1)
        expected = (weight[:, None, None] * advantages * self.logprobs[both]).sum() / 2
        found = torch.autograd.grad(expected, self.logits, retain_graph=True)[0]
        return ((found - self.gradient).norm() / self.gradient.norm()).item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("centre", ["none", "others"])
def test_return_to_go_is_unbiased_for_any_value(monkeypatch: pytest.MonkeyPatch, seed: int, centre: str) -> None:
    toy = Toy(seed)
    assert toy.bias(monkeypatch, "return_to_go", toy.starts, toy.value, centre) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_enumeration_catches_what_biases(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    toy = Toy(seed)

    def merged(y: tuple[int, ...]) -> list[int]:
        """A boundary gives way to a later one: later tokens tell whether it is one."""
        return [0, *[t for t in range(1, LENGTH) if y[t - 1] == 2][-1:]]

    def before(y: tuple[int, ...]) -> list[int]:
        """Segments that start with the separator: the token itself tells whether it is one."""
        return [0, *(t for t in range(1, LENGTH) if y[t] == 2)]

    assert toy.bias(monkeypatch, "return_to_go", merged, toy.value) > 0.01
    assert toy.bias(monkeypatch, "return_to_go", before, toy.value) > 0.05
    assert toy.bias(monkeypatch, "return_to_go", toy.starts, toy.value, "own") == pytest.approx(0.5)
    assert toy.bias(monkeypatch, "difference", toy.starts, toy.value) > 0.05
    assert toy.bias(monkeypatch, "difference", toy.starts, toy.true_value()) < 1e-6


# With a model.


def parts_of(model: Policy, task: Any, **changes: Any) -> Parts:
    options = {"share_prefix": changes.pop("share_prefix", True)}
    config = small(credit={"name": "rredcot"}, rollout={"temperature": 0.7}, teacher=options, rredcot=changes)
    return Parts(config, model, task, *[lambda: None] * 3, (), "ppo")  # type: ignore[arg-type, list-item]


def batch_of(model: Policy, problems: list[Problem], completions: list[str]) -> update.Batch:
    rollouts = rollouts_of(model, problems, completions)
    n = len(completions)
    return update.Batch(rollouts, torch.ones(n), torch.ones(n), None, 0.0)


def brute(model: Policy, context: list[int], scored: list[int]) -> float:
    logits = model.model(torch.tensor([context + scored])).logits[0, len(context) - 1 : -1].double() / 0.7
    return logits.log_softmax(-1).gather(1, torch.tensor(scored)[:, None]).sum().exp().item()


SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("changes", [{}, SLIDING])
@pytest.mark.parametrize(("task", "cue", "asked", "after"), [
    (Addition(), None, "#", None),
    (Sums(), None, "\n<answer>", "</answer>"),
    (Sums(), "so {{answer}}!", "so {", "}!"),
    (Sums(), "= {answer}", "= ", None),
])  # fmt: skip
@torch.no_grad()
def test_values_are_the_probability_of_the_answer_after_the_cue(
    monkeypatch: pytest.MonkeyPatch,
    task: Any,
    cue: str | None,
    asked: str,
    after: str | None,
    changes: dict[str, Any],
    share_prefix: bool,
) -> None:
    model = tiny_policy(**changes)
    problems = [Problem("3+4", "7"), Problem("100+11", "111")]
    # The first two share their first segment, the rollouts of a group their start.
    batch = batch_of(model, problems, ["34;7#7", "34;8;8#8", ";", "1 so 11#111", "2\n2\n#222", "#0"])
    separators = [";", "\n"]
    parts = parts_of(model, task, cue=cue, separators=separators, share_prefix=share_prefix)
    rows = [0, 1, 3, 4, 5]
    starts = value.segments(parts, batch, rows)
    assert starts == [[0, 3], [0, 3, 5], [0, 4], [0, 2, 4], [0]]
    continued, full = [], []
    for name, seen in (("continued_states", continued), ("response_states", full)):
        original = getattr(policy, name)
        monkeypatch.setattr(value, name, lambda *a, o=original, s=seen: s.append(len(a[-1])) or o(*a))
    values = value.answer_values(parts, batch, rows, starts)
    assert sum(continued + full) == 7, "a start that rollouts share is valued once"
    assert bool(continued) == (share_prefix and not changes)

    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    for b, begin, found in zip(rows, starts, values, strict=True):
        prompt, response = batch.prompts([b])[0], batch.rollouts.responses[b]
        scored = ids(problems[b // 3].answer + (after or "")) + ([] if after else [model.eos_ids[0]])
        expected = [brute(model, prompt + response[:t] + ids(asked), scored) for t in begin]
        assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=0)


def test_equal_prompts_with_different_answers_have_values_of_their_own() -> None:
    model = tiny_policy()
    batch = batch_of(model, [Problem("3+4", "7"), Problem("3+4", "8")], ["#7", "#7"])
    one, other = value.answer_values(parts_of(model, Addition()), batch, [0, 1], [[0], [0]])
    assert one != other


def test_the_policys_own_entropy_decides_which_boundaries_are_kept() -> None:
    model = tiny_policy()
    batch = batch_of(model, [Problem("3+4", "7")], ["3;4;5;6;#7", "1;2;3;#8"])
    every = [[0, 2, 4, 6, 8], [0, 2, 4, 6]]
    assert value.segments(parts_of(model, Addition()), batch, [0, 1]) == every
    entropies = [
        torch.distributions.Categorical(logits=model.model(torch.tensor([prompt + ids])).logits[0] / 0.7)
        .entropy()[len(prompt) - 1 : -1]
        .tolist()
        for prompt, ids in zip(batch.prompts([0, 1]), batch.rollouts.responses, strict=True)
    ]
    middle = sorted(h[t] for h, ts in zip(entropies, every, strict=True) for t in ts[1:])[3] + 1e-4
    kept = [[0, *(t for t in ts[1:] if h[t] >= middle)] for h, ts in zip(entropies, every, strict=True)]
    assert sum(map(len, kept)) == 5
    assert value.segments(parts_of(model, Addition(), min_entropy=middle), batch, [0, 1]) == kept


@pytest.mark.parametrize(("mode", "centre"), CHOICES)
def test_every_mode_trains_and_says_how_good_its_values_are(mode: str, centre: str) -> None:
    _, (record,) = steps(small(credit={"name": "rredcot"}, rredcot={"mode": mode, "centre": centre}), n=1)
    assert record["gradient_norm"] > 0
    assert record["seconds"]["token_advantages"] > 0
    assert 1 < record["segments"] <= 4
    for name in ("segment_reward", "value_mean", "value_outcome", "value_brier"):
        assert 0 < record[name] < 1, name


def ahead(parts: Parts, rewards: list[float | None] | None = None) -> tuple[update.Batch, list[float | None]]:
    """The rollouts of step 1 and what the credit makes of them before the update."""
    problems = trainer.problems_of(parts, 1)
    rollouts = trainer.rollout.sample(
        parts.policy, problems, group_size=4, max_new_tokens=28, temperature=1.0, key=(0, 1)
    )
    rewards = trainer.score(parts, rollouts) if rewards is None else rewards
    table = torch.tensor([float("nan") if r is None else r for r in rewards]).view(-1, 4)
    batch = trainer.make_batch(parts, rollouts, parts.advantage(table).flatten(), None, 0.5)
    success = [reward == 1 for reward in rewards]
    return update.credit_ahead(parts, batch, rewards, success, 1, Clock(parts.policy.device)), rewards


def test_token_advantages_are_the_modes_formula_on_each_segments_tokens() -> None:
    for mode, centre in (
        ("return_to_go", "none"),
        ("return_to_go", "others"),
        ("difference", "none"),
        ("scale", "none"),
    ):
        parts = load_parts(small(credit={"name": "rredcot"}, rredcot={"mode": mode, "centre": centre}))
        scored: list[float | None] = [1.0, 0.0, None, 1.0] * 6
        batch, _ = ahead(parts, scored)
        assert batch.ahead is not None
        rows = list(range(24))
        starts = value.segments(parts, batch, rows)
        values = value.answer_values(parts, batch, rows, starts)
        wanted, squares = [], []
        for b, reward in enumerate(scored):
            ends = [*starts[b][1:], len(batch.rollouts.responses[b])]
            others = [r for j, r in enumerate(scored[b // 4 * 4 : b // 4 * 4 + 4]) if j != b % 4 and r is not None]
            baseline = sum(others) / len(others) - values[b][0].item() if centre == "others" else 0.0
            v = values[b].tolist()
            for k, (start, end) in enumerate(zip(starts[b], ends, strict=True)):
                moved = [(after - before) for before, after in zip(v, [*v[1:], reward or 0.0], strict=True)]
                wanted += (end - start) * [
                    0.0 if reward is None
                    else reward - v[k] - baseline if mode == "return_to_go"
                    else moved[k] if mode == "difference"
                    else batch.advantages[b].item() * abs(moved[k]) * len(v) / sum(map(abs, moved))
                ]  # fmt: skip
                if reward is not None:
                    squares.append((v[k] - reward) ** 2)
        torch.testing.assert_close(batch.ahead.advantages, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        assert batch.ahead.statistics["value_brier"] == pytest.approx(sum(squares) / len(squares))
        assert batch.ahead.statistics["segments"] == sum(map(len, starts)) / 24


@pytest.mark.parametrize(("mode", "moves"), [("return_to_go", True), ("difference", True), ("scale", False)])
def test_rollouts_of_agreeing_groups_teach_where_the_advantage_is_not_multiplied(mode: str, moves: bool) -> None:
    parts = load_parts(small(credit={"name": "rredcot"}, rredcot={"mode": mode}))
    object.__setattr__(parts, "reward", lambda prompts, *args, **columns: [1.0] * len(prompts))
    before = weights(parts)
    record = trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    assert record["zero_variance"] == 1
    assert any(not torch.equal(before[name], after) for name, after in weights(parts).items()) == moves


def test_passes_in_pieces_give_the_same_token_advantages() -> None:
    found = []
    for pieces in (0, 1, 4):
        batch, _ = ahead(load_parts(small(credit={"name": "rredcot"}, train={"prompts_per_pass": pieces})))
        assert batch.ahead is not None
        found.append(batch.ahead.advantages)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_later_rounds_move_the_same_token_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    original = update.loss_op

    def spied(model: Policy) -> Any:
        return lambda *args, **options: given.append(args[4]) or original(model)(*args, **options)

    monkeypatch.setattr(update, "loss_op", spied)
    parts = load_parts(small(credit={"name": "rredcot"}, train={"updates_per_batch": 3}))
    batch, _ = ahead(parts)
    assert batch.ahead is not None
    update.update(parts, trainer.make_optimizer(parts), batch, Clock(parts.policy.device))
    assert len(given) == 3
    assert all(torch.equal(advantages, batch.ahead.advantages) for advantages in given)


@pytest.mark.parametrize(("mode", "centre"), CHOICES)
def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path: Path, mode: str, centre: str) -> None:
    sections = {"credit": {"name": "rredcot"}, "rredcot": {"mode": mode, "centre": centre}, "eval": {"every": 1}}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, **sections)
    train(resumed, **sections, train={"steps": 2})
    start = checkpoint.newest(resumed)
    train(resumed, start, **sections)
    assert_equal(whole, resumed)


def test_what_has_no_meaning_is_refused_with_the_reason() -> None:
    for mode in ("return_to_go", "difference"):
        with pytest.raises(
            InputError, match=f"advantage.name: .*rredcot.mode {mode} has advantages of its own.*'rloo'"
        ):
            small(credit={"name": "rredcot"}, advantage={"name": "rloo"}, rredcot={"mode": mode})
        with pytest.raises(InputError, match=f"reward.name: .*{mode} subtracts chances of success.*'self_certainty'"):
            small(credit={"name": "rredcot"}, reward={"name": "self_certainty"}, rredcot={"mode": mode})
    small(credit={"name": "rredcot"}, advantage={"name": "rloo"}, rredcot={"mode": "scale"})
    small(credit={"name": "rredcot"}, reward={"name": "self_certainty"}, rredcot={"mode": "scale"})
    with pytest.raises(InputError, match="mode: expected one of return_to_go, difference, scale, got 'bogus'"):
        rredcot.segment_advantages("bogus", torch.ones(2), 1.0, 1.0)
    for changes, words in (
        ({"mode": "magic"}, "rredcot.mode: expected one of return_to_go"),
        ({"centre": "own"}, "rredcot.centre: expected one of none, others, got 'own'"),
        ({"centre": "others", "mode": "scale"}, "rredcot.centre: expected none with rredcot.mode scale, got 'others'"),
        ({"cue": "Answer:"}, "rredcot.cue: expected a text with one {answer}"),
        ({"keywords": [""]}, "rredcot.keywords: expected texts that are not empty"),
        ({"min_entropy": -1.0}, "rredcot.min_entropy: expected a number, at least 0"),
    ):
        with pytest.raises(InputError, match=words):
            RredcotConfig(**changes).check()  # type: ignore[arg-type]
    assert CreditConfig().name == "cepo"


def test_problems_without_an_answer_or_the_room_for_it_are_refused_before_a_run() -> None:
    parts = load_parts(small(credit={"name": "rredcot"}, rollout={"prompts": 1}))
    trainer.check_prompts(parts)
    for problem, words in (
        (Problem("1+1", " "), "credit.name: rredcot needs the answer of every problem, '1\\+1' has none"),
        (Problem("1+1", "7 " * 500), "answer after a response to '1\\+1': expected at most 1024 tokens"),
    ):
        parts.task.train = lambda index, seed, problem=problem: problem  # type: ignore[method-assign, misc]
        with pytest.raises(InputError, match=words):
            trainer.check_prompts(parts)
