"""Mistakes that are the caller's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or a lack of room: the command line prints its one line and leaves with status 2."""


def one_line(error: BaseException | str) -> str:
    """The text of an error with its line breaks and runs of blanks folded."""
    return " ".join(str(error).split()) or type(error).__name__
