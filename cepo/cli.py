"""The command line: `cepo train`, `eval`, `diagnose` and so on; YAML and `--section.key value` on top of it."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from cepo import __version__
from cepo.errors import InputError, ProcessError, one_line

if TYPE_CHECKING:
    from cepo.config import Config
    from cepo.processes import Alone

_EPILOG = {
    "train": "examples: cepo train | cepo train --credit.name rlsd --train.steps 100 | cepo train --resume runs/NAME",
    "eval": "examples: cepo eval --policy.model runs/NAME | cepo eval --eval.split test --eval.problems 2000",
    "diagnose": "examples: cepo diagnose | cepo diagnose --policy.model runs/NAME --diagnose.batches 8 --out FILE.json",
    "compare": "examples: cepo compare examples/compare/addition.yaml | cepo compare PLAN.yaml --limit-seconds 3600",
    "tokens": "examples: cepo tokens runs/NAME | cepo tokens runs/NAME --by evidence --html tokens.html",
    "plot": "examples: cepo plot runs/NAME | cepo plot runs/ONE runs/OTHER --out both.svg",
    "doctor": "takes no arguments",
}
_SUMMARY = {
    "train": "improve a model on a task; without arguments, the embedded model on column addition",
    "eval": "held-out accuracy of a model, sampled and greedy",
    "diagnose": "does credit find the mistake, does it leak answers, how noisy is its gradient; a model, every method",
    "compare": "methods x tasks x seeds from one plan, and a table of what each is worth; the same command continues",
    "tokens": "the credit of a run's rollouts, token by token, in the terminal or as a page",
    "plot": "the curves of a run, or of several over each other, as a picture",
    "doctor": "which backend runs here, and whether it computes what it should",
}


class _Parser(ArgumentParser):
    """Says what is wrong in one line, and leaves the leaving to `main`."""

    def format_help(self, *args: Any, **options: Any) -> str:
        """Without the options that take a file for one section: `--config` does for all of them."""
        lines = super().format_help(*args, **options).splitlines(keepends=True)
        return "".join(line for line in lines if "Path to a configuration file." not in line)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(_plain(one_line(message))) from ex


def _plain(message: str) -> str:
    """What jsonargparse says of a bad value, as everything else here says it."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\]", r"\1\2", message).replace("NoneType", "null")
    for pattern, said in _SAID:
        if found := re.fullmatch(rf'Parser key "([\w.]+)": {pattern}', text):
            return found.expand(said)
    return re.sub(r"^Group '([\w.]+)' does not accept option '([\w.]+)'", r"\1: has no option \2", message)


_UNION = r"Does not validate .*? Subtypes: \[(.*?)\] Errors: .*"
_SAID = (
    (r"Expected a (\w+)\. Got value: ?(.*)", r"\1: expected \2, got \3"),
    (_UNION + r"- (\w+: expected .*?) - Expected .*", r"\1.\3"),
    (_UNION + r"Option '(\w+)' is not accepted .*", r"\1: has no option \3"),
    (_UNION + r" Given value: (.*)", r"\1: expected one of \2, got \3"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 if the doctor or a comparison is not content, or another process of
    the run has failed, 2 for bad input.

    130 after an interrupt, 141 if nobody reads the output any more: 128 + the signal, as shells count.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read this has left, as `head` does; what is still in the buffer would fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print(f"cepo: error: {one_line(error)}", file=sys.stderr)
        return 2
    except ProcessError as error:
        print(f"cepo: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("; ".join(("cepo: interrupted", *interrupt.args)), file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print("usage: cepo COMMAND [options]\n")
        for name, summary in _SUMMARY.items():
            print(f"  {name:8} {summary}")
        print("\n`cepo COMMAND --help` lists the options of a command, `cepo --version` says which cepo this is.")
        return 0
    if command == "--version":
        print(f"cepo {__version__}")
        return 0
    if command not in _SUMMARY:
        raise InputError(f"command: expected one of {', '.join(_SUMMARY)}, got {command!r}")
    if command != "train" and (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"{command}: expected one process, got {size}; only train takes several")
    if command == "doctor":
        from cepo import doctor

        _parser("doctor").parse_args(arguments[1:])
        return 0 if doctor.report() else 1
    if command == "compare":
        from cepo.compare import command as compare

        return compare.main(_parser("compare"), arguments[1:])
    if command in ("tokens", "plot"):
        from cepo.report import command as report

        return {"tokens": report.tokens, "plot": report.plot}[command](_parser(command), arguments[1:])
    if command == "train" and "--dry-run" in arguments:
        from cepo import memory

        print(memory.report(parse("train", arguments[1:])[0]))
        return 0
    return {"train": _train, "eval": _eval, "diagnose": _diagnose}[command](arguments[1:])


def _parser(command: str) -> _Parser:
    usage = {"doctor": "", "compare": " PLAN.yaml [--out DIR] [options]", "tokens": " RUN [options]",
             "plot": " RUN [RUN ...] [--out FILE]"}  # fmt: skip
    return _Parser(
        prog=f"cepo {command}",
        usage=f"cepo {command}{usage.get(command, ' [--config FILE] [--section.key value ...]')}",
        description=_SUMMARY[command],
        epilog=_EPILOG[command],
        allow_abbrev=False,
    )


def _parser_of_configs(command: str) -> _Parser:
    from cepo.config import Config, DiagnoseConfig

    parser = _parser(command)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    if command == "train":
        parser.add_argument("--resume", help="a run directory or one of its checkpoints to continue from")
        parser.add_argument("--dry-run", action="store_true", help="say what a step would take, and leave it at that")
    if command == "diagnose":
        parser.add_argument("--out", help="JSON file for all the numbers")
        parser.add_class_arguments(DiagnoseConfig, "diagnose")
    parser.add_class_arguments(Config, as_group=True)
    return parser


def parse(command: str, arguments: Sequence[str]) -> tuple[Config, Namespace]:
    """The checked config of a command line, and what else was given. Raises InputError.

    `train` refuses options without an effect. Those of a file have theirs under its own method, which the command line
    may replace; a run that is resumed keeps what it was told.
    """
    from cepo.config import Config
    from cepo.config.effects import require_effect

    parser = _parser_of_configs(command)
    arguments = list(arguments)
    resume = _values(arguments, "--resume")
    if command == "train" and resume:
        from cepo import checkpoint

        # Its own config comes first, so that what is given here overrides it.
        arguments = ["--config", str(checkpoint.run_of(resume[-1]) / checkpoint.CONFIG), *arguments]
    for path in _values(arguments, "--config"):
        _check_yaml(path)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except InputError as error:
        if "parsing config" in str(error):  # which does not say of what
            raise InputError(f"{', '.join(_values(arguments, '--config'))}: {error}") from error
        raise
    except RecursionError as error:
        raise InputError("options: expected values that end, got one inside itself, or nested too deep") from error
    except (TypeError, AttributeError, UnicodeDecodeError) as error:  # a file given to a section, of the wrong kind
        raise InputError(f"options: expected a value or YAML file for each, got {one_line(error)}") from error
    if command == "train" and parsed.resume != (resume[-1] if resume else None):
        raise InputError(f"--resume: expected on the command line, not in a config, got {parsed.resume!r}")
    config = Config(**{field.name: parsed[field.name] for field in fields(Config)}).check()
    if command == "train":
        kept = None
        if files := [f"--config={path}" for path in _values(arguments, "--config")]:
            with suppress(InputError):  # what is missing may be on the command line
                kept = read(*files)
        if kept and not resume:
            require_effect(kept)
        require_effect(config, kept)
    return config, parsed


def read(*options: str) -> Config:
    """The checked config that options make, whether or not each has an effect. Raises InputError."""
    return parse("eval", options)[0]


def _values(arguments: Sequence[str], name: str) -> list[str]:
    """All values given to an option, in their order."""
    joined = [argument.partition("=")[2] if argument.startswith(f"{name}=") else None for argument in arguments]
    split = [None, *(after if argument == name else None for argument, after in pairwise(arguments))]
    return [value for pair in zip(joined, split, strict=False) for value in pair if value is not None]


def _check_yaml(path: str) -> None:
    """Raise InputError for what would break the parser, and not be told by it."""
    from cepo.config import Config, document

    try:
        content = document.load(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return  # which it does tell
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--config: expected a YAML file, got {path!r}: {one_line(error)[:200]}") from error
    except InputError as error:
        raise InputError(f"--config: {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config: {path}: expected sections, got {content!r:.60}")
    for field in fields(Config):
        value = content.get(field.name, {})
        if is_dataclass(field.default_factory) and not isinstance(value, dict):
            raise InputError(f"--config: {path}: {field.name}: expected a section, got {value!r:.60}")


def _train(arguments: list[str]) -> int:
    from cepo import processes

    with processes.started() as many:
        return _train_in(many, arguments)


def _train_in(many: Alone, arguments: list[str]) -> int:
    config, parsed = many.together("options", lambda: parse("train", arguments))
    from cepo import adapters, checkpoint, processes, trackers, trainer
    from cepo.parts import Parts, load_parts
    from cepo.policy import threads
    from cepo.progress import follow
    from cepo.report import curves

    many.sharded = processes.shards(config, many)
    if len(set(many.gather("options", lambda: dump(config)))) > 1:
        raise InputError("options: expected the same in every process")
    run: Path | None = None
    start, done = None, 0
    with ExitStack() as held:
        if parsed.resume is not None:
            run = path = many.together("--resume", lambda: checkpoint.run_of(parsed.resume))
            many.first("lock", lambda: held.enter_context(checkpoint.lock(path)))
            _, start = many.together("checkpoint", lambda: checkpoint.locate(parsed.resume))
            done = 0 if start is None else checkpoint.step_of(start)
            many.together("options", lambda: _check_resumed(config, path, done))
            if config.train.steps == done:

                def finish() -> None:  # what a run does after its last save, in case it was killed there
                    checkpoint.drop_old(path, config.checkpoint.keep)
                    if not curves.is_drawn(path):
                        curves.draw(path)
                    print(f"nothing to do: {run} has all {done} steps", file=sys.stderr)

                many.first("end", finish)
                return 0

        def loaded() -> Parts:
            trackers.check(config.log.trackers)
            parts = load_parts(config, None if start is None else str(start), many)
            # Of an adapter that training goes on with the config says what it is.
            config.policy.lora = config.policy.lora or adapters.settings(parts.policy.model)
            trainer.check_prompts(parts)
            return parts

        # What can be refused is refused before there is a run directory.
        parts = many.together("parts", loaded)

        def resolved(path: str) -> str:
            config.run_dir = path
            return dump(config)

        def directory() -> Path:
            if run is None:
                method = config.loss.name if config.loss.distils else config.credit.name
                name = f"{config.task.name.split('/')[-1].replace(':', '-')}-{method}-seed{config.train.seed}"
                made = checkpoint.create_run(config.run_dir, name, resolved)
                held.enter_context(checkpoint.lock(made))
                return made
            with checkpoint.replacing(run / checkpoint.CONFIG) as temporary:
                temporary.write_text(resolved(str(run)))
            return run

        run = many.first("run_dir", directory)
        told = many.rank == 0  # the others work in silence
        if told:
            print(f"run directory: {run}{many.described()}", file=sys.stderr)
        made = trainer.train(parts, run, start)
        try:
            with threads(parts.policy, config.policy.threads):
                records = many.together("trackers", lambda: trackers.tracked(made, config, run, done) if told else made)
                if told:
                    follow(records, config.train.steps, done)
                else:
                    deque(records, maxlen=0)
        except (KeyboardInterrupt, ProcessError) as end:
            if not checkpoint.saved(run):
                raise
            hint = f"`cepo train --resume {run}` continues from the last checkpoint"
            raise type(end)("; ".join((*map(str, end.args), hint))) from None
        if told:
            print(f"curves: {curves.draw(run)}", file=sys.stderr)
    return 0


def _check_resumed(config: Config, run: Path, done: int) -> None:
    """Raise InputError for an option that a resumed run would not heed."""
    from cepo import checkpoint

    own = read("--config", str(run / checkpoint.CONFIG))
    for name, got, kept in (
        ("policy.model", config.policy.model, own.policy.model),
        ("policy.gguf_file", config.policy.gguf_file, own.policy.gguf_file),
        ("policy.lora", config.policy.lora, own.policy.lora),
        ("run_dir", config.run_dir, own.run_dir),
    ):
        if got != kept:
            raise InputError(f"--{name}: a resumed run keeps its own, expected {kept!r} or nothing, got {got!r}")
    if config.train.steps < done:
        raise InputError(f"--train.steps: expected at least {done}, which {run} has already, got {config.train.steps}")


def _parse_for_model(command: str, arguments: list[str]) -> tuple[Config, Namespace, Path | None]:
    """What `parse` returns, and the run that `policy.model` is, if it is one.

    A run is looked at as it was trained, but for its model, which is the last checkpoint.
    """
    config, parsed = parse(command, arguments)
    from cepo import checkpoint

    run = Path(config.policy.model).expanduser()
    if not ((run / checkpoint.CONFIG).is_file() and (run / checkpoint.FOLDER).is_dir()):
        return config, parsed, None
    own = ["--config", str(run / checkpoint.CONFIG), f"--policy.model={run}", "--policy.gguf_file=null"]
    return *parse(command, [*own, *arguments]), run


def _eval(arguments: list[str]) -> int:
    config, _, _ = _parse_for_model("eval", arguments)
    from cepo import trainer
    from cepo.config import RewardConfig
    from cepo.parts import load_parts
    from cepo.policy import threads

    # Accuracy is by the task's own check; no other reward is loaded, or run.
    config.reward = RewardConfig(success_threshold=config.reward.success_threshold)
    parts = load_parts(config)
    with threads(parts.policy, config.policy.threads):
        result = trainer.evaluate(parts)
    print(
        f"{config.policy.model} on {config.task.name}, {result['problems']} problems of {result['split']}: "
        f"sampled {result['sampled']:.3f} (T = {config.eval.temperature:g}), greedy {result['greedy']:.3f}"
        f"  ({result['seconds']:.1f} s)"
    )
    return 0


def _diagnose(arguments: list[str]) -> int:
    config, parsed, run = _parse_for_model("diagnose", arguments)
    from cepo import checkpoint
    from cepo.diagnose import command

    base = None if run is None else read("--config", str(run / checkpoint.CONFIG)).policy
    print(command.run(config, parsed.diagnose.check(), parsed.out, run, base))
    return 0


def dump(config: Config) -> str:
    from dataclasses import asdict

    return str(yaml.safe_dump(asdict(config), sort_keys=False))
