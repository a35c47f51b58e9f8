"""Reward axis: anybody's function, `package.module:function` or `path/to/file.py:function`, called as TRL calls it.

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

`columns` has one list for each field of the problems' data, None where a problem lacks it, `answer` among them, and
what every reward gets (`cepo.rewards`). The completion of a conversation is one too, of one assistant's turn. None and
NaN leave a rollout unscored. Not given: TRL's `trainer_state`, `log_extra` and `log_metric`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from cepo.config import Config
from cepo.errors import InputError, one_line
from cepo.prompts import Prompt
from cepo.tasks import Problem

SUPERVISION: tuple[str, ...] = ("a function's own",)
_LARGEST = torch.finfo(torch.float32).max  # of more, an advantage would square what float64 cannot hold
_GIVEN = ("prompt", "completion", "prompts", "completions", "completion_ids")


def load(config: Config) -> Callable[..., list[float | None]]:
    """The function that `reward.name` names, its results checked. Raises InputError if there is none."""
    name, timeout = config.reward.name, config.reward.timeout_s
    with _torch_as_it_was():
        function = _imported(name)

    def reward(
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        *,
        problem: Sequence[Problem],
        **others: Any,
    ) -> list[float | None]:
        fields = dict.fromkeys(key for one in problem for key in one.data if key not in _GIVEN)
        columns = {
            "problem": problem,
            **others,
            "answer": [one.answer for one in problem],
            **{key: [one.data.get(key) for one in problem] for key in fields},
        }
        told = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        with _torch_as_it_was():
            values = _within(
                timeout,
                name,
                lambda: function(
                    prompts=list(prompts),
                    completions=told,
                    completion_ids=[list(ids) for ids in completion_ids],
                    **columns,
                ),
            )
        return _checked(name, values, len(prompts))

    return reward


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Whatever is set here for all of torch, the run goes on with what was set before."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(":")
    path = Path(module).expanduser()
    sys.path.insert(0, "")  # the folder that the command was given in, as `python -m` has it
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(f"cepo_reward_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = found
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(module)
        function = getattr(found, attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it is a program of its own
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise InputError(f"reward.name: cannot load {name!r}: {why}") from error
    finally:
        sys.path.remove("")
    if not callable(function):
        raise InputError(f"reward.name: expected {name!r} to be a function, got a {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def _within(seconds: float | None, name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns, an awaitable awaited. Raises InputError if it raises, or has not returned in time."""
    value: Any = None
    failed: BaseException | None = None

    def run() -> None:
        nonlocal value, failed
        try:
            value = call()
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
        except BaseException as error:  # CancelledError and SystemExit are none of Exception
            failed = error

    if seconds is None:
        run()
    else:
        # Of a thread nothing is left behind at the end of the process, wherever it hangs.
        thread = Thread(target=run, name=name, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise InputError(f"reward {name}: expected its rewards within reward.timeout_s = {seconds:g} s, got none")
    if isinstance(failed, KeyboardInterrupt):
        raise failed
    if failed is not None:
        why = f"{type(failed).__name__}: {one_line(failed)[:300]}"
        raise InputError(f"reward {name}: raised {why}") from failed
    return value


def _checked(name: str, values: Any, n: int) -> list[float | None]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        raise InputError(f"reward {name}: expected a list of {n} rewards, got a {type(values).__name__}")
    if len(values) != n:
        raise InputError(f"reward {name}: expected {n} rewards, one per completion, got {len(values)}")
    rewards: list[float | None] = []
    for b, value in enumerate(values):
        number = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(number, int) and abs(number) > sys.float_info.max:
            value = number = math.inf if number > 0 else -math.inf
        if number is not None and (not isinstance(number, int | float) or abs(number) > _LARGEST):
            raise InputError(
                f"reward {name}: expected None or numbers of float32's range, got {value!r:.60} for completion {b}"
            )
        rewards.append(None if number is None or math.isnan(number) else float(number))
    return rewards
