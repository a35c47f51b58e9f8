"""Prompts, a text or a conversation, and what a teacher is told in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cepo.errors import InputError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


def text_of(prompt: Prompt) -> str:
    """A prompt in one text, for people and for telling prompts apart; never for a model."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


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
