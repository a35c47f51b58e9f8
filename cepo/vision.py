"""Models that see: those of `AutoModelForImageTextToText`, whose processor makes tokens of images.

A prompt with images is a list of token ids like any other that also knows what it was made of. Wherever it goes through
the model, what stands for its images there (pixels, their grid, which tokens they are) is made anew, so that only the
passes that need pixels hold any.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor

from cepo.errors import InputError, one_line
from cepo.images import digest, opened

# One for each token, as ids and mask; all else that a processor makes is about the images.
TOKEN_TYPES = "token_type_ids"

logger = logging.getLogger("cepo")


class Seen(list[int]):
    """Token ids of a prompt with images, perhaps with more text behind it, and what the prompt was made of."""

    def __init__(self, ids: Sequence[int], text: str, images: Sequence[Any]) -> None:
        super().__init__(ids)
        self.text, self.images = text, tuple(images)

    @property
    def source(self) -> tuple[str, ...]:
        """The same for prompts that are the same."""
        return (self.text, *map(digest, self.images))

    def __add__(self, more: list[int]) -> Seen:  # type: ignore[override]
        return Seen([*self, *more], self.text, self.images)

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: Any) -> Any:
        """A beginning keeps the images, so it must have their tokens."""
        part = super().__getitem__(index)
        return Seen(part, self.text, self.images) if isinstance(index, slice) and not index.start else part


def identity(context: Sequence[int]) -> tuple[Any, ...]:
    """Equal for contexts that say and show the same."""
    return (*context, *(context.source if isinstance(context, Seen) else ()))


@dataclass(frozen=True)
class Vision:
    """A processor, and what its model takes of what it makes."""

    processor: Any
    takes: frozenset[str]
    places: tuple[int, ...]
    """Tokens that images are put in the place of. No response may have any, since there is no image for it."""

    def render(self, turns: Sequence[Any]) -> str:
        """`turns`, in parts, in the chat template."""
        return str(self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str, images: Sequence[Any]) -> list[int]:
        """Token ids of a rendered prompt."""
        ids: list[int] = self._processed(text, images)["input_ids"][0].tolist()
        return Seen(ids, text, images) if images else ids

    def inputs(self, contexts: Sequence[Sequence[int]], length: int, device: torch.device) -> dict[str, Tensor]:
        """What the model takes beside the ids (B, length) of contexts that are padded on the left, and what follows.

        Contexts lie in a row so that all of them end in the same column, or with it. Nothing where nobody has images.
        """
        seen = [context for context in contexts if isinstance(context, Seen)]
        if not seen:
            return {}
        made = {context.source: self._processed(context.text, context.images) for context in seen}
        end = max(map(len, contexts))
        found = {}
        for name in sorted(self.takes.intersection(*made.values()) - {"input_ids", "attention_mask"}):
            if not name.endswith(TOKEN_TYPES):
                found[name] = _stacked([made[context.source][name] for context in seen])
                continue
            found[name] = torch.zeros((len(contexts), length), dtype=torch.int64)
            for row, context in zip(found[name], contexts, strict=True):
                if isinstance(context, Seen):
                    start = end - len(context)
                    types = made[context.source][name][0, : length - start]
                    row[start : start + len(types)] = types
        return {name: value.to(device) for name, value in found.items()}

    def _processed(self, text: str, images: Sequence[Any]) -> Any:
        beginning = self.processor.tokenizer.bos_token
        told = bool(beginning) and text.startswith(beginning)  # templates differ in whether they say it
        options = {"images": [opened(image) for image in images]} if images else {}
        try:
            made = self.processor(text=[text], return_tensors="pt", add_special_tokens=not told, **options)
        except Exception as error:  # of as many kinds as there are processors
            raise InputError(
                f"prompt: expected text and {len(images)} images that the model's processor takes, got {text[:40]!r}: "
                f"{one_line(error)[:200]}"
            ) from error
        return made


def separate(tokenizer: Any, model: Any) -> tuple[Any, Vision | None]:
    """The tokenizer itself, and what there is beside it where a processor is given."""
    if not hasattr(tokenizer, "image_processor"):
        return tokenizer, None
    config = model.config
    places = [getattr(config, f"{kind}_token_{end}", None) for kind in ("image", "video") for end in ("id", "index")]
    takes = frozenset(inspect.signature(model.forward).parameters)
    return tokenizer.tokenizer, Vision(tokenizer, takes, tuple(sorted({i for i in places if i is not None})))


def image_positions(model: Any, ids: Tensor, mask: Tensor, images: dict[str, Tensor]) -> Tensor | None:
    """Positions in text, height and width (3, B, T) of a model that counts them so; None for any other."""
    index = getattr(model.base_model, "get_rope_index", None)
    if index is None or not images:
        return None
    given = {name: value for name, value in images.items() if name in inspect.signature(index).parameters}
    found: Tensor = index(input_ids=ids, attention_mask=mask.long(), **given)[0]
    return found


def auto_classes(source: str, shape: Any, **options: Any) -> tuple[Any, Any]:
    """What loads a model of config `shape`, and the tokenizer in `source`, or the processor of a model that sees.

    Raises what transformers raises.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    reads = type(shape) in MODEL_FOR_CAUSAL_LM_MAPPING
    if type(shape) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        try:
            processor = AutoProcessor.from_pretrained(source, **options)  # type: ignore[no-untyped-call]
            if hasattr(processor, "image_processor") or not reads:
                return AutoModelForImageTextToText, processor
        except Exception as error:  # of as many kinds as there are processors
            if not reads:
                raise
            logger.warning("policy.model: reads no images, its processor cannot be loaded: %s", one_line(error)[:200])
    return AutoModelForCausalLM, AutoTokenizer.from_pretrained(source, **options)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One after the other; where images were cut into different numbers of tiles, with zeros for the missing ones."""
    widest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        whole = value.new_zeros((value.shape[0], *widest))
        whole[tuple(slice(size) for size in value.shape)] = value
        padded.append(whole)
    return torch.cat(padded)
