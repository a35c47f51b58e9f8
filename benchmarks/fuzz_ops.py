"""Random calls of every op, hostile ones among them, held against the reference in float64.

    python benchmarks/fuzz_ops.py --calls 1000           one process, as `reliability.py ops` starts several of

Call number i of a seed is always the same call. It is well-formed, and then has to give what `backend="reference"`
gives for the same inputs in float64, within the bounds below; or one argument of it is wrong, and then it has to be
refused with one line that begins with an argument's name. Logits of any size come with NaN, infinities and the largest
numbers among them, in any layout.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzz_calls import FROM_LOGITS, INF, OPS, Arguments, Maker, spoil, states_of
from torch import Tensor

import cepo_kernels

TINY = 2.0**-126
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-126, torch.float64: 0.0}


def doubled(call: Arguments) -> Arguments:
    """The same call for the reference, in float64."""
    wide = {name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in call.items()}  # fmt: skip
    wide.pop("logits_dtype", None)
    return wide | ({"backend": "reference"} if "backend" in call else {})


def outputs(result: Any) -> dict[str, Tensor]:
    """The tensors that an op returned, by name."""
    if isinstance(result, Tensor):
        return {"values": result}
    found = {name: value for name, value in result._asdict().items() if value is not None}
    if "credit" in found:
        found |= outputs(found.pop("credit"))
    return found


def run(op: str, call: Arguments, upstream: float, in_place: bool) -> dict[str, Tensor]:
    """Outputs of a call, and the gradient of its states where there is one to take."""
    name = states_of(op)
    leaf = call[name].detach()
    if op == "contrastive_credit":
        return outputs(cepo_kernels.contrastive_credit(**call))
    leaf = leaf.requires_grad_()
    extra = {"inplace_grad": True} if in_place else {}
    found = outputs(getattr(cepo_kernels, op)(**(call | {name: leaf * 1 if in_place else leaf}), **extra))
    differentiable = [
        found[n] for n in ("loss", "logprobs", "entropy", "values") if n in found and found[n].requires_grad
    ]
    if differentiable:
        grads = torch.autograd.grad(differentiable, leaf, [torch.full_like(x, upstream) for x in differentiable])
        found["gradient"] = grads[0]
    return {name: value.detach() for name, value in found.items()}


def excess(name: str, got: Tensor, want: Tensor, bound: Tensor) -> str | None:
    """Where `got` is not `want` to within `bound`, or of another shape; NaN and infinities have to be the same."""
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)} for {tuple(want.shape)}"
    if want.dtype == torch.bool:
        return None
    actual = got.double()
    most = torch.finfo(got.dtype).max * (1 + ROUNDOFF[got.dtype])
    close = (actual - want).abs() <= bound  # even of a value that the dtype does not hold
    want = torch.where(want.abs() > most, want.sign() * INF, want)
    same = torch.where(want.isnan(), actual.isnan(), actual == want)
    if (good := torch.where(want.isfinite(), close, same | close)).all():
        return None
    bad = ~good
    first = tuple(int(i) for i in bad.nonzero()[0]) if bad.ndim else ()
    allowed = bound.expand(bad.shape)[first].item()
    return f"{name}{list(first)}: got {actual[first].item()!r}, want {want[first].item()!r}, bound {allowed:.3g}"


def compare(op: str, call: Arguments, got: dict[str, Tensor], want: dict[str, Tensor], upstream: float) -> str | None:
    """What of a result is beyond the contract's bounds, in one line; None: nothing."""
    if got.keys() != want.keys():
        return f"outputs: got {sorted(got)}, want {sorted(want)}"
    noise = logit_noise(op, call)  # (...): how far a row's transformed logits may be off
    bounds, pull = bounds_of(op, call, want, noise)
    for name, value in want.items():
        infinite = pull > 1e37 or not want.get("loss", torch.zeros(())).isfinite()
        if name == "clipped" or (name == "gradient" and infinite):
            continue  # the one jumps at a bound, the other is what is left of an infinite loss
        if name == "gradient":
            actual = got[name]
            size, sixteen = reach(op, call), torch.float16 in (actual.dtype, call.get("logits_dtype"))
            if sixteen:  # what float16 cannot hold on its way is infinite
                largest = value.abs().nan_to_num(0, 0, 0).amax() if value.numel() else 0.0
                lost = ~actual.isfinite() & (largest > 65504 / size)
                actual, value = torch.where(lost, 0.0, actual), torch.where(lost, 0.0, value)
            found = excess(name, actual, value, gradient_bound(actual.dtype, value, noise, op, call, upstream, pull))
        else:
            found = excess(name, got[name], value, bounds[name])
        if found:
            return found
    return None


def reach(op: str, call: Arguments) -> float:
    """By how much a gradient may be larger on its way than at its end."""
    denominator = call.get("denominator")
    if denominator is None:
        denominator = call["labels"].numel() if op.endswith("loss") else 1
    return 64.0 * max(1.0, float(denominator)) if op.startswith("linear") else 2.0 * max(1.0, float(denominator))


def logit_noise(op: str, call: Arguments) -> Tensor:
    """Rounding of a row's transformed logits: of their own size in float32, and of the matrix product's."""
    states = [
        (n, v)
        for n, v in call.items()
        if isinstance(v, Tensor) and (n.endswith(("_hidden", "_logits", "_states")) or n == "logits")
    ]
    noise = torch.zeros(states[0][1].shape[:-1], dtype=torch.float64) if states else torch.zeros(())
    factor = 1.0
    for name in ("logit_scale", "temperature"):
        value = call.get(name, 1.0)
        value = value.detach().double() if isinstance(value, Tensor) else value
        factor = factor * value if name == "logit_scale" else factor / value
    plain = not {"logit_scale", "temperature", "logit_softcap"} & call.keys()
    for name, value in states:
        wide = value.detach().double().abs()
        wide = torch.where(wide.isfinite(), wide, 0.0)
        if op.startswith("linear"):
            mine = "teacher_" if name == "teacher_hidden" and call.get("teacher_lm_head_weight") is not None else ""
            weight, bias = call[f"{mine}lm_head_weight"], call.get(f"{mine}lm_head_bias")
            sizes = wide @ weight.double().abs().T
            sizes = sizes if bias is None else sizes + bias.double().abs()
            unit = ROUNDOFF[call["logits_dtype"]] * 2 if call.get("logits_dtype") else 2.0**-24 * (wide.shape[-1] + 3)
        else:
            # A number as far away as -1e4 is nowhere near the rows' largest, and its rounding moves nothing.
            sizes, unit = torch.where(wide > 1e3, 0.0, wide), 0.0 if plain else 2.0**-22
        largest = sizes.amax(-1) if sizes.shape[-1] else noise
        noise = torch.maximum(noise, largest * unit * factor)
    return noise


def bounds_of(op: str, call: Arguments, want: dict[str, Tensor], noise: Tensor) -> tuple[dict[str, Tensor], float]:
    """Absolute bounds by name; and how steep the loss is in a row's log-probs at most."""
    size = {name: value.abs() for name, value in want.items() if value.dtype != torch.bool}
    if op == "contrastive_credit":
        return {name: value * 2.0**-22 + TINY for name, value in size.items()}, 1.0
    if "values" in size:
        cut = 4e-5 if call.get("clip") is not None else 0.0
        weight = call.get("token_weight")
        weight = 1.0 if weight is None else weight.double().abs()
        steep = (weight * (1 + size["values"].nan_to_num(0, 0, 0))).amax().item() if size["values"].numel() else 1.0
        return {"values": 2e-5 * size["values"] + weight * (cut + 1e-14 + 8 * noise)}, steep
    log = 1e-5 * size["logprobs"] + 2 * noise + TINY
    log = log.nan_to_num(0, 0, 0)  # the ratio of a log-prob of -inf is 0 or 1
    bounds = {name: 1e-5 * size[name] + 2 * noise + TINY for name in size if name.endswith("logprobs")}
    if "entropy" in size:
        bounds["entropy"] = 1e-5 * size["entropy"] + noise * (4 + 4 * size["entropy"]) + TINY
    slack, steep = 5e-6 + 4 * noise, 1.0
    if "evidence" in size:
        far = 2.0**-23 * (size["positive_logprobs"] + size["negative_logprobs"]).nan_to_num(0, 0, 0)
        bounds["evidence"] = 4e-6 + 2.0**-24 * size["evidence"] + 4 * noise + far
        bounds["weight"] = slack * size["weight"] if "weight" in size else slack
    if "advantages" in size:
        bounds["advantages"] = slack * size["advantages"] + 1e-44
    if "loss" in size:
        moved = (1e-5 + log) * 2
        bounds["ratio"] = size["ratio"] * moved + TINY
        weight = call.get("token_weight")
        weight = torch.ones(()) if weight is None else weight.double().abs()
        pull = (
            weight
            * size["advantages"]
            * size["ratio"].clamp(min=1)
            * (3 if call["surrogate"] == "ppo" else 3 + size["logprobs"])
        )
        each = pull.nan_to_num(0, 0, 0)
        total = each * (moved + slack)
        if call.get("ref_logprobs") is not None and "kl_coef" in call:
            gap = (call["ref_logprobs"].double() - want["logprobs"]).nan_to_num(0, 0, 0)
            far = abs(float(call["kl_coef"])) * (gap.exp() + gap.abs() + 1)
            each, total = each + far, total + far * moved
        if "entropy" in size:
            total = total + abs(call["entropy_coef"]) * bounds["entropy"].nan_to_num(0, 0, 0)
            each = each + abs(call["entropy_coef"]) * (1 + size["entropy"].nan_to_num(0, 0, 0))
        elif call["entropy_coef"]:
            each, total = each + abs(call["entropy_coef"]) * 8, total + abs(call["entropy_coef"]) * (1e-4 + 40 * noise)
        denominator = call.get("denominator")
        count = float(denominator) if denominator is not None else max(1, int((call["labels"] != -100).sum()))
        bounds["loss"] = total.nan_to_num(0, 0, 0).sum() / count + 1e-30
        steep = each.amax().item() / count if each.numel() else 1.0
    return bounds, steep


def gradient_bound(
    dtype: torch.dtype, want: Tensor, noise: Tensor, op: str, call: Arguments, upstream: float, steep: float
) -> Tensor:
    """Of what is rounded to `dtype`: a share of the entry, and a smaller one of what it may be the difference of."""
    size, noise = want.abs(), noise.unsqueeze(-1)
    largest = size.nan_to_num(0, 0, 0).amax(-1, keepdim=True) if size.shape[-1] else size
    bound = (3e-5 + 2 * ROUNDOFF[dtype]) * size + largest * (2e-5 + 40 * noise)
    bound = bound + SMALLEST[dtype] * (1 + abs(upstream)) + 1e-30
    temperature = call.get("temperature", 1.0)
    least = float(temperature.min()) if isinstance(temperature, Tensor) and temperature.numel() else 1.0
    least = temperature if isinstance(temperature, float | int) else least
    weight = abs(upstream) * float(call.get("logit_scale", 1.0)) / least * 4
    if op.startswith("linear"):  # sums over the vocabulary, whose terms may cancel, and may be bfloat16 where all are
        head = call["lm_head_weight"]
        unit = 2.0**-8 if ROUNDOFF[head.dtype] > 1e-4 or call.get("logits_dtype") else 1e-5
        terms = weight * steep * head.double().abs().amax() * (1 + math.log(head.shape[0]))
        return bound + largest * 1e-3 + terms * (unit + 10 * noise) + 1e-5
    # What a cap's slope, or probabilities that are nearly the teacher's, leave of float32's precision.
    if "divergence" in op or call.get("logit_softcap") is not None:
        bound = bound + (2e-5 if "divergence" in op else 1e-6) * weight * steep * (1 + 40 * noise)
    if call.get("return_entropy") or call.get("entropy_coef"):  # log p + H, where one of them has float32's
        bound = bound + 1e-6 * weight * steep
    return bound


def one(number: int, seed: int = 0) -> tuple[str, str | None]:
    """(outcome, what was wrong with it) of call `number`; outcomes are "agrees", "refused" and "not possible"."""
    make = Maker(f"{seed}/{number}")
    op = make.rng.choice(OPS)
    call = {name: value for name, value in make.call(op).items() if value is not None or name in ("positive_logits",
            "negative_logits", "positive_hidden", "negative_hidden", "negative_logprobs")}  # fmt: skip
    wrong = spoil(op, call, make) if make.rng.random() < 0.4 else ""
    if wrong is None:
        return "not possible", None
    if wrong:
        try:
            getattr(cepo_kernels, op)(**call)
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error)
            named = re.match(r"[a-z_]+: .", text) and "\n" not in text and len(text) < 400
            named = named and (not isinstance(error, RuntimeError) or "cannot run here" in text)
            return "refused", None if named else f"{op}, {wrong}: {type(error).__name__}: {text[:300]!r}"
        except Exception as error:
            return "refused", f"{op}, {wrong}: {type(error).__name__}: {str(error)[:300]!r}"
        return "refused", f"{op}, {wrong}: accepted"
    upstream = make.rng.choice((1.0, 1.0, -2.5))
    dense = all(
        stride for size, stride in zip(call[states_of(op)].shape, call[states_of(op)].stride(), strict=True) if size > 1
    )
    in_place = make.rng.random() < 0.2 and dense and op in FROM_LOGITS
    try:
        want = run(op, doubled(call), upstream, False)
        got = run(op, call, upstream, in_place)
    except Exception as error:
        return "agrees", f"{op}: {type(error).__name__}: {str(error)[:300]!r}"
    found = compare(op, call, got, want, upstream)
    return "agrees", found and f"{op}: {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=Path, help="file that says which call is running, for when it crashes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counted: Counter[str] = Counter()
    wrong = []
    for number in range(arguments.first, arguments.first + arguments.calls):
        if arguments.at:
            arguments.at.write_text(str(number))
        outcome, error = one(number, arguments.seed)
        counted[outcome] += 1
        if error:
            wrong.append(f"{number}: {error}")
    print(json.dumps({"outcomes": counted, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
