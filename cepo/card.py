"""The model card of a checkpoint: what it was made from and how, and what was measured; no more than the run knows."""

from __future__ import annotations

import json
import platform
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cepo import __version__, checkpoint, metrics
from cepo.config import Config


def text(run: Path, step: int, sees: bool = False) -> str:
    """README.md for the checkpoint of `step`, from the config and the metrics of its run; of a model that `sees`."""
    config = _config(run)
    policy, rollout, train = config.policy, config.rollout, config.train
    lora: Any = policy.lora
    packages = ["torch", "transformers", *(["peft"] if lora else [])]
    header: dict[str, Any] = {"library_name": "peft" if lora else "transformers"}
    header["pipeline_tag"] = "image-text-to-text" if sees else "text-generation"
    if policy.model.count("/") == 1 and policy.model[0] not in "./~" and not Path(policy.model).exists():
        header["base_model"] = policy.model  # the hub takes its own names alone
    header["tags"] = ["cepo", "reinforcement-learning"]
    rows = {
        "Base model": f"`{policy.model}`" + (f", LoRA of {_options(lora)}" if lora else ""),
        **_method(config),
        "Data": f"task `{config.task.name}`" + (f", {_options(config.task.options)}" if config.task.options else ""),
        "Steps": f"{step} of {train.steps}, each of {rollout.prompts} prompts x {rollout.group_size} rollouts at "
        f"T = {rollout.temperature:g} and {train.updates_per_batch} update(s); AdamW, learning rate {train.lr:g}, "
        f"seed {train.seed}; computed in {policy.compute_dtype}, weights in float32",
        "Software": ", ".join([f"cepo {__version__}", f"Python {platform.python_version()}",
                               *(f"{name} {version(name)}" for name in packages)]),
        "Licence": "not stated here: it is for whoever publishes the model, and depends on base model and data",
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {run.name}, step {step}\n\n"
        f"A {'vision-' if sees else ''}language model after reinforcement learning with `cepo`. "
        "This card was written by the run itself.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## What was measured\n\n{_measured(run, step)}\n"
    )


def _config(run: Path) -> Config:
    given = yaml.safe_load((run / checkpoint.CONFIG).read_text()) or {}
    made: dict[str, Any] = {}
    for field in fields(Config):
        if field.name in given:
            section: Any = field.default_factory
            value = given[field.name]
            made[field.name] = section(**value) if isinstance(value, dict) else value
    return Config(**made)


def _method(config: Config) -> dict[str, str]:
    """The choice on each of the four axes; a distillation reads the last alone."""
    axes = ("loss",) if config.loss.distils else ("reward", "advantage", "credit", "loss")
    chosen = {}
    for axis in axes:
        options = {k: v for k, v in vars(getattr(config, axis)).items() if k != "name" and v is not None}
        chosen[axis.capitalize()] = f"`{getattr(config, axis).name}`" + (f", {_options(options)}" if options else "")
    return chosen


def _options(options: dict[str, Any]) -> str:
    return "`" + json.dumps(options, default=str).strip("{}").replace('"', "").replace("`", "'") + "`"


def _measured(run: Path, step: int) -> str:
    evaluated = [
        record
        for record in metrics.stream(run, "eval")
        if record["step"] <= step
        and record.keys() >= {"split", "problems"}
        and all(metrics.is_number(record.get(name)) for name in ("sampled", "greedy"))
    ]
    if not evaluated:
        return "Nothing was evaluated."
    lines = [
        f"| {r['step']} | {r['split']} | {r['problems']} | {r['sampled']:.3f} | {r['greedy']:.3f} |" for r in evaluated
    ]
    return (
        "Share of problems that the task's own check accepts, sampled at the evaluation's temperature and greedy. "
        "Nothing else was evaluated.\n\n| step | split | problems | sampled | greedy |\n|---:|---|---:|---:|---:|\n"
        + "\n".join(lines)
    )
