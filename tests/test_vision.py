"""Models that see: prompts with images in generation, scoring, teachers and credit, and a run from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import small
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401
from tiny_vision import Processor, picture, tiny_llava, tiny_qwen3_vl
from torch import Tensor

from cepo import checkpoint, distil, memory, metrics, teacher, trainer
from cepo.cli import main
from cepo.config import TeacherConfig
from cepo.distil import SelfTeacher
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.policy import Policy, make_policy, response_logits, token_op, tokens_of
from cepo.prompts import with_images
from cepo.rewards.cross_model_entropy import cross_model_entropy
from cepo.rollout import sample
from cepo.tasks import Problem, get_task

MODELS = {"qwen3_vl": tiny_qwen3_vl, "llava": tiny_llava}
TASK = Sums()
BOTH = ("positive", "negative")


@pytest.fixture(scope="module", params=list(MODELS))
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(*MODELS[request.param]())


def asking(text: str, *images: Any, answer: str = "7") -> Problem:
    return Problem(with_images(text, images) if images else text, answer)


def mixed() -> list[Problem]:
    """Images of two sizes, two in one prompt, and none."""
    return [asking("3+4", picture(16, 24)), asking("what", picture(32, 16), picture(8, 8)), asking("5+2")]


def by_hand(policy: Policy, prompt: Any, response: Sequence[int]) -> Tensor:
    """Log-probs of a response after a prompt, by the processor and the model alone: no padding, no cache."""
    inputs = policy.processor.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    labels = torch.tensor([list(response)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], labels], dim=1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(labels, fill)], dim=1)
    inputs = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    logits = policy.model(**inputs).logits[0, -len(response) - 1 : -1]
    return logits.log_softmax(-1).gather(1, labels[0][:, None])[:, 0].detach()


def in_parts(problem: Problem, hint: str = "") -> Any:
    prompt = problem.prompt
    if isinstance(prompt, str):
        return [{"role": "user", "content": [{"type": "text", "text": prompt + hint}]}]
    *images, text = prompt[0]["content"]
    return [{"role": "user", "content": [*images, {**text, "text": text["text"] + hint}]}]


@pytest.mark.parametrize(("share_prefix", "split_head"), [(True, True), (False, True), (True, False)])
def test_teachers_and_policy_see_the_images(policy: Policy, share_prefix: bool, split_head: bool) -> None:
    assert policy.split_head  # so hidden states are the way this model goes
    policy = replace(policy, split_head=split_head)
    config = TeacherConfig(share_prefix=share_prefix)

    def logprobs(problems: list[Problem]) -> dict[str, tuple[Tensor, ...]]:
        rollouts = rollouts_of(policy, problems, ["#7", "b#8", "cc#9", "#7"] * 3)
        scores = [1.0, 0.0, 0.0, 1.0] * 3
        teachers = teacher.build(policy, config, TASK, rollouts, scores, 1.0)
        told = teacher.teacher_states(policy, config, teachers, BOTH, rollouts, list(range(12)))
        contexts = rollouts.per_rollout(rollouts.prompts)
        own = response_logits(policy, contexts, rollouts.responses).log_softmax(-1)
        labels = torch.tensor([token for ids in rollouts.responses for token in ids])
        lengths = [len(ids) for ids in rollouts.responses]
        op = token_op(policy)
        found = {"policy": own.gather(1, labels[:, None])[:, 0].detach()}
        for name, states in (("7", told.positive), ("8", told.negative)):
            found[name] = op(states, labels).logprobs
        return {name: row.split(lengths) for name, row in found.items()}

    problems = mixed()
    got = logprobs(problems)
    responses = rollouts_of(policy, problems, ["#7", "b#8", "cc#9", "#7"] * 3).responses
    for b, response in enumerate(responses):
        for name, rows in got.items():
            hint = "" if name == "policy" else f"\nHint: the answer is {name}."
            expected = by_hand(policy, in_parts(problems[b // 4], hint), response)
            assert torch.allclose(rows[b], expected, atol=1e-5), (name, b)

    problems[0] = asking("3+4", picture(16, 24, seed=1))
    other = logprobs(problems)
    for name, rows in got.items():
        moved = [(mine - theirs).abs().max().item() for mine, theirs in zip(rows, other[name], strict=True)]
        assert min(moved[:4]) > 1e-3, name
        assert max(moved[4:]) < 1e-5, name


def test_generation_sees_them_however_it_is_batched(policy: Policy) -> None:
    shared: dict[str, Any] = {"group_size": 2, "max_new_tokens": 8, "key": (0, 1)}
    greedy = sample(policy, mixed(), temperature=0.0, **shared)
    contexts = greedy.per_rollout(greedy.prompts)
    assert policy.vision
    logits = response_logits(policy, contexts, greedy.responses)
    best = logits.index_fill(1, torch.tensor(policy.vision.places), -torch.inf).argmax(-1)
    assert best.tolist() == [token for ids in greedy.responses for token in ids]
    drawn = sample(policy, mixed(), temperature=1.0, **shared)
    assert drawn.responses == sample(policy, mixed(), temperature=1.0, batch_size=1, **shared).responses
    others = [asking("3+4", picture(16, 24, seed=1)), *mixed()[1:]]
    elsewhere = sample(policy, others, temperature=1.0, **shared)
    assert drawn.responses[:2] != elsewhere.responses[:2]
    assert drawn.responses[2:] == elsewhere.responses[2:]


def test_equal_texts_with_other_images_are_other_prompts(policy: Policy) -> None:
    problems = [asking("what", picture(16, 24, seed)) for seed in (0, 1, 0)]
    assert problems[0].text == problems[2].text != problems[1].text
    rollouts = rollouts_of(policy, problems, ["#7", "b#8"] * 3)
    teachers = teacher.build(policy, TeacherConfig(), TASK, rollouts, [1.0, 0.0] * 3, 1.0)
    assert len(teachers.prefixes) == 4
    assert teachers.positive == [0, 0, 2, 2, 0, 0]


def records(folder: Path, *changes: dict[str, Any]) -> Path:
    """A file of problems whose images of several sizes lie beside it."""
    (folder / "pictures").mkdir()
    lines: list[dict[str, Any]] = []
    for i in range(8):
        picture(16 + 8 * (i % 3), 16, seed=i).save(folder / "pictures" / f"{i}.png")
        lines.append({"prompt": "what", "answer": str(i), "image": f"pictures/{i}.png"})
        lines[i]["split"] = ("train", "train", "train", "train", "train", "train", "validation", "test")[i]
    lines[1]["prompt"] = [
        {"role": "system", "content": "look"},
        {"role": "user", "content": [{"type": "text", "text": "in"}, {"type": "image"}, {"type": "text", "text": "?"}]},
    ]
    lines[2] |= {"images": ["pictures/2.png", "pictures/3.png"], "image": None}
    del lines[3]["image"]
    for line, change in zip(lines, changes, strict=False):
        line |= change
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", list(MODELS))
def test_a_run_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """All weights of a Qwen3-VL, or low-rank factors in a LLaVA."""
    lora = name == "llava"
    if lora:
        pytest.importorskip("peft")
    model, processor = MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    if name == "qwen3_vl":  # its own cannot be loaded without torchvision
        monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
        monkeypatch.setattr(Processor, "save_pretrained", lambda self, path: self.tokenizer.save_pretrained(path))
    else:
        processor.save_pretrained(tmp_path / "model")
    reward = tmp_path / "reward.py"
    reward.write_text("def parity(completions, **_):\n    return [float(len(str(said)) % 2) for said in completions]\n")
    run = tmp_path / "run"
    options = {
        "policy.model": tmp_path / "model", "task.name": f"jsonl:{records(tmp_path)}", "train.lr": 1e-2, "run_dir": run,
        "task.options": "{max_new_tokens: 6}", "rollout.prompts": 3, "rollout.group_size": 4, "train.steps": 2,
        "eval.problems": 1, "checkpoint.every": 1, "reward.name": f"{reward}:parity", "train.prompts_per_pass": 2,
        "train.gradient_checkpointing": not lora, "policy.lora": "{r: 2}" if lora else "null",
    }  # fmt: skip
    assert main(["train", *(f"--{option}={given}" for option, given in options.items())]) == 0
    found = [record for record in metrics.read(run) if record["kind"] == "train"]
    assert any(record["gradient_norm"] > 0 for record in found)
    saved = checkpoint.newest(run)
    assert saved is not None
    assert (saved / "adapter_model.safetensors").exists() is lora
    card = (saved / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert f"library_name: {'peft' if lora else 'transformers'}" in card
    assert "A vision-language model after" in card
    parts = load_parts(small(policy={"model": str(saved)}))
    before, after = model.state_dict(), parts.policy.model.state_dict()
    own = {n: before.get(n, torch.zeros_like(after[n])) for n in after if not lora or "lora_B" in n}
    moved = {part for part in ("vis", "language") for n in own if part in n and not torch.equal(own[n], after[n])}
    assert moved == {"vis", "language"}, "the gradient went through the images, too"
    if lora:
        assert all(torch.equal(w, after[n]) for n, w in before.items() if n in after), "nothing else learns"
    assert main(["eval", "--policy.model", str(run)]) == 0
    # The run from the checkpoint after one step ends as the one that did not stop.
    first = checkpoint.all_of(run)[0]
    assert main(["train", "--resume", str(first)]) == 0
    again = load_parts(small(policy={"model": str(run)})).policy.model.state_dict()
    assert all(torch.equal(after[n], again[n]) for n in after)


class Pictures(Sums):
    """Sums with pictures of two sizes beside most of them, and rewards that differ."""

    def train(self, index: int, seed: int) -> Problem:
        shown = [picture(16 + 16 * (index % 2), 16)] if index % 3 else []
        return replace(asking(f"{index}+{seed}", *shown, answer=str(index)), data={"solution": f"#{index}"})

    def feedback(self, completion: str, problem: Problem) -> str:
        return "no"

    def score(self, completion: str, problem: Problem) -> float:
        return float(len(completion) % 2)


def step(name: str, split_head: bool = True, **sections: Any) -> tuple[trainer.Record, list[Tensor]]:
    """One step of a fresh model, and the gradient it leaves."""
    made = load_parts(small(rollout={"prompts": 3}, **sections))
    # Many tokens end a response: one that is cut off is no wrong answer.
    policy = replace(make_policy(*MODELS[name]()), split_head=split_head, eos_ids=tuple(range(10, 40)))
    told = SelfTeacher(policy.model, made.config.loss) if made.distillation else None
    parts = replace(made, policy=policy, task=Pictures(), self_teacher=told)
    record = trainer.train_step(parts, trainer.make_optimizer(parts), 1)
    return record, [p.grad for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", ["solution", "sibling", "feedback"])
def test_a_distillations_teacher_sees_the_images(policy: Policy, kind: str, share_prefix: bool) -> None:
    class Told(Sums):
        def feedback(self, completion: str, problem: Problem) -> str:
            return "no"

    problems = [replace(problem, data={"solution": "7"}) for problem in mixed()]
    rollouts = rollouts_of(policy, problems, ["#7", "b#8"] * 3)
    contexts = distil.build(policy, TeacherConfig(), [kind], Told(), rollouts, [True, False] * 3)
    chosen = [(b, ids) for b, ids in enumerate(contexts.ids) if ids is not None]
    assert [b for b, _ in chosen] == ([1, 3, 5] if kind == "sibling" else list(range(6)))
    responses = [rollouts.responses[b] for b, _ in chosen]
    states = distil.told_states(policy, [ids for _, ids in chosen], responses, share_prefix)
    labels = torch.tensor([token for ids in responses for token in ids])
    got = token_op(policy)(states, labels).logprobs.split(list(map(len, responses)))
    hint = {"solution": "a solution is 7", "sibling": "another attempt was #7", "feedback": "no"}[kind]
    for (b, _), row in zip(chosen, got, strict=True):
        hinted = f"\nHint: {hint}" + ("" if kind == "feedback" else ".")
        expected = by_hand(policy, in_parts(problems[b // 2], hinted), rollouts.responses[b])
        assert torch.allclose(row, expected, atol=1e-5), b


@pytest.mark.parametrize("loss", ["opsd", "sdpo"])
def test_a_step_of_distillation_teaches_what_sees(loss: str) -> None:
    record, gradients = step("qwen3_vl", loss={"name": loss})
    assert record["dropped"] == 0
    assert record["gradient_norm"] > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_step_from_hidden_states_is_that_from_logits(name: str) -> None:
    (record, hidden), (_, logits) = step(name), step(name, split_head=False)
    assert record["evidence_wrong"] is not None
    assert record["negative_missing"] < 1
    assert any(gradient.abs().max() > 1e-4 for gradient in hidden)
    for mine, theirs in zip(hidden, logits, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


def test_values_of_cut_responses_keep_the_images() -> None:
    separators = list("0123456789abcdefghijklmnop")
    config: dict[str, Any] = {"credit": {"name": "rredcot"}, "rredcot": {"separators": separators}}
    (shared, _), (whole, _) = (
        step("qwen3_vl", **config, teacher={"share_prefix": share_prefix}) for share_prefix in (True, False)
    )
    assert shared["segments"] > 1
    for name in ("value_mean", "value_brier", "segment_reward", "gradient_norm"):
        assert shared[name] == pytest.approx(whole[name], rel=1e-4), name


def test_what_reads_no_images_says_so(policy: Policy) -> None:
    blind = tiny_policy()
    with pytest.raises(InputError, match=r"expected a model that takes images .* got Qwen3ForCausalLM"):
        tokens_of(blind, mixed()[0].prompt)
    untold = make_policy(policy.model, policy.tokenizer)
    with pytest.raises(InputError, match="expected a model that takes images"):
        tokens_of(untold, mixed()[0].prompt)
    place = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(InputError, match=r"expected a model that takes images .* 'user: <image>\?'"):
        tokens_of(blind, place)
    judged = cross_model_entropy(policy)
    with pytest.raises(InputError, match="cross_model_entropy reads no images"):
        judged([mixed()[0].prompt], ["#7"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": "pictures/9.png"}, r"line 1: image: cannot read '.*pictures/9.png': No such file"),
        ({"image": 3}, "line 1: expected images to be paths or pictures, got \\[3\\]"),
        ({"images": ["a.png"]}, "line 1: expected 'image' or 'images', got both"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}]}]},
         "line 1: expected 2 images, one for each place in the prompt, got 1"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "line 1: .* a role and a content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "line 1: .* ends in a user turn with a text"),
    ],
)  # fmt: skip
def test_records_with_bad_images_are_told_by_their_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        get_task(f"jsonl:{records(tmp_path, change)}")


def test_a_damaged_image_is_told_when_it_is_read(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    picture(16, 16).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"image: cannot read '.*broken.png'"):
        tokens_of(policy, asking("what", str(path)).prompt)


def test_images_of_a_dataset_stay_encoded(policy: Policy, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [picture(16, 16, seed) for seed in range(6)]
    rows = {"prompt": ["what"] * 6, "answer": list("123456"), "image": pictures, "images": [None] * 6}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    task = get_task(f"hf:{tmp_path / 'rows.parquet'}")
    problem = task.train(0, 0)
    assert isinstance(problem.data["image"]["bytes"], bytes)
    shown = pictures[int(problem.answer) - 1]
    assert tokens_of(policy, problem.prompt) == tokens_of(policy, asking("what", shown).prompt)
    ours, theirs = (policy.images([tokens_of(policy, p)], 99) for p in (problem.prompt, asking("what", shown).prompt))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_dry_run_counts_the_tokens_of_images(tmp_path: Path) -> None:
    model, processor = tiny_llava()
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = small(policy={"model": str(tmp_path / "model")}, task={"name": f"jsonl:{records(tmp_path)}"})
    said = memory.estimate(config)
    task = get_task(config.task.name)
    prompts = [tokens_of(make_policy(model, processor), task.train(i, 0).prompt) for i in range(6)]
    assert said.prompt == max(map(len, prompts))
    assert said.parameters == model.num_parameters()
