"""The embedded models: what `from_pretrained` loads, written by the modules `build` and `build_verifier`."""

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
