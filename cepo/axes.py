"""Finding the members of an axis by name: a member is a module of the axis' package, so adding a file adds one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cepo.errors import InputError


def members(axis: str) -> list[str]:
    """Names of the members of `axis`, one of "rewards", "advantages", "credit", "losses"."""
    package = importlib.import_module(f"cepo.{axis}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def module(axis: str, name: str) -> ModuleType:
    """The module of member `name`. Raises InputError, listing the members, if there is none."""
    if axis == "rewards" and ":" in name:  # somebody's own function
        name = "_function"
    elif name not in members(axis):
        raise InputError(f"{axis}: expected one of {', '.join(members(axis))}, got {name!r}")
    return importlib.import_module(f"cepo.{axis}.{name}")


def lookup(axis: str, name: str) -> Callable[..., Any]:
    """The function of member `name`: the one called like its module."""
    return getattr(module(axis, name), name)  # type: ignore[no-any-return]
