"""Rollouts: keyed noise, what ends a response, and what `generate` may not do on its own."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Sums, one_thread, tiny_policy  # noqa: F401

from cepo.errors import InputError
from cepo.policy import response_logits
from cepo.rollout import GumbelMax, fold, gumbel, sample

PROBLEMS = [Sums().train(index, 7) for index in (3, 12345, 88)]


def test_noise_is_gumbel_distributed_and_differs_by_key_and_column() -> None:
    keys = fold(torch.zeros(200, dtype=torch.int64), torch.arange(200))
    noise = gumbel(keys, 500)
    assert noise.shape == (200, 500)
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.corrcoef(noise[:50])[~torch.eye(50, dtype=torch.bool)].abs().max() < 0.25


def test_gumbel_max_samples_the_softmax_at_its_temperature() -> None:
    logits, temperature = torch.tensor([2.0, 0.0, -1.0, 1.0]), 1.7
    rows = [(p, g) for p in range(100) for g in range(200)]
    noise = GumbelMax((0, 1), rows, temperature, torch.device("cpu"))
    drawn = noise(torch.zeros(len(rows), 3, dtype=torch.int64), logits.expand(len(rows), -1)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / len(rows)
    assert torch.allclose(shares, (logits / temperature).softmax(0), atol=0.015)


def test_rollouts_depend_on_seed_step_prompt_and_rollout_but_not_on_batching() -> None:
    policy = tiny_policy()

    def responses(seed: int = 0, step: int = 1, batch_size: int = 0) -> list[list[int]]:
        out = sample(policy, PROBLEMS, group_size=4, max_new_tokens=8, temperature=1.0, key=(seed, step),
                     batch_size=batch_size)  # fmt: skip
        return out.responses

    first = responses()
    assert len(first) == 12
    assert first == responses()
    assert first == responses(batch_size=5)
    assert len({tuple(ids) for ids in first}) == 12
    for other in (responses(seed=1), responses(step=2)):
        assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


def test_a_response_ends_with_its_end_token_or_is_truncated() -> None:
    policy = tiny_policy()
    out = sample(policy, PROBLEMS, group_size=40, max_new_tokens=30, temperature=1.0, key=(0, 1))
    assert any(out.truncated)
    assert not all(out.truncated)
    for ids, truncated in zip(out.responses, out.truncated, strict=True):
        assert (len(ids) == 30 and ids[-1] not in policy.eos_ids) if truncated else ids[-1] in policy.eos_ids
        assert not set(ids[:-1]) & set(policy.eos_ids)


def test_greedy_takes_the_likeliest_token_and_the_models_generation_config_is_ignored() -> None:
    policy = tiny_policy()
    plain = sample(policy, PROBLEMS, group_size=2, max_new_tokens=8, temperature=0.0, key=(0, 0)).responses
    noisy = sample(policy, PROBLEMS, group_size=2, max_new_tokens=8, temperature=1.0, key=(0, 0)).responses
    theirs = policy.model.generation_config
    theirs.update(do_sample=True, top_k=1, repetition_penalty=5.0, max_new_tokens=2, num_beams=3)
    assert sample(policy, PROBLEMS, group_size=2, max_new_tokens=8, temperature=0.0, key=(0, 0)).responses == plain
    assert sample(policy, PROBLEMS, group_size=2, max_new_tokens=8, temperature=1.0, key=(0, 0)).responses == noisy
    assert policy.model.generation_config is theirs
    out = sample(policy, PROBLEMS, group_size=1, max_new_tokens=8, temperature=0.0, key=(0, 0))
    logits = response_logits(policy, out.prompts, out.responses)
    assert logits.argmax(-1).tolist() == [token for ids in out.responses for token in ids]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"at most 16 tokens, the model's context, got \d+ \+ 12"):
        sample(tiny_policy(max_position_embeddings=16), PROBLEMS, group_size=2, max_new_tokens=12, temperature=1.0,
               key=(0, 1))  # fmt: skip
