"""The README's Python runs, block after block as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        logits, out = names["policy_logits"], names["out"]
        assert isinstance(logits, torch.Tensor)
        assert isinstance(out, tuple)
        assert logits.grad is not None
        logits.grad = None
