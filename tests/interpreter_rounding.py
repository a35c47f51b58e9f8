"""A pytest plugin: Triton's interpreter drops the bits that bfloat16 has no room for; hardware rounds to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _rounded(value: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(value, source, target, rounding)
    numbers = torch.from_numpy(np.ascontiguousarray(value))
    return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(value.shape)


interpreter._convert_float = _rounded
