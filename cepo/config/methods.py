"""The four axes of a method, and what belongs to one of their members."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from inspect import signature
from typing import Literal

from cepo import axes
from cepo.config.checks import one_of, require
from cepo.losses import AVERAGES


@dataclass
class RewardConfig:
    """How good is a rollout?

    Args:
        name: verifier (the task's own), cross_model_entropy or self_certainty (which read no label), or a function with
            TRL's signature, package.module:function or path/to/file.py:function, which is imported and run.
        success_threshold: a rollout succeeds from this score of the task on, whatever its reward; for maxrl and rl2ml,
            which have nothing but the reward, from this reward on.
        verifier: of cross_model_entropy: embedded (which knows the built-in task) or another of cepo/assets
            ("embedded:verifier-worked-0.4m"), a directory or a Hugging Face name; null: embedded.
        empty: what cross_model_entropy gives an empty response; null: it is not scored.
        timeout_s: seconds after which a function that has not returned ends the run; null: never.
    """

    name: str = "verifier"
    success_threshold: float = 1.0
    verifier: str | None = None
    empty: float | None = None
    timeout_s: float | None = None

    @property
    def is_function(self) -> bool:
        return ":" in self.name

    def check(self) -> None:
        if not self.is_function:
            one_of("reward.name", self.name, [*axes.members("rewards"), "package.module:function"])
        require(self.is_function or self.timeout_s is None, "reward.timeout_s",
                 f"none, since reward {self.name} is no function of yours", self.timeout_s)  # fmt: skip
        require(self.timeout_s is None or 0 < self.timeout_s < float("inf"), "reward.timeout_s", "a number above 0",
                 self.timeout_s)  # fmt: skip
        require(math.isfinite(self.success_threshold), "reward.success_threshold", "a finite number",
                 self.success_threshold)  # fmt: skip
        if self.name == "cross_model_entropy":
            self.verifier = self.verifier or "embedded"
        for name in ("verifier", "empty"):
            value = getattr(self, name)
            require(self.name == "cross_model_entropy" or value is None, f"reward.{name}",
                     f"none, since reward {self.name} has no such option", value)  # fmt: skip
        finite = self.empty is None or math.isfinite(self.empty)
        require(finite, "reward.empty", "a finite number, or null", self.empty)


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
        one_of("advantage.name", self.name, axes.members("advantages"))
        takes = signature(axes.lookup("advantages", self.name)).parameters
        for name in ("alpha", "baseline"):
            value = getattr(self, name)
            require(name in takes or value is None, f"advantage.{name}",
                     f"none, since advantage {self.name} has no such option", value)  # fmt: skip
            if name in takes and value is None:
                setattr(self, name, takes[name].default)
        if isinstance(self.alpha, float | int):
            good = not isinstance(self.alpha, bool) and 0 <= self.alpha < float("inf")
            require(good, "advantage.alpha", "auto or a number, at least 0", self.alpha)
        if self.baseline is not None:
            one_of("advantage.baseline", self.baseline, ("loo", "none"))

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
        one_of("credit.name", self.name, axes.members("credit"))
        require(0 <= self.lam <= 1, "credit.lam", "a number in [0, 1]", self.lam)
        module = axes.module("credit", self.name)
        self.lam_steps = module.LAM_STEPS if self.lam_steps is None else self.lam_steps
        self.eps_w = module.EPS_W if self.eps_w is None else self.eps_w
        require(self.lam_steps >= 0, "credit.lam_steps", "at least 0", self.lam_steps)
        require(0 <= self.eps_w < 1, "credit.eps_w", "a number in [0, 1)", self.eps_w)


RREDCOT_MODES = ("return_to_go", "difference", "scale")


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
        one_of("rredcot.mode", self.mode, RREDCOT_MODES)
        one_of("rredcot.centre", self.centre, ("none", "others"))
        require(self.centre == "none" or self.mode == "return_to_go", "rredcot.centre",
                 f"none with rredcot.mode {self.mode}", self.centre)  # fmt: skip
        for name in ("separators", "keywords"):
            for text in getattr(self, name) or ():
                require(bool(text), f"rredcot.{name}", "texts that are not empty", text)
        require(0 <= self.min_entropy < float("inf"), "rredcot.min_entropy", "a number, at least 0", self.min_entropy)
        one = self.cue is None or self.cue.count("{answer}") == 1
        require(one, "rredcot.cue", "a text with one {answer}", self.cue)


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
        one_of("loss.name", self.name, axes.members("losses"))
        if self.average is not None:
            one_of("loss.average", self.average, AVERAGES)
        require(0 <= self.clip_low <= 1, "loss.clip_low", "a number in [0, 1]", self.clip_low)
        require(self.clip_high >= 0, "loss.clip_high", "at least 0", self.clip_high)
        if self.distils:
            self._check_distillation()
        for name, taken, why in (
            *((name, self.distils, f"loss {self.name} has no such option") for name in _OF_DISTILLATIONS),
            ("beta", self.divergence == "jsd", "loss.divergence is not jsd"),
            ("ema", self.teacher == "ema", "loss.teacher is not ema"),
        ):
            require(taken or getattr(self, name) is None, f"loss.{name}", f"none, since {why}", getattr(self, name))

    def _check_distillation(self) -> None:
        module = axes.module("losses", self.name)
        self.average = self.average or module.AVERAGE
        self.divergence = self.divergence or module.DIVERGENCE
        self.teacher = self.teacher or module.TEACHER
        self.top_k = module.TOP_K if self.top_k is None else self.top_k
        one_of("loss.divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd"))
        one_of("loss.teacher", self.teacher, ("fixed", "ema", "policy"))
        if self.divergence == "jsd":
            self.beta = 0.5 if self.beta is None else self.beta
            require(0 <= self.beta <= 1, "loss.beta", "a number in [0, 1]", self.beta)
        if self.teacher == "ema":
            self.ema = 0.05 if self.ema is None else self.ema
            require(0 < self.ema <= 1, "loss.ema", "a number in (0, 1]", self.ema)
        require(self.clip is None or 0 <= self.clip < float("inf"), "loss.clip", "a number, at least 0", self.clip)
        require(self.top_k is None or self.top_k >= 1, "loss.top_k", "at least 1", self.top_k)
