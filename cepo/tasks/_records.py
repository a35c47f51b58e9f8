"""Problems from records, whatever they are read from: a prompt, its answer, and other fields that come along."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cepo.errors import InputError
from cepo.images import is_image, located
from cepo.prompts import with_images
from cepo.tasks import HELD_OUT, Problem, check_split
from cepo.tasks._answers import final_answer, same_answer, stated

SPLITS = ("train", *HELD_OUT)
FIELDS = ("prompt_key", "answer_key", "solution_key", "skip_bad", "max_new_tokens")

logger = logging.getLogger("cepo")


@dataclass(frozen=True)
class Reading:
    """How a record is read; the options that tasks from records share.

    A field `image`, or `images`, a list, belongs to the prompt: paths, or what `datasets` makes of its images.

    Args:
        prompt_key: its field with the prompt, a text or a list of {"role": ..., "content": ...} that ends in a user
            turn.
        answer_key: its field with the answer, a text or a number; None: the answer that the solution states.
        solution_key: its field with the worked solution, if it has one; the problem's data then has it as "solution".
        skip_bad: leave out records that cannot be used, with a warning, in place of an error.
        max_new_tokens: longest completion, in tokens.
    """

    prompt_key: str = "prompt"
    answer_key: str | None = "answer"
    solution_key: str | None = None
    skip_bad: bool = False
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name, kinds, none in (("prompt_key", str, False), ("answer_key", str, True), ("solution_key", str, True),
                                  ("skip_bad", bool, False)):  # fmt: skip
            value = getattr(self, name)
            if not (isinstance(value, kinds) or (none and value is None)):
                raise ValueError(f"{name}: expected a {kinds.__name__}{' or null' * none}, got {value!r}")
        if self.answer_key is None and self.solution_key is None:
            raise ValueError("answer_key: expected a field, or null and a solution_key, got null and none")

    def problems(
        self, records: Iterable[tuple[str, Any]], folder: Path, splits: tuple[str, ...] = SPLITS
    ) -> list[Problem]:
        """The problems of (where, record) pairs, each prompt once. Raises ValueError for the first that is none.

        folder: where paths of images start; splits: what a field "split" may say, none: it means nothing here.
        """
        found: dict[str, tuple[str, Problem]] = {}
        bad: list[str] = []
        for where, record in records:
            try:
                problem = self._problem(where, record, folder, splits)
                first, known = found.setdefault(problem.text, (where, problem))
                if known.answer != problem.answer or (splits and known.data.get("split") != problem.data.get("split")):
                    raise ValueError(f"{where}: expected one answer and split per prompt, {_last(first)} differs")
            except ValueError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        if bad:
            logger.warning("left out %d records that cannot be used, the first: %s", len(bad), bad[0])
        return [problem for _, problem in found.values()]

    def _problem(self, where: str, record: Any, folder: Path, splits: tuple[str, ...]) -> Problem:
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        for key in (self.prompt_key, self.answer_key, self.solution_key):
            if key is not None and key not in record:
                raise ValueError(f"{where}: expected a field {key!r}, got {', '.join(map(repr, record)) or 'none'}")
        prompt, split = record[self.prompt_key], record.get("split")
        images = _images(where, record, folder)
        problem = "" if isinstance(prompt, str) and prompt.strip() else _in_conversation(prompt, bool(images))
        if problem:
            raise ValueError(
                f"{where}: expected {self.prompt_key!r} to be a non-empty string or a list of messages{problem}"
            )
        if images:
            try:
                prompt = with_images(prompt, images)
            except InputError as error:
                raise ValueError(f"{where}: {error}") from error
        elif not isinstance(prompt, str):
            prompt = [{**message, "content": _said(message["content"])} for message in prompt]
        data = dict(record)
        if self.solution_key is not None:
            if self.solution_key != "solution" and data.get("solution") is not None:
                raise ValueError(
                    f"{where}: expected no field 'solution' beside the solution_key {self.solution_key!r}, which takes "
                    f"its place, got {data['solution']!r:.40}"
                )
            solution = data["solution"] = record[self.solution_key]
            if not isinstance(solution, str) or not solution.strip():
                raise ValueError(f"{where}: expected {self.solution_key!r} to be a non-empty string, got {solution!r}")
        if self.answer_key is None:
            answer: Any = final_answer(data["solution"])
            if answer is None:
                raise ValueError(
                    f"{where}: expected {self.solution_key!r} to mark its answer (\\boxed{{}}, ####, <answer>), "
                    f"got {data['solution'][-40:]!r}"
                )
        else:
            answer = record[self.answer_key]
        told = stated(answer)
        if told is None:
            raise ValueError(
                f"{where}: expected {self.answer_key!r} to be a non-empty string or a number, got {answer!r}"
            )
        made = Problem(prompt, told, data)
        try:
            text = made.text
        except InputError as error:  # an image that is not there
            raise ValueError(f"{where}: {error}") from error
        if not _is_unicode(text + made.answer):
            raise ValueError(f"{where}: expected Unicode text, got half of a surrogate pair in {text[:40]!r}")
        if splits and split is not None and split not in splits:
            raise ValueError(f"{where}: expected 'split' to be one of {', '.join(splits)}, got {split!r}")
        return made


class Listed:
    """A task whose problems are all known; `splits` has those of "train", "validation" and "test"."""

    def __init__(self, name: str, max_new_tokens: int, splits: Mapping[str, list[Problem]]) -> None:
        self.name = name
        self.max_new_tokens = max_new_tokens
        self._splits = splits
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def train(self, index: int, seed: int) -> Problem:
        problems = self._splits["train"]
        epoch, place = divmod(index, len(problems))
        if self._order is None or self._order[0] != (seed, epoch):
            order = list(range(len(problems)))
            random.Random(f"jsonl/{seed}/{epoch}").shuffle(order)
            self._order = (seed, epoch), order
        return problems[self._order[1][place]]

    def training_problems(self) -> list[Problem]:
        """All of them, so that what does not fit the model is told before a run starts."""
        return self._splits["train"]

    def split(self, name: str, n: int) -> list[Problem]:
        check_split(name, n)
        if not self._splits[name]:
            raise ValueError(f"task {self.name}: expected a line whose split is {name!r}, got none")
        return self._splits[name][:n]

    def parse_answer(self, completion: str) -> str | None:
        return final_answer(completion)

    def score(self, completion: str, problem: Problem) -> float:
        answer = self.parse_answer(completion)
        return float(answer is not None and self.accepts(answer, problem))

    def accepts(self, answer: str, problem: Problem) -> bool:
        return same_answer(answer, problem.answer)


def split_off(where: str, problems: list[Problem], missing: tuple[str, ...] = HELD_OUT) -> dict[str, list[Problem]]:
    """A tenth of `problems`, at least one, for each split of `missing`, by the order of a hash; the rest for training.

    Raises ValueError if nothing would be left.
    """
    if len(problems) < (least := len(missing) + 1):
        raise ValueError(f"{where}: expected at least {least} distinct prompts to split, got {len(problems)}")
    ordered = sorted(problems, key=lambda p: hashlib.sha256(p.text.encode()).digest()) if missing else problems
    share = math.ceil(len(problems) / 10)
    split = {name: ordered[i * share : (i + 1) * share] for i, name in enumerate(missing)}
    return {**split, "train": ordered[len(missing) * share :]}


def _last(where: str) -> str:
    return where.rpartition(", ")[2]


def _images(where: str, record: Mapping[str, Any], folder: Path) -> list[Any]:
    """The images that belong to a record's prompt."""
    one, several = record.get("image"), record.get("images")
    if one is not None and several is not None:
        raise ValueError(f"{where}: expected 'image' or 'images', got both")
    images = ([] if one is None else [one]) if several is None else several
    if not isinstance(images, list) or not all(map(is_image, images)):
        raise ValueError(f"{where}: expected images to be paths or pictures, got {images!r:.80}")
    return [located(image, folder) for image in images]


def _in_conversation(prompt: Any, images: bool) -> str:
    """What is wrong with a list of messages, "" if nothing. Only with images a content may have places for them."""
    if not isinstance(prompt, list) or not prompt:
        return f", got {prompt!r:.80}"
    said: Any = None
    for message in prompt:
        said = _said(message.get("content"), images) if isinstance(message, Mapping) else None
        if not isinstance(said, str) or not isinstance(message.get("role"), str):
            return f" with a role and a content, both texts, got {message!r:.80}"
    if prompt[-1]["role"] != "user" or not said.strip():
        return f" that ends in a user turn with a text, got {prompt[-1]!r:.80}"
    return ""


def _said(content: Any, images: bool = False) -> Any:
    """The text of a message's content, a text or a list of texts and, if `images`, of their places; else it or None."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind == "text" else "" if kind == "image" and images else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
