"""The command line: `cepo train | eval | doctor`, YAML and `--section.key value` on top of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from cepo.errors import InputError, one_line

if TYPE_CHECKING:
    from cepo.config import Config

_EPILOG = {
    "train": "examples: cepo train | cepo train --credit.name rlsd --train.steps 100 | cepo train --resume runs/NAME",
    "eval": "examples: cepo eval --policy.model runs/NAME | cepo eval --eval.split test --eval.problems 2000",
    "doctor": "takes no arguments",
}
_SUMMARY = {
    "train": "improve a model on a task; without arguments, the embedded model on column addition",
    "eval": "held-out accuracy of a model, sampled and greedy",
    "doctor": "which backend runs here, and whether it computes what it should",
}


class _Parser(ArgumentParser):
    """Says what is wrong in one line, and leaves the leaving to `main`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(one_line(message)) from ex


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 if the doctor finds a wrong result, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except InputError as error:
        print(f"cepo: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cepo: interrupted; `cepo train --resume` continues from the last checkpoint", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print("usage: cepo COMMAND [options]\n")
        for name, summary in _SUMMARY.items():
            print(f"  {name:8} {summary}")
        print("\n`cepo COMMAND --help` lists the options of a command.")
        return 0
    if command not in _SUMMARY:
        raise InputError(f"command: expected one of {', '.join(_SUMMARY)}, got {command!r}")
    if command == "doctor":
        from cepo import doctor

        _parser("doctor").parse_args(arguments[1:])
        return 0 if doctor.report() else 1
    return {"train": _train, "eval": _eval}[command](arguments[1:])


def _parser(command: str) -> _Parser:
    usage = f"cepo {command}" + ("" if command == "doctor" else " [--config FILE] [--section.key value ...]")
    return _Parser(prog=f"cepo {command}", usage=usage, description=_SUMMARY[command], epilog=_EPILOG[command])


def parse(command: str, arguments: Sequence[str]) -> tuple[Config, Namespace]:
    """The checked config of a command line, and what else was given. Raises InputError."""
    from cepo.config import Config

    parser = _parser(command)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    if command == "train":
        parser.add_argument("--resume", help="a run directory or one of its checkpoints to continue from")
    parser.add_class_arguments(Config, as_group=True)
    arguments = list(arguments)
    if resume := _option(arguments, "--resume"):
        from cepo import checkpoint

        # Its own config comes first, so that what is given here overrides it.
        arguments = ["--config", str(checkpoint.locate(resume)[0] / checkpoint.CONFIG), *arguments]
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except InputError as error:
        if "parsing config" in str(error):  # which does not say of what
            raise InputError(f"{_option(arguments, '--config')}: {error}") from error
        raise
    return Config(**{field.name: parsed[field.name] for field in fields(Config)}).check(), parsed


def _option(arguments: Sequence[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == name:
            return arguments[i + 1] if i + 1 < len(arguments) else None
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None


def _train(arguments: list[str]) -> int:
    config, parsed = parse("train", arguments)
    from cepo import checkpoint, trainer
    from cepo.parts import load_parts
    from cepo.policy import threads
    from cepo.report import curves

    run, start = checkpoint.locate(parsed.resume) if parsed.resume else (None, None)
    # What can be refused is refused before there is a run directory.
    parts = load_parts(config, None if start is None else str(start))
    trainer.check_prompts(parts)

    def resolved(path: str) -> str:
        config.run_dir = path
        return _dump(config)

    if run is None:
        name = f"{config.task.name.split('/')[-1].replace(':', '-')}-{config.credit.name}-seed{config.train.seed}"
        run = checkpoint.create_run(config.run_dir, name, resolved)
    else:
        with checkpoint.replacing(run / checkpoint.CONFIG) as temporary:
            temporary.write_text(resolved(str(run)))
    print(f"run directory: {run}", file=sys.stderr)
    with threads(parts.policy, config.policy.threads):
        _follow(trainer.train(parts, run, start), config.train.steps)
    print(f"curves: {curves.draw(run)}", file=sys.stderr)
    return 0


def _follow(records: Any, steps: int) -> None:
    """Show records as they come: training in the bar, evaluations as lines of their own."""
    from tqdm import tqdm

    first: dict[str, Any] | None = None
    latest: dict[str, Any] = {}
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for record in records:
            if record["kind"] == "eval":
                first, latest = first or record, record
                bar.write(
                    f"step {record['step']:4d}  held-out accuracy: sampled {record['sampled']:.3f}, "
                    f"greedy {record['greedy']:.3f}  ({record['problems']} problems of {record['split']})"
                )
            else:
                bar.update(record["step"] - bar.n)
                bar.set_postfix_str(_summary(record))
    if first is not None and latest["step"] > first["step"]:
        gain = 100 * (latest["sampled"] - first["sampled"])
        print(f"sampled accuracy {first['sampled']:.3f} -> {latest['sampled']:.3f} ({gain:+.1f} points)")


def _summary(record: dict[str, Any]) -> str:
    """A step in one line: the numbers a person watches, and where its time went."""

    def show(key: str, label: str, form: str = ".2f") -> list[str]:
        return [] if record.get(key) is None else [f"{label} {record[key]:{form}}"]

    whole = sum(record["seconds"].values())
    phases = " ".join(f"{name} {seconds / whole:.0%}" for name, seconds in record["seconds"].items() if name != "other")
    parts = [
        *show("reward", "reward"),
        *show("accuracy", "acc"),
        *show("entropy", "H", ".3f"),
        *show("zero_variance", "flat"),
        *show("lam", "lam"),
        *show("evidence_right", "ev+"),
        *show("evidence_wrong", "ev-"),
        *show("weight_clipped", "clip"),
        *show("tokens_per_second", "tok/s", ".0f"),
    ]
    return f"{' '.join(parts)} | {phases}"


def _eval(arguments: list[str]) -> int:
    config, _ = parse("eval", arguments)
    from cepo import trainer
    from cepo.parts import load_parts
    from cepo.policy import threads

    parts = load_parts(config)
    with threads(parts.policy, config.policy.threads):
        result = trainer.evaluate(parts)
    print(
        f"{config.policy.model} on {config.task.name}, {result['problems']} problems of {result['split']}: "
        f"sampled {result['sampled']:.3f} (T = {config.eval.temperature:g}), greedy {result['greedy']:.3f}"
        f"  ({result['seconds']:.1f} s)"
    )
    return 0


def _dump(config: Config) -> str:
    from dataclasses import asdict

    return str(yaml.safe_dump(asdict(config), sort_keys=False))
