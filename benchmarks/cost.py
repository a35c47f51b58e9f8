"""What each method's credit costs: seconds of an active step of `cepo train`, beside GRPO's on the same rollouts.

    python benchmarks/cost.py                                    # the built-in task, a few minutes
    python benchmarks/cost.py --models SmolLM2-135M              # needs what examples/smollm2/train.yaml needs

Methods take turns inside one process on one step's problems after another, with the same random numbers; a learning
rate of 0 keeps the weights, and so the rollouts, the same for all of them. Lambda stays at its first value: every step
of a method with teachers is an active one. Writes benchmarks/results/cost.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

from conftest import machine
from memory import merge
from step import smollm2_files

from cepo import cli
from cepo.compare import plan as plans
from cepo.config import Config
from cepo.parts import Parts, load_parts
from cepo.policy import threads
from cepo.trainer import make_optimizer, train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cost.json"
CONTROLS = ("shuffled", "self_certainty")


def built_in() -> dict[str, Config]:
    """The methods of the table on column addition, one thread."""
    plan = plans.load(ROOT / "examples" / "compare" / "family.yaml")
    return {name: plan.configs["addition", name] for name in plan.methods if name not in CONTROLS}


def smollm2() -> dict[str, Config]:
    """GRPO and CEPO as examples/smollm2/train.yaml has them, on as many threads as there are cores."""
    config = ROOT / "examples" / "smollm2" / "train.yaml"
    options = ["--config", str(config), "--policy.model", smollm2_files()["model"]]
    return {
        name: cli.parse("train", [*options, "--credit.name", credit])[0]
        for name, credit in (("grpo", "uniform"), ("cepo", "cepo"))
    }


MODELS = {"embedded": (built_in, 15), "SmolLM2-135M": (smollm2, 3)}


def measure(configs: dict[str, Config], rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a step of each, whole and by phase, and the median of its ratios to GRPO's."""
    loaded: dict[str, Parts] = {}
    for name, config in configs.items():
        still = copy.deepcopy(config)
        still.train.lr, still.credit.lam_steps = 0.0, 10**6
        loaded[name] = load_parts(still)
    optimizers = {name: make_optimizer(parts) for name, parts in loaded.items()}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in loaded}
    for step in range(rounds + 1):  # the first one warms up
        for name, parts in loaded.items():
            with threads(parts.policy, parts.config.policy.threads):
                phases[name].append(train_step(parts, optimizers[name], step + 1)["seconds"])
            print(f"{step} {name:12} {sum(phases[name][-1].values()):7.2f} s", flush=True)
    phases = {name: found[1:] for name, found in phases.items()}
    seconds = {name: [sum(each.values()) for each in found] for name, found in phases.items()}
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "total_ratio": sum(seconds[name]) / sum(seconds["grpo"]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["grpo"], strict=True)),
            "phases": {key: statistics.median(each[key] for each in phases[name]) for key in phases[name][0]},
        }
        for name in loaded
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["embedded"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for model in args.models:
        make, rounds = MODELS[model]
        configs = make()
        about = {"machine": machine(), "threads": configs["grpo"].policy.threads or machine()["threads"],
                 "rounds": rounds, "measured": measure(configs, rounds)}  # fmt: skip
        merge(args.results, {model: about})


if __name__ == "__main__":
    main()
