"""The reward axis beyond the task's own check: what another model, or the policy itself, thinks of a text."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import small, steps
from tiny import one_thread, tiny_policy  # noqa: F401
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cepo import axes, trainer
from cepo.assets import EMBEDDED_VERIFIER, build_verifier, embedded_model
from cepo.assets.build import prompt_ids
from cepo.assets.build_verifier import auroc, build_tokenizer
from cepo.config import PolicyConfig
from cepo.errors import InputError
from cepo.parts import judge, load_parts
from cepo.policy import Policy, load_policy, make_policy, response_logits
from cepo.rewards import is_success
from cepo.rewards.cross_model_entropy import cross_model_entropy, load_verifier
from cepo.rewards.self_certainty import self_certainty, uniform_divergence
from cepo.rollout import sample
from cepo.tasks import Task
from cepo.tasks.addition import Addition
from cepo.tasks.worked import Worked

PROMPTS = ["437+285", "437+285", "12+7", "x"]
WORKED = "embedded:verifier-worked-0.4m"
COMPLETIONS = ["75:12;38:12;42:7#722", "75:12;38:11;42:6#612", "27:9#19", "100"]


@pytest.fixture(scope="module")
def verifier() -> Policy:
    return load_verifier("embedded")


def tiny_verifier(context: int = 64, **changes: Any) -> Policy:
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=context, n_embd=16, n_layer=2, n_head=2,
                        initializer_range=0.5, eos_token_id=1, pad_token_id=0)  # fmt: skip
    policy = make_policy(GPT2LMHeadModel(config), tokenizer)
    return replace(policy, **changes)


def brute(policy: Policy, context: list[int], response: list[int]) -> float:
    """Mean log-prob of one response by one plain pass."""
    logits: Tensor = policy.model(torch.tensor([context + response])).logits[0, len(context) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).mean().item()


@pytest.mark.parametrize("split_head", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_it_is_the_mean_logprob_of_the_text_in_the_verifiers_own_tokens(batch_size: int, split_head: bool) -> None:
    policy = tiny_verifier(split_head=split_head)
    tokenizer = policy.tokenizer
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        response = tokenizer(completion)["input_ids"]
        assert tokenizer.eos_token_id not in response
        expected.append(brute(policy, prompt_ids(tokenizer, prompt), response))
    got = cross_model_entropy(policy, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    assert got == pytest.approx(expected, rel=1e-5)
    assert min(expected) < -5, "nothing may be clipped"


def test_equal_texts_get_equal_rewards_wherever_they_stand() -> None:
    texts = ["1", "12:3" * 9, "1", "77", "1"]
    rewards = cross_model_entropy(tiny_verifier(), batch_size=2)(["5+6"] * 5, texts)
    assert rewards[0] == rewards[2] == rewards[4]


def test_what_exceeds_the_context_is_cut_off_on_the_left() -> None:
    policy = tiny_verifier(context=16)
    reward = cross_model_entropy(policy)
    context, response = prompt_ids(policy.tokenizer, "123456789+1"), policy.tokenizer("1;2;3")["input_ids"]
    assert len(context) + len(response) > 16 > len(response)
    (got,) = reward(["123456789+1"], ["1;2;3"])
    assert got == pytest.approx(brute(policy, context[len(response) - 16 :], response), rel=1e-5)
    text = "1;2;3;" * 8
    kept = policy.tokenizer(text)["input_ids"][-16:]
    (got,) = reward(["1+1"], [text])
    assert got == pytest.approx(brute(policy, kept[:1], kept[1:]), rel=1e-5)


def test_an_empty_response_is_not_scored_or_gets_what_is_asked_for() -> None:
    policy = tiny_verifier()
    full, empty = cross_model_entropy(policy)(["1+1", "1+1"], ["2", ""])
    assert full is not None
    assert empty is None
    assert cross_model_entropy(policy, empty=-50.0)(["1+1", "1+1"], ["2", ""]) == [full, -50.0]


def test_it_takes_what_trl_gives_plain_and_conversational() -> None:
    reward = cross_model_entropy(tiny_verifier())
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    replies = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in COMPLETIONS]
    plain = reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 4, answer=["7"] * 4)
    assert reward(prompts=turns, completions=replies, completion_ids=[[1]] * 4, trainer_state=object()) == plain
    assert reward(turns, parts) == plain
    with pytest.raises(InputError, match="completions: expected one for each of 1 prompts, got 4"):
        reward(turns[:1], replies)
    for size in (0, True, 1.5):
        with pytest.raises(InputError, match=f"batch_size: expected a whole number, at least 1, got {size}"):
            cross_model_entropy(tiny_verifier(), batch_size=size)  # type: ignore[arg-type]
    assert reward.__name__ == "cross_model_entropy"
    bare = tiny_verifier()
    bare.tokenizer.chat_template = None
    (got,) = cross_model_entropy(bare)(turns[:1], replies[:1])
    ids = bare.tokenizer([PROMPTS[0], COMPLETIONS[0]])["input_ids"]
    assert got == pytest.approx(brute(bare, *ids), rel=1e-5)


def test_the_control_is_the_same_reward_under_weights_that_know_nothing(verifier: Policy) -> None:
    before = torch.get_rng_state()
    control = cross_model_entropy(verifier, random_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    first = control(PROMPTS, COMPLETIONS)
    assert first == cross_model_entropy(verifier, random_weights=True)(PROMPTS, COMPLETIONS)
    assert all(abs(r + math.log(len(verifier.tokenizer))) < 0.5 for r in first if r is not None)
    assert control.__name__ == "cross_model_entropy_control"


@pytest.mark.parametrize(
    ("judge", "model", "task", "text"),
    [
        ("embedded", "embedded", Addition(), "75:12;38:12;42:7#722"),
        (WORKED, "embedded:worked-0.8m", Worked("number_sorting"), "0:4719;1:479;4:79;7:9#01479"),
        (WORKED, "embedded:worked-0.8m", Worked("number_filtering"), "7y;2n;9y;3n;5y;1n#795"),
    ],
)
def test_an_embedded_verifier_is_another_model_and_knows_right_from_wrong(
    judge: str, model: str, task: Task, text: str
) -> None:
    verifier, own = load_verifier(judge), load_policy(PolicyConfig(model=model))
    assert verifier.model.config.model_type != own.model.config.model_type
    assert verifier.tokenizer.chat_template != own.tokenizer.chat_template
    assert len(verifier.tokenizer(text)["input_ids"]) < len(own.tokenizer(text)["input_ids"])
    assert verifier.tokenizer.decode(verifier.tokenizer(text)["input_ids"]) == text
    problems = task.split("test", 200)
    rollouts = sample(own, problems, group_size=1, max_new_tokens=task.max_new_tokens, temperature=1.0, key=(3, 1))
    correct = [task.score(c, p) == 1 for c, p in zip(rollouts.completions, problems, strict=True)]
    rewards = cross_model_entropy(verifier)([p.prompt for p in problems], rollouts.completions)
    assert auroc([r for r in rewards if r is not None], correct) > 0.95


def test_embedded_verifiers_are_small() -> None:
    for name in (EMBEDDED_VERIFIER, WORKED.partition(":")[2]):
        assert sum(f.stat().st_size for f in embedded_model(name).iterdir()) < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "taught"), [("addition", 122519), ("worked", 136847)])
def test_the_script_that_trains_them_draws_problems_the_policy_was_not_taught(
    policy: str, taught: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = build_verifier.train(policy, steps=2, learning_rate=1e-3, seed=0, rows=40)  # it asserts that
    assert f"none of the {taught} that the policy was taught" in capsys.readouterr().out
    assert tokenizer.get_vocab() == load_verifier("embedded").tokenizer.get_vocab()
    assert model.num_parameters() < 400_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--steps", "-1"], "--steps: expected at least 1, got -1"),
        (["--evaluate", "{tmp}/none"], "--evaluate: expected the directory of a verifier, got '{tmp}/none'"),
        (["--evaluate", "{tmp}"], "--evaluate: cannot load '{tmp}'"),
        (["--out", "{tmp}/file/verifier"], "--out: cannot make '{tmp}/file/verifier': Not a directory"),
    ],
)
def test_the_script_that_trains_them_tells_bad_arguments_before_it_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build_verifier, "train", lambda *_: pytest.fail("it trained"))
    monkeypatch.setattr(sys, "argv", ["build_verifier", *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as status:
        build_verifier.main()
    assert status.value.code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_auroc_counts_ties_half() -> None:
    assert auroc([1.0, 2.0, 2.0, 0.0], [True, True, False, False]) == (1 + 0.5 + 0 + 1) / 4


def test_an_unknown_verifier_is_told_by_its_own_name() -> None:
    with pytest.raises(InputError, match=r"^reward\.verifier: expected .*'\./nowhere'"):
        cross_model_entropy("./nowhere")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_self_certainty_is_the_mean_divergence_from_uniform(temperature: float) -> None:
    policy = tiny_policy()
    problems = Addition().split("validation", 3)
    rollouts = sample(policy, problems, group_size=2, max_new_tokens=9, temperature=1.0, key=(0, 1))
    prompts = rollouts.per_rollout([p.prompt for p in problems])
    got = self_certainty(
        prompts, rollouts.completions, rollouts.responses, policy=policy, temperature=temperature, batch_size=4
    )
    for b, response in enumerate(rollouts.responses):
        logits = response_logits(policy, [rollouts.prompts[b // 2]], [response]).double() / temperature
        uniform = torch.full_like(logits, 1 / logits.shape[1])
        expected = torch.nn.functional.kl_div(logits.log_softmax(-1), uniform, reduction="sum") / len(response)
        assert got[b] == pytest.approx(expected.item(), rel=1e-5)


def test_a_uniform_policy_has_no_certainty_and_a_capped_one_less() -> None:
    assert uniform_divergence(torch.zeros(2, 50)).abs().max() < 1e-12
    logits = 20 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert (uniform_divergence(logits, logit_softcap=5.0) < uniform_divergence(logits)).all()


@pytest.mark.parametrize("reward", ["cross_model_entropy", "self_certainty"])
def test_success_is_the_tasks_whatever_the_reward(monkeypatch: pytest.MonkeyPatch, reward: str) -> None:
    told: list[Any] = []
    build = trainer.teacher.build

    def spy(*args: Any) -> Any:
        told.append(args)
        return build(*args)

    monkeypatch.setattr(trainer.teacher, "build", spy)
    parts, (record,) = steps(small(reward={"name": reward}, credit={"name": "cepo"}), n=1)
    ((_, _, _, rollouts, scores, threshold),) = told
    assert scores == judge(parts, rollouts)
    assert set(scores) == {0.0, 1.0}
    assert record["accuracy"] == pytest.approx(sum(is_success(s, threshold) for s in scores) / len(scores))
    assert record["gradient_norm"] > 0
    assert ("reward_control" in record) is (reward == "cross_model_entropy")
    if reward == "cross_model_entropy":
        assert record["reward_control"] < record["reward"] < 0
    evaluation = trainer.evaluate(parts)
    assert evaluation["greedy"] == trainer.evaluate(replace(parts, reward=lambda *_, **__: [None]))["greedy"] > 0


@pytest.mark.parametrize("credit", axes.members("credit"))
@pytest.mark.parametrize("reward", axes.members("rewards"))
def test_any_reward_goes_with_any_credit(reward: str, credit: str) -> None:
    mode = "return_to_go" if reward == "verifier" else "scale"
    config = small(
        reward={"name": reward},
        credit={"name": credit},
        rredcot={"mode": mode},
        rollout={"prompts": 3, "group_size": 4},
    )
    _, (record,) = steps(config, n=1)
    assert record["gradient_norm"] > 0
    if credit == "rredcot":  # its values are judged by the task's success, not by the reward
        assert 0 < record["value_outcome"] < 1
        assert 0 <= record["segment_reward"] <= 1


@pytest.mark.parametrize("advantage", ["maxrl", "rl2ml"])
@pytest.mark.parametrize("reward", ["cross_model_entropy", "self_certainty"])
def test_counting_successes_of_a_reward_that_knows_none_is_refused(reward: str, advantage: str) -> None:
    with pytest.raises(InputError, match=rf"advantage\.name: expected .* {reward} knows nothing of, got '{advantage}'"):
        small(reward={"name": reward}, advantage={"name": advantage})


def test_options_of_another_reward_are_refused() -> None:
    with pytest.raises(InputError, match=r"reward\.verifier: expected none, since reward verifier"):
        small(reward={"verifier": "embedded"})
    with pytest.raises(InputError, match=r"reward\.empty: expected none"):
        small(reward={"name": "self_certainty", "empty": -50.0})
    with pytest.raises(InputError, match=r"reward\.verifier: expected a model that knows task jsonl:x, got"):
        small(reward={"name": "cross_model_entropy"}, task={"name": "jsonl:x"})
    with pytest.raises(InputError, match=r"reward\.verifier: .*nowhere"):
        load_parts(small(reward={"name": "cross_model_entropy", "verifier": "./nowhere"}))


def test_trl_trains_on_it_unchanged(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+285"}]} for i in range(200, 204)])
    args = trl.GRPOConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=8, num_generations=4, use_cpu=True,
                          max_completion_length=24, reward_weights=[1.0, 0.0], report_to=[], save_strategy="no",
                          logging_steps=1, disable_tqdm=True)  # fmt: skip
    rewards = [cross_model_entropy(), cross_model_entropy(random_weights=True)]
    learner = trl.GRPOTrainer(str(embedded_model()), rewards, args, data)
    learner.train()
    logged = learner.state.log_history[0]
    assert logged["reward"] == pytest.approx(logged["rewards/cross_model_entropy/mean"], abs=1e-6)
    assert logged["rewards/cross_model_entropy_control/mean"] < logged["reward"] < 0
