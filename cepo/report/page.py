"""Rollouts as one self-contained page, `page.html` with the data in it.

What a model wrote is hostile until shown otherwise. It is in the page as JSON without "<", which a parser of HTML reads
over; the script makes text nodes of it and never markup; and the page's policy lets no script run but that one,
nothing load and nothing leave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from typing import Any

from cepo.report.samples import Group, Rollout, Sample
from cepo.report.shades import LEVELS, Scale, token_text, visible


def render(run: str, samples: Sequence[Sample], scales: Mapping[str, Scale], by: str, step: int, prompt: int) -> str:
    """The page of these samples, in the order of their steps.

    Args:
        run: what the run is called.
        scales: by what tokens can be shaded; one of them is `by`.
        step, prompt: what is shown at first; prompts count from 1.
    """
    about = {
        "run": visible(run),
        "steps": [{"step": s.step, "method": s.method, "lam": s.lam, "prompts": len(s.groups)} for s in samples],
        "scales": {choice: scale._asdict() for choice, scale in scales.items()},
        "levels": LEVELS,
        "by": by,
        "step": step,
        "prompt": prompt - 1,
    }
    # A step's data are parsed when it is shown, so that the page opens at once however many there are.
    blocks = [_block("about", about), *(_block(f"step-{s.step}", _safe(s)) for s in samples)]
    template = resources.files("cepo.report").joinpath("page.html").read_text(encoding="utf-8")
    head, tail = template.replace("{policy}", _policy(template)).split("{data}")
    return head + "\n".join(blocks) + tail


def _policy(template: str) -> str:
    """Content-Security-Policy: the template's own style and script, by their hashes, and nothing else."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; base-uri 'none'; "
        "form-action 'none'"
    )


def _block(name: str, content: Any) -> str:
    text = json.dumps(content, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _safe(sample: Sample) -> dict[str, Any]:
    def rollout(r: Rollout) -> Rollout:
        return replace(
            r,
            answer=None if r.answer is None else visible(r.answer),
            negative=None if r.negative is None else visible(r.negative),
            tokens=[token_text(text) for text in r.tokens],
        )

    groups = [Group(visible(g.prompt), visible(g.positive), [rollout(r) for r in g.rollouts]) for g in sample.groups]
    return asdict(replace(sample, groups=groups))
