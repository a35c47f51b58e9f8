"""The embedded models: what `from_pretrained` loads.

addition-0.8m               `build`: column addition, every kind of hint
addition-0.8m-nohints       `build --hints none`: its sibling that never learnt what a hint means
addition-0.8m-righthints    `build --hints right`: the one that never met a wrong one
worked-0.8m                 `build_worked`: sorting and filtering
verifier-0.4m               `build_verifier`: the other model of `reward: cross_model_entropy`
verifier-worked-0.4m        `build_verifier --policy worked`: its sibling for sorting and filtering
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EMBEDDED_MODEL", "EMBEDDED_VERIFIER", "embedded_model"]

EMBEDDED_MODEL = "addition-0.8m"
EMBEDDED_VERIFIER = "verifier-0.4m"


def embedded_model(name: str = EMBEDDED_MODEL) -> Path:
    """Directory of an embedded model; raises ValueError, naming those that exist, for another name."""
    here = Path(__file__).parent
    names = sorted(config.parent.name for config in here.glob("*/config.json"))
    if name not in names:
        raise ValueError(f"embedded model: expected one of {', '.join(names)}, got {name!r}")
    return here / name
