"""Where a response is cut into segments: after separators and connective keywords, if the policy hesitates there.

Whether a segment starts at token t depends on the tokens before t alone, which is what keeps an advantage that refers
to the segment's start unbiased.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence


class Splitter:
    """Finds where a segment may start: where the text so far ends in a separator or a keyword.

    A keyword starts at a word's start, in any case. It may still go on (`so|mething`, where a tokenizer cuts there):
    waiting for the next token to tell would be looking ahead.

    Args:
        decode: text of some token ids.
        separators, keywords: texts, none of them empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], separators: Sequence[str], keywords: Sequence[str]) -> None:
        self._decode = decode
        plain, words = ("|".join(map(re.escape, texts)) or "(?!)" for texts in (separators, keywords))
        self._marker = re.compile(rf"(?:{plain}|(?<!\w)(?i:{words}))\Z")
        last = {end for text in (*separators, *keywords) for end in (text[-1], text[-1].lower(), text[-1].upper())}
        # Enough tokens to hold a marker and the character before it, of four bytes at most, one byte each.
        self._window = max((len(text.encode()) for text in (*separators, *keywords)), default=0) + 4

        @functools.cache
        def may_end(token: int) -> bool:
            piece = decode([token])
            return not piece or piece[-1] in last or piece[-1] == "\ufffd"  # part of a character

        self._may_end = may_end

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """Positions t, 0 < t < len(ids), at which a segment may start, each decided by ids[:t] alone."""
        return [
            t
            for t in range(1, len(ids))
            if self._may_end(ids[t - 1]) and self._marker.search(self._decode(list(ids[max(0, t - self._window) : t])))
        ]


def segment_starts(candidates: Sequence[int], entropies: Sequence[float] | None, min_entropy: float) -> list[int]:
    """0, and those candidates whose token the policy drew with an entropy of at least `min_entropy` nats.

    entropies: (T,) of the policy at every token of the response; None: keep all candidates.
    """
    return [0, *(t for t in candidates if entropies is None or entropies[t] >= min_entropy)]
