"""Every Triton kernel variant compiled, without a GPU, for the targets that the project promises: no register spills.

What each variant needs is printed in pytest's summary, straight from the binary.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="a process that interprets Triton kernels cannot compile them"
)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cepo_kernels.backends import triton as backend  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LOGITS = {"policy": "bf16", "positive": "bf16", "negative": "bf16", "gradient": "bf16"}
POINTERS = {"labels": "i64", "negative_mask": "i1", "temperatures": "fp32", "values": "fp64"}
TOKEN = {"positive", "negative", "advantages", "negative_mask", "positive_logprobs", "negative_logprobs", "evidence",
         "weight", "token_advantages", "temperatures", "values"}  # fmt: skip

# kernel, what is absent, soft cap, dtypes, columns a lane block (the largest is what real vocabularies take), aligned
VARIANTS: dict[str, tuple[str, set[str], bool, dict[str, str], int, bool]] = {
    "token": ("forward", TOKEN | {"entropy"}, False, {}, 512, True),
    "token, entropy": ("forward", TOKEN, False, {}, 512, True),
    "token, entropy, fp32": ("forward", TOKEN, False, {"policy": "fp32"}, 512, True),
    "contrastive": ("forward", {"entropy", "temperatures", "values"}, False, {}, 512, True),
    "contrastive, fp16": ("forward", {"entropy", "temperatures", "values"}, False, dict.fromkeys(LOGITS, "fp16"), 512, True),
    "contrastive, fp32": ("forward", {"entropy", "temperatures", "values"}, False, dict.fromkeys(LOGITS, "fp32"), 512, True),
    "contrastive, every option": ("forward", set(), True, {"negative": "fp32", "positive": "fp16"}, 512, True),
    "contrastive, odd strides": ("forward", {"temperatures", "values"}, False, {}, 512, False),
    "contrastive, small vocabulary": ("forward", {"temperatures", "values"}, False, {}, 32, True),
    "backward": ("backward", {"grad_entropy", "temperatures", "values"}, False, {}, 2048, True),
    "backward, entropy, fp32": ("backward", {"temperatures", "values"}, False, dict.fromkeys(LOGITS, "fp32"), 2048, True),
    "backward, every option": ("backward", set(), True, {}, 2048, True),
    "backward, every option, fp16": ("backward", set(), True, dict.fromkeys(LOGITS, "fp16"), 2048, True),
    "backward, odd strides": ("backward", {"temperatures", "values"}, False, {}, 2048, False),
    "backward, small vocabulary": ("backward", {"temperatures", "values"}, False, {}, 128, True),
}  # fmt: skip


class Resources(NamedTuple):
    registers: int
    spills: int
    shared: int


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_spills(variant, target, tmp_path, record_property):
    resources = compiled(*VARIANTS[variant], TARGETS[target], tmp_path)
    record_property("triton", f"{target:7} {variant:31} {resources.registers:4} registers, {resources.shared} B shared")
    print(f"{target} {variant}: {resources}")
    assert resources.registers > 0
    assert resources.spills == 0


def compiled(
    name: str, absent: set[str], softcap: bool, dtypes: dict[str, str], block: int, aligned: bool, target: Any, folder: Path
) -> Resources:  # fmt: skip
    from cepo_kernels.backends import triton_rows

    kernel = getattr(triton_rows, f"{name}_kernel")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        key = parameter.name
        if parameter.is_constexpr or key in absent:
            signature[key] = "constexpr"
            constants[key] = {"SOFTCAP": softcap, "BLOCK": block, "UNROLL": 4 if softcap else 8}.get(key)
        elif parameter.annotation_type:
            signature[key] = parameter.annotation_type
        else:
            signature[key] = "*" + {**LOGITS, **dtypes, **POINTERS}.get(key, "fp32")
        is_row = signature[key].startswith("*") or key == "vocabulary" or key.endswith(("_outer", "_inner"))
        if is_row and (aligned or key not in {*LOGITS, "vocabulary"} and not key.endswith(("_outer", "_inner"))):
            attributes[(index,)] = [["tt.divisibility", 16]]
    lanes = block if name == "forward" else block // 4
    warps = max(1, lanes // 128)
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options={**backend.COMPILE_OPTIONS[target.backend], "num_warps": warps})
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        spills = number(r"\.sgpr_spill_count:\s+(\d+)", text) + number(r"\.vgpr_spill_count:\s+(\d+)", text)
        scratch = number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return Resources(number(r"\.vgpr_count:\s+(\d+)", text), spills + scratch, binary.metadata.shared)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    return Resources(number(r"REG:(\d+)", text), number(r"STACK:(\d+)", text) + number(r"LOCAL:(\d+)", text), binary.metadata.shared)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text}"
    return int(found.group(1))
