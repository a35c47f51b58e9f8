"""In TRL: the credit is that of the kernels, and without credit the trainer is GRPOTrainer bit for bit.

Run as a script, by torchrun, it is one of several processes that train together.
"""

from __future__ import annotations

import copy
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_afresh, one_thread, tiny_policy  # noqa: F401

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from cepo.config import TeacherConfig
from cepo.errors import InputError
from cepo.integrations import trl as integration
from cepo.integrations.trl import CEPOConfig, CEPOTrainer
from cepo.policy import make_policy, response_logits
from cepo.prompts import hinted
from cepo.tasks import Problem
from cepo.teacher import teacher_context
from cepo_kernels import contrastive_logprobs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
GROUP = 4
RIGHT, WRONG, OTHER, CUT = "a#7", "b#8", "b2#9", "cc#5"


def parse(completion: str) -> str | None:
    return completion.partition("#")[2] or None


def lucky(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that a random model earns now and then."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def correct(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(parse(text) == right) for text, right in zip(texts, answer, strict=True)]


def prompt(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


DATA = [{"prompt": prompt(f"{i}+4"), "answer": "7"} for i in range(8)]


def make(
    folder: Path, kind: type = CEPOTrainer, *, data: Sequence[dict[str, Any]] = DATA, reward: Any = lucky,
    model: Any = None, more: dict[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """A trainer of the tiny policy; `options` go to its config, `more` to the trainer."""
    policy = tiny_policy()
    parts = {"processing_class": policy.tokenizer, **({"parse_answer": parse} if kind is CEPOTrainer else {})}
    settings = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": 8,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "max_steps": 2, "seed": 3,
    }  # fmt: skip
    config = (CEPOConfig if kind is CEPOTrainer else GRPOConfig)(**{**settings, **options})
    dataset = Dataset.from_list(list(data))
    return kind(model or policy.model, reward, config, dataset, **{**parts, **(more or {})})


def say(*completions: str) -> Any:
    """A rollout function that says these things, over and over; all but `CUT` end."""

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        tokenizer, first = trainer._tokenizer, trainer.accelerator.process_index * len(prompts)
        ids = []
        for i in range(len(prompts)):
            text = completions[(first + i) % len(completions)]
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids[-1] += [] if text == CUT else [tokenizer.eos_token_id]
        return {"prompt_ids": trainer._tokenize_prompts(prompts)[0], "completion_ids": ids, "logprobs": None}

    return rollout


def step(trainer: Any, data: Sequence[dict[str, Any]]) -> Any:
    """What a generation batch of `data`, each repeated for its group, goes to the loss as."""
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(row) for row in data for _ in range(GROUP)])


def logged(trainer: Any, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


def trained(trainer: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    trainer.train()
    keys = ("loss", "grad_norm", "reward", "entropy", "num_tokens")
    return [[record.get(key) for key in keys] for record in trainer.state.log_history], trainer.model.state_dict()


@pytest.mark.parametrize(
    "options",
    [{"credit": "uniform"}, {"lam": 0.0}, {"lam": 0.0, "skip_teachers": False},
     {"lam": 0.0, "skip_teachers": False, "loss_type": "vespo", "num_iterations": 2}],
)  # fmt: skip
def test_without_credit_it_is_grpo_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    # Dropout draws random numbers: a teacher pass in training mode would be seen in the next step's completions.
    def model() -> Any:
        return tiny_policy(attention_dropout=0.1).model

    theirs = {key: value for key, value in options.items() if key in ("loss_type", "num_iterations")}
    history, weights = trained(make(tmp_path, GRPOTrainer, model=model(), max_steps=3, **theirs))
    trainer = make(tmp_path, model=model(), max_steps=3, **options)
    passes = count_passes(trainer)
    mine, mine_weights = trained(trainer)
    assert mine == history
    assert any(loss != 0 for loss, *_ in history[:-1])
    assert all(torch.equal(weights[name], mine_weights[name]) for name in weights)
    assert bool(passes) == (options.get("skip_teachers") is False)


def count_passes(trainer: Any) -> list[int]:
    """The number of rows of every pass through the model for log-probs in evaluation mode."""
    passes: list[int] = []

    def count(model: Any, _: Any, options: dict[str, Any]) -> None:
        if options.get("fused_lm_head") and not model.training:
            passes.append(len(options["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    return passes


@pytest.mark.parametrize("credit", ["cepo", "rlsd"])
@pytest.mark.parametrize("template", ["hint", "splice"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_credit_is_that_of_the_kernels(tmp_path: Path, credit: str, template: str, plain: bool) -> None:
    texts = ["3+4", "10-3"]
    data = [{"prompt": t if plain else prompt(t), "solution": 7} for t in texts]
    said = [RIGHT, WRONG, OTHER, CUT, CUT, RIGHT, CUT, RIGHT]  # the second group has no r-: RLSD
    trainer = make(
        tmp_path, data=data, reward=lambda completions, solution, **_: correct(completions, ["7"] * len(solution)),
        credit=credit, template=template, lam=0.7, temperature=0.8, more={"rollout_func": say(*said)},
    )  # fmt: skip
    policy = make_policy(copy.deepcopy(trainer.model), copy.deepcopy(trainer.processing_class))
    if plain:
        policy.tokenizer.chat_template = None
    output = step(trainer, data)

    config = TeacherConfig(template=template)
    mask = output["completion_mask"].bool()
    responses = [ids[keep].tolist() for ids, keep in zip(output["completion_ids"], mask, strict=True)]
    prompts = [ids[keep.bool()].tolist() for ids, keep in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    problems = [Problem(t, "7") for t in texts for _ in range(GROUP)]
    positive = [teacher_context(policy, config, p, "7") for p in problems]
    negative = [teacher_context(policy, config, p, "8") for p in problems]
    logits = [response_logits(policy, contexts, responses).detach() for contexts in (prompts, positive, negative)]
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 1]).view(2, GROUP)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    has_negative = torch.tensor([credit == "cepo"] * GROUP + [False] * GROUP)[:, None]
    expected = contrastive_logprobs(
        *logits,
        torch.cat([torch.tensor(r) for r in responses]),
        advantages.expand(mask.shape)[mask],
        negative_mask=has_negative.expand(mask.shape)[mask],
        lam=0.7,
        eps_w=0.5 if credit == "cepo" else 0.2,
        temperature=0.8,
    )
    assert output["advantages"].shape == mask.shape
    assert torch.allclose(output["advantages"][mask], expected.advantages, atol=1e-5)
    assert torch.equal(output["advantages"][~mask], advantages.expand(mask.shape)[~mask])
    metrics = trainer._metrics["train"]
    right = (rewards.view(-1, 1) == 1).expand(mask.shape)[mask]
    assert metrics["cepo/lam"] == [0.7]
    assert metrics["cepo/weight"] == [pytest.approx(expected.weight.mean().item(), abs=1e-5)]
    assert metrics["cepo/evidence_right"] == [pytest.approx(expected.evidence[right].mean().item(), abs=1e-4)]
    assert metrics["cepo/evidence_wrong"] == [pytest.approx(expected.evidence[~right].mean().item(), abs=1e-4)]
    assert 0 < metrics["cepo/weight_clipped"][0] < 1
    assert metrics["cepo/teacher_seconds"][0] > 0
    if credit == "cepo":
        assert [metrics[f"cepo/negative_{x}"][0] for x in ("missing", "last_line", "same_as_positive")] == [0.5, 0, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(tmp_path: Path, loss: str) -> None:
    trainer = make(tmp_path, loss_type=loss, max_steps=1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    assert logged(trainer, "cepo/weight")[0] != 1


def test_rows_that_cannot_matter_meet_no_teacher(tmp_path: Path) -> None:
    said = [RIGHT, WRONG, RIGHT, CUT, *[RIGHT] * GROUP]
    outputs = {}
    for skip in (True, False):
        trainer = make(tmp_path, reward=correct, skip_teachers=skip, more={"rollout_func": say(*said)})
        passes = count_passes(trainer)
        outputs[skip] = step(trainer, DATA[:2])["advantages"]
        assert passes == ([GROUP, GROUP] if skip else [2 * GROUP, GROUP, GROUP])
    assert torch.allclose(outputs[True], outputs[False], atol=1e-6)
    assert not outputs[True][GROUP:].any()
    trainer = make(tmp_path, reward=correct, more={"rollout_func": say(RIGHT)})
    passes = count_passes(trainer)
    assert step(trainer, DATA[:2])["advantages"].shape == (2 * GROUP,)
    assert not passes
    trainer.model.eval()
    trainer._generate_and_score_completions([dict(row) for row in DATA[:2] for _ in range(GROUP)])
    assert not passes


def test_truncated_rollouts_may_be_masked_and_batches_used_twice(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, reward=correct, mask_truncated_completions=True, num_iterations=2, max_steps=4,
        more={"rollout_func": say(RIGHT, WRONG, OTHER, CUT)},
    )  # fmt: skip
    passes = count_passes(trainer)
    trainer.train()
    assert passes.count(2 * (GROUP - 1)) == 4  # two batches, two teachers: without the truncated
    assert all(loss == loss for loss in logged(trainer, "loss"))


def test_lambda_is_a_function_of_the_step_so_a_resumed_run_goes_on(tmp_path: Path) -> None:
    options = {"lam_steps": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    resumed = make(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(whole, "cepo/lam") == [0.5, 0.375, 0.25, 0.125]
    assert logged(resumed, "cepo/lam") == [0.5, 0.375, 0.25, 0.125]  # the first two were saved
    assert resumed.state.global_step == 4


def test_a_wrong_answer_too_long_for_the_context_is_left_out_and_a_right_one_refused(tmp_path: Path) -> None:
    long, say_long = "8" * 40, say(f"#{'8' * 40}", RIGHT)
    trainer = make(tmp_path, reward=correct, more={"rollout_func": say_long})
    need = len(trainer._tokenize_prompts([prompt(f"0+4\nHint: the answer is {long}.")])[0][0]) + 42
    for context, missing in ((need, 0), (need - 1, 1)):
        trainer._context = context
        step(trainer, DATA[:2])
        assert trainer._metrics["train"]["cepo/negative_missing"].pop() == missing
    trainer._context = 50
    with pytest.raises(InputError, match="teacher context of answer '7': expected at most 50 tokens"):
        step(trainer, DATA[:2])


def test_a_hint_goes_into_the_last_user_turn() -> None:
    system, image = {"role": "system", "content": "s"}, {"type": "image", "image": object()}
    turns = [system, *prompt("a"), {"role": "assistant", "content": "b"}, *prompt("c")]
    told = hinted("{prompt}! {answer}", turns, answer="{x}")
    assert [turn["content"] for turn in told] == ["s", "a", "b", "c! {x}"]
    assert turns[-1]["content"] == "c"
    blocks = [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]
    assert hinted("{prompt}!", blocks)[0]["content"] == [{"type": "text", "text": "a!"}, image]
    bare = [{"role": "user", "content": [image]}]
    assert hinted("{prompt}!", bare)[0]["content"] == [image, {"type": "text", "text": "!"}]
    with pytest.raises(InputError, match=r"prompt: expected a user turn for the hint, got roles \['system'\]"):
        hinted("{prompt}", [system])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 2.0}, r"^lam: expected a number in \[0, 1\], got 2"),
        ({"eps_w": 1.0}, r"^eps_w: expected a number in \[0, 1\), got 1"),
        ({"lam_steps": -1}, "^lam_steps: expected at least 0, got -1"),
        ({"credit": "x"}, "^credit: expected one of cepo, rlsd, uniform, rredcot, got 'x'"),
        ({"lam": "0.5"}, "^lam: expected a finite number, got '0.5'"),
        ({"lam_steps": 2.5}, "^lam_steps: expected a whole number or None, got 2.5"),
        ({"success_threshold": math.nan}, "^success_threshold: expected a finite number, got nan"),
        ({"success_threshold": "1"}, "^success_threshold: expected a finite number, got '1'"),
        ({"answer_column": 3}, "^answer_column: expected a text or None, got 3"),
        ({"answer_column": ""}, "^answer_column: expected the name of a column or None, got ''"),
        ({"skip_teachers": "no"}, "^skip_teachers: expected True or False, got 'no'"),
        ({"credit": "rredcot", "rredcot_keywords": [3]}, r"^rredcot_keywords: expected a list of texts, got \[3\]"),
        (
            {"credit": "rredcot", "lam": 0.0},
            "^lam: expected 0.5, the default, as it has no effect with credit rredcot, got 0.0",
        ),
        ({"credit": "rredcot", "eps_w": 0.2}, "^eps_w: expected 0.0, the default, .*got 0.2"),
        ({"credit": "rredcot", "hint": "{prompt} {answer}"}, "^hint: expected .*, the default, "),
        ({"rredcot_mode": "x"}, "^rredcot_mode: expected one of return_to_go, difference, scale, got 'x'"),
        (
            {"rredcot_mode": "scale"},
            "^rredcot_mode: expected 'return_to_go', the default, as it has no effect with credit cepo, got 'scale'",
        ),
        ({"credit": "uniform", "lam": 0.9}, "^lam: expected 0.5, the default, .* with credit uniform, got 0.9"),
        ({"credit": "uniform", "template": "splice"}, "^template: expected 'hint', the default, .*got 'splice'"),
        ({"splice": "{answer}"}, "^splice: expected .*, the default, as it has no effect with template hint, got '{an"),
        ({"credit": "rredcot", "rredcot_mode": "x"}, "^rredcot_mode: expected one of return_to_go, difference, scale"),
        (
            {"credit": "rredcot", "rredcot_mode": "scale", "rredcot_centre": "others"},
            "^rredcot_centre: expected none with rredcot_mode scale, got 'others'",
        ),
        ({"credit": "rredcot", "rredcot_cue": "so"}, r"^rredcot_cue: expected a text with one \{answer\}, got 'so'"),
        ({"credit": "rredcot", "rredcot_keywords": "so"}, "^rredcot_keywords: expected a list of texts, got 'so'"),
        (
            {"credit": "rredcot", "scale_rewards": "batch"},
            "^scale_rewards: expected group or none, as rredcot_mode ret",
        ),
        (
            {"credit": "rredcot", "reward_weights": [2.0]},
            r"^reward_weights: expected each at .* success .*, got \[2.0\]",
        ),
        ({"credit": "rredcot", "reward": [lucky, correct]}, r"^reward_weights: .*got \[1.0, 1.0\]"),
        ({"credit": "rredcot", "answer_column": "gold"}, "answer_column: expected the right answer in column gold"),
        ({"template": "x"}, "^template: expected one of hint, splice, got 'x'"),
        ({"hint": "no answer"}, r"^hint: expected a text with \{answer\}, got 'no answer'"),
        ({"answer_column": "gold"}, r"answer_column: expected the right answer in column gold, got \['answer', 'pro"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path, **options)


def test_published_settings_are_the_defaults(tmp_path: Path) -> None:
    for credit, eps_w, steps in (("cepo", 0.5, 25), ("rlsd", 0.2, 50)):
        config = CEPOConfig(str(tmp_path), credit=credit, use_cpu=True, bf16=False)
        assert (config.lam, config.eps_w, config.lam_steps) == (0.5, eps_w, steps)


def test_other_versions_are_refused_with_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    wanted = r"expected TRL >= 1\.16, < 1\.17 \(pip install 'trl>=1\.16,<1\.17'\), got"
    for version in ("1.15.0", "1.17.0", "0.29.1"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(ImportError, match=f"{wanted} {version}"):
            load_afresh(integration)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=f"{wanted}: .*trl"):
        load_afresh(integration)


@pytest.mark.parametrize("credit", ["cepo", "rredcot"])
def test_lora_trains(tmp_path: Path, credit: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(tmp_path, credit=credit, more={"peft_config": config})
    frozen = trainer.model.get_base_model().model.embed_tokens.weight.clone()
    adapters = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    if credit == "cepo":
        assert logged(trainer, "cepo/weight")[0] != 1
    else:  # values are of the adapted model, which has moved
        first, second = logged(trainer, "cepo/value_mean")
        assert 0 < first != second > 0
    assert torch.equal(frozen, trainer.model.get_base_model().model.embed_tokens.weight)
    now = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(adapters, now, strict=True))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train_one_step(self: Any) -> None:
        self.args.max_steps = 1
        seen.append(self)
        GRPOTrainer.train(self)

    monkeypatch.setattr(CEPOTrainer, "train", train_one_step)
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parent.parent / "examples" / "trl" / "train.py"
    runpy.run_path(str(example))
    assert logged(seen[0], "cepo/evidence_right")[0] > 0.1 > -0.1 > logged(seen[0], "cepo/evidence_wrong")[0]
    code = example.read_text().split('"""')[2].splitlines()
    assert sum(bool(line) for line in code) <= 12


@pytest.mark.parametrize("options", [{"bf16": True}, {"pad_to_multiple_of": 8}, {"beta": 0.1}])
def test_other_settings_train(tmp_path: Path, options: dict[str, Any]) -> None:
    policy = tiny_policy()
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    trainer = make(tmp_path, model=str(tmp_path / "model"), **options)
    trainer.train()
    assert logged(trainer, "cepo/weight")[0] != 1
    assert all(loss == loss for loss in logged(trainer, "loss"))


class Watched(CEPOTrainer):
    """Keeps what goes to the loss, and counts the teacher passes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: list[torch.Tensor] = []
        self.passes = count_passes(self)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.kept.append(output["advantages"][:, :4])
        return output


def run_processes(folder: Path) -> None:
    """Six rollouts of three groups of two, however many processes there are; the last group needs no teacher."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    policy = tiny_policy()
    asking = {"rredcot_separators": ["#"], "rredcot_cue": "{answer}"}
    for name, options, said in (
        ("cepo", {}, [WRONG, RIGHT, OTHER, RIGHT]),
        ("rredcot", {**asking, "rredcot_centre": "others"}, [WRONG, RIGHT, OTHER, RIGHT]),
        ("scale", {**asking, "rredcot_mode": "scale"}, [WRONG, RIGHT, RIGHT, RIGHT]),  # nothing for the second process
    ):
        config = CEPOConfig(
            str(folder), credit="cepo" if name == "cepo" else "rredcot", **options,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_steps=1,
            per_device_train_batch_size=1, gradient_accumulation_steps=6 // processes, num_generations=2, optim="sgd",
            shuffle_dataset=False, max_grad_norm=0.0, learning_rate=1.0, logging_steps=1, max_completion_length=8,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = Watched(
            tiny_policy().model, correct, config, Dataset.from_list(DATA[:3]), processing_class=policy.tokenizer,
            parse_answer=parse, rollout_func=say(*said, RIGHT, RIGHT),
        )  # fmt: skip
        trainer.train()
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        metrics = {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("cepo/")}
        torch.save(
            {"advantages": torch.cat(trainer.kept), "passes": trainer.passes, "state": state, "metrics": metrics},
            folder / f"{name}-{processes}-{trainer.accelerator.process_index}.pt",
        )


def test_groups_may_straddle_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    run_processes(tmp_path)
    for credit in ("cepo", "rredcot", "scale"):
        one, first, second = (torch.load(tmp_path / f"{credit}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
        assert torch.allclose(torch.cat([first["advantages"], second["advantages"]]), one["advantages"], atol=1e-5)
        assert one["advantages"].unique(dim=1).shape[1] > 1
        if credit == "cepo":
            # Three rollouts of the first process need teachers, one of the second: it takes part in all passes.
            assert first["passes"] == second["passes"] == [1] * 6
        assert bool(second["advantages"].any()) == (credit != "scale")
        for name, value in one["metrics"].items():
            if not name.endswith("_seconds"):
                assert first["metrics"][name] == second["metrics"][name] == pytest.approx(value, abs=1e-5)
        for name, value in one["state"].items():
            assert torch.equal(first["state"][name], second["state"][name])
            assert torch.allclose(first["state"][name], value, atol=1e-5)


if __name__ == "__main__":
    run_processes(Path(sys.argv[1]))
