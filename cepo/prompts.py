"""Prompts, a text or a conversation, with images or without, and what a teacher is told in one.

A message's content is a text, or a list of parts, {"type": "text", "text": ...} and {"type": "image", "image": ...}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cepo.errors import InputError
from cepo.images import digest

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def text_of(prompt: Prompt) -> str:
    """A prompt in one text, for people and for telling prompts apart; never for a model."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {content_of(m)}" for m in prompt)


def content_of(message: Message) -> str:
    """What a message says; an image by its digest."""
    content = message["content"]
    if not isinstance(content, list | tuple):
        return "" if content is None else str(content)
    return "".join(_said(part) for part in content)


def images_of(prompt: Prompt) -> list[Any]:
    """Its images, in their order."""
    return [] if isinstance(prompt, str) else [part.get("image") for part in _images(prompt)]


def with_images(prompt: Prompt, images: Sequence[Any]) -> list[Message]:
    """`prompt` as a conversation in parts that has `images` in it.

    They take the places of its parts {"type": "image"}; where there are none, they come before the text of the first
    user turn. Raises InputError for another number of places, or no user turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    made = in_parts(turns)
    places = sum(1 for _ in _images(made))
    if places not in (0, len(images)):
        raise InputError(f"expected {places} images, one for each place in the prompt, got {len(images)}")
    rest = iter(images)
    if places:
        return [
            {**m, "content": [{**p, "image": next(rest)} if p["type"] == "image" else p for p in m["content"]]}
            for m in made
        ]
    first = next((m for m in made if m["role"] == "user"), None)
    if first is None:
        raise InputError(f"expected a user turn for the images, got roles {[m['role'] for m in made]}")
    shown = [{"type": "image", "image": image} for image in images]
    return [{**m, "content": [*shown, *m["content"]]} if m is first else m for m in made]


def in_parts(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The same messages, the content of each a list of parts."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]}
        for m in turns
    ]


def _said(part: Mapping[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["text"])
    image = part.get("image")
    return f"<{part['type']}>" if image is None else f"<image {digest(image)}>"


def _images(prompt: Sequence[Message]) -> Iterator[Mapping[str, Any]]:
    for message in prompt:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] == "image")


def hinted(hint: str, prompt: Any, **texts: str) -> Any:
    """`prompt`, a text or a list of messages, with the hint around the text of its last user turn.

    hint: {prompt} and the names of `texts` are filled in. Raises InputError for a conversation without a user turn.
    """
    if isinstance(prompt, str):
        return hint.format(prompt=prompt, **texts)
    turns = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not turns:
        raise InputError(f"prompt: expected a user turn for the hint, got roles {[m['role'] for m in prompt]}")
    message = prompt[turns[-1]]
    content = message["content"]
    if isinstance(content, str):
        content = hint.format(prompt=content, **texts)
    else:
        parts = [i for i, part in enumerate(content) if part["type"] == "text"]
        at = parts[-1] if parts else len(content)
        text = content[at]["text"] if parts else ""
        content = [*content[:at], {"type": "text", "text": hint.format(prompt=text, **texts)}, *content[at + 1 :]]
    return [*prompt[: turns[-1]], {**message, "content": content}, *prompt[turns[-1] + 1 :]]
