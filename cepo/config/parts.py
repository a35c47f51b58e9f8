"""The parts of a run that no method changes: model, task, rollouts, teachers, optimisation, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cepo.config.checks import check_seed, check_temperature, one_of, require
from cepo.errors import InputError

HINT = "{prompt}\nHint: the answer is {answer}."
SOLUTION_HINT = "{prompt}\nHint: a solution is {solution}."
SIBLING_HINT = "{prompt}\nHint: another attempt was {solution}."
FEEDBACK_HINT = "{prompt}\nHint: {feedback}"
SPLICE = "{answer}\n"


@dataclass
class LoraConfig:
    """Low-rank factors beside the model's layers, which alone learn. No dropout, which the ratio would not survive.

    Args:
        r: their rank.
        alpha: they count alpha / r times.
        target_modules: names of the layers, or all-linear, all but the head.
    """

    r: int = 8
    alpha: float = 16.0
    target_modules: str | list[str] = "all-linear"

    def check(self) -> None:
        require(self.r >= 1, "policy.lora.r", "at least 1", self.r)
        require(0 < self.alpha < float("inf"), "policy.lora.alpha", "a number above 0", self.alpha)
        require(bool(self.target_modules), "policy.lora.target_modules", "names of layers", self.target_modules)


@dataclass
class PolicyConfig:
    """The model that learns.

    Args:
        model: "embedded" or another of cepo/assets ("embedded:worked-0.8m"), a directory (a run's too: its last
            checkpoint), or a Hugging Face name.
        gguf_file: file of a GGUF model in that directory (extra `[gguf]`).
        compute_dtype: float32, or bfloat16 by autocast; the weights are float32 either way.
        device: auto, cpu, cuda, cuda:1, ...
        threads: of the CPU; 0: one below ten million parameters, whose operations are too small to share, else all.
        lora: train low-rank factors beside its layers alone (extra `[lora]`); null: train all its weights, or
            the factors of an adapter that `model` is.
    """

    model: str = "embedded"
    gguf_file: str | None = None
    compute_dtype: str = "float32"
    device: str = "auto"
    threads: int = 0
    lora: LoraConfig | None = None

    def check(self) -> None:
        if self.lora is not None:
            self.lora.check()
            require(self.gguf_file is None, "policy.gguf_file",
                     "none with policy.lora, whose base has to be loadable by its name", self.gguf_file)  # fmt: skip
        require(self.threads >= 0, "policy.threads", "at least 0", self.threads)
        one_of("policy.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))


@dataclass
class TaskConfig:
    """Where the problems come from.

    Args:
        name: addition, worked:<dataset>, reasoning_gym:<dataset>, jsonl:<path>, or hf:<name or path>.
        options: the task's own options.
    """

    name: str = "addition"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RolloutConfig:
    """How completions are sampled.

    Args:
        prompts: problems per step.
        group_size: rollouts per problem.
        temperature: divides the logits, here and in every log-prob.
        max_new_tokens: longest completion; null: the task's own.
        batch_size: rollouts generated at once; 0: all.
        mask_truncated: leave rollouts that were cut out of the loss; they always score 0 and stay in the group's mean.
        engine: transformers, the policy's own `generate`; or vllm, which has to be installed.
        engine_options: of vllm: arguments of `vllm.LLM`, as gpu_memory_utilization; with enable_sleep_mode it gives its
            memory back while the policy learns.
        importance_cap: of vllm: a token weighs the ratio of the policy's probability to vllm's, but at most this; null:
            2.
    """

    prompts: int = 16
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 0
    mask_truncated: bool = False
    engine: str = "transformers"
    engine_options: dict[str, Any] = field(default_factory=dict)
    importance_cap: float | None = None

    def check(self) -> None:
        one_of("rollout.engine", self.engine, ("transformers", "vllm"))
        if self.engine == "vllm" and self.importance_cap is None:
            self.importance_cap = 2.0
        for name in ("engine_options", "importance_cap"):
            value = getattr(self, name)
            require(self.engine == "vllm" or not value, f"rollout.{name}", "none, since rollout.engine is transformers",
                     value)  # fmt: skip
        cap = self.importance_cap
        require(cap is None or cap >= 1, "rollout.importance_cap", "a number, at least 1", cap)
        require(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        require(self.group_size >= 1, "rollout.group_size", "at least 1", self.group_size)
        check_temperature("rollout.temperature", self.temperature)
        require(self.max_new_tokens is None or self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1",
                 self.max_new_tokens)  # fmt: skip
        require(self.batch_size >= 0, "rollout.batch_size", "at least 0", self.batch_size)


@dataclass
class TeacherConfig:
    """What the teachers are told.

    Args:
        template: hint (a sentence in the user's turn) or splice (text after the assistant's header).
        hint: the user's turn under `hint`; {prompt} and {answer} are filled in.
        splice: the text under `splice`; {answer} is filled in.
        solution_hint: the user's turn for a distillation's teacher who knows a worked solution, {solution}.
        sibling_hint: the same, who knows another attempt that succeeded, {solution}.
        feedback_hint: the same, who knows what was wrong with this one, {feedback}.
        negative: group (one wrong answer for the group, as published) or own (a wrong rollout's own answer).
        share_prefix: prefill each prefix once and share its cache; false: a full pass for every rollout.
        skip: leave out the teacher passes that cannot matter (A = 0, lambda = 0); false only to check that.
    """

    template: str = "hint"
    hint: str = HINT
    splice: str = SPLICE
    solution_hint: str = SOLUTION_HINT
    sibling_hint: str = SIBLING_HINT
    feedback_hint: str = FEEDBACK_HINT
    negative: str = "group"
    share_prefix: bool = True
    skip: bool = True

    def check(self) -> None:
        one_of("teacher.template", self.template, ("hint", "splice"))
        one_of("teacher.negative", self.negative, ("group", "own"))
        for name, fields in (("hint", ("prompt", "answer")), ("splice", ("answer",)),
                             ("solution_hint", ("prompt", "solution")), ("sibling_hint", ("prompt", "solution")),
                             ("feedback_hint", ("prompt", "feedback"))):  # fmt: skip
            text, told = getattr(self, name), f"{{{fields[-1]}}}"
            try:
                text.format(**dict.fromkeys(fields, ""))
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(f"teacher.{name}: expected no braces but {fields}, got {text!r}") from error
            require(told in text, f"teacher.{name}", f"a text with {told}", text)


@dataclass
class TrainConfig:
    """The optimisation.

    Args:
        steps: batches of rollouts.
        lr: AdamW's learning rate.
        warmup_steps: steps over which it rises from 0.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm.
        updates_per_batch: optimiser steps on each batch of rollouts.
        max_skipped: steps in a row that may be skipped, as something in them is not finite, before the run saves its
            state and ends; 0: any number.
        prompts_per_pass: groups in one forward and backward pass of a process, gradients adding up; 0: all.
        gradient_checkpointing: keep each layer's input alone and compute the rest twice.
        seed: of the problems and the sampling noise.
    """

    steps: int = 40
    lr: float = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    updates_per_batch: int = 1
    max_skipped: int = 3
    prompts_per_pass: int = 0
    gradient_checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        require(0 < self.lr < float("inf"), "train.lr", "a number above 0", self.lr)
        require(self.max_grad_norm > 0, "train.max_grad_norm", "a number above 0", self.max_grad_norm)
        for name, least in (("steps", 1), ("warmup_steps", 0), ("weight_decay", 0), ("updates_per_batch", 1),
                            ("max_skipped", 0), ("prompts_per_pass", 0)):  # fmt: skip
            value = getattr(self, name)
            require(value >= least, f"train.{name}", f"at least {least}", value)
        check_seed("train.seed", self.seed)


@dataclass
class EvalConfig:
    """Held-out accuracy, sampled and greedy.

    Args:
        split: validation or test.
        problems: how many.
        every: steps between two evaluations besides the first and the last; 0: none.
        temperature: of the sampled one.
        seed: of its noise, which is the same at every evaluation.
    """

    split: str = "validation"
    problems: int = 512
    every: int = 20
    temperature: float = 1.0
    seed: int = 0

    def check(self) -> None:
        one_of("eval.split", self.split, ("validation", "test"))
        require(self.problems >= 1, "eval.problems", "at least 1", self.problems)
        require(self.every >= 0, "eval.every", "at least 0", self.every)
        check_temperature("eval.temperature", self.temperature)
        check_seed("eval.seed", self.seed)


@dataclass
class CheckpointConfig:
    """What survives a crash.

    Args:
        every: steps between two checkpoints; the last step always gets one.
        keep: how many to keep, at least 1.
    """

    every: int = 20
    keep: int = 2

    def check(self) -> None:
        require(self.every >= 1, "checkpoint.every", "at least 1", self.every)
        require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass
class ReportConfig:
    """Which rollouts are kept token by token, for `cepo tokens`.

    Args:
        every: steps between two of which some are kept, besides the first and the last; 0: none.
        prompts: groups kept of such a step, those with a gradient first, then those with right and wrong.
    """

    every: int = 10
    prompts: int = 2

    def check(self) -> None:
        require(self.every >= 0, "report.every", "at least 0", self.every)
        require(self.prompts >= 1, "report.prompts", "at least 1", self.prompts)


@dataclass
class DiagnoseConfig:
    """What `cepo diagnose` looks at; by default that takes the embedded model some minutes of one core.

    Args:
        problems: held-out problems, each with a whole group of rollouts, for ranking, leakage and shares.
        batches: batches of training for the variance of the gradient; 0: none.
        eps_w: clip of every method's weights; null: as published for each.
        methods: members of the axes that are compared, besides uniform and cepo; null: all. Each takes a forward and
            backward pass of every batch, a teacher its own forward pass, and keeps a gradient the size of the model.
    """

    problems: int = 256
    batches: int = 64
    eps_w: float | None = None
    methods: list[str] | None = None

    def check(self) -> DiagnoseConfig:
        require(self.problems >= 1, "diagnose.problems", "at least 1", self.problems)
        require(self.batches == 0 or self.batches >= 2, "diagnose.batches", "0 or at least 2", self.batches)
        require(self.eps_w is None or 0 <= self.eps_w < 1, "diagnose.eps_w", "a number in [0, 1)", self.eps_w)
        return self
