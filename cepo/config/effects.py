"""Options that are set although nothing in their run reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cepo import axes
from cepo.config.checks import require

if TYPE_CHECKING:
    from cepo.config import Config


def without_effect(config: Config) -> dict[str, str]:
    """Names of the options of a checked config that decide nothing, and what leaves them nothing to decide."""
    credit, loss, teacher = config.credit, config.loss, config.teacher
    method = f"loss.name {loss.name}" if loss.distils else f"credit.name {credit.name}"
    teachers = () if loss.distils else axes.module("credit", credit.name).TEACHERS
    told = getattr(axes.module("losses", loss.name), "TEACHER_CONTEXT", ())
    segments = credit.name == "rredcot" and not loss.distils
    rules = [
        ("credit", ("lam", "lam_steps", "eps_w"), bool(teachers), method),
        ("rredcot", [field.name for field in fields(config.rredcot)], segments, method),
        ("teacher", ("template", "hint", "splice"), bool(teachers), method),
        ("teacher", ("hint",), teacher.template == "hint", f"teacher.template {teacher.template}"),
        ("teacher", ("splice",), teacher.template == "splice", f"teacher.template {teacher.template}"),
        ("teacher", ("negative",), "negative" in teachers, method),
        ("teacher", ("share_prefix",), bool(teachers) or loss.distils or segments, method),
        ("teacher", ("skip",), not loss.distils, method),
        *(("teacher", (f"{kind}_hint",), kind in told, f"loss.name {loss.name}")
          for kind in ("solution", "sibling", "feedback")),
        ("loss", ("clip_low", "clip_high"), not loss.distils, method),
        ("loss", ("clip_low", "clip_high"), config.train.updates_per_batch > 1, "train.updates_per_batch 1"),
    ]  # fmt: skip
    # Of two reasons the first stays.
    return {f"{section}.{name}": why for section, names, read, why in reversed(rules) if not read for name in names}


def require_effect(
    config: Config,
    kept: Config | None = None,
    among: Collection[str] | None = None,
    named: Callable[[str], str] = str,
) -> None:
    """Raise InputError for an option without an effect whose value is neither its default nor the one of `kept`.

    among: names of the options that are looked at; None: all.
    named: what an option, and the reason that nothing reads it, are called in the error.
    """
    for name, why in without_effect(config).items():
        section, _, key = name.partition(".")
        part: Any = getattr(config, section)
        usual = type(part)(**({"name": part.name} if hasattr(part, "name") else {}))
        usual.check()
        fine = [getattr(usual, key), *([] if kept is None else [getattr(getattr(kept, section), key)])]
        if among is None or name in among:
            got = getattr(part, key)
            require(got in fine, named(name), f"{fine[0]!r}, the default, as it has no effect with {named(why)}", got)
