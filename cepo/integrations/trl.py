"""Token credit in TRL: `CEPOTrainer` is TRL's `GRPOTrainer` whose advantages carry credit, and in all else the same.

Two methods are overridden. `_calculate_rewards` remembers what was scored. `_generate_and_score_completions` then turns
the advantages (B,) into A ((1 - lam) + lam w), (B, T), which every `loss_type` takes; w comes from the log-probs of the
completions after prompts that state a right and a wrong answer (`cepo.teacher`), computed by TRL's own method, so at
its temperature, in its precision and chunks, with its images. `rredcot` has advantages of its own, from what the model,
made to answer, says before each segment. Both belong to the policy that generated, once per generation batch. In
evaluation there is no credit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from cepo import axes
from cepo.config import HINT, SPLICE
from cepo.credit import lam_at
from cepo.credit.rredcot import mean_of_others, redistribute, segment_advantages
from cepo.errors import InputError
from cepo.integrations._common import CREDITS, check_effects, check_options, right_and_wrong
from cepo.integrations._rredcot import Valued, Valuing, check_rewards, read_options, segment_values, valuing_policy
from cepo.policy import context_length
from cepo.prompts import hinted
from cepo.tasks._answers import final_answer, same_answer, stated
from cepo.teacher import WrongAnswer, wrong_answer
from cepo_kernels import contrastive_credit

LEAST, BELOW = "1.16", "1.17"
_WANTED = f"cepo.integrations.trl: expected TRL >= {LEAST}, < {BELOW} (pip install 'trl>={LEAST},<{BELOW}'), got"

try:
    import trl
    from accelerate.utils import gather_object
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad, split_pixel_values_by_grid, unsplit_pixel_values_by_grid
except ImportError as error:
    raise ImportError(f"{_WANTED}: {error}") from error
if not Version(LEAST) <= Version(trl.__version__) < Version(BELOW):
    raise ImportError(f"{_WANTED} {trl.__version__}")

ANSWER_COLUMNS = ("answer", "solution")
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
          "image_position_ids", "num_images", "num_tiles")  # fmt: skip
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CEPOConfig(GRPOConfig):  # type: ignore[misc]
    """TRL's `GRPOConfig`, and which credit is given how. Raises InputError, a ValueError, for the first bad value."""

    credit: str = _field("cepo", "Which tokens earned the reward: cepo, rlsd, rredcot, or uniform, which is GRPO.")
    lam: float = _field(0.5, "How much of the advantage the credit decides in the first step, in [0, 1].")
    lam_steps: int | None = _field(
        None, "Optimiser steps over which that falls to 0; 0: never; None: as published (cepo 25, rlsd 50)."
    )
    eps_w: float | None = _field(
        None, "The weight is clipped to [1 - eps_w, 1 + eps_w]; None: as published (cepo 0.5, rlsd 0.2)."
    )
    template: str = _field("hint", "hint (a sentence in the last user turn) or splice (text after the prompt).")
    hint: str = _field(HINT, "That turn under hint; {prompt} and {answer} are filled in.")
    splice: str = _field(SPLICE, "The text under splice; {answer} is filled in.")
    answer_column: str | None = _field(
        None, "Column of the data set that holds the right answer; None: answer or solution, whichever there is."
    )
    success_threshold: float = _field(1.0, "A rollout is right from this reward on (the weighted sum, as TRL logs it).")
    skip_teachers: bool = _field(
        True, "Leave out the teacher passes that cannot matter (A = 0, lam = 0); False only to check that."
    )
    rredcot_mode: str = _field(
        "return_to_go", "Under rredcot: return_to_go, difference, or scale, which alone multiplies TRL's advantage."
    )
    rredcot_centre: str = _field(
        "none", "none, or others: subtract what the group's other rollouts gained on average, under return_to_go."
    )
    rredcot_separators: list[str] | None = field(
        default=None, metadata={"help": "A segment ends after one of these; None: a newline."}
    )
    rredcot_keywords: list[str] | None = field(
        default=None, metadata={"help": "Or after one of these words; None: wait, but, so, ... (`RredcotConfig`)."}
    )
    rredcot_min_entropy: float = _field(
        0.0, "The policy's entropy at the next token, in nats, below which a segment does not end."
    )
    rredcot_cue: str | None = _field(
        None, "The text that asks for the answer, {answer} filled in; None: a new line, <answer>{answer}</answer>."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, (*CREDITS, "rredcot"))
        check_effects(self, read_options(self))


class Scored(NamedTuple):
    """What `_calculate_rewards` saw: this process' B rollouts, and the rewards of all processes'."""

    first: int
    """Where this process' rollouts begin among all."""
    examples: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    rewards: Tensor
    """(W,) float64, the weighted sum; NaN: not scored."""
    right: Tensor
    wrong: Tensor
    """(W,), whether it reaches `success_threshold`, or does not."""


class Contexts(NamedTuple):
    """What B completions are read after, and the token types of models with images by their name."""

    ids: list[list[int]]
    types: dict[str, list[list[int]]]


class CEPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer` with token credit (CEPO, arXiv 2605.19436; RLSD, 2604.03128; RREDCoT, 2606.06475).

    Args:
        model, reward_funcs, args, ...: as for `GRPOTrainer`, but `args` is a `CEPOConfig`.
        parse_answer: the answer that a completion's text states, or None; default: the last one marked as such, or the
            only line.
        accepts: `f(answer, right_answer) -> bool`, whether the two are the same; default: as numbers, else as text.

    Raises:
        InputError: no right answer in the data, or one too long for the model's context; or what `rredcot` does not go
            with.
    """

    _tag_names = ("trl", "grpo", "cepo")

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: CEPOConfig | None = None,
        *others: Any,
        parse_answer: Callable[[str], str | None] = final_answer,
        accepts: Callable[[str, str], bool] = same_answer,
        **options: Any,
    ) -> None:
        if not isinstance(args, CEPOConfig):
            raise TypeError(f"args: expected a CEPOConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *others, **options)
        self._parse_answer, self._accepts = parse_answer, accepts
        self._teachers: tuple[str, ...] = axes.module("credit", args.credit).TEACHERS
        self._context = context_length(self.model)
        self._scored: Scored | None = None
        self._valuing: Valuing | None = self._make_valuing() if args.credit == "rredcot" else None
        if self._teachers or self._valuing:
            self._check_answers()

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        per_function: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = (per_function.double() * self.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards[per_function.isnan().all(dim=1)] = float("nan")
        first = self.accelerator.process_index * len(prompts)
        right, wrong = right_and_wrong(rewards, self.args.success_threshold)
        self._scored = Scored(first, inputs, prompts, completions, completion_ids_list, rewards, right, wrong)
        return per_function

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        training = self.model.training
        output = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None
        if not training or not (self._teachers or self._valuing):
            return output
        assert scored is not None
        start = time.perf_counter()
        if self._valuing:
            with _evaluating(self.model):
                self._add_segment_credit(self._valuing, output, scored)
            self._log("value_seconds", time.perf_counter() - start)
            return output
        lam = lam_at(self.state.global_step + 1, self.args.lam, self.args.lam_steps)
        if lam > 0 or not self.args.skip_teachers:
            self._add_credit(output, scored, lam)
        self._log("lam", lam)
        self._log("teacher_seconds", time.perf_counter() - start)
        return output

    def _add_credit(self, output: dict[str, Any], scored: Scored, lam: float) -> None:
        """Put (B, T) advantages into `output`, unless they are 0 in every process."""
        advantages, mask = output["advantages"], output["completion_mask"].bool()
        live = torch.ones_like(mask[:, 0])
        if self.args.skip_teachers:
            live = (advantages != 0) & mask.any(dim=1)
        if not self._most(live.sum()):
            return
        rows = live.nonzero().flatten().tolist()
        right = [self._right_answer(example) for example in scored.examples]
        longest, wrong = zip(*self._wrong_answers(scored, right), strict=True)
        policy = self._policy_contexts(output)
        positive = self._teacher_contexts(policy, scored.prompts, right)
        for b in rows:
            if len(positive.ids[b]) + longest[b] > self._context:
                raise InputError(
                    f"teacher context of answer {right[b][:40]!r}: expected at most {self._context} tokens, the "
                    f"model's context, got {len(positive.ids[b])} + {longest[b]} of the completion"
                )
        negative = positive
        if any(wrong):
            told = [answer if chosen is None else chosen.answer for chosen, answer in zip(wrong, right, strict=True)]
            negative = self._teacher_contexts(policy, scored.prompts, told)
        has_negative = [
            chosen is not None and len(ids) + length <= self._context
            for chosen, ids, length in zip(wrong, negative.ids, longest, strict=True)
        ]
        told_wrong = torch.tensor(has_negative, device=mask.device)
        credit: Any = contrastive_credit(
            self._logprobs(output, positive, rows),
            self._logprobs(output, negative, [b for b in rows if has_negative[b]]),
            advantages[:, None],
            policy_logprobs=self._logprobs(output, policy, [b for b in rows if not has_negative[b]]),
            negative_mask=told_wrong[:, None],
            lam=lam,
            eps_w=self.args.eps_w,
        )
        output["advantages"] = credit.advantages

        tokens = mask & live[:, None] & output.get("tool_mask", mask).bool()
        mine = slice(scored.first, scored.first + len(right))
        means: dict[str, tuple[Any, Tensor]] = {
            "weight": (credit.weight, tokens),
            "weight_clipped": ((credit.weight - 1).abs() >= self.args.eps_w * (1 - 1e-6), tokens),
            "evidence_right": (credit.evidence, tokens & scored.right[mine, None]),
            "evidence_wrong": (credit.evidence, tokens & scored.wrong[mine, None]),
        }
        if "negative" in self._teachers:
            last_line = [chosen is not None and chosen.last_line for chosen in wrong]
            same = [ids == others for ids, others in zip(positive.ids, negative.ids, strict=True)]
            means |= {
                "negative_missing": (~told_wrong, live),
                "negative_last_line": (told_wrong & torch.tensor(last_line, device=mask.device), live),
                "negative_same_as_positive": (told_wrong & torch.tensor(same, device=mask.device), live),
            }
        self._log_means(means)

    def _make_valuing(self) -> Valuing:
        check_rewards(self.args.rredcot_mode, self.reward_funcs, self.reward_weights.tolist())
        if self._is_vlm:
            raise InputError(f"credit: expected a model of text alone for rredcot, got {type(self.model).__name__}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("credit: expected no FSDP and no DeepSpeed, as rredcot needs the model in one piece")
        with _evaluating(self.model):
            return Valuing(valuing_policy(self.model, self._tokenizer, self.args), read_options(self.args))

    def _add_segment_credit(self, valuing: Valuing, output: dict[str, Any], scored: Scored) -> None:
        """Put the (B, T) advantages of `rredcot` into `output`; 0 where there is no reward."""
        config, mask, given = valuing.config, output["completion_mask"].bool(), output["advantages"]
        own = slice(scored.first, scored.first + len(given))
        rewards = scored.rewards[own]
        live = mask.any(dim=1) & ~rewards.isnan()
        if config.mode == "scale" and self.args.skip_teachers:
            live &= given != 0
        prompts = self._policy_contexts(output).ids
        rows, size = live.nonzero().flatten().tolist(), self.args.per_device_train_batch_size
        found: dict[int, Valued] = {}
        for some in (rows[start : start + size] for start in range(0, len(rows), size)):
            valued = segment_values(
                valuing,
                [prompts[b] for b in some],
                [output["completion_ids"][b][mask[b]].tolist() for b in some],
                [self._right_answer(scored.examples[b]) for b in some],
                [_text(scored.prompts[b]) for b in some],
                self.args.temperature,
            )
            found.update(zip(some, valued, strict=True))
        reward, right = rewards.tolist(), scored.right[own].tolist()
        gains: dict[int, float] = {}
        if config.centre == "others":  # who may be in another process
            mine = [reward[b] - found[b].values[0].item() if b in found else None for b in range(len(reward))]
            gains = {m: gain for m, gain in enumerate(gather_object(mine)) if gain is not None}
        advantages = torch.zeros(mask.shape, device=mask.device)
        segments = [torch.zeros(3, 0, dtype=torch.float64)]
        for b, (lengths, v) in found.items():
            baseline = mean_of_others(gains, scored.first + b, self.num_generations)
            worth = segment_advantages(config.mode, v, reward[b], given[b].item(), baseline)
            advantages[b][mask[b]] = worth.float().repeat_interleave(lengths).to(mask.device)
            segments.append(torch.stack([v, redistribute(v, reward[b]).abs(), torch.full_like(v, right[b])]))
        output["advantages"] = advantages
        v, moved, success = torch.cat(segments, dim=1).to(mask.device)
        means = {
            "segments": torch.tensor([part.shape[1] for part in segments[1:]], device=mask.device),
            "segment_reward": moved,
            "value_mean": v,
            "value_outcome": success,
            "value_brier": (v - success).square(),
        }
        self._log_means({name: (x, torch.ones_like(x, dtype=torch.bool)) for name, x in means.items()})

    def _check_answers(self) -> None:
        """Raise InputError for the first row without a right answer; of a stream, for columns that have none."""
        data: Any = self.train_dataset
        columns = getattr(data, "column_names", None) or ()
        if columns:
            self._right_answer(dict.fromkeys(columns, "any"))
        if not isinstance(data, Dataset) or data.format["type"] == "custom":  # which makes rows as they are asked for
            return
        names = [name for name in self._answer_columns if name in columns]
        for row, values in enumerate(zip(*(data[name][:] for name in names), strict=True)):
            try:
                self._right_answer(dict(zip(names, values, strict=True)))
            except InputError as error:
                raise InputError(f"{error}, row {row} of train_dataset") from error

    @property
    def _answer_columns(self) -> tuple[str, ...]:
        return ANSWER_COLUMNS if self.args.answer_column is None else (self.args.answer_column,)

    def _right_answer(self, example: dict[str, Any]) -> str:
        wanted = self._answer_columns
        for name in wanted:
            if (value := example.get(name)) is None:
                continue
            if (answer := stated(value)) is None:
                raise InputError(
                    f"answer_column: expected the right answer, a text or a number, in column {name}, got {value!r:.80}"
                )
            return answer
        raise InputError(
            f"answer_column: expected the right answer in column {' or '.join(wanted)}, got {sorted(example)}, "
            "where it is missing or None (remove_unused_columns would drop it)"
        )

    def _wrong_answers(self, scored: Scored, right: Sequence[str]) -> list[tuple[int, WrongAnswer | None]]:
        """For each of B rollouts the length of its group's longest completion, in tokens, and its group's r-.

        A group may have members in several processes, so all are gathered.
        """
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        everyone = gather_object(
            [
                (_text(completion), len(ids), bool(ids) and ids[-1] in ends)
                for completion, ids in zip(scored.completions, scored.completion_ids, strict=True)
            ]
        )
        rewards, missed = scored.rewards.tolist(), scored.wrong.tolist()

        @cache
        def of_group(group: int, answer: str) -> tuple[int, WrongAnswer | None]:
            members = range(group * self.num_generations, (group + 1) * self.num_generations)
            longest = max(everyone[m][1] for m in members)
            if "negative" not in self._teachers:
                return longest, None
            usable = [m for m in members if missed[m] and everyone[m][2]]
            return longest, wrong_answer(
                self._tokenizer,
                self._parse_answer,
                lambda stated: self._accepts(stated, answer),
                [everyone[m][0] for m in usable],
                [rewards[m] for m in usable],
            )

        return [of_group((scored.first + b) // self.num_generations, answer) for b, answer in enumerate(right)]

    def _policy_contexts(self, output: dict[str, Any]) -> Contexts:
        keep = output["prompt_mask"].bool()

        def unpadded(values: Tensor) -> list[list[int]]:
            return [row[kept].tolist() for row, kept in zip(values[:, : keep.shape[1]], keep, strict=True)]

        types = {name: unpadded(output[name]) for name in TOKEN_TYPES if name in output}
        return Contexts(unpadded(output["prompt_ids"]), types)

    def _teacher_contexts(self, policy: Contexts, prompts: Sequence[Any], answers: Sequence[str]) -> Contexts:
        """The prompts with `answers` in them: under hint rendered anew as one text, under splice followed by it."""
        if self.args.template == "hint":
            told = [hinted(self.args.hint, p, answer=a) for p, a in zip(prompts, answers, strict=True)]
            ids, _, fields = self._tokenize_prompts(told)
            types = {name: [list(map(int, row)) for row in fields[name]] for name in TOKEN_TYPES if name in fields}
            return Contexts(ids, types)
        added = [
            self._tokenizer(self.args.splice.format(answer=answer), add_special_tokens=False)["input_ids"]
            for answer in answers
        ]
        types = {
            name: [row + [0] * len(more) for row, more in zip(rows, added, strict=True)]
            for name, rows in policy.types.items()
        }
        return Contexts([ids + more for ids, more in zip(policy.ids, added, strict=True)], types)

    def _logprobs(self, output: dict[str, Any], contexts: Contexts, rows: list[int]) -> Tensor:
        """Log-probs of the completions of `rows` after their contexts: (B, T) float32, 0 where there is nothing.

        Every process calls it, and makes as many passes as the one with the most rows: those of a sharded model meet.
        """
        mask, size = output["completion_mask"], self.args.per_device_train_batch_size
        result = torch.zeros(mask.shape, device=mask.device)
        passes = -(-self._most(torch.tensor(len(rows), device=mask.device)) // size)
        if not passes:
            return result
        used = rows + [rows[0] if rows else 0] * max((passes - 1) * size + 1 - len(rows), 0)

        def left(values: list[list[int]], fill: int) -> Tensor:
            chosen = [torch.tensor(values[b]) for b in used]
            padded: Tensor = pad(chosen, fill, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)
            return padded.to(mask.device)

        def whole(before: Tensor, within: Tensor) -> Tensor:
            return torch.cat([before, within[used][:, -mask.shape[1] :]], dim=1)

        inputs = _rows_of_images(output, used)
        for name in TOKEN_TYPES:
            if name in output:
                types = contexts.types.get(name) or [[0] * len(ids) for ids in contexts.ids]
                inputs[name] = whole(left(types, 0), output[name])
        ids = whole(left(contexts.ids, self._tokenizer.pad_token_id), output["completion_ids"])
        attention = whole(left([[1] * len(ids) for ids in contexts.ids], 0), mask)
        with torch.no_grad(), _evaluating(self.model):
            logprobs, *_ = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, mask.shape[1], batch_size=size, **inputs
            )
        result[rows] = logprobs[: len(rows)].float()
        return result

    def _most(self, count: Tensor) -> int:
        """The largest `count` of all processes."""
        return int(self.accelerator.gather(count.reshape(1)).max())

    def _log(self, name: str, value: float) -> None:
        self._metrics["train"][f"cepo/{name}"].append(value)

    def _log_means(self, means: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Log the mean of each tensor where its mask is True, over all processes; NaN, which TRL skips, if nowhere."""
        sums = [x for value, mask in means.values() for x in (value.double().where(mask, 0.0).sum(), mask.sum())]
        totals = self.accelerator.gather(torch.stack(sums)[None]).sum(dim=0).view(-1, 2)
        for name, (total, count) in zip(means, totals.tolist(), strict=True):
            self._log(name, total / count if count else float("nan"))


def _rows_of_images(output: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The images of `rows`, as TRL cuts and joins them itself."""
    given = {name: output[name] for name in IMAGES if output.get(name) is not None}
    chosen = {
        name: value[rows] if isinstance(value, Tensor) else [value[b] for b in rows]
        for name, value in split_pixel_values_by_grid(given).items()
    }
    merged: dict[str, Any] = unsplit_pixel_values_by_grid(chosen)
    return merged


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off: teachers are compared token by token. It also leaves the random numbers where they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # train() would reach frozen ones too
            module.training = True


def _text(completion: Any) -> str:
    """The text of a completion: of its last message, if it is a list of them."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
