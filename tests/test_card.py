"""The model card says what a run did and measured, and nothing else."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_trainer import small
from tiny import one_thread  # noqa: F401

from cepo import __version__, card, checkpoint, metrics, trainer
from cepo.cli import dump
from cepo.config import LoraConfig
from cepo.parts import load_parts


def run_of(path: Path, **sections: Any) -> Path:
    path.mkdir()
    (path / checkpoint.CONFIG).write_text(dump(small(**sections)))
    metrics.append(path, {"kind": "eval", "step": 0, "split": "test", "problems": 8, "sampled": 0.25, "greedy": 0.5})
    metrics.append(path, {"kind": "eval", "step": 9, "split": "test", "problems": 8, "sampled": 0.9, "greedy": 0.9})
    return path


def parsed(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    _, header, body = text.split("---\n", 2)
    rows = [
        line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and " | " in line[3:]
    ]
    return yaml.safe_load(header), dict(rows)  # type: ignore[arg-type]


def test_a_checkpoint_has_the_card_of_its_run_and_step(tmp_path: Path) -> None:
    config = small(train={"steps": 2}, checkpoint={"every": 1})
    (tmp_path / checkpoint.CONFIG).write_text(dump(config))
    list(trainer.train(load_parts(config), tmp_path))
    cards = [(path / "README.md").read_text() for path in checkpoint.all_of(tmp_path)]
    last = [r for r in metrics.read(tmp_path) if r["kind"] == "eval"][-1]
    assert f"| 2 | validation | 8 | {last['sampled']:.3f} | {last['greedy']:.3f} |" in cards[1]
    assert "| 2 | validation" not in cards[0]
    header, rows = parsed(cards[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation",
                      "tags": ["cepo", "reinforcement-learning"]}  # fmt: skip
    assert rows["Base model"] == "`embedded`"
    assert rows["Reward"].startswith("`verifier`")
    assert rows["Credit"] == "`cepo`, `lam: 0.5, lam_steps: 25, eps_w: 0.5`"
    assert rows["Data"] == "task `addition`"
    assert rows["Steps"].startswith("2 of 2, each of 6 prompts x 4 rollouts at T = 1 and 1 update(s)")
    assert f"cepo {__version__}" in rows["Software"]
    assert rows["Licence"].startswith("not stated here")
    checkpoint.verify(checkpoint.all_of(tmp_path)[1])


@pytest.mark.parametrize(
    ("sections", "header", "rows"),
    [
        ({"policy": {"model": "Qwen/Qwen3-0.6B"}}, {"base_model": "Qwen/Qwen3-0.6B", "library_name": "transformers"},
         {"Base model": "`Qwen/Qwen3-0.6B`"}),
        ({"policy": {"model": "./mine", "lora": LoraConfig(r=4)}}, {"base_model": None, "library_name": "peft"},
         {"Base model": "`./mine`, LoRA of `r: 4, alpha: 16.0, target_modules: all-linear`"}),
        ({"loss": {"name": "sdpo"}}, {}, {"Reward": None, "Credit": None}),
        ({"task": {"name": "jsonl:a|b`c", "options": {"prompt_key": "q|`"}}}, {},
         {"Data": "task `jsonl:a\\|b`c`, `prompt_key: q\\|'`"}),
    ],
)  # fmt: skip
def test_it_says_what_the_config_says(
    tmp_path: Path, sections: dict[str, Any], header: dict[str, Any], rows: dict[str, Any]
) -> None:
    text = card.text(run_of(tmp_path / "run", **sections), 3)
    got_header, got_rows = parsed(text)
    assert {name: got_header.get(name) for name in header} == header
    assert {name: got_rows.get(name) for name in rows} == rows
    assert "| 0 | test | 8 | 0.250 | 0.500 |" in text
    assert "0.900" not in text, "measured after this step"
    assert "license" not in got_header


def test_a_card_costs_the_same_memory_however_many_steps_a_run_has(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    card.text(run, 9)  # what is imported and cached once
    steps = {"kind": "train", "step": 5, **{f"column {i}": 0.1 * i for i in range(30)}}
    with (run / metrics.FILE).open("a") as file:
        file.writelines(json.dumps(steps) + "\n" for _ in range(2000))
    tracemalloc.start()
    try:
        card.text(run, 9)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
