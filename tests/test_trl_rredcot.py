"""`rredcot` in TRL: token advantages from what the model answers before each segment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_thread, tiny_policy  # noqa: F401

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from test_trl import CUT, GROUP, make, prompt, say, step
from tiny_vision import tiny_qwen3_vl

from cepo.errors import InputError
from cepo.integrations import trl as integration
from cepo.integrations.trl import CEPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("mode", "centre", "plain", "min_entropy"),
    [("return_to_go", "none", False, 0.0), ("return_to_go", "others", False, 0.0), ("difference", "none", True, 3.7),
     ("scale", "none", False, 0.0)],
)  # fmt: skip
def test_rredcot_gives_each_segment_what_its_values_say(
    tmp_path: Path, mode: str, centre: str, plain: bool, min_entropy: float
) -> None:
    texts = ["3+4", "10-3"]
    data = [{"prompt": t if plain else prompt(t), "solution": 7} for t in texts]
    said = ["1;2;a#7", "b;;#8", "3a2;9#9", CUT, *["1;2;#7"] * 3, "5"]  # all that is scored of the second group is right
    trainer = make(
        tmp_path, data=data, more={"rollout_func": say(*said)}, temperature=0.8,
        model=tiny_policy(initializer_range=0.2).model, per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=2, credit="rredcot", rredcot_mode=mode, rredcot_centre=centre,
        rredcot_separators=[";"], rredcot_keywords=["a"], rredcot_min_entropy=min_entropy, rredcot_cue="#{answer}",
        reward=lambda completions, **_: [
            None if r == "5" else float("#7" in r) for r in ((c if plain else c[0]["content"]) for c in completions)
        ],
    )  # fmt: skip
    model, tokenizer = copy.deepcopy(trainer.model).eval(), trainer.processing_class

    @torch.no_grad()
    def rows(context: list[int], after: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([context + after])).logits[0, len(context) - 1 : -1]
        return (logits.double() / 0.8).log_softmax(-1)

    before = torch.get_rng_state()
    output = step(trainer, data)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), before)
    mask = output["completion_mask"].bool()
    assert output["advantages"].shape == mask.shape
    scored = tokenizer("7")["input_ids"] + [tokenizer.eos_token_id]
    cue = tokenizer("#", add_special_tokens=False)["input_ids"]
    spread = [1.0, 0, 0, 0]
    deviation = torch.tensor(spread).std().item() + 1e-4
    all_values, sizes, kept, squares = [], [], 0, []
    compared, gains = {}, {}
    for b, text in enumerate(said):
        context = output["prompt_ids"][b][output["prompt_mask"][b].bool()].tolist()
        response = output["completion_ids"][b][mask[b]].tolist()
        given = output["advantages"][b][mask[b]].tolist()
        if text == "5":
            assert given == [0.0] * len(response)
            continue
        log_p = rows(context, response)
        entropy = -(log_p.exp() * log_p).sum(-1)
        candidates = [t for t in range(1, len(response)) if tokenizer.decode(response[:t]).endswith((";", ";a"))]
        starts = [0, *(t for t in candidates if entropy[t] >= min_entropy)]
        kept += len(starts) - 1 - len(candidates)
        v = [
            rows(context + response[:t] + cue, scored).gather(1, torch.tensor(scored)[:, None]).sum().exp().item()
            for t in starts
        ]
        reward = float("#7" in text)
        moved = [after - now for now, after in zip(v, [*v[1:], reward], strict=True)]
        advantage = (reward - 0.25) / deviation if b < GROUP else 0.0
        wanted = [
            reward - v[k] if mode == "return_to_go"
            else moved[k] if mode == "difference"
            else advantage * abs(moved[k]) * len(v) / sum(map(abs, moved))
            for k, (start, end) in enumerate(zip(starts, [*starts[1:], len(response)], strict=True))
            for _ in range(start, end)
        ]  # fmt: skip
        compared[b], gains[b] = (given, wanted), reward - v[0]
        if mode != "scale" or advantage:
            all_values += v
            sizes.append(len(v))
            squares += [(x - reward) ** 2 for x in v]
    for b, (given, wanted) in compared.items():
        others = [gains[j] for j in gains if j // GROUP == b // GROUP and j != b]
        centred = [x - sum(others) / len(others) * (centre == "others") for x in wanted]
        assert given == pytest.approx(centred, rel=0, abs=1e-3 if mode == "scale" else 3e-7)
    assert (kept < 0) == (min_entropy > 0)
    assert max(all_values) > 2e-5 > 1e-5 > min(all_values)
    assert max(sizes) > 1
    metrics = trainer._metrics["train"]
    assert metrics["cepo/segments"] == [pytest.approx(sum(sizes) / len(sizes))]
    assert metrics["cepo/value_mean"] == [pytest.approx(sum(all_values) / len(all_values), rel=1e-4)]
    assert metrics["cepo/value_brier"] == [pytest.approx(sum(squares) / len(squares), rel=1e-4)]
    assert "cepo/lam" not in metrics


@pytest.mark.parametrize(
    ("said", "reward", "options"),
    [("#7", 1.0, {"rredcot_mode": "scale"}), (CUT, 1.0, {"mask_truncated_completions": True}), ("#7", None, {})],
)
def test_where_nothing_is_to_be_valued_nothing_moves(
    tmp_path: Path, said: str, reward: float | None, options: dict[str, Any]
) -> None:
    rewards = lambda completions, **_: [reward] * len(completions)  # noqa: E731
    trainer = make(tmp_path, reward=rewards, credit="rredcot", more={"rollout_func": say(said)}, max_steps=1, **options)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_a_reward_model_is_no_chance_of_success() -> None:
    integration.check_rewards("scale", [torch.nn.Identity()], [2.0])
    with pytest.raises(InputError, match=r"^reward_funcs: expected functions, as .*difference.*got a Identity"):
        integration.check_rewards("difference", [torch.nn.Identity()], [1.0])


@pytest.mark.parametrize("how", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_model_in_pieces_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """As TRL says it is: none of the two starts without a GPU."""
    made = CEPOTrainer.create_accelerator_and_postprocess

    def marked(trainer: Any) -> None:
        made(trainer)
        setattr(trainer, how, True)

    monkeypatch.setattr(CEPOTrainer, "create_accelerator_and_postprocess", marked)
    make(tmp_path, credit="uniform")
    with pytest.raises(InputError, match=r"^credit: expected no FSDP and no DeepSpeed, as rredcot needs the model in"):
        make(tmp_path, credit="rredcot")


def test_a_model_that_sees_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_qwen3_vl()
    with pytest.raises(InputError, match=r"^credit: expected a model of text .*, got Qwen3VLForConditionalGeneration$"):
        make(tmp_path, model=model, credit="rredcot", more={"processing_class": processor})
