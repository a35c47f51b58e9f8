"""A head that is called with labels, so that whatever gathers its weight when it is called (FSDP2, ZeRO-3) does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .contrastive import ContrastiveLogprobs
from .linear import linear_contrastive_logprobs, linear_contrastive_policy_loss, linear_token_logprobs
from .policy_loss import PolicyLoss
from .token import TokenLogprobs


class LogprobHead(nn.Linear):
    """An ``lm_head``: logits without labels, as any other; with labels the ops of `linear`, and no logits anywhere.

        head(hidden_states)                                                            logits
        head(hidden_states, labels=labels)                                             TokenLogprobs
        head(policy, positive, negative, labels=labels, advantages=A)                  ContrastiveLogprobs
        head(policy, positive, negative, labels=labels, advantages=A, policy_loss=True)    PolicyLoss

    Hidden states are (..., H); teachers may be None. Every other option of the op may follow.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        positive_hidden: Tensor | None = None,
        negative_hidden: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        advantages: Any = None,
        policy_loss: bool = False,
        **options: Any,
    ) -> Tensor | TokenLogprobs | ContrastiveLogprobs | PolicyLoss:
        if labels is None:
            given = (positive_hidden, negative_hidden, advantages, policy_loss or None, *options.values())
            if any(value is not None for value in given):
                raise ValueError("labels: expected a tensor, given as labels=..., got None")
            return super().forward(input)
        checks.check_flag("policy_loss", policy_loss)
        for name in {"lm_head_weight", "lm_head_bias"} & options.keys():
            raise TypeError(f"{name}: expected none, as the head has its own")
        options["lm_head_bias"] = self.bias
        if policy_loss:
            return linear_contrastive_policy_loss(
                input,
                positive_hidden,
                negative_hidden,
                self.weight,
                labels,
                advantages,
                **options,
            )
        if advantages is None and positive_hidden is None and negative_hidden is None:
            return linear_token_logprobs(input, self.weight, labels, **options)
        return linear_contrastive_logprobs(
            input, positive_hidden, negative_hidden, self.weight, labels, advantages, **options
        )


def use_logprob_head(model: Any) -> LogprobHead:
    """Turn a transformers model's head into a `LogprobHead`, where it stands: parameters, ties and hooks stay.

    To be called before the model is sharded or compiled. `restore_head` undoes it.

    Raises:
        TypeError: the model has no output embeddings, or they are no plain linear layer (LoRA on the head, a quantised
            or an already sharded one), or the model has an encoder, or scales, caps or cuts what they say.
    """
    head = _head(model)
    if type(head) is LogprobHead:
        return head
    if "forward" in vars(head):
        raise TypeError("model: expected output embeddings with their class's forward, got one that was replaced")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        what = "whose decoder may scale its states and add a bias to its logits"
        raise TypeError(f"model: expected a decoder alone, got {type(model).__name__}, {what}")
    cut = getattr(_text_config(config), "unpadded_vocab_size", None)
    if cut is not None and cut < head.weight.shape[0]:
        raise TypeError(
            f"model: expected a column for every token, got a head of {head.weight.shape[0]} that is cut to {cut}"
        )
    if options := logit_options(config):
        raise TypeError(
            f"model: expected one whose logits are its head's output, got a config that asks for {options}; call "
            "linear_token_logprobs with that"
        )
    if type(head) is not nn.Linear:
        why = "; merge or leave out the adapter of the head" if hasattr(head, "base_layer") else ""
        why = "; call this before fully_shard" if type(head).__name__.startswith("FSDP") else why
        raise TypeError(f"model: expected output embeddings that are an nn.Linear, got {type(head).__name__}{why}")
    head.__class__ = LogprobHead
    return head  # type: ignore[return-value]


def restore_head(model: Any) -> None:
    """Make the model's head a plain `nn.Linear` again."""
    head = _head(model)
    if type(head) is LogprobHead:
        head.__class__ = nn.Linear  # type: ignore[assignment]


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, FalconH1, Muse
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling


def logit_options(config: Any) -> dict[str, float]:
    """The ops' ``logit_softcap`` and ``logit_scale`` that a transformers config asks for, where they do anything."""
    config = _text_config(config)
    cap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    scale = next((scale for name in _SCALES if (scale := getattr(config, name, None))), 1.0)
    divisor = next((divisor for name in _DIVISORS if (divisor := getattr(config, name, None))), 1.0)
    if str(getattr(config, "model_type", "")).startswith("hyperclovax"):  # which multiplies by it
        divisor = 1.0 / divisor
    options = {"logit_softcap": float(cap)} if cap else {}
    return options if scale == divisor else {**options, "logit_scale": scale / divisor}


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head(model: Any) -> Any:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        raise TypeError(f"model: expected a model with output embeddings, got {type(model).__name__}")
    return head
