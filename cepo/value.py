"""The value of a response so far: the probability that the policy, made to answer now, would give the correct answer.

The answer is cued by the task's own `answer_cue`, after which the end of the sequence is scored with the answer, or by
what the config says. Forward passes of `token_logprobs` alone, at the sampling temperature. `cut` and `values_at` need
no more than a policy and ids, which the trainers of others have, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cepo.config import RredcotConfig
from cepo.credit._segments import Splitter, segment_starts
from cepo.errors import InputError
from cepo.parts import Parts
from cepo.policy import Policy, continued_states, prefill, response_states, token_op
from cepo.tasks import Problem
from cepo.update import Batch, kernel_options
from cepo.vision import identity

CUE = "\n<answer>{answer}</answer>"


def encode_answer(parts: Parts, problem: Problem, before: int) -> tuple[list[int], list[int]]:
    """`asked` of a problem, with the cue of the config or the task. Raises InputError, also if it has no answer."""
    own = getattr(parts.task, "answer_cue", None)
    if not problem.answer.strip():
        raise InputError(f"credit.name: rredcot needs the answer of every problem, {problem.text[:40]!r} has none")
    form = parts.config.rredcot.cue or (CUE if own is None else own + "{answer}")
    return asked(parts.policy, form, problem.answer, before, problem.text)


def asked(policy: Policy, form: str, answer: str, before: int, text: str) -> tuple[list[int], list[int]]:
    """Token ids of cue and answer, and the same as labels, with -100 for the cue.

    Args:
        form: the cue, with {answer} in it; where nothing follows that, the end token is scored as well.
        before: tokens that stand before the cue.
        text: the problem's, for the error.

    Raises:
        InputError: the model's context has no room for that.
    """
    cue, _, after = form.partition("{answer}")
    ids, scored = (policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (cue, answer + after))
    if not after:
        scored = [*scored, policy.eos_ids[0]]
    if before + len(ids) + len(scored) > policy.context:
        raise InputError(
            f"answer after a response to {text[:40]!r}: expected at most {policy.context} tokens, the "
            f"model's context, got {before} + {len(ids) + len(scored)} of cue and answer"
        )
    return ids + scored, [-100] * len(ids) + scored


def segments(parts: Parts, batch: Batch, rows: list[int]) -> list[list[int]]:
    """Where the segments of each response of `rows` start, 0 first."""
    own = filter(None, [getattr(parts.task, "separator", None)])
    given = batch.prompts(rows), batch.responses(rows)
    return cut(parts.policy, parts.config.rredcot, *given, separators=["\n", *own], **kernel_options(parts))


@torch.no_grad()
def cut(
    policy: Policy,
    config: RredcotConfig,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    separators: Sequence[str] = ("\n",),
    **options: Any,
) -> list[list[int]]:
    """Where the segments of each response start, 0 first.

    separators: where the config names none; options: of the kernels.
    """
    separators = separators if config.separators is None else config.separators
    split = Splitter(lambda ids: str(policy.tokenizer.decode(ids)), separators, config.keywords)
    candidates = [split(ids) for ids in responses]
    if not config.min_entropy:
        return [segment_starts(found, None, 0.0) for found in candidates]
    states = response_states(policy, prompts, responses)
    labels = torch.tensor([token for ids in responses for token in ids], device=states.device)
    with policy.autocast():
        entropy = token_op(policy)(states, labels, return_entropy=True, **options).entropy
    assert entropy is not None
    entropies = entropy.cpu().split([len(ids) for ids in responses])
    return [segment_starts(t, h.tolist(), config.min_entropy) for t, h in zip(candidates, entropies, strict=True)]


def answer_values(parts: Parts, batch: Batch, rows: list[int], starts: Sequence[Sequence[int]]) -> list[Tensor]:
    """`values_at` the `starts` of each response of `rows`."""
    prompts, responses = batch.prompts(rows), batch.responses(rows)
    problems = [batch.rollouts.problems[b // batch.rollouts.group_size] for b in rows]
    answers = [
        encode_answer(parts, problem, len(prompt) + ts[-1])
        for problem, prompt, ts in zip(problems, prompts, starts, strict=True)
    ]
    share = parts.config.teacher.share_prefix
    return values_at(parts.policy, prompts, responses, starts, answers, share, **kernel_options(parts))


@torch.no_grad()
def values_at(
    policy: Policy,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    starts: Sequence[Sequence[int]],
    answers: Sequence[tuple[list[int], list[int]]],
    share_prefix: bool = True,
    **options: Any,
) -> list[Tensor]:
    """P(answer | prompt, response[:t], cue) at every t of `starts`, for each response: (S,) float64 each.

    Each response goes through the model once and every value continues from its cache, where that can be cut and
    `share_prefix` is True; a start that several rollouts share is valued once.

    Args:
        answers: each response's cue and answer, from `asked`.
        options: of the kernels.
    """
    contexts = [prompt + ids[: ts[-1]] for prompt, ids, ts in zip(prompts, responses, starts, strict=True)]
    lengths = [[len(prompt) + t for t in ts] for prompt, ts in zip(prompts, starts, strict=True)]
    shown = [(*identity(prompt), *map(tuple, answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    keys = [[(told, *context[:n]) for n in ns] for told, context, ns in zip(shown, contexts, lengths, strict=True)]
    wanted = {key: (k, n) for k, ns in enumerate(lengths) for n, key in zip(ns, keys[k], strict=True)}
    places = list(wanted.values())
    prefixes = prefill(policy, contexts) if share_prefix else None
    values: list[Tensor] = []
    for chunk in (places[i : i + len(prompts)] for i in range(0, len(places), len(prompts))):  # no cache outgrows it
        tails = [answers[k][0] for k, _ in chunk]
        if prefixes is not None and prefixes.divisible:
            states = continued_states(policy, prefixes, [k for k, _ in chunk], tails, [n for _, n in chunk])
        else:
            states = response_states(policy, [contexts[k][:n] for k, n in chunk], tails)
        labels = torch.tensor([label for k, _ in chunk for label in answers[k][1]], device=states.device)
        with policy.autocast():
            logprobs = token_op(policy)(states, labels, **options).logprobs  # 0 for the cue
        values += [part.sum().exp() for part in logprobs.double().cpu().split([len(tail) for tail in tails])]
    known = dict(zip(wanted, values, strict=True))
    return [torch.stack([known[key] for key in ks]) for ks in keys]
