"""The methods that a diagnosis compares: one model under every credit, every other advantage and every distillation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Literal

from cepo import axes, rollout
from cepo.config import AdvantageConfig, Config, CreditConfig, LossConfig, RewardConfig
from cepo.config.checks import one_of
from cepo.errors import InputError
from cepo.parts import Parts, held_out, of_method, training_problems

NEEDED = ("cepo", "uniform")
"""Whatever is asked for: the one says what r- is, the other is what policy and gradient would be without any credit."""
_ALPHAS: tuple[float | Literal["auto"], ...] = (0.5, 1.5, "auto")


def methods(
    parts: Parts, eps_w: float | None, names: Collection[str] | None = None, distillation: LossConfig | None = None
) -> tuple[dict[str, Parts], dict[str, str]]:
    """`parts` under each method, by its label; and why those that are not there cannot be.

    Args:
        eps_w: of each credit with weights; None: as published.
        names: of members of the axes, besides `NEEDED`; None: all.
        distillation: the options of that one, those of others being as published.

    Raises InputError for a name that no member has.
    """
    candidates = dict(_candidates(parts.config, eps_w, distillation))
    known = sorted({label.partition(",")[0] for label in candidates})
    for name in names or ():
        one_of("diagnose.methods", name, known)
    found: dict[str, Parts] = {}
    without: dict[str, str] = {}
    for label, config in candidates.items():
        if names is None or label.partition(",")[0] in {*names, *NEEDED}:
            try:
                method = replace(parts, config=config.check(), **of_method(config, parts.policy))
                _check_problems(method)
            except InputError as error:
                without[label] = str(error)
            else:
                found[label] = method
    return found, without


def _check_problems(method: Parts) -> None:
    """Raise InputError for a problem that the method cannot learn from."""
    if method.check_problem:
        problems = [*held_out(method), *training_problems(method)]
        prompts = rollout.encode_prompts(method.policy, problems, method.max_new_tokens)
        for problem, prompt in zip(problems, prompts, strict=True):
            method.check_problem(method, problem, prompt)


def _candidates(config: Config, eps_w: float | None, distillation: LossConfig | None) -> Iterator[tuple[str, Config]]:
    """Labels, which begin with a member's name, and configs, not checked."""
    for name in axes.members("credit"):
        module = axes.module("credit", name)
        credit = CreditConfig(name, config.credit.lam, eps_w=eps_w if module.TEACHERS else None)
        # rredcot's own advantages go with no other; its `scale` multiplies any.
        own = name == "rredcot" and config.rredcot.mode != "scale"
        changed = replace(config, credit=credit, advantage=AdvantageConfig() if own else config.advantage)
        either = "negative" in module.TEACHERS and not hasattr(module, "token_advantages")
        for negative in ("group", "own") if either else ("group",):
            label = name if negative == "group" else f"{name}, own r-"
            yield label, replace(changed, teacher=replace(config.teacher, negative=negative))
    uniform = replace(config, credit=CreditConfig("uniform", config.credit.lam))
    for name in axes.members("advantages"):
        for alpha in _ALPHAS if name == "rl2ml" else (None,):
            advantage = AdvantageConfig(name, alpha)
            advantage.check()
            if advantage != config.advantage:
                loss = replace(config.loss, average=advantage.average or config.loss.average)
                label = name if alpha is None else f"{name}, alpha {alpha}"
                yield label, replace(uniform, advantage=advantage, loss=loss)
    for name in axes.members("losses"):
        loss = distillation if distillation and distillation.name == name else LossConfig(name)
        if loss.distils:
            # At these weights its teacher is the policy, as in the first step of a training that begins with them.
            loss = replace(loss, teacher="policy", ema=None)
            reward = RewardConfig(success_threshold=config.reward.success_threshold)
            yield name, replace(config, loss=loss, reward=reward, advantage=AdvantageConfig(), credit=CreditConfig())
