"""LoRA: the factors alone learn, are saved and come back; the rest of the trainer does not notice."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_checkpoint import TIMES, train
from test_trainer import small, steps, weights
from tiny import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

from cepo import checkpoint, memory, metrics, trainer
from cepo.cli import main, parse
from cepo.config import Config, LoraConfig, PolicyConfig
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.policy import EMBEDDED, load_policy, response_logits

pytest.importorskip("peft")

LORA = {"policy": {"lora": LoraConfig(r=4, alpha=32.0)}, "train": {"lr": 1e-2}}


def test_the_factors_alone_learn_and_the_head_has_no_gradient() -> None:
    before = weights(load_parts(small()))
    parts, records = steps(small(**LORA), n=2)
    assert records[0]["gradient_norm"] > 0
    after = weights(parts)
    moved = {name for name, p in parts.policy.model.named_parameters() if p.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    for name, value in before.items():
        inside = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(value, after[name if name in after else inside])
    assert any(after[name].any() for name in moved if "lora_B" in name)
    head = parts.policy.model.get_output_embeddings().weight
    assert head.grad is None
    assert not head.requires_grad
    assert parts.policy.split_head
    optimizer = trainer.make_optimizer(parts)
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) < 0.2 * sum(v.numel() for v in before.values())


def test_it_begins_as_the_model_it_is_added_to_whatever_the_seed_of_torch() -> None:
    one, other, plain = (load_policy(PolicyConfig(lora=lora)) for lora in (LoraConfig(), LoraConfig(), None))
    single = load_policy(PolicyConfig(lora=LoraConfig(target_modules="q_proj"))).model.state_dict()
    assert {name.split(".")[-4] for name in single if "lora_A" in name} == {"q_proj"}
    ids = [[5, 6, 7]], [[8, 9]]
    assert torch.equal(response_logits(one, *ids), response_logits(plain, *ids))
    mine, others = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("loss", [{}, {"name": "sdpo", "ema": 0.5}, {"name": "opsd", "teacher": "fixed"}])
def test_a_run_of_adapters_is_saved_small_and_resumes_bit_for_bit(tmp_path: Path, loss: dict[str, Any]) -> None:
    sections = {**LORA, **({"loss": loss} if loss else {})}
    train(tmp_path / "whole", **sections)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for path in checkpoint.all_of(tmp_path / "halves")[1:]:
        shutil.rmtree(path)
    train(tmp_path / "halves", checkpoint.newest(tmp_path / "halves"), **sections)
    ends = [checkpoint.newest(tmp_path / name) for name in ("whole", "halves")]
    saved = [load_file(path / "adapter_model.safetensors") for path in ends if path]
    assert all("lora_" in name for name in saved[0])
    assert not (ends[0] / "model.safetensors").exists()  # type: ignore[operator]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    lines = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(tmp_path / name) if r["kind"] == "train"]
        for name in ("whole", "halves")
    ]
    assert lines[0] == lines[1]
    if loss.get("name") == "sdpo":
        state = torch.load(ends[0] / checkpoint.STATE, weights_only=True)  # type: ignore[operator]
        average = state["ema_teacher"]
        assert all("lora_" in name for name in average)
        assert any(value.any() for name, value in average.items() if "lora_B" in name)


def test_an_average_of_adapters_is_the_average_and_shares_what_does_not_learn() -> None:
    parts, _ = steps(small(**LORA, loss={"name": "sdpo", "ema": 0.5}), n=1)
    assert parts.self_teacher is not None
    mine, theirs = (dict(model.named_parameters()) for model in (parts.policy.model, parts.self_teacher.model))
    for name, p in mine.items():
        assert (theirs[name] is p) is ("lora_" not in name)
        if "lora_B" in name:  # it began at 0
            torch.testing.assert_close(theirs[name], 0.5 * p)
    assert not any(p.requires_grad for p in theirs.values())


def test_a_saved_adapter_is_evaluated_loaded_elsewhere_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ["--rollout.prompts", "2", "--rollout.group_size", "4", "--train.steps", "1", "--eval.problems", "4"]
    assert main(["train", *options, "--policy.lora.r", "2", "--train.lr", ".01", "--run_dir", str(run)]) == 0
    assert parse("train", ["--config", str(run / "config.yaml")])[0].policy.lora == LoraConfig(r=2)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--policy.model", str(run), "--eval.problems", "4"]) == 0
    newest = checkpoint.newest(run)
    assert newest is not None
    policy = load_policy(PolicyConfig(model=str(run)))
    ids = [[5, 6, 7]], [[8, 9]]
    other = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32)
    logits = other(torch.tensor([[5, 6, 7, 8]])).logits[0, -2:]
    torch.testing.assert_close(response_logits(policy, *ids), logits)
    assert not torch.equal(response_logits(load_policy(PolicyConfig()), *ids), response_logits(policy, *ids))
    assert {p.requires_grad for n, p in policy.model.named_parameters() if "lora_" in n} == {True}
    with pytest.raises(InputError, match=r"policy.lora.r: expected 2, which the adapter .* has, got 8"):
        load_policy(PolicyConfig(model=str(run), lora=LoraConfig()))
    named = {name.split(".")[-4] for name in policy.model.state_dict() if "lora_A" in name}
    load_policy(PolicyConfig(model=str(run), lora=LoraConfig(r=2, target_modules=sorted(named))))
    for names, message in (("q_proj", "expected .*'q_proj'.*, which the adapter .* has, got 'q_proj'"),
                           (["no_such"], ".*no_such")):  # fmt: skip
        with pytest.raises(InputError, match=f"policy.lora.target_modules: {message}"):
            load_policy(PolicyConfig(model=str(run), lora=LoraConfig(r=2, target_modules=names)))
    for own in ("--policy.lora.target_modules=[q_proj]", "--policy.lora=null"):
        assert main(["train", "--resume", str(run), own]) == 2
        assert "--policy.lora: a resumed run keeps its own" in capsys.readouterr().err
    on = ["train", "--policy.model", str(run), *options, "--run_dir", "on"]
    assert main([*on, "--dry-run"]) == 0
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    said = capsys.readouterr().out
    assert f"of which {trained:,} learn" in said
    assert main(on) == 0
    for config in (said[: said.index("\nparameters: ")], Path("on/config.yaml").read_text()):
        assert yaml.safe_load(config)["policy"]["lora"] == asdict(LoraConfig(r=2, target_modules=sorted(named)))
    assert "LoRA of `r: 2" in Path("on/checkpoints/step-000001/README.md").read_text()
    file = newest / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "/no/such"}))
    for read in (load_policy, lambda policy: memory.estimate(Config(policy=policy))):
        with pytest.raises(InputError, match=r"step-000001 is an adapter of /no/such, which is gone \("):
            read(PolicyConfig(model=str(newest)))


def test_a_base_that_is_not_what_it_was_is_noticed(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(EMBEDDED, base)
    options: dict[str, Any] = {**LORA, "policy": {**LORA["policy"], "model": str(base)}}
    train(run, **{**options, "train": {"steps": 1}})
    newest = checkpoint.newest(run)
    assert newest is not None
    load_policy(PolicyConfig(model=str(run)))
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"is an adapter of {base} as it was before model.safetensors changed there"):
        train(run, newest, **{**options, "train": {"steps": 2}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"]}, "policy.lora.target_modules: expected none to be the head, as log-probs"),
        ({"target_modules": ["no_such"]}, "policy.lora.target_modules: .*no_such"),
        ({"target_modules": "no_such"}, "policy.lora.target_modules: .*no_such"),
        ({"target_modules": "q(_proj"}, "policy.lora.target_modules: .*unterminated"),
        ({"target_modules": []}, "policy.lora.target_modules: expected names of layers, got "),
        ({"r": 0}, "policy.lora.r: expected at least 1, got 0"),
        ({"alpha": 0.0}, "policy.lora.alpha: expected a number above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_policy(small(policy={"lora": LoraConfig(**options)}).policy)
    assert "\n" not in str(error.value)
