"""Reward axis: cross-model entropy, what a frozen second model thinks of the text (arXiv 2605.29009). No labels.

As a reward of TRL, beside its control with random weights:

    GRPOTrainer(reward_funcs=[cross_model_entropy(name), cross_model_entropy(name, random_weights=True)],
                args=GRPOConfig(reward_weights=[1.0, 0.0], ...), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cepo.config import Config, PolicyConfig
from cepo.config.checks import require
from cepo.errors import InputError
from cepo.policy import Policy, load_policy, make_policy, response_states, token_op, tokens_of
from cepo.prompts import Prompt, content_of
from cepo.vision import Seen

SUPERVISION: tuple[str, ...] = ("another model (the embedded one saw the task)",)

Reward = Callable[..., list[float | None]]
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def load(config: Config) -> Reward:
    """The reward of a run: `reward.verifier` on the policy's device."""
    return _of_config(config, random_weights=False)


def load_control(config: Config) -> Reward:
    """The same reward under random weights, which is logged beside it."""
    return _of_config(config, random_weights=True)


def _of_config(config: Config, *, random_weights: bool) -> Reward:
    assert config.reward.verifier is not None
    policy, empty = config.policy, config.reward.empty
    loaded = load_verifier(config.reward.verifier, policy.device, policy.compute_dtype)
    return cross_model_entropy(loaded, empty=empty, random_weights=random_weights, backend=config.backend)


def load_verifier(name: str, device: str = "auto", compute_dtype: str = "float32") -> Policy:
    """A frozen verifier: "embedded", a directory or a Hugging Face name; device and dtype as for the policy."""
    from cepo.assets import EMBEDDED_VERIFIER, embedded_model

    try:
        source = str(embedded_model(EMBEDDED_VERIFIER)) if name == "embedded" else name
        return load_policy(PolicyConfig(model=source, device=device, compute_dtype=compute_dtype))
    except InputError as error:
        raise InputError(str(error).replace("policy.model", "reward.verifier")) from error


def cross_model_entropy(
    verifier: str | Policy = "embedded",
    *,
    empty: float | None = None,
    random_weights: bool = False,
    batch_size: int = 32,
    backend: str = "auto",
) -> Reward:
    """A reward function: r = mean over the response's tokens of log p_v(token), p_v the verifier's.

    The response's text is tokenised anew and the prompt rendered in the verifier's own chat template; what exceeds its
    context is cut off on the left; no end token is scored, and nothing clipped.

    Args:
        verifier: a model and its tokenizer (`load_verifier`, `cepo.policy.make_policy`), or what to load.
        empty: reward of a response without tokens; None: not scored. The paper's -50 flattens the rest of its group.
        random_weights: the control: the same architecture, freshly initialised from seed 0.
        batch_size: responses in one forward pass.
        backend: of cepo_kernels.

    Returns `f(prompts, completions, completion_ids=None, **columns) -> list[float | None]`, with TRL's arguments, plain
    or conversational. Raises InputError if the verifier cannot be loaded, or for a bad batch_size.
    """
    whole = type(batch_size) is int and batch_size >= 1
    require(whole, "batch_size", "a whole number, at least 1", batch_size)
    judge = load_verifier(verifier) if isinstance(verifier, str) else verifier
    if random_weights:
        judge = _with_random_weights(judge)

    def reward(
        prompts: Sequence[Prompt], completions: Sequence[Prompt], completion_ids: object = None, **columns: Any
    ) -> list[float | None]:
        if len(prompts) != len(completions):
            raise InputError(f"completions: expected one for each of {len(prompts)} prompts, got {len(completions)}")
        contexts = [tokens_of(judge, prompt) for prompt in prompts]
        if any(isinstance(context, Seen) for context in contexts):
            raise InputError("reward.name: cross_model_entropy reads no images, and a prompt has one")
        responses = [_ids(judge, completion) for completion in completions]
        pairs = [_cut(c, r, judge.context) if r else None for c, r in zip(contexts, responses, strict=True)]
        # Equal texts get equal bits, which rows of a batch would not promise: a group that agrees must not move.
        distinct = list(dict.fromkeys(pair for pair in pairs if pair))
        values: dict[Pair | None, float | None] = {None: empty}
        for start in range(0, len(distinct), batch_size):
            rows = distinct[start : start + batch_size]
            values |= zip(rows, mean_logprobs(judge, *zip(*rows, strict=True), backend=backend), strict=True)
        return [values[pair] for pair in pairs]

    reward.__name__ = "cross_model_entropy_control" if random_weights else "cross_model_entropy"
    return reward


@torch.no_grad()
def mean_logprobs(
    judge: Policy, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, backend: str = "auto"
) -> list[float]:
    """Mean log-prob of each response's tokens given its context, neither empty."""
    states = response_states(judge, contexts, responses)
    labels = torch.tensor([token for ids in responses for token in ids], device=judge.device)
    with judge.autocast():
        logprobs = token_op(judge)(states, labels, backend=backend, **judge.logit_options).logprobs
    return [row.mean().item() for row in logprobs.split([len(ids) for ids in responses])]


def _with_random_weights(judge: Policy) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = type(judge.model)(judge.model.config)
    return make_policy(fresh.to(judge.device), judge.tokenizer, judge.compute_dtype)


def _ids(judge: Policy, completion: Prompt) -> list[int]:
    text = completion if isinstance(completion, str) else "".join(content_of(turn) for turn in completion)
    ids: list[int] = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _cut(context: list[int], response: list[int], longest: int) -> Pair:
    """The last `longest` tokens of both; the first one left is always context, since nothing predicts it."""
    kept = (*context, *response)[-longest:]
    first = max(1, len(kept) - len(response))
    return kept[:first], kept[first:]
