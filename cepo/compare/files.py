"""Files and models that a config names and that decide a cell's numbers: the content belongs to what the cell is."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

from cepo import checkpoint
from cepo.config import Config

MODELS = ("policy.model", "reward.verifier")
_OF_MODELS = (".safetensors", ".gguf", ".bin", ".json", ".jinja", ".model", ".txt")


def digests(config: Config) -> dict[str, str | None]:
    """Of the files of a reward function and of a jsonl task, by option; None for one that cannot be read."""
    found: dict[str, str | None] = {}
    module, _, _ = config.reward.name.rpartition(":")
    if module:
        found["reward.name"] = _digest(Path(module)) if module.endswith(".py") else _of_module(module)
    kind, _, path = config.task.name.partition(":")
    if kind == "jsonl":
        found["task.name"] = _digest(Path(path))
    return found


def models(config: Config) -> dict[str, str]:
    """Of the weights, configs and tokenizers in directories that are one of `MODELS`; an embedded one is software."""
    found: dict[str, str] = {}
    for option, name in zip(MODELS, (config.policy.model, config.reward.verifier), strict=True):
        if name is None or name.partition(":")[0] == "embedded":
            continue
        path = Path(name).expanduser()
        folder = [path, *checkpoint.all_of(path)][-1]  # a run stands for its last checkpoint
        if folder.is_dir():
            parts = sorted(path for path in folder.iterdir() if path.suffix in _OF_MODELS)
            told = "".join(f"{path.name} {_digest(path)}\n" for path in parts)
            found[option] = hashlib.sha256(told.encode()).hexdigest()[:16]
    return found


@functools.cache  # as a process imports it once, whatever becomes of the file
def _of_module(name: str) -> str | None:
    """Of the file that would be imported, found without running anything."""
    stem = name.replace(".", "/")
    # The first is the folder that the command was given in; a package comes before a file.
    places = (Path(folder, file) for folder in ("", *sys.path) for file in (f"{stem}/__init__.py", f"{stem}.py"))
    return next((_digest(place) for place in places if place.is_file()), None)


def _digest(path: Path) -> str | None:
    path = path.expanduser().absolute()
    try:
        state = path.stat()
        return _hash(path, state.st_mtime_ns, state.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=1024)  # a plan makes its cells again and again
def _hash(path: Path, modified_ns: int, size: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:  # of gigabytes, if it has weights
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:16]
