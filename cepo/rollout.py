"""Rollouts, of whichever engine (`cepo.engine`); and the one that is always there, the model's own `generate`.

That samples by Gumbel-max with noise that is a function of where it is used: argmax(logits / T + Gumbel noise) is drawn
from softmax(logits / T). The noise of every vocabulary entry is a hash of (seed, step, prompt, rollout, position), so
methods share random numbers, nothing needs saving, and it does not matter how rollouts are batched. The model's own
generation config (top-p, penalties, ...) plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cepo.engine import Engine, Generated
from cepo.errors import InputError
from cepo.policy import Policy, tokens_of
from cepo.processes import ALONE, Alone
from cepo.sharding import whole
from cepo.tasks import Problem

_STREAM = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@dataclass(frozen=True)
class Rollouts:
    """B = P * G rollouts, group after group."""

    problems: list[Problem]
    """(P,)"""
    prompts: list[list[int]]
    """(P,) token ids of the rendered prompts."""
    responses: list[list[int]]
    """(B,) token ids up to and with the end-of-sequence token."""
    completions: list[str]
    """(B,) text, special tokens left out."""
    truncated: list[bool]
    """(B,) whether the length ran out first."""
    logprobs: list[list[float]] | None = None
    """(B,) of the responses' tokens, as an engine sampled them that is not the policy itself; None: the policy did."""

    @property
    def group_size(self) -> int:
        return len(self.responses) // len(self.problems)

    def per_rollout(self, values: Sequence[Any]) -> list[Any]:
        """(P,) values as (B,)."""
        return [value for value in values for _ in range(self.group_size)]


def sample(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    key: tuple[int, int],
    batch_size: int = 0,
    processes: Alone = ALONE,
    engine: Engine | None = None,
) -> Rollouts:
    """Complete every problem `group_size` times.

    Args:
        max_new_tokens: longest response, in tokens.
        temperature: T > 0; 0 is greedy.
        key: (seed, step) of the noise.
        batch_size: rollouts at once; 0: all.
        processes: each generates a share of the groups, and gets what all have generated.
        engine: what generates; None: the policy's own `generate`.

    Raises InputError if a prompt and a response of full length exceed the model's context.
    """
    prompts = encode_prompts(policy, problems, max_new_tokens)
    mine = processes.share(len(problems))
    chosen = engine or Transformers(policy, batch_size)

    def generated() -> Generated:
        return chosen.generate(
            prompts[mine.start : mine.stop], group_size, max_new_tokens=max_new_tokens, temperature=temperature,
            key=key, first=mine.start,
        )  # fmt: skip

    with whole(policy.model):
        parts = processes.gather("rollouts", generated)
    responses = [ids for part in parts for ids in part.responses]
    logprobs = [row for part in parts for row in part.logprobs or ()]
    completions = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    truncated = [ids[-1] not in policy.eos_ids for ids in responses]
    return Rollouts(list(problems), prompts, responses, completions, truncated, logprobs or None)


class Transformers:
    """The `generate` of a policy's model as an `Engine`; `batch_size` rollouts at once, 0: all."""

    def __init__(self, policy: Policy, batch_size: int = 0) -> None:
        self._policy, self._batch_size = policy, batch_size

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        max_new_tokens: int,
        temperature: float,
        key: tuple[int, int],
        first: int = 0,
    ) -> Generated:
        """As `Engine.generate`; tokens depend on `key` and their place alone."""
        rows = [(p, g) for p in range(len(prompts)) for g in range(n)]
        at_once = self._batch_size or max(len(rows), 1)
        found: list[list[int]] = []
        for chunk in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
            places = [(first + p, g) for p, g in chunk]
            noise = GumbelMax(key, places, temperature, self._policy.device) if temperature else None
            found += _generate(self._policy, [prompts[p] for p, _ in chunk], max_new_tokens, noise)
        return Generated(found)

    def sync(self, model: torch.nn.Module) -> None:
        """Nothing: it is the model."""


def encode_prompts(policy: Policy, problems: Sequence[Problem], max_new_tokens: int) -> list[list[int]]:
    """Token ids of the rendered prompts. Raises InputError if one leaves no room for `max_new_tokens`."""
    prompts = [tokens_of(policy, problem.prompt) for problem in problems]
    for problem, ids in zip(problems, prompts, strict=True):
        if len(ids) + max_new_tokens > policy.context:
            raise InputError(
                f"prompt {problem.text[:40]!r}: expected at most {policy.context} tokens, the model's context, "
                f"got {len(ids)} + {max_new_tokens} to generate"
            )
    return prompts


class GumbelMax(LogitsProcessor):
    """Adds the noise of one batch of (prompt, rollout) rows to its logits, position after position."""

    def __init__(self, key: tuple[int, int], rows: Sequence[tuple[int, int]], temperature: float, device: torch.device):
        self.temperature = temperature
        self.prompt_length: int | None = None
        self.keys = torch.zeros(len(rows), dtype=torch.int64, device=device)
        parts: list[int | Tensor] = [*key, *torch.tensor(rows, device=device).unbind(1)]
        for part in parts:
            self.keys = fold(self.keys, part)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        keys = fold(self.keys, input_ids.shape[1] - self.prompt_length)
        return scores.float() / self.temperature + gumbel(keys, scores.shape[-1])


def fold(keys: Tensor, value: int | Tensor) -> Tensor:
    """Hash one more value, in [0, 2^63), into 64-bit keys."""
    return _mix(keys + (torch.as_tensor(value, dtype=torch.int64, device=keys.device) + 1) * _STREAM)


def seed_of(key: tuple[int, int], prompt: int) -> int:
    """A seed in [0, 2^31) for an engine with random numbers of its own."""
    folded = torch.zeros((), dtype=torch.int64)
    for part in (*key, prompt):
        folded = fold(folded, part)
    return int(folded) & ((1 << 31) - 1)


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise (B, size), float32, of int64 keys (B,): the same bits of hash on every device."""
    column = torch.arange(1, size + 1, device=keys.device) * _STREAM
    bits = _shift(_mix(keys[:, None] + column), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log().float()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift, which int64 tensors lack."""
    return (x >> by) & ((1 << (64 - by)) - 1)


@torch.no_grad()
def _generate(
    policy: Policy, prompts: Sequence[Sequence[int]], max_new_tokens: int, noise: LogitsProcessor | None
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[policy.pad_id] * (width - len(p)) + list(p) for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    with _own_generation_config(policy, max_new_tokens), policy.autocast():
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **policy.images(prompts, width),
            logits_processor=LogitsProcessorList([noise] if noise else []),
            synced_gpus=False,  # weights are whole here, and no process waits for another's longest
        )
    return [_until_end(row, policy.eos_ids) for row in out[:, width:].tolist()]


@contextmanager
def _own_generation_config(policy: Policy, max_new_tokens: int) -> Iterator[None]:
    """Put ours in the model's place: `generate` would fill gaps in a passed one from the model's."""
    theirs = policy.model.generation_config
    policy.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id,
        suppress_tokens=list(policy.vision.places) if policy.vision else None,
    )  # fmt: skip
    try:
        yield
    finally:
        policy.model.generation_config = theirs


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return ids[: end + 1]
