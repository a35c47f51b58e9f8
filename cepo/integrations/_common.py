"""What the trainers of others have in common: the options of the credit, and who was right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cepo.config import Config, CreditConfig, RredcotConfig, TeacherConfig
from cepo.config.checks import require
from cepo.config.effects import require_effect
from cepo.errors import InputError

CREDITS = ("cepo", "rlsd", "uniform")
_KINDS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("credit", "template", "hint", "splice", "answer_column", "rredcot_mode", "rredcot_centre", "rredcot_cue"), str,
     "a text"),
    (("lam", "eps_w", "success_threshold", "rredcot_min_entropy"), int | float, "a finite number"),
    (("lam_steps",), int, "a whole number"),
    (("skip_teachers",), bool, "True or False"),
)  # fmt: skip
_OPTIONAL = ("lam_steps", "eps_w", "answer_column", "rredcot_cue")
_ROUNDING = 1e-6  # of a weighted sum whose terms and weights are float32


def check_options(options: Any, credits: Sequence[str] = CREDITS) -> None:
    """Raise InputError for the first bad one of `options`, and fill in what is None as published."""
    for names, kinds, expected in _KINDS:
        for name in names:
            value: Any = getattr(options, name, None)
            good = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
            if good and kinds == int | float:
                good = abs(value) <= sys.float_info.max
            missing = value is None and (name in _OPTIONAL or not hasattr(options, name))
            require(good or missing, name, expected + " or None" * (name in _OPTIONAL), value)
    column = getattr(options, "answer_column", None)
    require(column != "", "answer_column", "the name of a column or None", column)
    require(options.credit in credits, "credit", f"one of {', '.join(credits)}", options.credit)
    checked = CreditConfig(options.credit, lam=options.lam, lam_steps=options.lam_steps, eps_w=options.eps_w)
    try:
        checked.check()
        _teacher(options).check()
    except InputError as error:  # theirs are fields of a section
        raise InputError(str(error).partition(".")[2]) from error
    options.lam_steps, options.eps_w = checked.lam_steps, checked.eps_w


def check_effects(options: Any, rredcot: RredcotConfig | None = None) -> None:
    """Raise InputError for one of the checked `options` that is not the default although nothing reads it."""
    credit = CreditConfig(options.credit, lam=options.lam, lam_steps=options.lam_steps, eps_w=options.eps_w)
    config = Config(credit=credit, teacher=_teacher(options), rredcot=rredcot or RredcotConfig())
    require_effect(config, named=_named)


def right_and_wrong(rewards: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which of (B,) rewards reach `threshold`, up to the rounding of float32, and which do not; NaN is neither."""
    rewards, least = rewards.double(), threshold - _ROUNDING * abs(threshold)
    return rewards >= least, rewards < least


def _teacher(options: Any) -> TeacherConfig:
    return TeacherConfig(template=options.template, hint=options.hint, splice=options.splice)


def _named(text: str) -> str:
    """An option of a section as the trainers of others call it."""
    text = text.replace("credit.name", "credit").replace("rredcot.", "rredcot_")
    return text.removeprefix("credit.").removeprefix("teacher.")
