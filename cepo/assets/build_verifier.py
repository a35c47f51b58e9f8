"""Trains the embedded verifiers of `reward: cross_model_entropy` from scratch, on right solutions.

    python -m cepo.assets.build_verifier                  # writes ./verifier-0.4m, a few minutes on one free core
    python -m cepo.assets.build_verifier --policy worked  # the one of sorting and filtering, ./verifier-worked-0.4m
    python -m cepo.assets.build_verifier --evaluate DIR   # only measure a finished verifier

A verifier shares nothing with the embedded policy but the alphabet: a GPT-2 of another size and seed, whose tokenizer
merges digits in pairs, with another chat template. Its problems are those of the policy's supervised split that the
policy was never taught; RL, validation and test problems are in neither.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

from cepo.assets import EMBEDDED_MODEL, build_worked, embedded_model
from cepo.assets.build import STEPS, character_bpe, draw_batches, fit, load, sample, save, wrap_tokenizer
from cepo.errors import InputError
from cepo.rewards.cross_model_entropy import cross_model_entropy, load_verifier
from cepo.tasks.addition import Addition, columns, draw, render, split_of
from cepo.tasks.worked import FORMS, Worked

SPECIAL = ["<pad>", "<|endoftext|>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}.get(m['role'], '') + m['content'] }}"
    "{{ '<|endoftext|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
CONTEXT = 256


def build_tokenizer() -> Any:
    """Digits in pairs from the left, every other printable ASCII character by itself."""
    digits = [str(i) for i in range(10)]
    tokenizer = Tokenizer(character_bpe(SPECIAL, [(x, y) for x in digits for y in digits]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{1,2}"), "isolated")
    return wrap_tokenizer(tokenizer, SPECIAL, CHAT_TEMPLATE, CONTEXT)


def build_model(tokenizer: Any) -> Any:
    """A freshly initialised GPT-2 of 0.4 M parameters."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=96,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


class Lesson(NamedTuple):
    """A problem, whichever way it is put, the split it is of, and how it is asked and solved."""

    problem: object
    split: str
    prompt: str
    solution: str


def pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


class OfAddition:
    """What the verifier of column addition is taught, and measured on."""

    name, model, steps = "verifier-0.4m", EMBEDDED_MODEL, 600
    tasks = (Addition(),)

    def lessons(self, seed: int) -> Iterator[Lesson]:
        rng = random.Random(f"verifier/{seed}")
        while True:
            a, b = draw(rng, "sft")
            yield Lesson(pair(a, b), split_of(a, b), f"{a}+{b}", render(columns(a, b)))

    def taught_policy(self) -> set[object]:
        """Sums that the embedded policy met in its supervised training, which this repeats."""
        rng = random.Random(0)
        rows = [row for _ in range(STEPS) for batch in draw_batches(rng, "all").values() for row in batch]
        return {pair(*map(int, user.split("\n")[0].split("+"))) for user, _, _ in rows}


class OfWorked:
    """The same of sorting and filtering."""

    name, model, steps = "verifier-worked-0.4m", "worked-0.8m", 900
    tasks = tuple(map(Worked, FORMS))

    def lessons(self, seed: int) -> Iterator[Lesson]:
        streams = [task.taught(len(build_worked.ROUNDS) + seed) for task in self.tasks]
        for problem in chain.from_iterable(zip(*streams, strict=True)):
            yield Lesson(problem.prompt, Worked._owner(problem), problem.prompt, problem.data["solution"])

    def taught_policy(self) -> set[object]:
        """Questions that the embedded policy met; it goes on from the adding model, which met none."""
        return {
            user.split("\n")[0]
            for seed, (steps, _, sorting) in enumerate(build_worked.ROUNDS)
            for batches in [build_worked.batches_of(seed, sorting)]
            for _ in range(steps)
            for batch in batches().values()
            for user, _, _ in batch
        }


POLICIES: dict[str, OfAddition | OfWorked] = {"addition": OfAddition(), "worked": OfWorked()}


def train(policy: str, steps: int, learning_rate: float, seed: int, rows: int = 256) -> tuple[Any, Any]:
    """Supervised training on right solutions of problems that the policy was not taught."""
    torch.manual_seed(seed)
    excluded, tokenizer = POLICIES[policy].taught_policy(), build_tokenizer()
    model = build_model(tokenizer)
    lessons = (lesson for lesson in POLICIES[policy].lessons(seed) if lesson.problem not in excluded)
    met: dict[object, str] = {}

    def examples() -> list[tuple[str, str, str]]:
        drawn = list(islice(lessons, rows))
        met.update((lesson.problem, lesson.split) for lesson in drawn)
        return [(lesson.prompt, "", lesson.solution) for lesson in drawn]

    fit(model, tokenizer, steps, learning_rate, lambda: {"solutions": examples()})
    assert set(met.values()) == {"sft"}, f"expected problems of 'sft' alone, got {set(met.values())}"
    assert not met.keys() & excluded, "expected problems that the policy was not taught"
    print(f"trained on {len(met)} problems of 'sft', none of the {len(excluded)} that the policy was taught")
    return model, tokenizer


def auroc(rewards: Sequence[float], correct: Sequence[bool]) -> float:
    """Chance that a correct rollout has a higher reward than a wrong one, ties counting half."""
    values, right = torch.tensor(rewards), torch.tensor(correct)
    gaps = values[right][:, None] - values[~right][None, :]
    return ((gaps > 0).double() + (gaps == 0).double() / 2).mean().item()


def evaluate(policy: str, directory: Path, n: int = 1000) -> None:
    """Print how well the reward tells right from wrong rollouts of the embedded policy, beside its random control."""
    verifier, writer = load_verifier(str(directory)), load(embedded_model(POLICIES[policy].model))
    for task in POLICIES[policy].tasks:
        problems = task.split("validation", n)
        prompts = [p.prompt for p in problems]
        texts = sample(*writer, prompts, temperature=1.0, seed=0, budget=task.max_new_tokens)
        correct = [task.score(text, p) == 1 for text, p in zip(texts, problems, strict=True)]
        print(f"{task.name}:")
        for name, reward in (
            ("trained weights", cross_model_entropy(verifier)),
            ("random weights", cross_model_entropy(verifier, random_weights=True)),
        ):
            scored = [(r, c) for r, c in zip(reward(prompts, texts), correct, strict=True) if r is not None]
            rewards, truth = zip(*scored, strict=True)
            right, wrong = (statistics.mean(r for r, c in scored if c is kind) for kind in (True, False))
            print(
                f"  {name}: AUROC(reward, correct) {auroc(rewards, truth):.3f}, mean reward {right:.3f} if correct, "
                f"{wrong:.3f} if wrong  (n = {len(scored)}, {sum(truth)} correct)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedded verifier from scratch, or measure one.")
    parser.add_argument(
        "--policy", choices=tuple(POLICIES), default="addition", help="whose tasks (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="directory (default: its name among the assets)")
    parser.add_argument("--steps", type=int, help="supervised steps (default: 600 for addition, 900 for worked)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, cosine decay (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and data (default: %(default)s)")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the verifier in DIR, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    of = POLICIES[args.policy]
    out, steps = args.out or Path(of.name), of.steps if args.steps is None else args.steps
    if steps < 1:
        parser.error(f"--steps: expected at least 1, got {steps}")
    if args.evaluate and not args.evaluate.is_dir():
        parser.error(f"--evaluate: expected the directory of a verifier, got {str(args.evaluate)!r}")
    if not args.evaluate:
        try:
            out.mkdir(parents=True, exist_ok=True)  # before the minutes that training takes
        except OSError as error:
            parser.error(f"--out: cannot make {str(out)!r}: {error.strerror}")
        save(out, *train(args.policy, steps, args.learning_rate, args.seed))
    try:
        evaluate(args.policy, args.evaluate or out)
    except InputError as error:
        parser.error(str(error).replace("reward.verifier", "--evaluate"))


if __name__ == "__main__":
    main()
