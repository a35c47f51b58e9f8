"""The configuration: one small dataclass per part of the loop, checked where it is made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

from cepo import axes
from cepo.errors import InputError
from cepo.losses import AVERAGES

HINT = "{prompt}\nHint: the answer is {answer}."
SOLUTION_HINT = "{prompt}\nHint: a solution is {solution}."
SIBLING_HINT = "{prompt}\nHint: another attempt was {solution}."
FEEDBACK_HINT = "{prompt}\nHint: {feedback}"
SPLICE = "{answer}\n"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"{name}: expected {expected}, got {got!r}")


def _one_of(name: str, got: str, choices: Collection[str]) -> None:
    _require(got in choices, name, f"one of {', '.join(choices)}", got)


def _check_seed(name: str, seed: int) -> None:
    _require(0 <= seed < 1 << 63, name, "a number in [0, 2^63)", seed)


@dataclass
class PolicyConfig:
    """The model that learns.

    Args:
        model: "embedded", a directory (a run's too: its last checkpoint), or a Hugging Face name.
        gguf_file: file of a GGUF model in that directory (extra `[gguf]`).
        compute_dtype: float32, or bfloat16 by autocast; the weights are float32 either way.
        device: auto, cpu, cuda, cuda:1, ...
        threads: of the CPU; 0: one below ten million parameters, whose operations are too small to share, else all.
    """

    model: str = "embedded"
    gguf_file: str | None = None
    compute_dtype: str = "float32"
    device: str = "auto"
    threads: int = 0

    def check(self) -> None:
        _require(self.threads >= 0, "policy.threads", "at least 0", self.threads)
        _one_of("policy.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))


@dataclass
class TaskConfig:
    """Where the problems come from.

    Args:
        name: addition, reasoning_gym:<dataset>, or jsonl:<path>.
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
    """

    prompts: int = 16
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 0
    mask_truncated: bool = False

    def check(self) -> None:
        _require(self.prompts >= 1, "rollout.prompts", "at least 1", self.prompts)
        _require(self.group_size >= 1, "rollout.group_size", "at least 1", self.group_size)
        _require(0 < self.temperature < float("inf"), "rollout.temperature", "a number above 0", self.temperature)
        _require(self.max_new_tokens is None or self.max_new_tokens >= 1, "rollout.max_new_tokens", "at least 1",
                 self.max_new_tokens)  # fmt: skip
        _require(self.batch_size >= 0, "rollout.batch_size", "at least 0", self.batch_size)


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
        _one_of("teacher.template", self.template, ("hint", "splice"))
        _one_of("teacher.negative", self.negative, ("group", "own"))
        for name, fields in (("hint", ("prompt", "answer")), ("splice", ("answer",)),
                             ("solution_hint", ("prompt", "solution")), ("sibling_hint", ("prompt", "solution")),
                             ("feedback_hint", ("prompt", "feedback"))):  # fmt: skip
            text, told = getattr(self, name), f"{{{fields[-1]}}}"
            try:
                text.format(**dict.fromkeys(fields, ""))
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(f"teacher.{name}: expected no braces but {fields}, got {text!r}") from error
            _require(told in text, f"teacher.{name}", f"a text with {told}", text)


@dataclass
class RewardConfig:
    """How good is a rollout?

    Args:
        name: verifier (the task's own), cross_model_entropy or self_certainty (which read no label).
        success_threshold: a rollout succeeds from this score of the task on, whatever its reward.
        verifier: of cross_model_entropy: embedded (which knows the built-in task), a directory or a Hugging Face name;
            null: embedded.
        empty: what cross_model_entropy gives an empty response; null: it is not scored.
    """

    name: str = "verifier"
    success_threshold: float = 1.0
    verifier: str | None = None
    empty: float | None = None

    def check(self) -> None:
        _one_of("reward.name", self.name, axes.members("rewards"))
        if self.name == "cross_model_entropy":
            self.verifier = self.verifier or "embedded"
        for name in ("verifier", "empty"):
            value = getattr(self, name)
            _require(self.name == "cross_model_entropy" or value is None, f"reward.{name}",
                     f"none, since reward {self.name} has no such option", value)  # fmt: skip


@dataclass
class AdvantageConfig:
    """Relative to its group?

    Args:
        name: grpo, dr_grpo, rloo, maxrl or rl2ml.
        alpha: of rl2ml: 0 (reinforcement), 1 (maximum likelihood) and beyond, or auto (from earlier steps); null: 1.
        baseline: of rl2ml: loo (leave one out) or none; null: loo.
    """

    name: str = "grpo"
    alpha: float | Literal["auto"] | None = None
    baseline: str | None = None

    def check(self) -> None:
        _one_of("advantage.name", self.name, axes.members("advantages"))
        takes = signature(axes.lookup("advantages", self.name)).parameters
        for name in ("alpha", "baseline"):
            value = getattr(self, name)
            _require(name in takes or value is None, f"advantage.{name}",
                     f"none, since advantage {self.name} has no such option", value)  # fmt: skip
            if name in takes and value is None:
                setattr(self, name, takes[name].default)
        if isinstance(self.alpha, float | int):
            _require(0 <= self.alpha < float("inf"), "advantage.alpha", "auto or a number, at least 0", self.alpha)
        if self.baseline is not None:
            _one_of("advantage.baseline", self.baseline, ("loo", "none"))

    @property
    def counts_successes(self) -> bool:
        return "threshold" in signature(axes.lookup("advantages", self.name)).parameters

    @property
    def average(self) -> str | None:
        """The loss average under which alone its objective holds."""
        return getattr(axes.module("advantages", self.name), "AVERAGE", None)


@dataclass
class CreditConfig:
    """Which tokens earned it?

    Args:
        name: cepo, rlsd, rredcot, uniform, or the control shuffled.
        lam: how much of the advantage the credit decides in the first step, in [0, 1].
        lam_steps: steps over which that falls to 0; 0: never; null: as published (cepo 25, rlsd 50).
        eps_w: the weight is clipped to [1 - eps_w, 1 + eps_w], in [0, 1); null: as published (cepo 0.5, rlsd 0.2).
    """

    name: str = "cepo"
    lam: float = 0.5
    lam_steps: int | None = None
    eps_w: float | None = None

    def check(self) -> None:
        _one_of("credit.name", self.name, axes.members("credit"))
        _require(0 <= self.lam <= 1, "credit.lam", "a number in [0, 1]", self.lam)
        module = axes.module("credit", self.name)
        self.lam_steps = module.LAM_STEPS if self.lam_steps is None else self.lam_steps
        self.eps_w = module.EPS_W if self.eps_w is None else self.eps_w
        _require(self.lam_steps >= 0, "credit.lam_steps", "at least 0", self.lam_steps)
        _require(0 <= self.eps_w < 1, "credit.eps_w", "a number in [0, 1)", self.eps_w)


@dataclass
class RredcotConfig:
    """How credit `rredcot` splits a response and values its segments.

    Args:
        mode: return_to_go, difference or scale; only scale multiplies the advantage.
        centre: none, or others (subtract what the group's other rollouts gained on average), in mode return_to_go.
        separators: a segment ends after one of these; null: a newline, and the task's own.
        keywords: or after one of these words.
        min_entropy: of the policy at the next token, in nats, below which it does not end.
        cue: the text that asks for the answer, {answer} filled in; scored from there on, with the end token where
            nothing follows; null: the task's own, else "\\n<answer>{answer}</answer>".
    """

    mode: str = "return_to_go"
    centre: str = "none"
    separators: list[str] | None = None
    keywords: list[str] = field(
        default_factory=lambda: ["wait", "but", "however", "alternatively", "so", "thus", "hence", "therefore", "then",
                                 "now", "next", "finally"])  # fmt: skip
    min_entropy: float = 0.0
    cue: str | None = None

    def check(self) -> None:
        _one_of("rredcot.mode", self.mode, ("return_to_go", "difference", "scale"))
        _one_of("rredcot.centre", self.centre, ("none", "others"))
        _require(self.centre == "none" or self.mode == "return_to_go", "rredcot.centre",
                 f"none with rredcot.mode {self.mode}", self.centre)  # fmt: skip
        for name in ("separators", "keywords"):
            for text in getattr(self, name) or ():
                _require(bool(text), f"rredcot.{name}", "texts that are not empty", text)
        _require(0 <= self.min_entropy < float("inf"), "rredcot.min_entropy", "a number, at least 0", self.min_entropy)
        one = self.cue is None or self.cue.count("{answer}") == 1
        _require(one, "rredcot.cue", "a text with one {answer}", self.cue)


_OF_DISTILLATIONS = ("divergence", "beta", "clip", "top_k", "teacher", "ema")


@dataclass
class LossConfig:
    """How does the policy move?

    Args:
        name: clipped or cispo; or opsd or sdpo, which distil a teacher and have no advantage and no credit.
        clip_low: lower clip of the ratio.
        clip_high: upper clip of the ratio.
        average: token, sequence or constant; null: constant for maxrl and rl2ml, which keep their objective under no
            other, sequence for opsd, else token.
        divergence: of a distillation: forward_kl, reverse_kl or jsd; null: as published (opsd forward_kl, sdpo
            reverse_kl).
        beta: the teacher's share of the mixture in jsd, in [0, 1]; null: 0.5.
        clip: what an entry's term of the divergence is held to, at least 0; null: nothing.
        top_k: the student's most likely tokens that are compared, all others as one; null: as published (opsd all,
            sdpo 100).
        teacher: whose weights a distillation's teacher has: fixed (of the initial policy), ema (an exponential average)
            or policy; null: as published (opsd fixed, sdpo ema).
        ema: how far ema moves towards the policy in each step of the optimiser, in (0, 1]; null: 0.05.
    """

    name: str = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.28
    average: str | None = None
    divergence: str | None = None
    beta: float | None = None
    clip: float | None = None
    top_k: int | None = None
    teacher: str | None = None
    ema: float | None = None

    @property
    def distils(self) -> bool:
        return hasattr(axes.module("losses", self.name), "TEACHER_CONTEXT")

    def check(self) -> None:
        _one_of("loss.name", self.name, axes.members("losses"))
        if self.average is not None:
            _one_of("loss.average", self.average, AVERAGES)
        _require(0 <= self.clip_low <= 1, "loss.clip_low", "a number in [0, 1]", self.clip_low)
        _require(self.clip_high >= 0, "loss.clip_high", "at least 0", self.clip_high)
        if self.distils:
            self._check_distillation()
        for name, taken, why in (
            *((name, self.distils, f"loss {self.name} has no such option") for name in _OF_DISTILLATIONS),
            ("beta", self.divergence == "jsd", "loss.divergence is not jsd"),
            ("ema", self.teacher == "ema", "loss.teacher is not ema"),
        ):
            _require(taken or getattr(self, name) is None, f"loss.{name}", f"none, since {why}", getattr(self, name))

    def _check_distillation(self) -> None:
        module = axes.module("losses", self.name)
        self.average = self.average or module.AVERAGE
        self.divergence = self.divergence or module.DIVERGENCE
        self.teacher = self.teacher or module.TEACHER
        self.top_k = module.TOP_K if self.top_k is None else self.top_k
        _one_of("loss.divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd"))
        _one_of("loss.teacher", self.teacher, ("fixed", "ema", "policy"))
        if self.divergence == "jsd":
            self.beta = 0.5 if self.beta is None else self.beta
            _require(0 <= self.beta <= 1, "loss.beta", "a number in [0, 1]", self.beta)
        if self.teacher == "ema":
            self.ema = 0.05 if self.ema is None else self.ema
            _require(0 < self.ema <= 1, "loss.ema", "a number in (0, 1]", self.ema)
        _require(self.clip is None or 0 <= self.clip < float("inf"), "loss.clip", "a number, at least 0", self.clip)
        _require(self.top_k is None or self.top_k >= 1, "loss.top_k", "at least 1", self.top_k)


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
        prompts_per_pass: groups in one forward and backward pass; 0: all.
        seed: of the problems and the sampling noise.
    """

    steps: int = 40
    lr: float = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    updates_per_batch: int = 1
    prompts_per_pass: int = 0
    seed: int = 0

    def check(self) -> None:
        _require(0 < self.lr < float("inf"), "train.lr", "a number above 0", self.lr)
        _require(self.max_grad_norm > 0, "train.max_grad_norm", "a number above 0", self.max_grad_norm)
        for name, least in (("steps", 1), ("warmup_steps", 0), ("weight_decay", 0), ("updates_per_batch", 1),
                            ("prompts_per_pass", 0)):  # fmt: skip
            value = getattr(self, name)
            _require(value >= least, f"train.{name}", f"at least {least}", value)
        _check_seed("train.seed", self.seed)


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
        _one_of("eval.split", self.split, ("validation", "test"))
        _require(self.problems >= 1, "eval.problems", "at least 1", self.problems)
        _require(self.every >= 0, "eval.every", "at least 0", self.every)
        _require(0 < self.temperature < float("inf"), "eval.temperature", "a number above 0", self.temperature)
        _check_seed("eval.seed", self.seed)


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
        _require(self.every >= 1, "checkpoint.every", "at least 1", self.every)
        _require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass
class DiagnoseConfig:
    """What `cepo diagnose` looks at.

    Args:
        problems: held-out problems, each with a whole group of rollouts, for ranking, leakage and shares.
        batches: batches of training for the variance of the gradient; 0: none.
        eps_w: clip of every method's weights; null: as published for each.
    """

    problems: int = 256
    batches: int = 64
    eps_w: float | None = None

    def check(self) -> DiagnoseConfig:
        _require(self.problems >= 1, "diagnose.problems", "at least 1", self.problems)
        _require(self.batches == 0 or self.batches >= 2, "diagnose.batches", "0 or at least 2", self.batches)
        _require(self.eps_w is None or 0 <= self.eps_w < 1, "diagnose.eps_w", "a number in [0, 1)", self.eps_w)
        return self


@dataclass
class Config:
    """Everything a run is made of.

    Args:
        policy: the model that learns.
        task: where the problems come from.
        rollout: how completions are sampled.
        teacher: what the teachers are told.
        reward: how good is a rollout?
        advantage: relative to its group?
        credit: which tokens earned it?
        rredcot: how credit `rredcot` splits a response and values its segments.
        loss: how does the policy move?
        train: the optimisation.
        eval: held-out accuracy, sampled and greedy.
        checkpoint: what survives a crash.
        backend: of cepo_kernels: auto, triton, cpu, cpu:avx512, cpu:avx2, cpu:portable or reference; `cepo doctor` says
            which run here.
        run_dir: where the run is kept; null: a fresh directory under runs/.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    rredcot: RredcotConfig = field(default_factory=RredcotConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    backend: str = "auto"
    run_dir: str | None = None

    def check(self) -> Config:
        """Fill in what depends on a method's name. Raises InputError, in one line, for the first bad value."""
        for part in (self.policy, self.rollout, self.teacher, self.reward, self.advantage, self.credit,
                     self.rredcot, self.loss, self.train, self.eval, self.checkpoint):  # fmt: skip
            part.check()
        if self.loss.distils:
            for name in ("reward", "advantage", "credit"):
                got, default = getattr(self, name).name, type(getattr(self, name))().name
                _require(got == default, f"{name}.name",
                         f"the default, as loss {self.loss.name} has a teacher and reads no {name}", got)  # fmt: skip
        else:
            _require(self.rollout.group_size >= 2, "rollout.group_size", "at least 2 to compare",
                     self.rollout.group_size)  # fmt: skip
        _require(self.reward.name == "verifier" or not self.advantage.counts_successes, "advantage.name",
                 f"one that does not count successes, which reward {self.reward.name} knows nothing of",
                 self.advantage.name)  # fmt: skip
        _require(self.reward.verifier != "embedded" or self.task.name == "addition", "reward.verifier",
                 f"a model that knows task {self.task.name}", self.reward.verifier)  # fmt: skip
        self.loss.average = self.loss.average or self.advantage.average or "token"
        if check := getattr(axes.module("credit", self.credit.name), "check", None):
            check(self)
        return self
