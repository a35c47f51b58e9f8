"""All cells of a comparison into one dictionary: what each method is worth, and whether they met on equal terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from cepo import axes
from cepo.compare.cells import Record, Store
from cepo.compare.plan import METRICS, Cell, Plan
from cepo.compare.statistics import LEVEL, area, detectable, holm, mean_sd, paired, verdict
from cepo.config import Config

# Every other phase of a step is there for the credit's sake.
_NO_CREDIT = ("rollout", "reward", "policy", "update", "other")


def tried(plan: Plan, store: Store, task: str, method: str) -> dict[float, list[float | None]]:
    """Validation accuracy at the end of each tuning cell, by learning rate; None where one is missing or failed."""
    result = {}
    for lr in plan.rates:
        records = [store.get(plan.tuning(task, method, lr, seed)) for seed in plan.tuning_seeds]
        result[lr] = [_end(record, plan.metric) for record in records]
    return result


def chosen(plan: Plan, store: Store, task: str, method: str) -> float | None:
    """The learning rate of best mean accuracy in tuning, of equals the smallest; None while cells are missing.

    A rate with a failed cell is none to choose from.
    """
    if not plan.rates:
        return plan.configs[task, method].train.lr
    tuning = [plan.tuning(task, method, lr, seed) for lr in plan.rates for seed in plan.tuning_seeds]
    if any(store.get(cell) is None for cell in tuning):
        return None
    means = {lr: _mean(values) for lr, values in tried(plan, store, task, method).items()}
    known = {lr: mean for lr, mean in means.items() if mean is not None}
    return max(known, key=lambda lr: (known[lr], -lr), default=None)


def schedule(plan: Plan, store: Store) -> Iterator[Cell]:
    """All cells in their order, final ones once their rate is chosen: seed by seed, so that a part can be compared."""
    for task in plan.tasks:
        yield plan.base(task)
        for lr in plan.rates:
            for seed in plan.tuning_seeds:
                yield from (plan.tuning(task, method, lr, seed) for method in plan.methods)
        for seed in plan.seeds:
            for method in plan.methods:
                if (lr_of := chosen(plan, store, task, method)) is not None:
                    yield plan.final(task, method, lr_of, seed)


def summarise(plan: Plan, store: Store) -> Record:
    """What results.json holds."""
    records = [(cell.name, store.get(cell)) for cell in schedule(plan, store)]
    software = []
    for _, record in records:
        if record is not None and "error" not in record and record["software"] not in software:
            software.append(record["software"])
    limit = plan.cell_seconds or float("inf")
    return {
        "plan": {"name": plan.name, "reference": plan.reference, "metric": plan.metric, "seeds": list(plan.seeds),
                 "rates": list(plan.rates), "tuning_seeds": list(plan.tuning_seeds), "pass_at": dict(plan.pass_at),
                 "test_problems": plan.test_problems, "cell_seconds": plan.cell_seconds, "level": LEVEL},
        "tasks": {task: _task(plan, store, task) for task in plan.tasks},
        "cells": {
            "planned": len(plan),
            "finished": sum(record is not None and "error" not in record for _, record in records),
            "failed": {name: record["error"] for name, record in records if record is not None and "error" in record},
            "too_long": {name: record["wall_seconds"] for name, record in records
                         if record is not None and record.get("wall_seconds", 0.0) > limit},
        },
        "software": software,
    }  # fmt: skip


def whole(summary: Record) -> bool:
    """Whether every cell is finished and every check held."""
    cells = summary["cells"]
    return cells["finished"] == cells["planned"] and all(
        check["held"] for task in summary["tasks"].values() for check in task["checks"]
    )


def _finals(plan: Plan, store: Store, task: str, method: str) -> list[Cell]:
    lr = chosen(plan, store, task, method)
    return [] if lr is None else [plan.final(task, method, lr, seed) for seed in plan.seeds]


def _task(plan: Plan, store: Store, task: str) -> Record:
    """Base, checks and methods of one task."""
    base = next(iter(_finished(store, [plan.base(task)])), None)
    finals = {method: _finished(store, _finals(plan, store, task, method)) for method in plan.methods}
    methods = {method: _method(plan, store, task, method, finals[method]) for method in plan.methods}
    reference = finals[plan.reference]
    others = [method for method in plan.methods if method != plan.reference]
    differences = [paired(_ends(finals[method], plan), _ends(reference, plan)) for method in others]
    for method, difference, p in zip(others, differences, holm([d.p for d in differences]), strict=True):
        methods[method]["difference"] = {
            **asdict(difference),
            "p_holm": p,
            "verdict": verdict(difference, p),
            "detectable": detectable(difference.sd, difference.n),
            # At Holm's first step, which the smallest p has to pass.
            "detectable_holm": detectable(difference.sd, difference.n, LEVEL / len(others)),
        }
        methods[method]["area_difference"] = asdict(paired(_areas(finals[method], plan), _areas(reference, plan)))
    return {
        "base": base and {**_start(base), "pass_at": base["pass_at"] and base["pass_at"]["accuracy"]},
        "test_problems": base and base["held_out"],
        "checks": _checks(plan, store, task, base, [record for records in finals.values() for record in records]),
        "methods": methods,
    }


def _method(plan: Plan, store: Store, task: str, method: str, records: list[Record]) -> Record:
    """What the final cells of one method come to; means over the seeds where nothing else is said."""
    phases = list(dict.fromkeys(phase for record in records for phase in record["seconds"]))
    seconds = {phase: _mean([r["seconds"].get(phase, 0.0) / r["steps"] for r in records]) or 0.0 for phase in phases}
    active = [record["seconds_per_active_step"] for record in records]
    rates = tried(plan, store, task, method)
    return {
        "supervision": supervision(plan.configs[task, method]),
        "lr": chosen(plan, store, task, method),
        "tried": [{"lr": lr, "values": values, "mean": _mean(values)} for lr, values in rates.items()],
        "seeds": [record["seed"] for record in records],
        **{metric: _spread([record["curve"][-1][metric] for record in records]) for metric in METRICS},
        "pass_at": _spread([record["pass_at"]["accuracy"] for record in records if record["pass_at"]]),
        "area": _spread(list(_areas(records, plan).values())),
        "seconds_per_step": sum(seconds.values()) if records else None,
        "credit_seconds_per_step": sum(s for name, s in seconds.items() if name not in _NO_CREDIT) if records else None,
        "seconds_per_active_step": _mean(active),
        "phase_seconds_per_step": seconds,
        **{key: _mean([record[key] for record in records])
           for key in ("generated_tokens", "optimizer_steps", "evaluation_seconds", "wall_seconds")},
        "curve": [_over_seeds(points) for points in zip(*(record["curve"] for record in records), strict=True)],
    }  # fmt: skip


def _checks(plan: Plan, store: Store, task: str, base: Record | None, finals: list[Record]) -> list[Record]:
    """Whether the finished cells of a task met the same problems, weights and budget, by their own records."""
    cells = [plan.tuning(task, method, lr, seed)
             for method in plan.methods for lr in plan.rates for seed in plan.tuning_seeds]  # fmt: skip
    tuning = _finished(store, cells)
    found: list[Record] = []

    def check(what: str, held: bool, detail: object) -> None:
        found.append({"what": what, "held": held, "detail": str(detail)})

    def same(what: str, groups: Mapping[str, Sequence[Record]], *keys: str) -> None:
        values = {name: list(dict.fromkeys(tuple(record[key] for key in keys) for record in records))
                  for name, records in groups.items()}  # fmt: skip
        told = (name + " | ".join(", ".join(map(str, each)) for each in found) for name, found in values.items())
        check(what, all(len(found) == 1 for found in values.values()), "; ".join(told))

    for kind, records in (("tuning", tuning), ("final", finals)):
        if not records:
            continue
        seeds = sorted({record["seed"] for record in records})
        by_seed = {f"seed {seed}: ": [record for record in records if record["seed"] == seed] for seed in seeds}
        firsts = {seed: [record["start"] for record in of_seed] for seed, of_seed in by_seed.items()}
        tested = records if kind == "tuning" or base is None else [base, *records]
        same(f"{kind}: the same training problems in the same order", by_seed, "training_problems")
        same(f"{kind}: the same first rollouts, by tokens and accuracy", firsts, "tokens", "accuracy")
        same(f"{kind}: the same steps, and rollouts in each", {"": records}, "steps", "rollouts_per_step")
        same(f"{kind}: the same held-out problems, and their number", {"": tested}, "held_out_problems", "held_out")
        same(f"{kind}: the same initial accuracy, sampled and greedy", {"": [_start(r) for r in tested]}, *METRICS)
        both = sum(record["in_both"] for record in records)
        check(f"{kind}: no training problem is held out", both == 0, f"{both} in both")
    return found


def supervision(config: Config) -> list[str]:
    """What a method was told: the SUPERVISION of its reward, credit and loss; a distillation reads the loss's alone.

    The outcomes that `rredcot` reads are those of a reward that is a function, else the task's.
    """
    members = [("rewards", config.reward.name), ("credit", config.credit.name), ("losses", config.loss.name)]
    members = members[-1:] if config.loss.distils else members
    told = [source for axis, name in members for source in axes.module(axis, name).SUPERVISION]
    if config.reward.is_function and ("credit", "rredcot") in members:
        told = [source for source in told if source != "verifier"]
    return list(dict.fromkeys(told)) or ["none"]


def _finished(store: Store, cells: Sequence[Cell]) -> list[Record]:
    records = map(store.get, cells)
    return [record for record in records if record is not None and "error" not in record]


def _start(record: Record) -> Record:
    return {metric: record["curve"][0][metric] for metric in METRICS}


def _end(record: Record | None, metric: str) -> float | None:
    return None if record is None or "error" in record else record["curve"][-1][metric]


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is missing."""
    known = [value for value in values if value is not None]
    return mean_sd(known)[0] if len(known) == len(values) else None


def _ends(records: Sequence[Record], plan: Plan) -> dict[int, float]:
    return {record["seed"]: record["curve"][-1][plan.metric] for record in records}


def _areas(records: Sequence[Record], plan: Plan) -> dict[int, float]:
    """Mean height of each cell's curve, by seed."""
    curves = {record["seed"]: record["curve"] for record in records}
    return {
        seed: area([p["step"] for p in points], [p[plan.metric] for p in points]) for seed, points in curves.items()
    }


def _spread(values: Sequence[float]) -> Record:
    mean, sd = mean_sd(values)
    return {"values": list(values), "mean": mean, "sd": sd}


def _over_seeds(points: Sequence[Record]) -> Record:
    """One evaluation of a method, over the seeds."""
    spreads = {metric: mean_sd([point[metric] for point in points]) for metric in METRICS}
    return {
        "step": points[0]["step"],
        "training_seconds": mean_sd([point["training_seconds"] for point in points])[0],
        **{metric: {"mean": mean, "sd": sd} for metric, (mean, sd) in spreads.items()},
    }
