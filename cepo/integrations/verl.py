"""Token credit in verl: the trainers `cepo`, `cepo_colocate_async` and `cepo_separate_async` are verl's own with it.

`register_adv_est` would not do: an advantage estimator sees no workers, so no teacher. Here `_compute_advantage` lets
verl compute its advantages, whichever they are, and multiplies them by (1 - lam) + lam w; w comes from the log-probs of
the responses after prompts that state a right and a wrong answer (`cepo.teacher`), computed by the actor's workers as
the old log-probs are. verl finds this module by the entry point `verl.plugins`.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from cepo import axes
from cepo.config import HINT, SPLICE
from cepo.credit import lam_at
from cepo.errors import InputError, one_line
from cepo.integrations._common import check_effects, check_options, right_and_wrong
from cepo.prompts import hinted
from cepo.tasks._answers import final_answer, same_answer, stated
from cepo.teacher import WrongAnswer, wrong_answer
from cepo_kernels import contrastive_credit

LEAST, BELOW = "0.9.1", "0.10"
_WANTED = f"cepo.integrations.verl: expected verl >= {LEAST}, < {BELOW} (pip install 'verl>={LEAST},<{BELOW}'), got"

try:
    import verl
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    if not Version(LEAST) <= Version(verl.__version__) < Version(BELOW):
        raise ImportError(verl.__version__)
    import transfer_queue as tq
    from tensordict import TensorDict
    from verl.protocol import DataProto
    from verl.trainer.ppo.v1 import (
        PPOTrainer,
        PPOTrainerColocateAsync,
        PPOTrainerSeparateAsync,
        PPOTrainerSync,
        register_trainer,
    )
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.tokenizer import normalize_token_ids
    from verl.workers.utils.padding import response_from_nested, response_to_nested
except ImportError as error:
    raise ImportError(f"{_WANTED} {error}") from error

SECTION = "trainer.v1.cepo"
ROUTER_REPLAY = tuple(f"actor_rollout_ref.actor.{engine}.router_replay.mode" for engine in ("megatron", "veomni"))


@dataclass
class CEPOOptions:
    """The section `trainer.v1.cepo` of verl's config: which credit is given how.

    Args:
        credit: which tokens earned the reward: cepo, rlsd, or uniform, which is verl's trainer as it is.
        lam: how much of the advantage the credit decides in the first step, in [0, 1].
        lam_steps: global steps over which that falls to 0; 0: never; None: as published (cepo 25, rlsd 50).
        eps_w: the weight is clipped to [1 - eps_w, 1 + eps_w]; None: as published (cepo 0.5, rlsd 0.2).
        template: hint (a sentence in the last user turn) or splice (text after the prompt).
        hint: that turn under hint; {prompt} and {answer} are filled in.
        splice: the text under splice; {answer} is filled in.
        answer_column: column of the data that holds the right answer; None: ground_truth in the column reward_model.
        success_threshold: a rollout is right from this score on.
        skip_teachers: leave out the teacher passes that cannot matter (A = 0, lam = 0); False only to check that.
        parse_answer: `module:function` that finds the answer a response's text states, or None; default: the last one
            marked as such, or the only line.
        accepts: `module:function` of (answer, right_answer), whether they are the same; default: as numbers, else text.
    """

    credit: str = "cepo"
    lam: float = 0.5
    lam_steps: int | None = None
    eps_w: float | None = None
    template: str = "hint"
    hint: str = HINT
    splice: str = SPLICE
    answer_column: str | None = None
    success_threshold: float = 1.0
    skip_teachers: bool = True
    parse_answer: str = f"{final_answer.__module__}:{final_answer.__name__}"
    accepts: str = f"{same_answer.__module__}:{same_answer.__name__}"


def read_options(section: Mapping[str, Any] | None) -> CEPOOptions:
    """The options of a config's section; raises InputError for the first that is unknown or bad."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(CEPOOptions), section or {})
        options: CEPOOptions = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{SECTION}: expected the fields of CEPOOptions, got: {one_line(error)}") from error
    check_options(options)
    check_effects(options)
    for name in ("parse_answer", "accepts"):
        _imported(name, getattr(options, name))
    return options


class TokenCredit:
    """Token credit for batches of verl (CEPO, arXiv 2605.19436; RLSD, arXiv 2604.03128).

    Args:
        options: which credit.
        tokenizer: the policy's.
        context: longest sequence the policy takes, in tokens.
        eos_ids: tokens that end a response; one that ends in none of them was truncated, and its answer is not used.
        render_options: what verl renders chats with (`data.apply_chat_template_kwargs`).
    """

    def __init__(
        self,
        options: CEPOOptions,
        tokenizer: Any,
        context: int,
        eos_ids: Sequence[int],
        render_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.options, self._tokenizer, self._context = options, tokenizer, context
        self._eos_ids, self._render_options = frozenset(eos_ids), dict(render_options or {})
        self.teachers: tuple[str, ...] = axes.module("credit", options.credit).TEACHERS
        self._parse_answer = _imported("parse_answer", options.parse_answer)
        self._accepts = _imported("accepts", options.accepts)

    def lam(self, step: int) -> float:
        """lambda in global step 1, 2, ...; a function of nothing else."""
        return lam_at(step, self.options.lam, self.options.lam_steps or 0)

    def needed(self, step: int) -> bool:
        return bool(self.teachers) and (self.lam(step) > 0 or not self.options.skip_teachers)

    def apply(
        self, data: DataProto, step: int, log_prob: Callable[[TensorDict], TensorDict], *, multiple: int = 1
    ) -> dict[str, float]:
        """Multiply the advantages of a batch by the credit, in place, and return metrics.

        Args:
            data: as verl's trainers have it: prompts, responses, attention_mask (of both), response_mask, advantages,
                token_level_scores and, if they are of the workers and not of the rollout engine, old_log_probs, all
                (B, T) or (B, P); uid, raw_prompt, the answers; with several outputs per rollout is_final, bool.
                meta_info: temperature.
            step: the global step, from 1.
            log_prob: a worker group's `compute_log_prob`.
            multiple: what the number of rows in a call of it has to be divisible by.

        Raises:
            InputError: no right answer, or one too long for the context; images; prompts that are rendered otherwise.
        """
        batch, options, lam = data.batch, self.options, self.lam(step)
        advantages, mask = batch["advantages"], batch["response_mask"].bool()
        live = mask.any(dim=1)
        if options.skip_teachers:
            live &= ((advantages != 0) & mask).any(dim=1)
        rows = live.nonzero().flatten().tolist()
        if not rows:
            return {}
        rollouts = _Rollouts(data)
        scores = batch["token_level_scores"].double().sum(dim=-1)
        success, failure = right_and_wrong(scores, options.success_threshold)
        right = {b: self._right_answer(data, b) for b in rows}
        positive = {b: self._context_of(data, rollouts, b, right[b]) for b in rows}
        negative: dict[int, list[int]] = {}
        wrong: dict[int, WrongAnswer | None] = {}
        groups: dict[Any, WrongAnswer | None] = {}
        for b in rows:
            group = rollouts.groups[data.non_tensor_batch["uid"][b]]
            longest = max(len(rollouts.responses[m]) for m in group)
            if len(positive[b]) + longest > self._context:
                raise InputError(
                    f"teacher context of answer {right[b][:40]!r}: expected at most {self._context} tokens, the "
                    f"model's context, got {len(positive[b])} + {longest} of the response"
                )
            if "negative" not in self.teachers:
                continue
            key = data.non_tensor_batch["uid"][b]
            if key not in groups:
                missed = [m for m in group if failure[m]]
                groups[key] = self._wrong_answer(rollouts, missed, scores.tolist(), mask, right[b])
            wrong[b] = chosen = groups[key]
            if chosen is not None:
                ids = self._context_of(data, rollouts, b, chosen.answer)
                if len(ids) + longest <= self._context:
                    negative[b] = ids

        def computed(contexts: Mapping[int, list[int]]) -> Tensor:
            return _log_probs(contexts, rollouts, mask, data.meta_info["temperature"], log_prob, multiple)

        policy = batch.get("old_log_probs")
        if policy is None:
            policy = computed({b: rollouts.prompts[b] for b in rows if b not in negative})
        told_wrong = torch.tensor([b in negative for b in range(len(mask))])
        credit: Any = contrastive_credit(
            computed(positive), computed(negative), advantages,
            policy_logprobs=policy.float(), negative_mask=told_wrong[:, None], lam=lam, eps_w=options.eps_w or 0.0,
        )  # fmt: skip
        tokens = mask & live[:, None]
        if lam > 0:
            batch["advantages"] = torch.where(tokens, credit.advantages.to(advantages.dtype), advantages)

        means = {
            "weight": (credit.weight, tokens),
            "weight_clipped": ((credit.weight - 1).abs() >= (options.eps_w or 0.0) * (1 - 1e-6), tokens),
            "evidence_right": (credit.evidence, tokens & success[:, None]),
            "evidence_wrong": (credit.evidence, tokens & failure[:, None]),
        }
        metrics = {name: value[at].double().mean().item() for name, (value, at) in means.items() if at.any()}
        if "negative" in self.teachers:
            last_line = [b for b in negative if (chosen := wrong[b]) is not None and chosen.last_line]
            same = [b for b in negative if negative[b] == positive[b]]
            metrics |= {
                "negative_missing": 1 - len(negative) / len(rows),
                "negative_last_line": len(last_line) / len(rows),
                "negative_same_as_positive": len(same) / len(rows),
            }
        return metrics

    def _right_answer(self, data: DataProto, b: int) -> str:
        column = self.options.answer_column
        values = data.non_tensor_batch.get("reward_model" if column is None else column)
        value = None if values is None else values[b]
        if column is None:
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if (answer := stated(value)) is None:
            where = "ground_truth of column reward_model" if column is None else f"column {column}"
            raise InputError(
                f"answer_column: expected the right answer, a text or a number, in {where}, got {value!r}; the columns "
                f"are {sorted(data.non_tensor_batch)}"
            )
        return answer

    def _wrong_answer(
        self, rollouts: _Rollouts, missed: Sequence[int], scores: Sequence[float], mask: Tensor, right: str
    ) -> WrongAnswer | None:
        """r- of a group, of which `missed` were wrong, from the tokens that the policy wrote itself."""
        usable = [
            b
            for b in missed
            if rollouts.final[b] and rollouts.responses[b] and rollouts.responses[b][-1] in self._eos_ids
        ]
        written = [
            [token for token, own in zip(rollouts.responses[b], mask[b].tolist(), strict=False) if own] for b in usable
        ]
        return wrong_answer(
            self._tokenizer,
            self._parse_answer,
            lambda answer: self._accepts(answer, right),
            [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in written],
            [scores[b] for b in usable],
        )

    def _context_of(self, data: DataProto, rollouts: _Rollouts, b: int, answer: str) -> list[int]:
        """The prompt of row `b` with `answer` in it: under hint rendered anew as one text, under splice followed."""
        if self.options.template == "splice":
            added = self._tokenizer(self.options.splice.format(answer=answer), add_special_tokens=False)
            return [*rollouts.prompts[b], *added["input_ids"]]
        chats = data.non_tensor_batch.get("raw_prompt")
        if chats is None:
            raise InputError("raw_prompt: expected the chat of each prompt for template hint, got none")
        chat = list(chats[b])
        if self._render(chat) != rollouts.prompts[b]:
            raise InputError(
                f"prompt: expected the rollout's prompt to be its chat and no more for template hint, got one that "
                f"renders otherwise (tools or earlier turns; template splice takes them): {chat!r:.80}"
            )
        return self._render(hinted(self.options.hint, chat, answer=answer))

    def _render(self, chat: list[Any]) -> list[int]:
        ids = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, **self._render_options
        )
        return list(normalize_token_ids(ids))


class _Rollouts:
    """The rows of a batch without their padding, and which of them share a problem."""

    def __init__(self, data: DataProto) -> None:
        images = data.non_tensor_batch.get("multi_modal_inputs")
        if images is not None and any(images):
            raise InputError("multi_modal_inputs: expected prompts of text alone, got images, videos or sounds")
        prompts, responses = data.batch["prompts"], data.batch["responses"]
        kept = data.batch["attention_mask"].bool().split([prompts.shape[1], responses.shape[1]], dim=1)
        self.prompts, self.responses = (
            [row[keep].tolist() for row, keep in zip(values, keeps, strict=True)]
            for values, keeps in zip((prompts, responses), kept, strict=True)
        )
        self.final = data.non_tensor_batch.get("is_final", [True] * len(prompts))
        self.groups: dict[Any, list[int]] = {}
        for b, uid in enumerate(data.non_tensor_batch["uid"]):
            self.groups.setdefault(uid, []).append(b)


def _log_probs(
    contexts: Mapping[int, list[int]], rollouts: _Rollouts, mask: Tensor, temperature: float,
    log_prob: Callable[[TensorDict], TensorDict], multiple: int,
) -> Tensor:  # fmt: skip
    """Log-probs of the responses after `contexts`, by row: (B, T) float32, 0 where there is nothing."""
    result = torch.zeros(mask.shape)
    rows = list(contexts)
    if not rows:
        return result
    used = rows + [rows[0]] * (-len(rows) % multiple)

    def nested(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(v) for v in values], layout=torch.jagged)

    responses = [rollouts.responses[b] for b in used]
    whole = [contexts[b] + rollouts.responses[b] for b in used]
    ones = nested([[1] * len(ids) for ids in responses])
    batch = tu.get_tensordict(
        {
            "input_ids": nested(whole), "position_ids": nested([range(len(ids)) for ids in whole]),
            "prompts": nested([contexts[b] for b in used]), "responses": nested(responses),
            "response_mask": ones, "loss_mask": ones,
        },
        {"temperature": temperature, "calculate_entropy": False, "compute_loss": False},
    )  # fmt: skip
    output = response_from_nested(tu.get(log_prob(batch), "log_probs"), ones)
    for b, row in zip(rows, output.unbind(), strict=False):
        result[b, : len(row)] = row.float()
    return result


class _WithCredit(PPOTrainer):  # type: ignore[misc]
    """What is added to verl's trainers. The workers' machines need nothing of it."""

    MODE: str
    """Which trainer of verl's it is otherwise."""

    def __init__(self, config: Any) -> None:
        self._options = read_options(OmegaConf.select(config, SECTION))
        for name in ROUTER_REPLAY:
            if (mode := OmegaConf.select(config, name, default="disabled")) != "disabled":
                raise InputError(f"{name}: expected disabled, since a teacher has routes of its own, got {mode!r}")
        config = copy.deepcopy(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.MODE  # verl compares it with the names of its own
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._credit = TokenCredit(
            self._options,
            self.tokenizer,
            getattr(model.hf_config.get_text_config(), "max_position_embeddings", None) or 1 << 30,
            [self.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends or [])],
            self.config.data.get("apply_chat_template_kwargs"),
        )

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        if not self._credit.teachers:
            return batch
        start = time.perf_counter()
        metrics["cepo/lam"] = self._credit.lam(self.global_steps)
        if self._credit.needed(self.global_steps):
            data, response_mask = self._fetch(batch)
            with self._old_weights():
                found = self._credit.apply(
                    data, self.global_steps, self.actor_rollout_wg.compute_log_prob, multiple=self._multiple()
                )
            metrics.update({f"cepo/{name}": value for name, value in found.items()})
            fields = {"advantages": response_to_nested(data.batch["advantages"], response_mask)}
            batch = tq.kv_batch_put(
                keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
            )
        metrics["cepo/teacher_seconds"] = time.perf_counter() - start
        return batch

    def _old_weights(self) -> AbstractContextManager[None]:
        """Teachers compute with the weights that the old log-probs are of: mostly those that the actor has."""
        return nullcontext()

    def _bypasses(self) -> bool:
        correction = self.config.algorithm.get("rollout_correction")
        return bool(correction and correction.get("bypass_mode"))

    def _fetch(self, batch: Any) -> tuple[DataProto, Tensor]:
        """The batch as `TokenCredit` reads it, and its response mask, nested."""
        columns = {"uid", "raw_prompt", "multi_modal_inputs", self._options.answer_column or "reward_model"}
        tensors = ["prompts", "responses", "response_mask", "advantages", "rm_scores"]
        if not self._bypasses():  # else they are the rollout engine's
            tensors.append("old_log_probs")
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=[*tensors, *sorted(columns)]
        )
        rows: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(list(data[name].unbind()), layout=torch.jagged) for name in tensors
        }
        padded = {name: values.to_padded_tensor(0) for name, values in rows.items()}
        padded["token_level_scores"] = padded.pop("rm_scores")
        padded["attention_mask"] = torch.cat(
            [self._lengths_to_mask(rows[n].offsets().diff(), padded[n].shape[1]) for n in ("prompts", "responses")], 1
        )
        others = {name: _objects(data[name]) for name in columns if name in data.keys()}  # noqa: SIM118
        last: dict[str, tuple[int, int]] = {}  # of a rollout's outputs, by the index that ends its key
        for b, key in enumerate(batch.keys):
            rollout, _, index = key.rpartition("_")
            last[rollout] = max(last.get(rollout, (-1, -1)), (int(index), b))
        others["is_final"] = np.isin(np.arange(len(batch)), [b for _, b in last.values()])
        temperature = self.config.actor_rollout_ref.rollout.temperature
        proto = DataProto(TensorDict(padded, batch_size=len(batch)), others, {"temperature": temperature})
        return proto, rows["response_mask"]

    def _multiple(self) -> int:
        """What verl splits a batch of rows into: data-parallel ranks, each into micro batches of one size."""
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        rollout = self.config.actor_rollout_ref.rollout
        return int(ranks * (1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu))


@register_trainer("cepo")
class CEPOTrainer(_WithCredit, PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer with token credit: `trainer.v1.trainer_mode=cepo`.

    Raises:
        InputError: an option under `trainer.v1.cepo` is unknown or bad, or the config has what does not go with it.
    """

    MODE = "sync"


@register_trainer("cepo_colocate_async")
class CEPOTrainerColocateAsync(_WithCredit, PPOTrainerColocateAsync):  # type: ignore[misc]
    """The same for verl's `colocate_async`. Evidence is of the policy that is trained, as the old log-probs are."""

    MODE = "colocate_async"


@register_trainer("cepo_separate_async")
class CEPOTrainerSeparateAsync(_WithCredit, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """The same for verl's `separate_async`, whose old log-probs are of the weights of the last synchronisation."""

    MODE = "separate_async"

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """As verl's own `_compute_old_log_prob` does: it has saved those weights as number 0."""
        now, workers = self.local_trigger_step, self.actor_rollout_wg
        if now == 0 or self._bypasses():
            yield
            return
        workers.save_model_to_cpu(now)
        workers.restore_model_from_cpu(0)
        yield  # an error ends the run
        workers.restore_model_from_cpu(now)
        workers.clear_cpu_model(now)


def _objects(values: Any) -> np.ndarray[Any, Any]:
    result = np.empty(len(values), dtype=object)
    result[:] = list(values)
    return result


def _imported(name: str, path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{name}: expected module:function, got {path!r} ({error})") from error
    return found
