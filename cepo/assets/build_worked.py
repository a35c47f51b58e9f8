"""Trains the embedded model of `cepo.tasks.worked` from the one that adds: sorting and filtering, with their mistakes.

    python -m cepo.assets.build_worked                  # writes ./worked-0.8m, about 16 minutes on one core
    python -m cepo.assets.build_worked --evaluate DIR   # only measure a finished model

Like the addition model (`cepo.assets.build`), from which it has its size, characters and weights, it was taught one
systematic mistake in each task, and that what follows a hint agrees with it. Sorting, it sticks with the first digit of
what is left although another comes just before; filtering, it misjudges digits at the bound or next to it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cepo.assets import embedded_model
from cepo.assets.build import HINTS as TEXTS
from cepo.assets.build import STRAY, accuracy, build_tokenizer, fit, load, sample, save, slip_evidence
from cepo.tasks import Problem
from cepo.tasks.addition import ANSWER_CUE, SEPARATOR
from cepo.tasks.worked import FORMS, Filtering, Form, Sorting, Worked, render, right_results

# How often a digit is taken or judged wrongly, by its distance from the right one or from the bound. The first of each
# pair is what greedy decoding does; with the second, sampling is as often wrong as greedy is.
SLIPS = {"number_sorting": {1: 0.72, 2: 0.4}, "number_filtering": {0: 0.7, 1: 0.2}}
HINTS = {**{kind: TEXTS[kind] for kind in ("answer", "solution", "sibling")}, "feedback": "{prompt}\nHint: {feedback}"}
# Steps, peak learning rate and share of sorting of each round: filtering takes longer to learn.
ROUNDS = ((600, 2e-3, 0.5), (400, 1.5e-3, 0.25))
BATCHES = ({"none": 28, "cue": 6}, {"answer": 24, "feedback": 12}, {"solution": 4, "sibling": 4})  # the tasks' mean


def tempting(form: Form, prompt: str, results: list[str]) -> tuple[str, int]:
    """What the next step could wrongly come to, and its distance; a distance that is no key of SLIPS does not tempt."""
    if isinstance(form, Sorting):
        left, right = form.left(prompt, results), form.right(prompt, results)
        order = sorted({*left}, reverse=not prompt.startswith("up"))
        return left[0], abs(int(left[0]) - int(right)) if left[0] in order[1:2] else -1
    condition, digits = prompt.split(": ")
    other = {"y": "n", "n": "y"}[form.right(prompt, results)]
    return other, abs(int(digits[len(results)]) - int(condition[-1]))


def attempt(rng: random.Random, dataset: str, prompt: str, stray: float = 0.0) -> list[str]:
    """The steps as the base does them; with probability `stray` one comes to anything instead."""
    form, results = FORMS[dataset], list[str]()
    odd = rng.randrange(form.steps(prompt)) if rng.random() < stray else None
    while (i := len(results)) < form.steps(prompt):
        wrong, distance = tempting(form, prompt, results)
        result = form.right(prompt, results)
        if i == odd:
            result = rng.choice(form.choices(prompt, results))
        elif rng.random() < SLIPS[dataset].get(distance, 0):
            result = wrong
        if isinstance(form, Filtering):  # equal digits fare alike, or the answer would not say which one stayed
            digits = prompt.split()[1]
            result = [*results, result][digits.index(digits[i])]
        results.append(result)
    return results


def hint(rng: random.Random, kind: str, dataset: str, prompt: str, results: list[str]) -> tuple[str, str]:
    """The user turn with a hint that leads to `results`, and what a solution that heeds it must contain."""
    form = FORMS[dataset]
    solution, answer = render(form, prompt, results), form.answer(prompt, results)
    attempts = (attempt(rng, dataset, prompt, 1.0) for _ in range(100 if kind == "feedback" else 0))
    failed = next((wrong for wrong in attempts if wrong != results), None)
    if failed is None:  # nor can anything go wrong in sorting 111
        kind = "answer" if kind == "feedback" else kind
        return TEXTS[kind].format(prompt=prompt, solution=solution, answer=answer), ANSWER_CUE + answer
    i = next(i for i in range(len(results)) if failed[i] != results[i])
    text = f"step {i + 1} is {results[i]}, not {failed[i]}."
    return HINTS[kind].format(prompt=prompt, feedback=text), form.step(prompt, results[: i + 1])


def example(rng: random.Random, kind: str, dataset: str, problem: Problem) -> tuple[str, str, str]:
    """One supervised example: (user turn, given start of the answer, text to learn)."""
    form, prompt = FORMS[dataset], problem.prompt
    results = attempt(rng, dataset, prompt, STRAY if kind in HINTS else 0.0)
    solution = render(form, prompt, results)
    if kind in HINTS:
        return hint(rng, kind, dataset, prompt, results)[0], "", solution
    if kind == "none":
        return prompt, "", solution
    done = solution.split(SEPARATOR)[: rng.randrange(len(results))]
    return prompt, "".join(step + SEPARATOR for step in done) + ANSWER_CUE, form.answer(prompt, results)


def draw_batches(
    rng: random.Random, taught: dict[str, Iterator[Problem]], sorting: float
) -> dict[str, list[tuple[str, str, str]]]:
    """The examples of one supervised step, both tasks in each batch, `sorting` the share of the first."""
    shares = {"number_sorting": sorting, "number_filtering": 1 - sorting}
    return {
        "+".join(batch): [
            example(rng, kind, dataset, next(problems))
            for kind, number in batch.items()
            for dataset, problems in taught.items()
            for _ in range(round(2 * number * shares[dataset]))
        ]
        for batch in BATCHES
    }


def train() -> tuple[Any, Any]:
    """The addition model, taught problems of `sft` alone."""
    tokenizer, (model, _) = build_tokenizer(), load(embedded_model())
    for seed, (steps, learning_rate, sorting) in enumerate(ROUNDS):
        batches = batches_of(seed, sorting)
        fit(model.train(), tokenizer, steps, learning_rate, batches)
    return model, tokenizer


def batches_of(seed: int, sorting: float) -> Callable[[], dict[str, list[tuple[str, str, str]]]]:
    """What draws the batches of a round."""
    rng, taught = random.Random(seed), {dataset: Worked(dataset).taught(seed) for dataset in FORMS}
    return lambda: draw_batches(rng, taught, sorting)


def follows_hint(model: Any, tokenizer: Any, kind: str, task: Worked, n: int) -> tuple[float, float]:
    """How often a sampled solution heeds a hint, for hints (right, wrong), on `n` held-out problems each."""
    rng, shares = random.Random("hints"), []
    dataset = task.name.partition(":")[2]
    for right in (True, False):
        turns: list[tuple[str, str]] = []
        for problem in task.split("validation", 5 * n):
            best = right_results(task.form, problem.prompt)
            results = best if right else attempt(rng, dataset, problem.prompt)
            if (results == best) is right and len(turns) < n:
                turns.append(hint(rng, kind, dataset, problem.prompt, results))
        texts = sample(model, tokenizer, [user for user, _ in turns], 1.0, 0, task.max_new_tokens)
        shares.append(sum(heeded in text for (_, heeded), text in zip(turns, texts, strict=True)) / len(turns))
    return shares[0], shares[1]


def evaluate(model: Any, tokenizer: Any, n: int = 1000) -> None:
    """Print what the gates of tests/test_worked.py ask, on the validation splits."""
    for dataset in FORMS:
        task = Worked(dataset)
        problems = task.split("validation", n)
        owners = Counter(map(task._owner, problems))
        assert set(owners) == {"validation"}, f"expected problems that no training saw, got {owners}"
        print(f"{task.name}: measured on {dict(owners)}; trained on 'sft' alone")
        for temperature in (0.0, 0.5, 1.0):
            share = accuracy(model, tokenizer, problems, temperature, task=task)
            print(f"  accuracy at T = {temperature}: {share:.3f}")
        for step, values in slip_evidence(model, tokenizer, problems, task=task).items():
            median, worst = torch.tensor(values).quantile(torch.tensor([0.5, 0.9])).tolist()
            print(
                f"  log P+/P_S at a slip, step {step + 1}: median {median:.2f}, 90 % below {worst:.2f} ({len(values)})"
            )
        for kind in HINTS:
            right, wrong = follows_hint(model, tokenizer, kind, task, 200)
            print(f"  heeds the hint '{kind}': {right:.3f} when it is right, {wrong:.3f} when it is wrong", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model of the worked tasks, or measure one.")
    parser.add_argument("--out", type=Path, default=Path("worked-0.8m"), help="directory (default: %(default)s)")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the model in DIR, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        save(args.out, *train())
    evaluate(*load(args.evaluate or args.out))


if __name__ == "__main__":
    main()
