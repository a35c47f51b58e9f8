"""RREDCoT in TRL: its options, its model, and what that answers before each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cepo.config import RredcotConfig
from cepo.config.checks import require
from cepo.errors import InputError
from cepo.policy import Policy, make_policy
from cepo.value import CUE, asked, cut, values_at

OPTIONS = ("mode", "centre", "separators", "keywords", "min_entropy", "cue")


class Valuing(NamedTuple):
    """A model that is made to answer, and how."""

    policy: Policy
    config: RredcotConfig


class Valued(NamedTuple):
    """A response of S segments."""

    lengths: Tensor
    """(S,) in tokens."""
    values: Tensor
    """(S,) float64, v at their starts."""


def read_options(args: Any) -> RredcotConfig:
    """What `args`, a `CEPOConfig`, says of it. Raises InputError for what is bad, or does not go with it."""
    given = {name: getattr(args, f"rredcot_{name}") for name in OPTIONS}
    for name in ("separators", "keywords"):
        texts = isinstance(given[name], list | tuple) and all(isinstance(text, str) for text in given[name])
        require(given[name] is None or texts, f"rredcot_{name}", "a list of texts", given[name])
    config = RredcotConfig(**{name: value for name, value in given.items() if value is not None})
    try:
        config.check()
    except InputError as error:  # theirs are fields of a section
        raise InputError(str(error).replace("rredcot.", "rredcot_")) from error
    if args.credit == "rredcot" and config.mode != "scale":
        for name, fine in (("scale_rewards", ("group", "none")),
                           ("multi_objective_aggregation", ("sum_then_normalize",))):  # fmt: skip
            if getattr(args, name) not in fine:
                raise InputError(
                    f"{name}: expected {' or '.join(fine)}, as rredcot_mode {config.mode} has advantages of its own, "
                    f"got {getattr(args, name)!r}; rredcot_mode scale multiplies TRL's"
                )
    return config


def check_rewards(mode: str, functions: Sequence[Any], weights: Sequence[float]) -> None:
    """Raise InputError for rewards that are certainly no chance of success, where `mode` subtracts one."""
    if mode == "scale":
        return
    why = f"as rredcot_mode {mode} subtracts chances of success from the reward"
    if min(weights) < 0 or sum(weights) > 1 + 1e-6:
        raise InputError(f"reward_weights: expected each at least 0, their sum at most 1, {why}, got {list(weights)}")
    if models := [type(f).__name__ for f in functions if isinstance(f, torch.nn.Module)]:
        raise InputError(f"reward_funcs: expected functions, {why}, got a {models[0]}")


def valuing_policy(model: Any, tokenizer: Any, args: Any) -> Policy:
    """`model` as `cepo.value` reads it. Raises InputError for adapters that it would not see."""
    if hasattr(model, "peft_config"):
        lora, model = model, model.get_base_model()
        head = type(model.get_output_embeddings())
        if lora.active_peft_config.is_prompt_learning or head.__module__.startswith("peft."):
            raise InputError("peft_config: expected LoRA, and none at the head, as credit rredcot reads its weight")
    return make_policy(model, tokenizer, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)


@torch.no_grad()
def segment_values(
    valuing: Valuing,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    answers: Sequence[str],
    texts: Sequence[str],
    temperature: float,
) -> list[Valued]:
    """Each response in segments, and what they are worth.

    Args:
        prompts, responses: token ids.
        texts: the prompts', for errors.

    Raises:
        InputError: no room for an answer in the model's context.
    """
    policy, config = valuing
    options: dict[str, Any] = {"temperature": temperature, **policy.logit_options}
    starts = cut(policy, config, prompts, responses, **options)
    asking = [
        asked(policy, config.cue or CUE, answer, len(prompt) + ts[-1], text)
        for answer, prompt, ts, text in zip(answers, prompts, starts, texts, strict=True)
    ]
    values = values_at(policy, prompts, responses, starts, asking, **options)
    lengths = [torch.tensor([*ts, len(ids)]).diff() for ts, ids in zip(starts, responses, strict=True)]
    return list(map(Valued, lengths, values))
