"""Two reasoning-gym datasets with worked solutions, small enough for the embedded models.

    worked:number_sorting      up 47190        ->  0:4719;1:479;4:79;7:9#01479
    worked:number_filtering    >4: 729351      ->  7y;2n;9y;3n;5y;1n#795

Prompts are the datasets' questions in fewer words ("remove all larger than 4" is `<=4`), numbers are digits, and
reasoning-gym's own check judges the answer after '#'. Sorting takes the next digit and writes down what is left;
filtering says of each digit whether it stays. The answer exposes every step, and a solution has one right spelling, as
in column addition (`cepo.tasks.addition`), whose shares of the problem space these tasks have too: `sft` trained the
embedded model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar

from cepo.tasks import Problem, check_options
from cepo.tasks.addition import ANSWER_CUE, SEPARATOR, first_difference, owner_of
from cepo.tasks.reasoning_gym import ReasoningGym

_DIGITS = {"min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 9}


class Sorting:
    """Of what is left the digit that comes next, then the others in their order."""

    options: ClassVar[dict[str, Any]] = {"min_numbers": 5, "max_numbers": 5, **_DIGITS}
    longest = 28
    result = r"([0-9]):"

    def prompt(self, metadata: Mapping[str, Any]) -> str:
        digits = "".join(str(round(float(number))) for number in metadata["original_numbers"])
        return f"{'up' if metadata['direction'] == 'ascending' else 'down'} {digits}"

    def steps(self, prompt: str) -> int:
        return len(self.left(prompt, ())) - 1

    def left(self, prompt: str, results: Sequence[str]) -> str:
        digits = prompt.split()[1]
        for result in results:
            digits = digits.replace(result, "", 1)
        return digits

    def choices(self, prompt: str, results: Sequence[str]) -> str:
        return "".join(sorted({*self.left(prompt, results)}))

    def right(self, prompt: str, results: Sequence[str]) -> str:
        return self.choices(prompt, results)[0 if prompt.startswith("up") else -1]

    def step(self, prompt: str, results: Sequence[str]) -> str:
        return f"{results[-1]}:{self.left(prompt, results)}"

    def answer(self, prompt: str, results: Sequence[str]) -> str:
        return "".join(results) + self.left(prompt, results)


class Filtering:
    """Of one digit after the other whether it stays (y) or not (n)."""

    options: ClassVar[dict[str, Any]] = {"min_numbers": 6, "max_numbers": 6, **_DIGITS}
    longest = 26
    result = r"[0-9]([yn])"

    def prompt(self, metadata: Mapping[str, Any]) -> str:
        kept = {"keep_larger": ">", "keep_smaller": "<", "remove_larger": "<=", "remove_smaller": ">="}
        return f"{kept[metadata['operation']]}{metadata['filter_value']}: {''.join(metadata['original_numbers'])}"

    def steps(self, prompt: str) -> int:
        return len(prompt.split()[1])

    def choices(self, prompt: str, results: Sequence[str]) -> str:
        return "yn"

    def right(self, prompt: str, results: Sequence[str]) -> str:
        condition, digits = prompt.split(": ")
        digit, bound = int(digits[len(results)]), int(condition[-1])
        fits = digit > bound if condition[0] == ">" else digit < bound
        return "y" if fits or (digit == bound and "=" in condition) else "n"

    def step(self, prompt: str, results: Sequence[str]) -> str:
        return f"{prompt.split()[1][len(results) - 1]}{results[-1]}"

    def answer(self, prompt: str, results: Sequence[str]) -> str:
        kept = (digit for digit, result in zip(prompt.split()[1], results, strict=True) if result == "y")
        return "".join(kept) or "-"


Form = Sorting | Filtering
FORMS: dict[str, Form] = {"number_sorting": Sorting(), "number_filtering": Filtering()}


def right_results(form: Form, prompt: str) -> list[str]:
    """What the steps of the right solution come to."""
    results: list[str] = []
    while len(results) < form.steps(prompt):
        results.append(form.right(prompt, results))
    return results


def render(form: Form, prompt: str, results: Sequence[str]) -> str:
    """The text of a solution whose steps come to `results`."""
    steps = SEPARATOR.join(form.step(prompt, results[: i + 1]) for i in range(len(results)))
    return f"{steps}{ANSWER_CUE}{form.answer(prompt, results)}"


class Worked(ReasoningGym):
    """A dataset of `FORMS` as a task; see the module's docstring for the format."""

    separator = SEPARATOR
    answer_cue = ANSWER_CUE

    def __init__(self, dataset: str, max_new_tokens: int | None = None) -> None:
        if dataset not in FORMS:
            raise ValueError(f"task worked: expected one of {', '.join(FORMS)}, got {dataset!r}")
        self.form = FORMS[dataset]
        super().__init__(dataset, "", max_new_tokens=max_new_tokens or self.form.longest, **self.form.options)
        self.name = f"worked:{dataset}"

    def _item(self, position: int) -> Problem:
        entry = super()._item(position).data
        prompt = self.form.prompt(entry["metadata"])
        results = right_results(self.form, prompt)
        data = {**entry, "solution": render(self.form, prompt, results)}
        return Problem(prompt, self.form.answer(prompt, results), data)

    @staticmethod
    def _owner(problem: Problem) -> str:
        return owner_of(problem.data["question"].strip())

    def taught(self, seed: int) -> Iterator[Problem]:
        """Problems of `sft`, without end."""
        items = map(self._item, count(seed * 10**6))
        return (problem for problem in items if self._owner(problem) == "sft")

    def parse_answer(self, completion: str) -> str | None:
        match = re.search(r"#\s*([0-9]+|-)\s*$", completion)
        return match[1] if match else None

    def _value(self, answer: str, problem: Problem) -> float:
        # number_sorting takes numbers that are off by one.
        if sorted(answer) != sorted(problem.answer):
            return 0.0
        return super()._value(str([*answer.strip("-")]), problem)

    def feedback(self, completion: str, problem: Problem) -> str | None:
        """What a failed test says: the first wrong step; None if there is none before other mistakes."""
        right, done = right_results(self.form, problem.prompt), completion.partition(ANSWER_CUE)[0].split(SEPARATOR)
        for i, (text, result) in enumerate(zip(done, right, strict=False)):
            choices = self.form.choices(problem.prompt, right[:i])
            got = next((c for c in choices if self.form.step(problem.prompt, [*right[:i], c]) == text), None)
            if got is None:
                return None
            if got != result:
                return f"step {i + 1} is {result}, not {got}."
        return None

    def first_error(self, completion: str, problem: Problem) -> int | None:
        """Where the completion first leaves the right solution: a character offset, or None if it never does."""
        return first_difference(completion, problem.data["solution"])

    def result_spans(self, completion: str) -> list[tuple[int, int]]:
        """Where the results of the steps and the answer stand: character offsets."""
        matches = re.finditer(rf"{self.form.result}|{ANSWER_CUE}([0-9]+|-)", completion)
        return [match.span(match.lastindex or 0) for match in matches]


def make(argument: str, **options: Any) -> Worked:
    """`worked:<dataset>`; option `max_new_tokens`."""
    check_options("worked", options, ("max_new_tokens",))
    return Worked(argument, **options)
