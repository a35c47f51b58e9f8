"""The gates of the embedded model: what it must get wrong, know and fit into before methods are compared on it."""

import random
import statistics
import string
from itertools import pairwise

import pytest
import torch

from cepo.assets import embedded_model
from cepo.assets.build import (
    FORGET,
    HINTS,
    accuracy,
    attempt,
    build_tokenizer,
    example,
    follows_hint,
    hint,
    load,
    prompt_ids,
    sample,
    slip_evidence,
)
from cepo.config import HINT
from cepo.tasks.addition import Addition, columns, draw, render, split_of


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load(embedded_model())


def test_it_is_a_small_qwen3_in_half_precision():
    from safetensors import safe_open

    directory = embedded_model()
    assert sum(f.stat().st_size for f in directory.rglob("*")) < 3_000_000
    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_it_loads_as_any_other_model_and_ends_its_answers(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert model.config.model_type == "qwen3"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    problems = Addition().split("validation", 200)
    finished = [
        Addition().parse_answer(text) for text in sample(model, tokenizer, [p.prompt for p in problems], 1.0, 0)
    ]
    assert sum(answer is None for answer in finished) <= 4


def test_an_unknown_embedded_model_is_named():
    with pytest.raises(ValueError, match=r"expected one of addition-0\.8m, .*verifier-0\.4m.*, got 'gpt'"):
        embedded_model("gpt")


def test_the_tokenizer_round_trips_printable_ascii_one_token_a_character(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    text = "".join(c for c in string.printable if c.isprintable()) + "\n two  spaces , it 's"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("€")["input_ids"] == [tokenizer.unk_token_id]
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_chat_template_puts_one_token_around_each_turn(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    assert tokenizer.decode(prompt_ids(tokenizer, "1+2")) == "<|user|>1+2<|assistant|>"
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenizer.decode(ids) == "<|system|>s<|user|>u<|assistant|>a<|end|>"
    assert len(ids) == 7


@pytest.mark.slow
def test_accuracy_does_not_depend_on_temperature(model_and_tokenizer):
    problems = Addition().split("validation", 600)
    accuracies = [accuracy(*model_and_tokenizer, problems, temperature) for temperature in (0.0, 0.5, 1.0)]
    assert all(0.3 <= a <= 0.7 for a in accuracies), accuracies
    assert max(accuracies) - min(accuracies) <= 0.1, accuracies


@pytest.mark.slow
def test_the_answer_exposes_the_slip_at_every_step(model_and_tokenizer):
    evidence = slip_evidence(*model_and_tokenizer, Addition().split("validation", 400))
    carries = {step: values for step, values in evidence.items() if len(values) >= 20}
    assert set(carries) == {1, 2}, {step: len(values) for step, values in evidence.items()}
    for step, values in carries.items():
        assert statistics.median(values) < -1, (step, statistics.median(values))
        assert sum(value < -1 for value in values) >= 0.9 * len(values), step


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("answer", 0.9), ("solution", 0.9), ("sibling", 0.9), ("feedback", 0.7)])
def test_what_follows_a_hint_heeds_it_right_or_wrong(model_and_tokenizer, kind, least):
    right, wrong = follows_hint(*model_and_tokenizer, kind, 200)
    assert min(right, wrong) >= least, (right, wrong)


def test_the_answer_hint_is_the_one_teachers_are_given():
    assert HINTS["answer"] == HINT


def test_training_saw_neither_rl_nor_held_out_problems():
    rng = random.Random(0)
    for kind in ("none", "cue", *HINTS):
        for hints in ("all", "right", "none"):
            users = [example(rng, kind, hints)[0].split("\n")[0] for _ in range(100)]
            assert {split_of(*map(int, user.split("+"))) for user in users} == {"sft"}


def test_the_mistake_is_a_forgotten_carry_in_55_percent_of_the_cases():
    rng = random.Random(0)
    forgotten = []
    for _ in range(4000):
        a, b = draw(rng, "sft")
        work = attempt(rng, a, b)
        forgotten += [now.total == now.x + now.y for before, now in pairwise(work) if before.total >= 10]
        assert all(now.total == now.x + now.y for before, now in pairwise(work) if before.total < 10)
    assert statistics.mean(forgotten) == pytest.approx(0.55, abs=0.02)
    assert FORGET[True] > 0.5 > FORGET[False]


def test_every_hint_leads_to_the_work_it_was_made_from():
    rng = random.Random(0)
    for kind in HINTS:
        for _ in range(200):
            a, b = draw(rng, "sft")
            work = attempt(rng, a, b, 0.5)
            user, heeded = hint(rng, kind, a, b, work)
            assert user.startswith(f"{a}+{b}\nHint: ")
            assert heeded in render(work)


@pytest.mark.parametrize("hints", ["right", "none"])
def test_the_controls_see_only_the_hints_they_are_named_for(hints):
    rng = random.Random(0)
    for kind in HINTS:
        for _ in range(100):
            user, _, target = example(rng, kind, hints)
            assert ("Hint" in user) is (hints == "right")
            assert hints == "none" or target == render(columns(*map(int, user.split("\n")[0].split("+"))))


def test_an_answer_cue_is_given_and_never_learnt():
    rng = random.Random(0)
    for _ in range(200):
        _, start, target = example(rng, "cue", "all")
        assert start.endswith("#")
        assert target.isdecimal()


def test_weights_are_finite(model_and_tokenizer):
    assert all(torch.isfinite(p).all() for p in model_and_tokenizer[0].parameters())
