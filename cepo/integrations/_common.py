"""What the trainers of others have in common: the options of the credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cepo.config import CreditConfig, TeacherConfig
from cepo.errors import InputError

CREDITS = ("cepo", "rlsd", "uniform")


def check_options(options: Any, credits: Sequence[str] = CREDITS) -> None:
    """Raise InputError for the first bad one of `options`, and fill in what is None as published."""
    if options.credit not in credits:
        raise InputError(f"credit: expected one of {', '.join(credits)}, got {options.credit!r}")
    checked = CreditConfig(options.credit, lam=options.lam, lam_steps=options.lam_steps, eps_w=options.eps_w)
    try:
        checked.check()
        TeacherConfig(template=options.template, hint=options.hint, splice=options.splice).check()
    except InputError as error:  # theirs are fields of a section
        raise InputError(str(error).partition(".")[2]) from error
    options.lam_steps, options.eps_w = checked.lam_steps, checked.eps_w
