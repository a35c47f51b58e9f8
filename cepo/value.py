"""The value of a response so far: the probability that the policy, made to answer now, would give the correct answer.

The answer is cued by the task's own `answer_cue`, after which the end of the sequence is scored with the answer, or by
what the config says. Forward passes of `token_logprobs` alone, at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cepo.credit._segments import Splitter, segment_starts
from cepo.errors import InputError
from cepo.metrics import Clock
from cepo.parts import Parts
from cepo.policy import continued_states, prefill, response_states, token_op
from cepo.tasks import Problem
from cepo.update import Batch, entropy, kernel_options

CUE = "\n<answer>{answer}</answer>"


def encode_answer(parts: Parts, problem: Problem, before: int) -> tuple[list[int], list[int]]:
    """Token ids of cue and answer, and the same as labels, with -100 for the cue.

    Raises InputError if the problem has no answer, or the model's context no room after `before` tokens.
    """
    policy, own = parts.policy, getattr(parts.task, "answer_cue", None)
    if not problem.answer.strip():
        raise InputError(f"credit.name: rredcot needs the answer of every problem, {problem.text[:40]!r} has none")
    form = parts.config.rredcot.cue or (CUE if own is None else own + "{answer}")
    cue, _, after = form.partition("{answer}")
    ids, scored = (policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (cue, problem.answer + after))
    if not after:
        scored = [*scored, policy.eos_ids[0]]
    if before + len(ids) + len(scored) > policy.context:
        raise InputError(
            f"answer after a response to {problem.text[:40]!r}: expected at most {policy.context} tokens, the "
            f"model's context, got {before} + {len(ids) + len(scored)} of cue and answer"
        )
    return ids + scored, [-100] * len(ids) + scored


def segments(parts: Parts, batch: Batch, rows: list[int]) -> list[list[int]]:
    """Where the segments of each response of `rows` start, 0 first."""
    config, tokenizer = parts.config.rredcot, parts.policy.tokenizer
    separators = config.separators
    if separators is None:
        separators = ["\n", *filter(None, [getattr(parts.task, "separator", None)])]
    split = Splitter(lambda ids: str(tokenizer.decode(ids)), separators, config.keywords)
    candidates = [split(ids) for ids in batch.responses(rows)]
    if not config.min_entropy:
        return [segment_starts(found, None, 0.0) for found in candidates]
    lengths = [len(ids) for ids in batch.responses(rows)]
    entropies = entropy(parts, batch, rows, Clock(parts.policy.device)).cpu().split(lengths)
    return [segment_starts(t, h.tolist(), config.min_entropy) for t, h in zip(candidates, entropies, strict=True)]


@torch.no_grad()
def answer_values(parts: Parts, batch: Batch, rows: list[int], starts: Sequence[Sequence[int]]) -> list[Tensor]:
    """P(answer | prompt, response[:t], cue) at every t of `starts`, for each response of `rows`: (S,) float64 each.

    Each response goes through the model once and every value continues from its cache, where that can be cut
    (`teacher.share_prefix`); a start that several rollouts share is valued once.
    """
    policy, size = parts.policy, batch.rollouts.group_size
    prompts, responses = batch.prompts(rows), batch.responses(rows)
    contexts = [prompt + ids[: ts[-1]] for prompt, ids, ts in zip(prompts, responses, starts, strict=True)]
    lengths = [[len(prompt) + t for t in ts] for prompt, ts in zip(prompts, starts, strict=True)]
    answers = [
        encode_answer(parts, batch.rollouts.problems[b // size], ns[-1]) for b, ns in zip(rows, lengths, strict=True)
    ]
    keys = [[(b // size, *context[:n]) for n in ns] for b, context, ns in zip(rows, contexts, lengths, strict=True)]
    wanted = {key: (k, n) for k, ns in enumerate(lengths) for n, key in zip(ns, keys[k], strict=True)}
    places = list(wanted.values())
    prefixes = prefill(policy, contexts) if parts.config.teacher.share_prefix else None
    values: list[Tensor] = []
    for chunk in (places[i : i + len(rows)] for i in range(0, len(places), len(rows))):  # no cache outgrows the first
        tails = [answers[k][0] for k, _ in chunk]
        if prefixes is not None and prefixes.divisible:
            states = continued_states(policy, prefixes, [k for k, _ in chunk], tails, [n for _, n in chunk])
        else:
            states = response_states(policy, [contexts[k][:n] for k, n in chunk], tails)
        labels = torch.tensor([label for k, _ in chunk for label in answers[k][1]], device=states.device)
        with policy.autocast():
            logprobs = token_op(policy)(states, labels, **kernel_options(parts)).logprobs  # 0 for the cue
        values += [part.sum().exp() for part in logprobs.double().cpu().split([len(tail) for tail in tails])]
    known = dict(zip(wanted, values, strict=True))
    return [torch.stack([known[key] for key in ks]) for ks in keys]
