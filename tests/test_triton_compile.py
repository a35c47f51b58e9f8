"""Every Triton kernel variant compiled, without a GPU, for the targets that the project promises: no register spills.

What each variant needs is read from the binary and printed as a table when the tests have run.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="a process that interprets Triton kernels cannot compile them"
)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cepo_kernels.backends import triton as backend  # noqa: E402
from cepo_kernels.backends.tables import launch, pair_launch  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LOGITS = dict.fromkeys(("policy", "positive", "negative", "gradient", "student", "teacher"), "bf16")
POINTERS = {"labels": "i64", "negative_mask": "i1", "clipped": "i1", "temperatures": "fp32", "values": "fp64",
            "equals": "i32"}  # fmt: skip
TEACHERS = {"positive", "negative", "positive_logprobs", "negative_logprobs", "evidence", "weight"}
PLAIN = {"temperatures", "values", "negative_mask"}  # the options are numbers, the same for every row
ENTRIES = PLAIN | {"thresholds", "equals"}  # and every column is an entry
TOKEN = TEACHERS | PLAIN | {"advantages", "token_advantages"}
FP16, FP32 = dict.fromkeys(LOGITS, "fp16"), dict.fromkeys(LOGITS, "fp32")


class Variant(NamedTuple):
    """A kernel, the arguments that are None, and what else it is compiled for."""

    kernel: str
    absent: set[str]
    dtypes: dict[str, str] = {}  # noqa: RUF012
    softcap: bool = False
    vocabulary: int = 151_936
    aligned: bool = True
    kind: int = 0  # of a divergence: forward KL, reverse KL, jsd, jsd of beta 1/2
    clip: bool = False


VARIANTS = {
    "token": Variant("forward", TOKEN | {"entropy"}),
    "token, entropy": Variant("forward", TOKEN),
    "contrastive": Variant("forward", PLAIN | {"entropy"}),
    "contrastive, fp16": Variant("forward", PLAIN | {"entropy"}, FP16),
    "contrastive, fp32, entropy": Variant("forward", PLAIN, FP32),
    "contrastive, every option": Variant("forward", set(), {"positive": "fp16", "negative": "fp32"}, softcap=True),
    "contrastive, odd vocabulary": Variant("forward", PLAIN, vocabulary=50_257, aligned=False),
    "contrastive, small vocabulary": Variant("forward", PLAIN, vocabulary=200),
    "policy loss": Variant("policy_loss", PLAIN | {"entropy", "ref_logprobs", "token_weight"}),
    "policy loss, no gradient": Variant("policy_loss", PLAIN | {"entropy", "ref_logprobs", "gradient"}),
    "policy loss, fp32, entropy": Variant("policy_loss", PLAIN | {"ref_logprobs"}, FP32),
    "policy loss, every option": Variant("policy_loss", set(), FP16, softcap=True),
    "policy loss, odd vocabulary": Variant("policy_loss", PLAIN, vocabulary=50_257, aligned=False),
    "backward": Variant("backward", PLAIN | {"grad_entropy", "entropy"}),
    "backward, fp32, entropy": Variant("backward", PLAIN, FP32),
    "backward, every option": Variant("backward", set(), FP16, softcap=True),
    "backward, odd vocabulary": Variant("backward", PLAIN, vocabulary=50_257, aligned=False),
    "forward KL": Variant("divergence", ENTRIES),
    "forward KL, value alone": Variant("divergence", ENTRIES | {"gradient"}),
    "forward KL, top k, odd": Variant("divergence", PLAIN, vocabulary=50_257, aligned=False),
    "reverse KL, fp32": Variant("divergence", ENTRIES, FP32, kind=1),
    "reverse KL, small vocabulary": Variant("divergence", ENTRIES, vocabulary=200, kind=1),
    "even jsd, clip": Variant("divergence", ENTRIES, kind=3, clip=True),
    "jsd": Variant("divergence", ENTRIES, kind=2),
    "jsd, every option": Variant("divergence", set(), FP16, softcap=True, kind=2, clip=True),
}


class Resources(NamedTuple):
    registers: int
    spills: int

    def __str__(self) -> str:
        return f"{self.registers} + {self.spills}"


@pytest.fixture(scope="module")
def table(request) -> Iterator[dict[str, dict[str, Resources]]]:
    """Filled by the tests, and shown when the last has run."""
    found: dict[str, dict[str, Resources]] = {variant: {} for variant in VARIANTS}
    yield found
    rows = [["registers + bytes spilled", *TARGETS]]
    rows += [[variant, *(str(of.get(target, "-")) for target in TARGETS)] for variant, of in found.items()]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for first, *others in rows:
            print(f"{first:30}" + "".join(f"{cell:>10}" for cell in others))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_spills(variant, target, tmp_path, table):
    resources = table[variant][target] = compiled(VARIANTS[variant], TARGETS[target], tmp_path)
    assert resources.registers > 0
    assert resources.spills == 0


def compiled(variant: Variant, target: Any, folder: Path) -> Resources:
    from cepo_kernels.backends import triton_divergence, triton_kernels, triton_policy_loss

    module = {"policy_loss": triton_policy_loss, "divergence": triton_divergence}.get(variant.kernel, triton_kernels)
    kernel = getattr(module, f"{variant.kernel}_kernel")
    policy = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
        variant.dtypes.get("policy", "bf16")
    ]
    of_pair = variant.kernel == "divergence"
    shape = launch(variant.vocabulary, policy, variant.softcap)
    if of_pair:
        shape = pair_launch(variant.vocabulary, policy, variant.softcap, "thresholds" not in variant.absent)
    block = shape.backward_block if variant.kernel == "backward" else shape.block
    constant = {"SOFTCAP": variant.softcap, "BLOCK": block, "UNROLL": shape.unroll, "CISPO": True}
    constant["BACKWARD_BLOCK"] = 2 * shape.block if of_pair else shape.backward_block
    constant |= {"KIND": variant.kind, "CLIP": variant.clip}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in variant.absent:
            signature[name] = "constexpr"
            constants[name] = constant.get(name)
            continue
        of_logits = name in LOGITS or name == "vocabulary" or name.endswith(("_outer", "_inner"))
        dtype = {**LOGITS, **variant.dtypes, **POINTERS}.get(name, "fp32")
        signature[name] = parameter.annotation_type or f"*{dtype}"
        if signature[name].startswith("*") or of_logits:
            attributes[(index,)] = [["tt.divisibility", 16]] if variant.aligned or not of_logits else []
    options = {**backend.COMPILE_OPTIONS[target.backend], "num_warps": shape.warps,
               "num_stages": shape.stages}  # fmt: skip
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        spills = number(r"\.vgpr_spill_count:\s+(\d+)", text)  # scalar registers spill into vector ones, not to memory
        scratch = number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return Resources(number(r"\.vgpr_count:\s+(\d+)", text), spills + scratch)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    return Resources(number(r"REG:(\d+)", text), number(r"STACK:(\d+)", text) + number(r"LOCAL:(\d+)", text))


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text}"
    return int(found.group(1))
