"""Mistakes that are the caller's to mend, and ends that are nobody's fault here."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or a lack of room: the command line prints its one line and leaves with status 2."""


class ProcessError(RuntimeError):
    """Another process of the run has failed or is gone: one line as well, and status 1."""


def one_line(error: BaseException | str) -> str:
    """The text of an error with its line breaks and runs of blanks folded."""
    return " ".join(str(error).split()) or type(error).__name__
