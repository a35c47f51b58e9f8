"""What the terminal and the page show alike: how a number is shaded, and text that can do nothing but be read."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from cepo.report.samples import Sample

LEVELS = 4


class Scale(NamedTuple):
    """A column's values from `centre - span` to `centre + span`, in `LEVELS` shades each way."""

    column: str
    low: str
    """What lies below the centre, "" if nothing does."""
    high: str
    centre: float
    span: float

    def level(self, value: float | None) -> int:
        """The shade of a value, from -LEVELS to LEVELS."""
        if value is None:
            return 0
        return round(LEVELS * min(1.0, max(-1.0, (value - self.centre) / self.span)))


# By the names of a choice: column, what its ends mean, centre, and span; 0: that of the largest value there is.
_SCALES = {
    "weight": ("weight", "less of the advantage", "more of it", 1.0, 0.0),
    "evidence": ("evidence", "speaks for the wrong answer", "for the right one", 0.0, 2.0),
    "advantage": ("advantages", "made less likely", "more likely", 0.0, 0.0),
    "value": ("value", "will likely fail", "will succeed", 0.5, 0.5),
    "segment_reward": ("segment_reward", "lost", "gained", 0.0, 1.0),
    "divergence": ("divergence", "", "far from the teacher", 0.0, 0.0),
    "logprob": ("logprobs", "was unlikely", "", 0.0, 5.0),
    "entropy": ("entropy", "", "the policy was undecided", 0.0, 0.0),
}
CHOICES = tuple(_SCALES)
COLUMNS = {choice: scale[0] for choice, scale in _SCALES.items()}


def scales(samples: Iterable[Sample]) -> dict[str, Scale]:
    """The scales of what the samples have, by the names among `CHOICES`."""
    largest: dict[str, float] = {}
    for rollout in (r for sample in samples for group in sample.groups for r in group.rollouts):
        for choice, (column, _, _, centre, _) in _SCALES.items():
            values = rollout.columns.get(column)
            if values is not None:
                # An infinity, which is there as float32's largest, would leave no shade to the others.
                sizes = (abs(x - centre) for x in values if x is not None and abs(x) < 1e38)
                largest[choice] = max(largest.get(choice, 0.0), *sizes, 0.0)
    found = {choice: _SCALES[choice] for choice in CHOICES if choice in largest}
    return {
        choice: Scale(column, low, high, centre, span or largest[choice] or 1.0)
        for choice, (column, low, high, centre, span) in found.items()
    }


def visible(text: str) -> str:
    """`text` with control characters, and what reorders or hides others, written out; line breaks remain."""
    return "".join(_sign(character) for character in text)


def token_text(text: str) -> str:
    """A token's text, `visible` throughout: line breaks have a sign too, and nothing at all is a dot."""
    return visible(text).replace("\n", "↵\n") or "·"


def _sign(character: str) -> str:
    category, code = unicodedata.category(character), ord(character)
    # Joiners stay, as Indic scripts and emoji are written with them.
    if character == "\n" or character in "\u200c\u200d" or category not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    if character == "\t":
        return "⇥"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
