"""The policy: a language model, its tokenizer or processor, and the way from token ids to logits of response tokens.

Only response rows are kept, packed: (N, H) hidden states for the N response tokens of a batch, rollout after rollout,
which `cepo_kernels` takes through the head a few rows at a time. A model whose head cannot be told apart gives (N, V)
logits instead. The model stays in evaluation mode throughout, so an on-policy ratio is 1.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cepo import adapters, checkpoint
from cepo.assets import EMBEDDED_MODEL, embedded_model
from cepo.config import PolicyConfig
from cepo.errors import InputError, one_line
from cepo.prompts import Prompt, content_of, images_of, in_parts, text_of
from cepo.vision import Vision, auto_classes, identity, image_positions, separate
from cepo_kernels import (
    ContrastiveLogprobs,
    PolicyLoss,
    TokenLogprobs,
    contrastive_logprobs,
    contrastive_policy_loss,
    divergence,
    linear_contrastive_logprobs,
    linear_contrastive_policy_loss,
    linear_divergence,
    linear_token_logprobs,
    token_logprobs,
)
from cepo_kernels.head import logit_options

EMBEDDED = embedded_model()


@dataclass(frozen=True)
class Policy:
    """A model and what is needed to talk to it."""

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context: int
    """Longest sequence the model takes, in tokens."""
    compute_dtype: torch.dtype = torch.float32
    split_head: bool = True
    """Whether logits are head(base model), so that the head can be left to the kernels."""
    logit_options: dict[str, Any] = field(default_factory=dict)
    """`logit_scale` and `logit_softcap` for the kernels, where the head alone leaves them out."""
    vision: Vision | None = None
    """How images come into its prompts; None: not at all."""
    base: dict[str, Any] = field(default_factory=dict)
    """What the model that its factors of LoRA stand beside is known by (`adapters.digests`)."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    @property
    def processor(self) -> Any:
        """What is saved with the model: the tokenizer, or that and what makes tokens of images."""
        return self.vision.processor if self.vision else self.tokenizer

    def images(self, contexts: Sequence[Sequence[int]], length: int) -> dict[str, Tensor]:
        """What the model takes beside the ids (B, length) of contexts with images (`Vision.inputs`)."""
        return self.vision.inputs(contexts, length, self.device) if self.vision else {}


def load_policy(config: PolicyConfig) -> Policy:
    """Load the model of `config`, float32, in evaluation mode. Raises InputError if that fails."""
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    # Their bars would break the trainer's own, and every retry of a name that does not exist is announced.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    device = _device(config.device)
    named = resolve(config.model)
    base = adapters.base_of(named)
    source = named if base is None else base
    # Of a model that brings code none is run, and nobody is asked to let it.
    options: dict[str, Any] = {"trust_remote_code": False}
    options |= {} if config.gguf_file is None else {"gguf_file": config.gguf_file}
    try:
        shape = AutoConfig.from_pretrained(source, **options)  # the cheapest way to learn that there is nothing to load
        auto, tokenizer = auto_classes(named, shape, **options)
        # Wrong shapes and missing weights are told below, in one line in place of their table.
        options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            loaded: Any = auto.from_pretrained(source, **options)
        finally:
            transformers_logging.set_verbosity(verbosity)
    except Exception as error:  # a damaged file fails in whatever way the library that reads it does
        of = "" if base is None else f", an adapter of {base!r}"
        raise InputError(f"policy.model: cannot load {config.model!r}{of}: {one_line(error)[:300]}") from error
    model, info = loaded
    quantized = getattr(model.config, "quantization_config", None) is not None
    if info["mismatched_keys"]:
        name, got, expected = min(info["mismatched_keys"])
        raise InputError(
            f"policy.model: {config.model!r}: by its config {name} is {tuple(expected)}, its weights have {tuple(got)}"
        )
    if info["missing_keys"] and not quantized:
        raise InputError(
            f"policy.model: {config.model!r}: its weights lack {len(info['missing_keys'])} parameters that its config "
            f"asks for, {min(info['missing_keys'])} among them"
        )
    if quantized:
        model = _without_quantization(model)
    if base is not None:
        adapters.load(model, named, config.lora)
    elif config.lora is not None:
        adapters.add(model, config.lora, source)
    model.to(device=device)
    policy = make_policy(model, tokenizer, compute_dtype=getattr(torch, config.compute_dtype))
    beside = base is not None or config.lora is not None
    return replace(policy, base=adapters.digests(source, named if base else None)) if beside else policy


@contextmanager
def threads(policy: Policy, wanted: int) -> Iterator[None]:
    """Run with `wanted` CPU threads; 0: one for a model so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    small = policy.model.num_parameters() < 10_000_000
    torch.set_num_threads(wanted or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_policy(model: Any, tokenizer: Any, compute_dtype: torch.dtype = torch.float32) -> Policy:
    """Wrap a model of transformers and its tokenizer, or its processor where it takes images.

    Raises InputError if no end-of-sequence token is known.
    """
    model.eval()
    tokenizer, sight = separate(tokenizer, model)
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos_ids:
        eos_ids.append(tokenizer.eos_token_id)
    if not eos_ids:
        raise InputError(
            "policy.model: expected an end-of-sequence token in the model's or tokenizer's config, got none"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    options = logit_options(model.config)
    context = context_length(model)
    split = _head_is_separable(model, options, eos_ids[0])
    options = options if split else {}
    return Policy(model, tokenizer, tuple(eos_ids), pad_id, context, compute_dtype, split, options, sight)


def context_length(model: Any) -> int:
    """Longest sequence `model` takes, in tokens, as its config says."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def resolve(name: str) -> str:
    """The directory or name to load: of "embedded[:<asset>]", and of a run, which stands for its last checkpoint."""
    if name.partition(":")[0] == "embedded":
        try:
            return str(embedded_model(name.partition(":")[2] or EMBEDDED_MODEL))
        except ValueError as error:
            raise InputError(f"policy.model: {error}") from error
    path = Path(name).expanduser()
    of_run = (path / checkpoint.CONFIG).is_file() and not (path / "config.json").is_file()
    if of_run or (path / checkpoint.FOLDER).is_dir():
        found = checkpoint.newest(path)
        if found is None:
            raise InputError(f"policy.model: the run {name!r} has no checkpoint")
        return str(found)
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"policy.model: expected 'embedded', a directory or a Hugging Face name, got {name!r}")
    return name


def render(policy: Policy, prompt: Prompt) -> str:
    """`prompt` in the tokenizer's chat template, a text as a user turn, and the assistant's header; plain without one.

    Raises InputError if the template refuses it, as some do with a system turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not policy.processor.chat_template:
        return "\n".join(map(content_of, turns))
    try:
        if policy.vision:
            return policy.vision.render(in_parts(turns))
        return str(policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and ends as its author pleased
        told = f"{[turn['role'] for turn in turns]} of {text_of(prompt)[:40]!r}: {one_line(error)[:200]}"
        raise InputError(f"prompt: expected turns that the model's chat template takes, got {told}") from error


def tokens_of(policy: Policy, prompt: Prompt, after: str = "") -> list[int]:
    """Token ids of a rendered prompt, which know its images if it has any (`cepo.vision.Seen`), and of a text after it.

    Raises InputError for images that the model does not take.
    """
    images = images_of(prompt)
    if images and not (policy.vision and policy.processor.chat_template):
        raise InputError(
            f"prompt: expected a model that takes images (one of AutoModelForImageTextToText, with a processor and its "
            f"chat template) for {text_of(prompt)[:40]!r}, got {type(policy.model).__name__}"
        )
    return encode(policy, render(policy, prompt) + after, images)


def encode(policy: Policy, rendered: str, images: Sequence[Any] = ()) -> list[int]:
    """Token ids of a rendered context; the special tokens of a chat template are in it already. Never empty."""
    plain = not policy.processor.chat_template
    ids: list[int] = (
        policy.vision.encode(rendered, images)
        if policy.vision
        else policy.tokenizer(rendered, add_special_tokens=plain)["input_ids"]
    )
    if not ids:
        raise InputError("prompt: expected at least one token, got none")
    return ids


def response_logits(policy: Policy, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """Logits that predict every response token given its context: (N, V)."""
    states = response_states(policy, contexts, responses)
    if not policy.split_head:
        return states
    with policy.autocast():
        return policy.model.get_output_embeddings()(states)  # type: ignore[no-any-return]


def token_op(policy: Policy) -> Callable[..., TokenLogprobs]:
    """`token_logprobs(states, labels, ...)` of what `response_states` returns."""
    if not policy.split_head:
        return token_logprobs
    weight, bias = _head(policy)
    return lambda states, labels, **options: linear_token_logprobs(states, weight, labels, lm_head_bias=bias, **options)


def contrastive_op(policy: Policy) -> Callable[..., ContrastiveLogprobs]:
    """`contrastive_logprobs(policy, positive, negative, labels, ...)` of what `response_states` returns."""
    if not policy.split_head:
        return contrastive_logprobs
    return _with_head(policy, linear_contrastive_logprobs)


def loss_op(policy: Policy) -> Callable[..., PolicyLoss]:
    """`contrastive_policy_loss(policy, positive, negative, labels, ...)` of what `response_states` returns."""
    if not policy.split_head:
        return partial(contrastive_policy_loss, inplace_grad=True)
    return _with_head(policy, linear_contrastive_policy_loss)


def divergence_op(policy: Policy, teacher: Policy) -> Callable[..., Tensor]:
    """`divergence(student, teacher, ...)` of what `response_states` returns for each, whose heads may differ."""
    if not policy.split_head:
        return partial(divergence, inplace_grad=True)
    (weight, bias), (teacher_weight, teacher_bias) = _head(policy), _head(teacher)
    return lambda own, told, **options: linear_divergence(
        own, told, weight, lm_head_bias=bias, teacher_lm_head_weight=teacher_weight, teacher_lm_head_bias=teacher_bias,
        **options,
    )  # fmt: skip


def _with_head(policy: Policy, op: Callable[..., Any]) -> Callable[..., Any]:
    weight, bias = _head(policy)
    return lambda own, positive, negative, labels, *rows, **options: op(
        own, positive, negative, weight, labels, *rows, lm_head_bias=bias, **options
    )


def _head(policy: Policy) -> tuple[Tensor, Tensor | None]:
    head = policy.model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def response_states(policy: Policy, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """States that predict every response token given its context: (N, H), a full pass for each distinct rollout.

    Contexts are padded on the left and responses on the right, so that responses line up.
    """

    def run(rows: Sequence[int]) -> Tensor:
        told, replies = [contexts[b] for b in rows], [responses[b] for b in rows]
        before = _pad([list(context)[:-1] for context in told], policy.pad_id, left=True)
        within = _pad(_shifted(told, replies), policy.pad_id)
        ids, mask = (torch.cat(pair, dim=1).to(policy.device) for pair in zip(before, within, strict=True))
        wanted = torch.cat([torch.zeros_like(before[1]), within[1]], dim=1).to(policy.device)
        images = policy.images(told, ids.shape[1])
        return _states(policy, wanted, ids, mask, {**images, **_positions(policy, mask, ids, images)})

    return _once_each(policy, list(map(identity, contexts)), responses, run)


def _once_each(
    policy: Policy, contexts: Sequence[Hashable], responses: Sequence[Sequence[int]], run: Callable[..., Tensor]
) -> Tensor:
    """`run(rows)` of all, in which equal rollouts, of which groups of short answers are full, share a row.

    contexts: whatever tells them apart.
    """
    pairs = list(zip(contexts, map(tuple, responses), strict=True))
    first = {pair: row for row, pair in reversed(list(enumerate(pairs)))}
    rows = sorted(first.values())
    if len(rows) == len(pairs) or not policy.split_head:  # rows of logits are too large to have twice
        return run(range(len(pairs)))
    pieces = dict(zip(rows, run(rows).split([len(responses[b]) for b in rows]), strict=True))
    return torch.cat([pieces[first[pair]] for pair in pairs])


@dataclass(frozen=True)
class Prefixes:
    """K contexts that went through the model once, all but their last token, padded to one length on the left."""

    ids: Sequence[Sequence[int]]
    cache: Any
    mask: Tensor
    after: Tensor | None = None
    """(K,) the position behind each, where images have made it another than their number of tokens."""

    @property
    def divisible(self) -> bool:
        """Whether the cache of a prefix holds that of its beginning, unlike a sliding window or a running state."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)


@torch.no_grad()
def prefill(policy: Policy, prefixes: Sequence[Sequence[int]]) -> Prefixes:
    """Run K prefixes through the model and keep their keys and values."""
    from transformers import DynamicCache

    ids, mask = (part.to(policy.device) for part in _pad([list(p)[:-1] for p in prefixes], policy.pad_id, left=True))
    cache = DynamicCache(config=policy.model.config)
    after = None
    if ids.shape[1]:
        images = policy.images(prefixes, ids.shape[1])
        more = _positions(policy, mask, ids, images)
        if more and more["position_ids"].ndim == 3:
            after = more["position_ids"].amax(dim=(0, 2)) + 1
        with policy.autocast():
            policy.model.base_model(
                input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **images, **more
            )
    return Prefixes(prefixes, cache, mask, after)


@torch.no_grad()
def continued_states(
    policy: Policy,
    prefixes: Prefixes,
    index: Sequence[int],
    responses: Sequence[Sequence[int]],
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """States that predict every token of response b given prefix `index[b]`: (N, H), the prefixes not run again.

    lengths: response b follows the first lengths[b] tokens of its prefix; the prefixes must be `divisible`.
    """
    lengths = [len(prefixes.ids[k]) for k in index] if lengths is None else lengths
    places = list(zip(index, lengths, strict=True))

    def run(rows: Sequence[int]) -> Tensor:
        chosen, replies = [places[b] for b in rows], [responses[b] for b in rows]
        contexts = [prefixes.ids[k][:n] for k, n in chosen]
        which, lengths = torch.tensor(chosen, device=policy.device).unbind(1)
        before = prefixes.mask[which]
        before = before & (before.cumsum(1) < lengths[:, None])
        ids, wanted = (part.to(policy.device) for part in _pad(_shifted(contexts, replies), policy.pad_id))
        cache = copy.deepcopy(prefixes.cache)
        cache.batch_select_indices(which)
        mask = torch.cat([before, wanted], dim=1)
        positions = {name: value[:, -ids.shape[1] :] for name, value in _positions(policy, mask).items()}
        if prefixes.after is not None:  # text alone follows a prefix, and what of it is cut off
            whole = torch.tensor([len(prefixes.ids[k]) for k, _ in chosen], device=policy.device)
            first = (prefixes.after[which] - whole + lengths)[:, None]
            positions["position_ids"] = (first + torch.arange(ids.shape[1], device=policy.device)).expand(3, -1, -1)
        return _states(policy, wanted, ids, mask, positions, cache)

    return _once_each(policy, places, responses, run)


def _shifted(contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[int]]:
    """Inputs whose outputs predict the responses: the context's last token, then the response but for its last."""
    return [[context[-1], *response[:-1]] for context, response in zip(contexts, responses, strict=True)]


def _pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids, int64, and the mask of what is not padding, bool; both (B, longest)."""
    width = max(map(len, rows))
    fill = [[pad_id] * (width - len(row)) for row in rows]
    ids = [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]
    mask = torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor(ids, dtype=torch.int64).reshape(len(rows), width), mask.flip(1) if left else mask


def _positions(
    policy: Policy, mask: Tensor, ids: Tensor | None = None, images: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Positions that count real tokens only, for models that take them; with images as the model counts those."""
    if "position_ids" not in inspect.signature(policy.model.forward).parameters:
        return {}
    if ids is not None and images and (found := image_positions(policy.model, ids, mask, images)) is not None:
        return {"position_ids": found}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _states(
    policy: Policy, wanted: Tensor, ids: Tensor, mask: Tensor, more: dict[str, Tensor], cache: Any = None
) -> Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None, **more}
    if cache is not None:
        inputs["past_key_values"] = cache
    with policy.autocast():
        if not policy.split_head:
            return policy.model(**inputs).logits[wanted]  # type: ignore[no-any-return]
        return policy.model.base_model(**inputs).last_hidden_state[wanted]  # type: ignore[no-any-return]


@torch.no_grad()
def _head_is_separable(model: Any, options: dict[str, float], token: int) -> bool:
    """Ask the model: some transform the head's output in ways that no config key tells."""
    ids = torch.full((1, 2), token, device=next(model.parameters()).device)
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        rows = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError):
        return False
    rows = rows * options.get("logit_scale", 1.0)
    if cap := options.get("logit_softcap"):
        rows = cap * torch.tanh(rows / cap)
    return torch.allclose(whole, rows, rtol=1e-4, atol=1e-4)


def _without_quantization(model: Any) -> Any:
    """The same weights in a model whose config does not claim to be quantised, which could not be saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # which "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"policy.device: expected auto, cpu or a usable device, got {name!r}") from error
    return device
