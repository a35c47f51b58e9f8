"""Run directories and checkpoints: complete or absent, never half there.

    <run>/config.yaml  metrics.jsonl  curves.png  .lock
    <run>/tokens/step-000020.json    rollouts token by token, for `cepo tokens`
    <run>/teacher.pt                 weights of a fixed teacher, as it never changes
    <run>/checkpoints/step-000020/   a model that `from_pretrained` loads (or an adapter), its tokenizer,
                                     its model card README.md, and
                                     state.pt       the optimizer's, and that of `advantage.alpha: auto` and of
                                                    a distillation's teacher
                                     manifest.json  step, and size and SHA-256 of every file and of an adapter's base

Everything is written under a temporary name, flushed to disk and renamed. Schedules, data order and sampling noise are
functions of the step, so the step is all that their state consists of. The lock is that of the process which trains.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from cepo.errors import InputError, one_line
from cepo.sharding import load_optimizer

FOLDER = "checkpoints"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
STATE = "state.pt"
TEACHER = "teacher.pt"
CARD = "README.md"
LOCK = ".lock"


def create_run(wanted: str | None, default: str, config: Callable[[str], str]) -> Path:
    """A new run directory with its config in it.

    Args:
        wanted: its path, new or an empty directory; None: runs/<default>, with a number behind it if that exists.
        config: text of config.yaml, given the path.

    Raises InputError if the path is taken.
    """
    path = Path(wanted or Path("runs", default)).expanduser()
    number = 2
    if wanted is not None and path.is_dir() and _claim(path):
        with replacing(path / CONFIG) as temporary:
            temporary.write_text(config(str(path)))
        return path
    while path.exists():
        if wanted is not None:
            raise InputError(f"run_dir: {wanted!r} exists already; continue it with --resume {wanted}, or name another")
        path = Path("runs", f"{default}-{number}")
        number += 1
    with replacing(path, fresh=True) as temporary:
        temporary.mkdir(parents=True)
        (temporary / CONFIG).write_text(config(str(path)))
    return path


def _claim(path: Path) -> bool:
    """Whether a directory was empty, and is this process's now. Raises InputError where nothing can be written."""
    try:
        if any(path.iterdir()):
            return False
        (path / FOLDER).mkdir()
    except FileExistsError:  # of two processes one gets it
        return False
    except OSError as error:
        raise InputError(f"run_dir: cannot write {path}: {error.strerror}") from error
    return True


def save(
    run: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: dict[str, Any],
    keep: int,
    weights: dict[str, Tensor] | None = None,
    base: dict[str, Any] | None = None,
    **state: Any,
) -> Path:
    """Write the checkpoint of `step`, then delete all but the `keep` newest. Raises InputError if it cannot.

    optimizer: its state, of the whole; weights: those of the model, if it does not hold them all itself; base:
    digests of the files of the model that an adapter belongs to.
    """
    path = run / FOLDER / _folder(step)
    from cepo import card  # which reads runs, and so needs what is here

    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if (run / CONFIG).exists():  # else nobody knows what the run was
            sees = hasattr(tokenizer, "image_processor")  # then it is a processor
            (temporary / CARD).write_text(card.text(run, step, sees), encoding="utf-8")
        torch.save({"optimizer": optimizer, **state}, temporary / STATE)
        files = {str(file.relative_to(temporary)): digest(file) for file in _files(temporary)}
        manifest = {"step": step, "files": files, **({"base": base} if base else {})}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    drop_old(run, keep)
    return path


def drop_old(run: Path, keep: int) -> None:
    """Delete all checkpoints but the `keep` newest."""
    for old in all_of(run)[:-keep]:
        shutil.rmtree(old)


def load_state(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring the optimizer back to where it was; returns whatever else was saved. Raises InputError if it cannot."""
    state = _tensors(path / STATE)
    try:
        load_optimizer(optimizer, state.pop("optimizer"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path / STATE}: expected the state of this model's optimiser, got {one_line(error)}"
        ) from error
    return state


def _tensors(path: Path) -> dict[str, Any]:
    """What a file holds, which is loaded without running any code that it brings. Raises InputError."""
    try:
        held: dict[str, Any] = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:  # whose text says how to run it all the same
        raise InputError(f"{path}: expected tensors and plain values alone, got a pickle of something else") from error
    except Exception as error:  # whatever the format's reader stumbles over
        raise InputError(f"{path}: expected tensors and plain values alone, got {one_line(error)[:200]}") from error
    return held


def save_teacher(run: Path, model: Any) -> list[Any]:
    """Write the weights of a run's fixed teacher; returns what `load_teacher` knows them by. Raises InputError."""
    with replacing(run / TEACHER) as temporary:
        torch.save(model.state_dict(), temporary)
    return digest(run / TEACHER)


def load_teacher(run: Path, written: list[Any]) -> dict[str, Tensor]:
    """The weights of a run's fixed teacher. Raises InputError if they are not as they were written."""
    path = run / TEACHER
    if not path.is_file() or digest(path) != written:
        got = "another file" if path.is_file() else "none"
        raise InputError(f"{path}: expected the fixed teacher as it was saved, got {got}")
    return _tensors(path)


def step_of(path: Path) -> int:
    """The step of a checkpoint that is whole."""
    return int(json.loads((path / MANIFEST).read_text())["step"])


def base_of(path: Path) -> dict[str, Any] | None:
    """What the checkpoint of an adapter knows its base model by; None: nothing."""
    with suppress(OSError, ValueError, AttributeError):
        found: dict[str, Any] | None = json.loads((path / MANIFEST).read_text()).get("base")
        return found
    return None


def saved(run: Path) -> bool:
    """Whether a run has a checkpoint, whole or not."""
    return bool(all_of(run))


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((run / FOLDER).glob("step-*"))


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if it has none. Raises InputError if damaged, naming the one before."""
    found = all_of(run)
    if not found:
        return None
    verify(found[-1])
    return found[-1]


def verify(path: Path) -> int:
    """The step of a checkpoint whose files are all as they were written.

    Raises InputError if they are not, with the newest earlier one that is whole.
    """
    if (damage := _damage(path)) is None:
        return step_of(path)
    earlier = next((p for p in reversed(all_of(path.parent.parent)) if p.name < path.name and not _damage(p)), None)
    offer = f"the previous one is whole: --resume {earlier}" if earlier else "and no earlier one is whole"
    raise InputError(f"checkpoint {path} is damaged ({damage}); {offer}")


def run_of(resume: str) -> Path:
    """The run directory that `--resume` means: itself, or that of one of its checkpoints."""
    path = Path(resume).expanduser()
    if resume and (path / CONFIG).is_file():
        return path
    run = path.parent.parent
    if path.parent.name == FOLDER and path.is_dir() and (run / CONFIG).is_file():
        return run
    raise InputError(f"--resume: expected a run directory or one of its checkpoints, got {resume!r}")


def locate(resume: str) -> tuple[Path, Path | None]:
    """The run that `--resume` means, and the checkpoint: the one it names, or the run's newest."""
    path, run = Path(resume).expanduser(), run_of(resume)
    if path == run:
        return run, newest(run)
    verify(path)
    return run, path


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep other processes from training in `run`. Raises InputError if one does already."""
    if fcntl is None:
        yield
        return
    try:
        file = (run / LOCK).open("a")
    except OSError as error:
        raise InputError(f"cannot write {run / LOCK}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process trains in {run}") from error
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def replacing(path: Path, *, fresh: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to fill; renamed to `path` at the end, removed if anything fails.

    With `fresh` a directory is never replaced, not even one that another process has just made.
    Raises InputError where the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial" if fresh else f".{path.name}.partial")
    try:
        _remove(temporary)
        yield temporary
        for file in _files(temporary) if temporary.is_dir() else [temporary]:
            _flush(file)
        if path.is_dir() and not fresh:
            # A directory cannot be renamed onto another; `path` is absent for a moment, its replacement is not.
            _remove(path)
        os.rename(temporary, path)
        _flush(path.parent)
    except BaseException as error:
        reason = _write_failure(error, path.parent)
        with suppress(OSError):
            _remove(temporary)
        if reason is not None:
            raise InputError(f"cannot write {path}: {reason}; nothing saved before is lost") from error
        raise


def _write_failure(error: BaseException, folder: Path) -> str | None:
    """Why writing failed, or None if the error is of another kind. torch and safetensors wrap the system's errors."""
    if isinstance(error, OSError):
        return error.strerror or one_line(error)
    if not isinstance(error, SafetensorError) and "inline_container" not in str(error):
        return None
    free = shutil.disk_usage(folder).free
    return "No space left on device" if free < 1 << 20 else f"{one_line(error)} ({free >> 20} MB free)"


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {one_line(error)}"
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or STATE not in files or not isinstance(manifest.get("step"), int):
        return f"{MANIFEST}: expected a step and files"
    if path.name.startswith("step-") and path.name != _folder(manifest["step"]):
        return f"{MANIFEST}: expected the step of {path.name}, got {manifest['step']}"
    for name, written in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != written:
            return f"{name} has changed"
    return None


def _folder(step: int) -> str:
    return f"step-{step:06d}"


def digest(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
