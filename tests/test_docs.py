"""What the documentation shows runs: Python is executed, commands and configurations go through their own parsers.

A block above which "*Not run by the tests: ...*" stands is left alone, for the reason that stands there; if that names
an example or benchmark, the block is an excerpt of it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tiny import one_thread  # noqa: F401

from cepo import cli, trainer
from cepo.compare.plan import load
from cepo.config import Config, RewardConfig, RolloutConfig
from cepo.parts import load_parts
from cepo.tasks import get_task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^\*Not run by the tests: (?P<why>(?:[^\n]+\n)*?[^\n]+)\*\n+)?"
    r'^```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
COMMANDS = {"ruff", "mypy", "clang-format", "mkdocs", "."}  # of others, with no arguments that we define
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


class Block(NamedTuple):
    language: str
    text: str
    title: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to run."""
    found = []
    for match in BLOCK.finditer(page.read_text()):
        block = Block(match["language"], match["text"], match["title"])
        assert block.language in ("python", "bash", "yaml", "json", "text"), block
        if match["why"] is None:
            found.append(block)
        elif named := re.search(r"`((?:examples|benchmarks)/[\w./]+)`", match["why"]):
            assert block.text in (ROOT / named[1]).read_text(), named[1]
    return found


class ParsedError(Exception):
    """A command line was accepted; nothing is to run."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_fenced_and_says_what_it_is(page: Path) -> None:
    blocks(page)
    rest = BLOCK.sub("", page.read_text())
    assert "```" not in rest
    assert not re.search(r"^\n(?:    |\t)\S", rest, re.MULTILINE), "an indented block, which nothing tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs_block_after_block(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would paste it into one session; `torch.compile` stops at the graph."""
    code = [block.text for block in blocks(page) if block.language == "python"]
    if page.name in ("README.md", "kernels.md", "methods.md"):
        assert len(code) >= 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with socket.socket() as free:  # what torchrun would say to a process that is alone
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": "docs"}
    for text in code:
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = cli._Parser.parse_args

    def accept(parser: Any, *arguments: Any, **options: Any) -> None:
        parse_args(parser, *arguments, **options)
        raise ParsedError

    files = {}
    for block in blocks(page):
        if block.language in ("yaml", "json"):
            assert block.title, "a file needs a title"
            path = tmp_path / block.title
            path.write_text(block.text)
            files[path.name] = str(path)
            check_file(path)
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.language == "bash":
            for command in commands(block.text):
                check_command([files.get(word, word) for word in command], tmp_path, monkeypatch, accept)


def check_file(path: Path) -> None:
    """A configuration, the plan of a comparison, or problems one a line."""
    if path.suffix == ".jsonl":
        assert get_task(f"jsonl:{path}").train(0, seed=0).answer
    elif "methods" in yaml.safe_load(path.read_text()):
        load(path)
    else:
        cli.parse("train", ["--config", str(path)])


def commands(text: str) -> list[list[str]]:
    """The words of each command, without the variables set for it alone."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            if word == "&&":
                found.append([])
            elif found[-1] or not re.match(r"\w+=", word):
                found[-1].append(word)
    return [words for words in found if words]


def check_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accept: Any) -> None:
    program, *arguments = words
    if program in ("torchrun", "accelerate"):
        at = arguments.index("cepo")
        assert arguments[at - 1] == "-m"
        program, arguments = "cepo", arguments[at + 1 :]
    if program == "cepo":
        check_cepo(arguments, tmp_path, monkeypatch, accept)
    elif program == "pip":
        for extras in re.findall(r"^(?:\.|cepo)\[(.+)\]$", "\n".join(arguments), re.MULTILINE):
            assert set(extras.split(",")) <= EXTRAS, words
    elif program in ("python", "bash", "pytest") and arguments:
        if arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1]), words
        elif not arguments[0].startswith("-"):
            assert (ROOT / arguments[0]).exists(), words
    else:
        assert program in COMMANDS or (ROOT / program).is_file(), words


def check_cepo(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accept: Any) -> None:
    command, *options = arguments
    if "--resume" in options:  # a run that was not given a thing
        (tmp_path / "config.yaml").write_text(cli.dump(Config().check()))
        options[options.index("--resume") + 1] = str(tmp_path)
    if command in ("train", "eval", "diagnose"):
        cli.parse(command, options)
        return
    if command == "compare":
        load(Path(options[0]))
    with monkeypatch.context() as patch:
        patch.setattr(cli._Parser, "parse_args", accept)
        with pytest.raises(ParsedError):
            cli._run([command, *options])


def test_troubleshooting_quotes_what_is_said() -> None:
    """A heading quotes a message, its changing parts as "..."; every other part is in the source."""
    files = [ROOT / "setup.py", *(path for name in ("cepo", "cepo_kernels") for path in (ROOT / name).rglob("*.py"))]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    said = " ".join(joined.split())
    quoted = re.findall(r"^#+ `(.+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 10
    for message in quoted:
        for part in filter(None, map(str.strip, message.split("..."))):
            assert part in said, (message, part)


def test_records_that_are_explained_are_written() -> None:
    table = (ROOT / "docs" / "trainer.md").read_text().partition("| record | |")[2].partition("\n\n")[0]
    explained = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")
    }
    assert len(explained) >= 10
    config = Config(reward=RewardConfig("cross_model_entropy"), rollout=RolloutConfig(prompts=4, group_size=4)).check()
    parts = load_parts(config)
    # A step in which all is finite does not say what is not.
    assert explained - {"not_finite"} <= set(trainer.train_step(parts, trainer.make_optimizer(parts), 1))
