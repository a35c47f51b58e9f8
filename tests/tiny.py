"""Small things to train on: a random two-layer Qwen3 with the embedded tokenizer, and hand-made rollouts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from cepo.policy import EMBEDDED, Policy, make_policy, tokens_of
from cepo.rollout import Rollouts
from cepo.tasks import Problem


def load_afresh(module: ModuleType) -> None:
    """Run a module as its first import does, and leave the one that is loaded."""
    spec = importlib.util.spec_from_file_location("fresh", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What `cepo train` does for models of this size: on a busy machine two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_policy(seed: int = 0, **changes: Any) -> Policy:
    """A random model; `changes` go to its config."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    return make_policy(Qwen3ForCausalLM(Qwen3Config(**{**options, **changes})), tokenizer)


@dataclass
class Sums:
    """A task whose answers are what stands behind '#', with leading zeros ignored."""

    name: str = "sums"
    max_new_tokens: int = 12
    data: Mapping[str, Any] = field(default_factory=dict)

    def train(self, index: int, seed: int) -> Problem:
        return Problem(f"{index}+{seed}", str(index + seed))

    def split(self, name: str, n: int) -> list[Problem]:
        return [Problem(f"{i}+{i}", str(2 * i)) for i in range(n)]

    def parse_answer(self, completion: str) -> str | None:
        return completion.partition("#")[2] or None

    def score(self, completion: str, problem: Problem) -> float | None:
        answer = self.parse_answer(completion)
        return float(answer is not None and self.accepts(answer, problem))

    def accepts(self, answer: str, problem: Problem) -> bool:
        return answer.strip().lstrip("0") == problem.answer


def rollouts_of(
    policy: Policy, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[int] = ()
) -> Rollouts:
    """Rollouts with these completions, group after group; those at the places `truncated` have no end token."""
    responses = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    for b, ids in enumerate(responses):
        if b not in truncated:
            ids.append(policy.eos_ids[0])
    prompts = [tokens_of(policy, problem.prompt) for problem in problems]
    return Rollouts(
        list(problems), prompts, responses, list(completions), [b in truncated for b in range(len(completions))]
    )
