"""What the trainers of others have in common: the options of the credit, and the hint in a prompt."""

from __future__ import annotations

from typing import Any

from cepo.config import CreditConfig, TeacherConfig
from cepo.errors import InputError

CREDITS = ("cepo", "rlsd", "uniform")


def check_options(options: Any) -> None:
    """Raise InputError for the first bad one of `options`, and fill in what is None as published."""
    if options.credit not in CREDITS:
        raise InputError(f"credit: expected one of {', '.join(CREDITS)}, got {options.credit!r}")
    checked = CreditConfig(options.credit, lam=options.lam, lam_steps=options.lam_steps, eps_w=options.eps_w)
    try:
        checked.check()
        TeacherConfig(template=options.template, hint=options.hint, splice=options.splice).check()
    except InputError as error:  # theirs are fields of a section
        raise InputError(str(error).partition(".")[2]) from error
    options.lam_steps, options.eps_w = checked.lam_steps, checked.eps_w


def hinted(hint: str, prompt: Any, answer: str) -> Any:
    """`prompt`, a text or a list of messages, with the hint around the text of its last user turn."""
    if isinstance(prompt, str):
        return hint.format(prompt=prompt, answer=answer)
    turns = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not turns:
        raise InputError(f"prompt: expected a user turn for the hint, got roles {[m['role'] for m in prompt]}")
    message = prompt[turns[-1]]
    content = message["content"]
    if isinstance(content, str):
        content = hint.format(prompt=content, answer=answer)
    else:
        texts = [i for i, part in enumerate(content) if part["type"] == "text"]
        at = texts[-1] if texts else len(content)
        text = content[at]["text"] if texts else ""
        content = [*content[:at], {"type": "text", "text": hint.format(prompt=text, answer=answer)}, *content[at + 1 :]]
    return [*prompt[: turns[-1]], {**message, "content": content}, *prompt[turns[-1] + 1 :]]
