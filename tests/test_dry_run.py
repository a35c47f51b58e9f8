"""What a dry run says is what the run then has: parameters, tokens, and the memory of what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_trainer import small
from tiny import one_thread, tiny_policy  # noqa: F401

from cepo import memory, trainer
from cepo.cli import main
from cepo.config import LoraConfig, PolicyConfig
from cepo.errors import InputError
from cepo.parts import load_parts


def bytes_of(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=3), LoraConfig(target_modules=["q_proj", "down_proj"])])
def test_what_stays_is_counted_to_the_byte(lora: LoraConfig | None) -> None:
    if lora:
        pytest.importorskip("peft")
    config = small(policy={"lora": lora}, train={"lr": 1e-2})
    said = memory.estimate(config)
    parts = load_parts(config)
    optimizer = trainer.make_optimizer(parts)
    record = trainer.train_step(parts, optimizer, 1)
    trained = [p for p in parts.policy.model.parameters() if p.requires_grad]
    assert said.trained == sum(p.numel() for p in trained)
    assert said.memory["gradients"] == bytes_of(p.grad for p in trained)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name.startswith("exp_")]
    assert said.memory["optimiser"] == bytes_of(moments)
    assert said.rollouts * said.response >= record["tokens"]
    if lora is None:
        assert said.memory["weights"] == bytes_of(parts.policy.model.parameters())


def test_what_is_said_grows_with_what_is_asked(tmp_path: Path) -> None:
    plain = memory.estimate(small())
    longer = memory.estimate(small(rollout={"max_new_tokens": 2 * plain.response}))
    pieces = memory.estimate(small(train={"prompts_per_pass": 2}))
    batched = memory.estimate(small(rollout={"batch_size": 6}))
    taught = memory.estimate(small(loss={"name": "sdpo"}))
    assert longer.memory["activations"] > plain.memory["activations"]
    assert pieces.memory["activations"] * 3 == plain.memory["activations"]
    assert batched.memory["rollout KV cache"] * 4 == plain.memory["rollout KV cache"]
    assert taught.memory["weights"] == 2 * plain.memory["weights"]
    assert longer.peak > plain.peak > pieces.peak


def test_no_weights_are_read_and_no_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = tiny_policy()
    policy.model.config.save_pretrained("model")
    policy.tokenizer.save_pretrained("model")
    assert main(["train", "--dry-run", "--policy.model", "./model", "--credit.lam", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "lam: 0.25" in said
    assert "128 rollouts of at most" in said
    assert f"parameters: {policy.model.num_parameters():,}, of which" in said
    assert "peak of a step" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(InputError, match=r"policy.model: cannot load './nothing'|expected 'embedded'"):
        memory.estimate(replace(small(), policy=PolicyConfig(model="./nothing")))


def test_the_errors_that_are_stated_were_measured() -> None:
    root = Path(__file__).parent.parent
    measured = json.loads((root / "benchmarks/results/dry_run.json").read_text())["cases"]
    stated = (root / "docs/trainer.md").read_text()
    assert len(measured) == 5
    for case in measured.values():
        row = f"| {case['estimated'] / 2**20:,.0f} MiB | {case['measured'] / 2**20:,.0f} MiB | {case['error']:+.0%} |"
        assert row.replace("%", " %") in stated


def test_checkpointed_layers_keep_their_inputs_and_one_whole() -> None:
    plain, kept = memory.estimate(small()), memory.estimate(small(train={"gradient_checkpointing": True}))
    layers = 4
    assert plain.memory["activations"] / layers < kept.memory["activations"] < plain.memory["activations"] / 2
    half = memory.estimate(small(policy={"compute_dtype": "bfloat16"}))
    assert plain.memory["activations"] / 2 < half.memory["activations"] < plain.memory["activations"]
