"""A Hugging Face dataset: `hf:openai/gsm8k`, `hf:./saved_to_disk`, `hf:problems.parquet`, `hf:problems.json`.

What exists as a path is read there, a directory as `save_to_disk` wrote it or its data files; any other name is asked
of the hub, and nothing else touches the network. Options beyond those of `cepo.tasks._records.Reading`:

    config                   its configuration on the hub, as "main" of gsm8k
    train, validation, test  its splits in these roles, slices too, as "train[:1000]"; null: the one of that name, and
                             where there is no such validation or test a tenth of train, by the order of a hash

A training prompt that a held-out split has too is left out of training, which is said. gsm8k, whose answers end a
worked solution, is {config: main, prompt_key: question, answer_key: null, solution_key: answer}.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cepo.errors import one_line
from cepo.tasks import HELD_OUT, check_options
from cepo.tasks._records import FIELDS, SPLITS, Listed, Reading, split_off

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

logger = logging.getLogger("cepo")


def make(argument: str, **options: Any) -> Listed:
    """`hf:<name or path>`; options as above. Raises ValueError for what cannot be loaded or is no problem."""
    if not argument:
        raise ValueError("task hf: expected a name or path, hf:openai/gsm8k, got none")
    check_options("hf", options, (*FIELDS, "config", *SPLITS))
    reading = Reading(**{name: value for name, value in options.items() if name in FIELDS})
    for name in ("config", *SPLITS):
        if not isinstance(options.get(name), str | None):
            raise ValueError(f"task hf: expected {name} to be a name or null, got {options[name]!r}")
    name = f"hf:{argument}"
    available = _splits_of(argument, options.get("config"))
    path = Path(argument).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else Path()
    splits = {}
    for role in SPLITS:
        wanted = options.get(role) or role
        base = wanted.partition("[")[0]
        if base not in available:
            if role == "train" or options.get(role):
                raise ValueError(f"task {name}: expected {role} to be one of {', '.join(available)}, got {wanted!r}")
            continue
        rows = _slice(available[base], wanted.removeprefix(base), f"task {name}: {role}")
        records = ((f"{argument}, {base} row {number}", row) for number, row in enumerate(rows))
        splits[role] = reading.problems(records, folder, splits=())
        if not splits[role]:
            raise ValueError(f"task {name}: expected at least one row in {wanted!r}, got none")
    tested = {p.text for p in splits.get("test", ())}
    if both := [p for p in splits.get("validation", ()) if p.text in tested]:
        raise ValueError(
            f"task {name}: expected no prompt in validation and test, got {len(both)}, {both[0].text[:40]!r} among them"
        )
    held = tested | {p.text for p in splits.get("validation", ())}
    training = [p for p in splits["train"] if p.text not in held]
    if len(training) < len(splits["train"]):
        logger.warning("%s: left out %d training prompts that are held out", name, len(splits["train"]) - len(training))
    missing = tuple(role for role in HELD_OUT if role not in splits)
    return Listed(name, reading.max_new_tokens, {**splits, **split_off(name, training, missing)})


def _splits_of(argument: str, config: str | None) -> dict[str, Any]:
    """The splits of a dataset by name."""
    try:
        import datasets
    except ImportError:
        raise ValueError("task hf: datasets is not installed; pip install 'cepo[datasets]'") from None
    path = Path(argument).expanduser()
    if not path.exists() and (path.is_absolute() or argument.startswith((".", "~")) or argument.count("/") > 1
                              or path.suffix in KINDS):  # fmt: skip
        raise ValueError(f"task hf: expected a path or a name on the hub, and {argument!r} does not exist")
    if path.is_file() and path.suffix not in KINDS:
        raise ValueError(f"task hf: expected a file of kind {', '.join(KINDS)}, got {argument!r}")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if config is not None and (saved or path.is_file()):
        raise ValueError(f"task hf: expected no config, as {argument!r} has none, got {config!r}")
    bar = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset(KINDS[path.suffix], data_files=str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else argument, config)
    except Exception as error:  # a damaged file fails in whatever way the library that reads it does
        raise ValueError(f"task hf: cannot load {argument!r}: {one_line(error)[:300]}") from error
    finally:
        if not bar:
            datasets.enable_progress_bars()
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {name: _undecoded(rows) for name, rows in splits.items()}


def _undecoded(rows: Any) -> Any:
    """The same rows, their images as they are stored: all of them decoded would hardly fit into memory."""
    import datasets

    for name in ("image", "images"):
        kind = rows.features.get(name)
        stored = datasets.Image(decode=False)
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(kind)(stored))
    return rows


def _slice(rows: Any, text: str, where: str) -> Any:
    """The rows that "[a:b]" leaves, all if there is nothing."""
    if not text:
        return rows
    start, colon, stop = text.strip("[]").partition(":")
    try:
        chosen = range(len(rows))[slice(*(int(end) if end else None for end in (start, stop)))]
    except ValueError:
        colon = ""
    if not colon or text != f"[{start}:{stop}]":
        raise ValueError(f"{where}: expected a split or a slice of one, split[a:b] in rows, got {text!r}")
    return rows.select(chosen)
