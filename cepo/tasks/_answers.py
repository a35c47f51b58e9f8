"""The final answer of a free-form completion, and when two answers are the same."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Real
from typing import Any

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKED_LINE = re.compile(r"(?:####|\banswer(?:\s+is|\s*[:=]))\s*[:=]?\s*(\S.*?)\.?\s*$", re.IGNORECASE | re.MULTILINE)


_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def stated(value: Any) -> str | None:
    """An answer in the data as a text; None if it is neither a non-empty text nor a finite number."""
    if isinstance(value, str):
        return value if value.strip() else None
    bad = isinstance(value, bool) or not isinstance(value, Real)
    # math.isfinite does not take every integer.
    if bad or value != value or value in (math.inf, -math.inf):
        return None
    # Readers of CSV make floats of a column of whole numbers in which one is missing.
    return str(int(value) if abs(value) <= 2**53 and value == int(value) else value)


def final_answer(completion: str) -> str | None:
    """The last answer a completion marks as such, or None.

    In this order: <answer>...</answer>, \\boxed{...}, a line with '#### ...', 'answer: ...' or 'answer is ...', and a
    completion that is a single line altogether. Never a guess from running text: a scorer that matches parts of a text
    would reward hedging.
    """
    if tags := _TAG.findall(completion):
        return tags[-1].strip() or None
    if (boxed := _last_boxed(completion)) is not None:
        return boxed.strip() or None
    if marked := _MARKED_LINE.findall(completion):
        return str(marked[-1])
    line = completion.strip()
    return line if line and "\n" not in line else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def same_answer(a: str, b: str) -> bool:
    """Equal as numbers ('1,000' and '1000.0', '1/2' and '0.5'), else as text up to case and spacing."""
    left, right = _number(a), _number(b)
    if left is not None and right is not None:
        return left == right
    return a.casefold().split() == b.casefold().split()


def _number(text: str) -> Fraction | None:
    text = text.strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    # Fraction would expand 1e999999999 digit by digit; no honest answer needs an exponent that large.
    if len(text) > 100 or "_" in text or re.search(r"e[+-]?\d{4}", text, re.IGNORECASE):
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
