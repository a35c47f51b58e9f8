"""Files that a config names and that decide a cell's numbers: their content belongs to what the cell is."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

from cepo.config import Config


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


@functools.lru_cache(maxsize=64)  # a plan makes its cells again and again
def _hash(path: Path, modified_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
