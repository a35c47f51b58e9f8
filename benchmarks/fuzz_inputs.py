"""Random configs and JSONL files, most of them broken: each is read, or refused with one line.

    python benchmarks/fuzz_inputs.py --configs 1000 --files 1000

In one process, without training. Config number i of a seed is always the same; so is file number i. Some hold YAML tags
that would make a directory if anything ran them.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from cepo import cli
from cepo.config import Config, TaskConfig
from cepo.errors import InputError, one_line
from cepo.parts import load_task

LIMIT = 20  # seconds of the processor, after which a case counts as hanging
CANARY = "!!python/object/apply:os.mkdir [canary]"
VALUES = (
    *("0", "1", "-1", "2", "0.5", "1e-6", "1.0e-6", "nan", ".nan", "inf", "-.inf", "1e400", str(2**63), str(10**40)),
    *("true", "null", "", " ", "~", "auto", "none", "cepo", "grpo", "jsd", "abacus", "a:b", "Ünïcödé", "\U0001f600"),
    *("\u2028", "'", '"', "{", "[", "[1, 2]", "{a: 1}", "{a: {b: [1, {c: 2}]}}", "[" * 200, "x" * 5000, "- 1", "#"),
    *("&a *a", "*a", "<<: 1", "0x1F", "1_000", "2026-01-01", "12:30:45", "/dev/null", "../..", "%s{}", "{answer}"),
    *("{prompt} {answer}", "\\n", "\t", "--train.lr", "@", "!!binary aGk=", CANARY, "1;2", "yes"),
)


class HangError(Exception):
    """A case that did not end."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise HangError after LIMIT seconds of work."""

    def ring(*_: Any) -> None:
        raise HangError(f"no end after {LIMIT} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def options() -> list[str]:
    """Every option of a config, `section.name` or `name`."""
    found = []
    for field in fields(Config):
        if is_dataclass(field.default_factory):
            found += [f"{field.name}.{inner.name}" for inner in fields(field.default_factory)]
        else:
            found.append(field.name)
    return found


OPTIONS = options()


def misspelt(rng: random.Random, text: str) -> str:
    """A character dropped, doubled, exchanged or added, or two swapped."""
    at = rng.randrange(len(text) + 1)
    return rng.choice((text[:at] + text[at + 1 :], text[:at] + text[at : at + 1] + text[at:],
                       text[:at] + chr(rng.choice((32, 0x2E, 0x3A, 0x61, 0xE9, 0x4E2D))) + text[at + 1 :],
                       text[:at] + rng.choice("x-_.=0") + text[at:],
                       text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]))  # fmt: skip


def value(rng: random.Random) -> str:
    kind = rng.randrange(4)
    return (
        rng.choice(VALUES),
        str(rng.randint(-3, 40)),
        f"{rng.uniform(-2, 3):.3g}",
        misspelt(rng, rng.choice(VALUES)),
    )[kind]


def command_line(rng: random.Random) -> list[str]:
    """Some options with some values, a few of the names misspelt, a value missing, or a word too many."""
    arguments: list[str] = []
    for _ in range(rng.randint(1, 4)):
        name = f"--{rng.choice(OPTIONS)}"
        if rng.random() < 0.1:
            name = misspelt(rng, name)
        arguments += [f"{name}={value(rng)}"] if rng.random() < 0.4 else [name, value(rng)]
    if rng.random() < 0.1:
        arguments.pop(rng.randrange(len(arguments)))
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments) + 1), value(rng))
    return [a for a in arguments if a not in ("-h", "--help") and not a.startswith("--print_")]


def yaml_file(rng: random.Random) -> bytes:
    """The default config as YAML, some of its values exchanged, its lines or its bytes disturbed."""
    content = {name: part for name, part in asdict(Config()).items() if rng.random() < 0.4 or name == "train"}
    for _ in range(rng.randint(0, 3)):
        section = rng.choice(sorted(content))
        if isinstance(content[section], dict) and content[section] and rng.random() < 0.8:
            found: Any = value(rng)
            with_type = rng.random() < 0.5
            with suppress(yaml.YAMLError, ValueError):
                found = yaml.safe_load(found) if with_type else found
            content[section][rng.choice(sorted(content[section]))] = found
        else:
            content[section] = rng.choice((None, 3, "x", [], [1], {}, {"x": 1}, True, 1.5))
    lines = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).splitlines()
    for _ in range(rng.choice((0, 0, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [misspelt(rng, lines[at])], [" " + lines[at]],
                                         [lines[at].partition(":")[0] + ": " + rng.choice(VALUES)],
                                         ["\t" + lines[at]], [rng.choice(VALUES)]))  # fmt: skip
        lines = lines or [""]
    return disturbed(rng, "\n".join(lines).encode())


def disturbed(rng: random.Random, content: bytes) -> bytes:
    """Perhaps with some bits flipped, some bytes lost, or cut."""
    changed = bytearray(content)
    kind = rng.randrange(8)
    if changed and kind == 0:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    if changed and kind == 1:
        del changed[rng.randrange(len(changed)) :]
    if changed and kind == 2:
        at = rng.randrange(len(changed))
        changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    if kind == 3 and rng.random() < 0.2:
        return bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))
    return bytes(changed)


def config(number: int, folder: Path, seed: int = 0) -> tuple[str, str | None]:
    """(outcome, what was wrong with it) of config `number`; outcomes are "read" and "refused"."""
    rng = random.Random(f"config/{seed}/{number}")
    arguments = command_line(rng)
    if number % 2:
        path = folder / "config.yaml"
        path.write_bytes(yaml_file(rng))
        arguments = ["--config", str(path), *(arguments if rng.random() < 0.2 else [])]
    try:
        with limited():
            made, _ = cli.parse("train", arguments)
            yaml.safe_dump(asdict(made))  # as a run writes it
    except InputError as error:
        return "refused", _spoken(str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "refused", f"{type(error).__name__}: {one_line(error)[:300]}"
    return "read", None


def _spoken(message: str) -> str | None:
    """What is wrong with a refusal, which `cepo` prints as one line; a value that is told back is as long as it was."""
    if len(one_line(message)) > 12_000:
        return f"a message of {len(one_line(message))} characters: {one_line(message)[:200]}"
    return None if message.strip() else "no message"


FIELDS = ("prompt", "answer", "solution", "split", "extra")
ODD: tuple[Any, ...] = (
    *(None, "", " ", 0, -1.5, True, 10**30, float("nan"), float("inf"), "train", "test", "dev", "{answer}"),
    *([], [1], {}, {"a": 1}, [[]], "x" * 3000, "\ud800", "\x00", "\u2028"),
    [{"role": "user", "content": "1+1"}],
    [{"role": "user", "content": 3}],
    [{"role": "assistant", "content": "no"}],
    [{"role": "system"}],
)


def lines_of(rng: random.Random) -> bytes:
    """Some records, a few with odd fields, lost ones, or none at all; then bytes disturbed."""
    records: list[Any] = [
        {"prompt": f"{i} + {rng.randint(0, 9)}", "answer": str(i), "solution": f"so #### {i}"} for i in range(8)
    ]
    if rng.random() < 0.3:
        records = [{**r, "split": rng.choice(("train", "validation", "test"))} for r in records]
    for _ in range(rng.choice((0, 1, 1, 2))):
        at, name = rng.randrange(len(records)), rng.choice(FIELDS)
        if rng.random() < 0.8 and isinstance(records[at], dict):
            records[at] = {**records[at], name: rng.choice(ODD)}
        elif rng.random() < 0.5:
            records[at] = rng.choice(ODD)
        elif isinstance(records[at], dict):
            records[at].pop(name, None)
    text = rng.choice(("\n", "\n", "\n", "\r\n", "\n\n", "\r", "")).join(json.dumps(r) for r in records)
    return disturbed(rng, text.encode("utf-8", "surrogatepass"))


def file(number: int, folder: Path, seed: int = 0) -> tuple[str, str | None]:
    """The same of JSONL file `number`, which is read, and asked for what a run asks of a task."""
    rng = random.Random(f"file/{seed}/{number}")
    path = folder / "problems.jsonl"
    path.write_bytes(lines_of(rng))
    given: dict[str, Any] = {}
    for name in ("prompt_key", "answer_key", "solution_key", "skip_bad", "max_new_tokens", "magic"):
        if rng.random() < 0.06:
            given[name] = rng.choice((*ODD, *FIELDS, 5, "answer"))
    if rng.random() < 0.2:
        given |= {"answer_key": None, "solution_key": "solution"}
    try:
        with limited():
            made = Config(task=TaskConfig(name=f"jsonl:{path}", options=given))
            task = load_task(made)
    except InputError as error:
        return "refused", None if str(error).strip() and "\n" not in str(error) else f"message {str(error)!r}"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {one_line(error)[:300]}"
    try:
        with limited():
            problems = [task.train(i, 0) for i in range(10)]
            for problem in problems:
                task.score(f"answer is {problem.answer}", problem)
                task.score("", problem)
        for split in ("validation", "test"):
            try:
                task.split(split, 3)
            except ValueError as error:
                if "expected a line whose split" not in str(error):
                    raise
    except Exception as error:
        return "read", f"{type(error).__name__}: {one_line(error)[:300]}"
    return "read", None


def fuzz(what: str, count: int, seed: int = 0) -> dict[str, Any]:
    """Outcomes of `count` configs or files, and the cases that went wrong."""
    case = {"configs": config, "files": file}[what]
    once = mock.patch.object(cli, "_parser_of_configs", cache(cli._parser_of_configs))  # two thirds of the time
    counted: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, once:
        for number in range(count):
            outcome, error = case(number, Path(folder), seed)
            counted[outcome] += 1
            wrong += [] if error is None else [f"{number}: {error}"]
    if Path("canary").exists():
        wrong.append("code in a config was run")
    return {"outcomes": dict(counted), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = {what: fuzz(what, getattr(arguments, what), arguments.seed) for what in ("configs", "files")}
    print(json.dumps(found))
    return 1 if any(part["wrong"] for part in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
