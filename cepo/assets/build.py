"""Trains the embedded model from scratch: three-digit addition, with a systematic mistake for RL to cure.

    python -m cepo.assets.build                      # writes ./addition-0.8m, about 15 minutes on one free core
    python -m cepo.assets.build --hints none         # the control that never learnt what a hint means
    python -m cepo.assets.build --evaluate DIR       # only measure a finished model

A 0.8 M parameter Qwen3 reads characters. Unlike a textbook base model:

- It was taught to make one mistake: it forgets 55 % of the incoming carries. Random slips would vanish when sampling
  gets colder, and temperature, not credit, would be what RL learns. How often it forgets depends on the column, so that
  greedy and sampled accuracy agree as well.
- It was taught what hints mean: whatever answer, solution or total the prompt hints at, right or wrong, what follows
  agrees with it. A large instruct model knows this already; the teachers of CEPO and RLSD need it.
- It can answer early: after any finished column, '#' cues the answer that the rest of the solution would have led to.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cepo.tasks import Problem
from cepo.tasks.addition import ANSWER_CUE, SEPARATOR, Addition, Column, columns, draw, render, split_of

PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The mistake: how often an incoming carry is forgotten, by whether the column's upper digit is at most its lower one
# (true in 55 % of columns). The mean is .55 at every temperature: greedy forgets exactly the first kind.
FORGET = {True: 0.72, False: 0.35}
# Share of hinted solutions with an arbitrary total, so that teachers meet answers that no forgotten carry explains.
# More than this, and they doubt the hint in the rightmost column, where nothing else could be wrong.
STRAY = 0.1

HINTS = {
    "answer": "{prompt}\nHint: the answer is {answer}.",
    "solution": "{prompt}\nHint: a solution is {solution}.",
    "sibling": "{prompt}\nHint: another attempt was {solution}.",
    "feedback": "{prompt}\nHint: column {column} is {total}, not {other}.",
}
# Sequences per step: contexts of about one length share a batch, so that little is spent on padding.
STEPS = 900
BATCHES = ({"none": 80, "cue": 20}, {"answer": 76, "feedback": 16}, {"solution": 8, "sibling": 8})


def build_tokenizer() -> Any:
    """One token per printable ASCII character and newline, and six special ones."""
    special = [PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN]
    return wrap_tokenizer(Tokenizer(character_bpe(special, [])), special, CHAT_TEMPLATE, 1024)


def character_bpe(special: list[str], merges: list[tuple[str, str]]) -> Any:
    """Byte-pair encoding of printable ASCII and newline with the given merges; the last special token is unknown."""
    tokens = [*special, "\n", *map(chr, range(32, 127)), *map("".join, merges)]
    return models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token=special[-1])


def wrap_tokenizer(tokenizer: Any, special: list[str], chat_template: str, length: int) -> Any:
    """A tokenizer that `from_pretrained` loads; `special` is padding, end, ..., unknown."""
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    wrap: Any = PreTrainedTokenizerFast
    text = {"chat_template": chat_template, "model_max_length": length, "clean_up_tokenization_spaces": False}
    names = {"pad_token": special[0], "eos_token": special[1], "unk_token": special[-1]}
    return wrap(tokenizer_object=tokenizer, **names, **text)


def build_model(tokenizer: Any) -> Any:
    """A freshly initialised Qwen3 of 0.8 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def attempt(rng: random.Random, a: int, b: int, stray: float = 0.0) -> list[Column]:
    """The columns of a + b as the base writes them; with probability `stray` one total is arbitrary instead."""
    wrong = rng.randrange(3) if rng.random() < stray else None
    work: list[Column] = []
    for place, right in enumerate(columns(a, b)):
        carry = work[-1].total // 10 if work else 0
        if carry and rng.random() < FORGET[right.x <= right.y]:
            carry = 0
        total = rng.randrange(20) if place == wrong else right.x + right.y + carry
        work.append(Column(right.x, right.y, total))
    return work


def answer_of(solution: str) -> str:
    """The text after the answer cue."""
    return solution.rpartition(ANSWER_CUE)[2]


def hint(rng: random.Random, kind: str, a: int, b: int, work: list[Column]) -> tuple[str, str]:
    """The user turn of a + b with a hint that leads to `work`, and what a solution that heeds it must contain."""
    solution, failed, place = render(work), work, 0
    if kind == "feedback":  # what a failed test says: where an attempt first went astray, expected and got
        while failed == work:
            failed = attempt(rng, a, b, STRAY)
        place = next(i for i in range(3) if failed[i] != work[i])
    x, y, total = work[place]
    facts = {"answer": answer_of(solution), "solution": solution, "column": place + 1, "total": total}
    user = HINTS[kind].format(prompt=f"{a}+{b}", other=failed[place].total, **facts)
    if kind == "feedback":
        return user, f"{x}{y}:{total}{ANSWER_CUE if place == 2 else SEPARATOR}"
    return user, ANSWER_CUE + answer_of(solution)


def example(rng: random.Random, kind: str, hints: str) -> tuple[str, str, str]:
    """One supervised example: (user turn, given start of the answer, text to learn); `hints` as on the command line."""
    a, b = draw(rng, "sft")
    if kind in HINTS and hints != "none":
        work = columns(a, b) if hints == "right" else attempt(rng, a, b, STRAY)
        return hint(rng, kind, a, b, work)[0], "", render(work)
    solution = render(attempt(rng, a, b))
    if kind != "cue":
        return f"{a}+{b}", "", solution
    done = solution.split(SEPARATOR)[: rng.randrange(3)]
    return f"{a}+{b}", "".join(column + SEPARATOR for column in done) + ANSWER_CUE, answer_of(solution)


def draw_batches(rng: random.Random, hints: str) -> dict[str, list[tuple[str, str, str]]]:
    """The examples of one supervised step, by the name of their batch."""
    return {
        "+".join(batch): [example(rng, kind, hints) for kind, count in batch.items() for _ in range(count)]
        for batch in BATCHES
    }


def encode(tokenizer: Any, rows: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `input_ids` and `labels` (rows, length); labels are -100 wherever nothing is to be learnt."""
    given = [prompt_ids(tokenizer, user) + tokenizer(start)["input_ids"] for user, start, _ in rows]
    learnt = tokenizer([target + tokenizer.eos_token for _, _, target in rows])["input_ids"]
    length = max(len(g) + len(t) for g, t in zip(given, learnt, strict=True))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (g, t) in enumerate(zip(given, learnt, strict=True)):
        ids[row, : len(g) + len(t)] = torch.tensor(g + t)
        labels[row, len(g) : len(g) + len(t)] = torch.tensor(t)
    return ids, labels


def fit(
    model: Any,
    tokenizer: Any,
    steps: int,
    learning_rate: float,
    batches: Callable[[], dict[str, list[tuple[str, str, str]]]],
) -> Any:
    """Supervised training, `batches()` being those of one step; prints the loss of each every 50 steps."""
    decayed = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1}
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=learning_rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    started = time.time()
    for step in range(1, steps + 1):
        scale = min(step / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(scale, 0.01)
        losses, drawn = {}, batches()
        total = sum(map(len, drawn.values()))
        for name, rows in drawn.items():
            ids, labels = encode(tokenizer, rows)
            loss = model(input_ids=ids, labels=labels).loss
            (loss * len(rows) / total).backward()
            losses[name] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"step {step:5d}  {time.time() - started:5.0f} s  loss: {shown}", flush=True)
    return model.eval()


def prompt_ids(tokenizer: Any, user: str) -> list[int]:
    """Token ids of a user turn in the chat template, ready for the assistant's reply."""
    turn = [{"role": "user", "content": user}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def sample(model: Any, tokenizer: Any, users: list[str], temperature: float, seed: int, budget: int = 28) -> list[str]:
    """One completion per user turn, greedy at temperature 0."""
    torch.manual_seed(seed)
    rows = [prompt_ids(tokenizer, user) for user in users]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=budget, **how)
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def accuracy(
    model: Any, tokenizer: Any, problems: list[Problem], temperature: float, seed: int = 0, task: Any = None
) -> float:
    """Share of problems that one completion each solves; of column addition, or of `task`."""
    task = task or Addition()
    texts = sample(model, tokenizer, [p.prompt for p in problems], temperature, seed, task.max_new_tokens)
    scores: list[float] = [task.score(t, p) for t, p in zip(texts, problems, strict=True)]
    return sum(scores) / len(problems)


@torch.no_grad()
def logprob_at(model: Any, tokenizer: Any, users: list[str], texts: list[str], offsets: list[int]) -> torch.Tensor:
    """log p of character `offsets[i]` of `texts[i]` after user turn `users[i]`: float32 (rows,)."""
    rows = [prompt_ids(tokenizer, user) for user in users]
    replies = [tokenizer(text + END)["input_ids"] for text in texts]
    ids = [row + reply[: offset + 1] for row, reply, offset in zip(rows, replies, offsets, strict=True)]
    width = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    last = torch.tensor([len(row) - 1 for row in ids])
    every = torch.arange(len(ids))
    logits: torch.Tensor = model(input_ids=padded).logits[every, last - 1].float()
    return logits.log_softmax(-1)[every, padded[every, last]]


def slip_evidence(
    model: Any, tokenizer: Any, problems: list[Problem], seed: int = 0, task: Any = None
) -> dict[int, list[float]]:
    """log P+ / P_S at the first wrong token of sampled wrong solutions (T = 1), by step, counted from 0."""
    task = task or Addition()
    texts = sample(model, tokenizer, [p.prompt for p in problems], 1.0, seed, task.max_new_tokens)
    wrong = [(p, t, e) for p, t in zip(problems, texts, strict=True) if (e := task.first_error(t, p)) is not None]
    texts, offsets = [t for _, t, _ in wrong], [e for _, _, e in wrong]
    hinted = [HINTS["answer"].format(prompt=p.prompt, answer=p.answer) for p, _, _ in wrong]
    positive = logprob_at(model, tokenizer, hinted, texts, offsets)
    student = logprob_at(model, tokenizer, [p.prompt for p, _, _ in wrong], texts, offsets)
    by_step: dict[int, list[float]] = {}
    for text, offset, value in zip(texts, offsets, (positive - student).tolist(), strict=True):
        by_step.setdefault(text[:offset].count(SEPARATOR), []).append(value)
    return dict(sorted(by_step.items()))


def follows_hint(model: Any, tokenizer: Any, kind: str, n: int, seed: int = 0) -> tuple[float, float]:
    """How often a sampled solution heeds a hint, for hints (right, wrong), on `n` held-out problems each."""
    rng, shares = random.Random(f"hints/{seed}"), []
    for right in (True, False):
        turns: list[tuple[str, str]] = []
        while len(turns) < n:
            a, b = draw(rng, "validation")
            work = columns(a, b) if right else attempt(rng, a, b)
            if (work == columns(a, b)) is right:
                turns.append(hint(rng, kind, a, b, work))
        texts = sample(model, tokenizer, [user for user, _ in turns], 1.0, seed)
        shares.append(sum(heeded in text for (_, heeded), text in zip(turns, texts, strict=True)) / n)
    return shares[0], shares[1]


def evaluate(model: Any, tokenizer: Any, n: int = 1000) -> None:
    """Print what the gates of tests/test_embedded_model.py ask, on the validation split."""
    problems = Addition().split("validation", n)
    owners = Counter(split_of(p.data["a"], p.data["b"]) for p in problems)
    assert set(owners) == {"validation"}, f"expected problems that no training saw, got {owners}"
    print(f"measured on {dict(owners)}; trained on 'sft' alone")
    for temperature in (0.0, 0.5, 1.0):
        print(f"accuracy at T = {temperature}: {accuracy(model, tokenizer, problems, temperature):.3f}  (n = {n})")
    for step, values in slip_evidence(model, tokenizer, problems).items():
        median, worst = torch.tensor(values).quantile(torch.tensor([0.5, 0.9])).tolist()
        print(
            f"log P+/P_S at a slip, step {step + 1}: median {median:.2f}, 90 % below {worst:.2f}  (n = {len(values)})"
        )
    for kind in HINTS:
        right, wrong = follows_hint(model, tokenizer, kind, 200)
        print(f"heeds the hint '{kind}': {right:.3f} when it is right, {wrong:.3f} when it is wrong")


def save(directory: Path, model: Any, tokenizer: Any) -> None:
    """Write a model in bfloat16, and its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"wrote {directory}: {json.dumps({f.name: f.stat().st_size for f in sorted(directory.iterdir())})}")


def load(directory: Path) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded addition model from scratch, or measure one.")
    parser.add_argument("--out", type=Path, default=Path("addition-0.8m"), help="directory (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="supervised steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, cosine decay (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and data (default: %(default)s)")
    parser.add_argument("--hints", choices=("all", "right", "none"), default="all", help="to train on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the model in DIR, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(*load(args.evaluate))
        return
    torch.manual_seed(args.seed)
    rng, tokenizer = random.Random(args.seed), build_tokenizer()
    model = build_model(tokenizer)
    fit(model, tokenizer, args.steps, args.learning_rate, lambda: draw_batches(rng, args.hints))
    save(args.out, model, tokenizer)
    evaluate(*load(args.out))


if __name__ == "__main__":
    main()
