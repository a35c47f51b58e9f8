"""Rollouts by another engine: a stand-in for vLLM with its documented interface, and the weights of what it samples.

vLLM itself is not installed where these run.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import one_thread  # noqa: F401
from torch import Tensor

from cepo import trainer, update
from cepo.config import LoraConfig, PolicyConfig
from cepo.engine import importance
from cepo.errors import InputError
from cepo.parts import Parts, load_parts
from cepo.policy import EMBEDDED, Policy, load_policy, response_states, token_op
from cepo.processes import Alone
from cepo.rollout import Transformers, seed_of
from cepo.update import Batch

Gap = Callable[[int, int], float]


@dataclass
class SamplingParams:
    """The arguments that are used, under vLLM's names."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.temperature or self.n == 1, "n must be 1 when using greedy sampling"


@dataclass
class Fake:
    """A module `vllm` whose engine is a model of its own in transformers; `gap` is added to its log-probs."""

    gap: Gap = lambda place, token: 0.0
    calls: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    params: list[SamplingParams] = field(default_factory=list)
    policy: Policy | None = None

    def module(self) -> ModuleType:
        made = ModuleType("vllm")
        made.LLM, made.SamplingParams = self.start, SamplingParams  # type: ignore[attr-defined]
        return made

    def start(self, model: str, **options: Any) -> Fake:
        self.options = {"model": model, **options}
        self.policy = load_policy(PolicyConfig(model=model))
        with torch.no_grad():
            for p in self.policy.model.parameters():
                p.zero_()  # what it has of its own is of no use to anybody
        name, _, cls = options["worker_extension_cls"].rpartition(".")
        self.worker = getattr(importlib.import_module(name), cls)()
        self.worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        return self

    def _load(self, weights: Any) -> None:
        assert self.policy is not None
        found = dict(weights)
        missing = self.policy.model.load_state_dict(found, strict=False)
        assert set(missing.missing_keys) <= {"lm_head.weight"}, "all of the checkpoint's, by its names"
        assert not missing.unexpected_keys

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        return [getattr(self.worker, method)(*args)]

    def generate(self, prompts: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool = True) -> list[Any]:
        self.calls.append("generate")
        self.params, policy = sampling_params, self.policy
        assert policy is not None
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert params.seed is not None
            responses, _ = Transformers(policy).generate(
                [prompt["prompt_token_ids"]], params.n, max_new_tokens=params.max_tokens or 0,
                temperature=params.temperature, key=(params.seed, 0),
            )  # fmt: skip
            rows = logprobs(policy, [prompt["prompt_token_ids"]] * params.n, responses, params.temperature or 1.0)
            outputs.append(SimpleNamespace(outputs=[
                SimpleNamespace(token_ids=tuple(ids), logprobs=[
                    {token: SimpleNamespace(logprob=x + self.gap(place, token), rank=1)}
                    for place, (token, x) in enumerate(zip(ids, row.tolist(), strict=True))
                ])
                for ids, row in zip(responses, rows, strict=True)
            ]))  # fmt: skip
        return outputs

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")


@torch.no_grad()
def logprobs(policy: Policy, prompts: Any, responses: list[list[int]], temperature: float) -> tuple[Tensor, ...]:
    states = response_states(policy, prompts, responses)
    labels = torch.tensor([token for ids in responses for token in ids])
    found = token_op(policy)(states, labels, temperature=temperature).logprobs
    return found.split([len(ids) for ids in responses])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(sys.modules, "vllm", made.module())
    return made


def by_vllm(**sections: Any) -> Parts:
    rollout = {"engine": "vllm", "prompts": 3, "temperature": 0.8, **sections.pop("rollout", {})}
    return load_parts(small(rollout=rollout, **sections))


def one_step(parts: Parts, number: int = 1) -> trainer.Record:
    return trainer.train_step(parts, trainer.make_optimizer(parts), number)


def test_it_generates_with_the_policys_weights_and_at_its_temperature(fake: Fake) -> None:
    parts = by_vllm(rollout={"engine_options": {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3}})
    assert fake.options["model"] == str(EMBEDDED)
    assert fake.options["logprobs_mode"] == "processed_logprobs"
    assert fake.options["gpu_memory_utilization"] == 0.3
    assert fake.calls == ["cepo_load_weights", "reset_prefix_cache"]
    record = one_step(parts)
    assert record["engine_gap"] < 1e-5, "its log-probs are those of the policy"
    assert record["importance"] == pytest.approx(1, abs=1e-5)
    assert record["importance_capped"] == 0
    assert record["reward"] > 0.1, "it is the embedded model that answered"
    cycle = ["generate", "sleep 1", "wake_up", "cepo_load_weights", "reset_prefix_cache"]
    assert fake.calls[2:] == cycle
    told = {(p.n, p.temperature, p.max_tokens, p.logprobs, p.detokenize) for p in fake.params}
    assert told == {(4, 0.8, parts.max_new_tokens, 0, False)}
    assert [p.seed for p in fake.params] == [seed_of((0, 1), p) for p in range(3)]
    assert len({p.seed for p in fake.params}) == 3
    assert fake.policy is not None
    for (name, mine), theirs in zip(parts.policy.model.named_parameters(), fake.policy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), f"{name} after the update"
    greedy = trainer.evaluate(parts)["greedy"]
    assert fake.params[0].n == 1
    assert greedy == trainer.evaluate(replace(parts, engine=None))["greedy"] > 0


@pytest.mark.parametrize(("loss", "updates"), [("clipped", 2), ("cispo", 1), ("opsd", 2)])
def test_known_gaps_give_the_weights_they_should(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, loss: str, updates: int
) -> None:
    cap = 1.5
    fake.gap = lambda place, token: 0.7 * (-1) ** place + 0.01 * token
    weights: list[Tensor] = []
    batches: list[Batch] = []
    given, make = update.loss_weights, trainer.make_batch

    def weighed(*args: Any) -> Tensor:
        weights.append(given(*args))
        return weights[-1]

    def made(*args: Any) -> Batch:
        batches.append(make(*args))
        return batches[-1]

    monkeypatch.setattr(update, "loss_weights", weighed)
    monkeypatch.setattr(trainer, "make_batch", made)
    parts = by_vllm(
        rollout={"importance_cap": cap}, loss={"name": loss}, train={"updates_per_batch": updates, "lr": 1e-2},
        task={"name": "addition"},
    )  # fmt: skip
    record = one_step(parts)
    (batch,) = batches
    rows = batch.active().nonzero().flatten().tolist()
    ratios = [
        min(math.exp(-fake.gap(place, token)), cap)
        for b in rows for place, token in enumerate(batch.rollouts.responses[b])
    ]  # fmt: skip
    assert len(weights) == updates
    for one in weights:  # later updates have moved the policy, and weigh as the first did
        assert torch.allclose(one / batch.per_token(batch.weights, rows), torch.tensor(ratios), rtol=2e-5)
    assert record["importance"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    capped = sum(ratio == cap for ratio in ratios) / len(ratios)
    assert 0.2 < capped < 0.8
    assert record["importance_capped"] == pytest.approx(capped)


def test_a_token_weighs_in_the_gradient_what_it_should(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """All log-probs off by the same: the gradient is that of the policy's own tokens, times the ratio."""

    def gradient(gap: float) -> list[Tensor]:
        fake.gap = lambda place, token: gap
        parts = by_vllm(train={"max_grad_norm": 1e9})
        one_step(parts)
        return [p.grad for p in parts.policy.model.parameters() if p.grad is not None]

    for mine, theirs in zip(gradient(math.log(2)), gradient(0.0), strict=True):
        assert torch.allclose(mine, theirs / 2, rtol=1e-3, atol=1e-7)


def test_the_weight_is_exact_and_bounded() -> None:
    own, told = torch.tensor([-1.0, -1.0, -1.0, -0.0]), torch.tensor([-2.0, -1.0, -0.5, -torch.inf])
    assert importance(own.requires_grad_(), told, 2.0).tolist() == [2.0, 1.0, pytest.approx(math.exp(-0.5)), 2.0]
    assert not importance(own, told, 2.0).requires_grad


def test_what_it_cannot_do_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    for sections, told in (
        ({"policy": {"lora": LoraConfig()}}, r"policy\.lora: expected none with rollout\.engine vllm"),
        ({"rollout": {"importance_cap": 0.5}}, r"rollout\.importance_cap: expected a number, at least 1, got 0\.5"),
        ({"rollout": {"engine": "transformers", "importance_cap": 2.0}}, r"rollout\.importance_cap: expected none"),
        ({"rollout": {"engine": "sglang"}}, r"rollout\.engine: expected one of transformers, vllm, got 'sglang'"),
    ):
        with pytest.raises(InputError, match=told):
            by_vllm(**sections)
    many = Alone()
    many.world = 2
    with pytest.raises(InputError, match=r"rollout\.engine: expected transformers in several processes, got 'vllm'"):
        load_parts(small(rollout={"engine": "vllm"}), processes=many)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"rollout\.engine: vllm cannot be imported .*; pip install vllm"):
        by_vllm()
