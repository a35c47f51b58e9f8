"""`cepo diagnose`: is credit credit? Ranking, leakage, shares and the noise of gradients, of one model on one task.

Every method sees the same rollouts and the same weights, through the passes that training would take. Nothing learns.
One that has nothing to say about tokens is in no ranking: `uniform`, the advantages, and the control `shuffled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from cepo.config import DiagnoseConfig, LossConfig
from cepo.diagnose.batches import collect_held_out, observe
from cepo.diagnose.gradient import variance
from cepo.diagnose.leakage import leakage
from cepo.diagnose.methods import methods
from cepo.diagnose.ranking import ranking
from cepo.diagnose.shares import shares
from cepo.errors import InputError
from cepo.parts import Parts


def diagnose(
    parts: Parts,
    options: DiagnoseConfig,
    name: str = "model",
    others: Mapping[str, Callable[[], Parts]] | None = None,
    distillation: LossConfig | None = None,
) -> dict[str, Any]:
    """All diagnoses: a function of the weights, the config and the options. `Estimate` aside it is JSON.

    Args:
        parts: the model, its task and how it would be trained; its own credit and kind of r- do not matter.
        name: label of its leakage.
        others: label and loader of further weights, whose leakage is shown before its own, or why it cannot be.
        distillation: the options of one, those of others being as published.
    """

    def on_problems(loaded: Parts) -> Parts:
        eval_config = replace(loaded.config.eval, problems=options.problems)
        return replace(loaded, config=replace(loaded.config, eval=eval_config))

    def leakage_of(loaded: Parts) -> dict[str, Any]:
        return leakage(methods(loaded, None, ())[0]["uniform"], list(collect_held_out(loaded)))

    rows: dict[str, Any] = {}
    for label, load in (others or {}).items():
        try:
            rows[label] = leakage_of(on_problems(load()))
        except InputError as error:
            rows[label] = str(error)
    parts = on_problems(parts)
    every, without = methods(parts, options.eps_w, options.methods, distillation)
    collected = list(collect_held_out(parts))
    rows[name] = leakage(every["uniform"], collected)
    observed = [observe(every, scored) for scored in tqdm(collected, desc="credit", unit="batch")]
    config = parts.config
    return {
        "model": config.policy.model,
        "task": config.task.name,
        "split": config.eval.split,
        "problems": sum(len(scored.rollouts.problems) for scored in collected),
        "options": {
            **asdict(options),
            "lam": config.credit.lam,
            "prompts": config.rollout.prompts,
            "group_size": config.rollout.group_size,
            "temperature": config.rollout.temperature,
            "average": config.loss.average,
            "eval_seed": config.eval.seed,
            "train_seed": config.train.seed,
        },
        "eps_w": {label: method.config.credit.eps_w for label, method in every.items() if method.teachers},
        "without": without,
        "ranking": ranking(parts, observed),
        "leakage": rows,
        "shares": shares(every, observed),
        "gradient": variance(parts, every, options.batches) if options.batches else None,
    }
