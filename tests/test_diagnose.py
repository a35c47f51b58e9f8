"""`cepo diagnose`: that it looks at what training does, at the right tokens, and says what it cannot know."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny import Sums, one_thread, rollouts_of, tiny_policy  # noqa: F401

from cepo import axes, checkpoint, trainer
from cepo.cli import main
from cepo.config import Config, DiagnoseConfig, RolloutConfig
from cepo.diagnose import command, diagnose
from cepo.diagnose.batches import Scored, batch_of, collect, collect_held_out, observe
from cepo.diagnose.gradient import gradient, variance
from cepo.diagnose.leakage import answer_logprobs, leakage
from cepo.diagnose.methods import methods
from cepo.diagnose.ranking import UNCERTAIN, Slip, rank, ranking, result_tokens, slips
from cepo.diagnose.report import text
from cepo.diagnose.shares import shares
from cepo.errors import InputError
from cepo.parts import Parts, load_parts, problems_of, score
from cepo.policy import response_logits
from cepo.tasks.addition import Addition, problem

FEW = DiagnoseConfig(problems=4, batches=2)


def small(prompts: int = 4, **sections: Any) -> Config:
    config = Config(rollout=RolloutConfig(prompts=prompts, group_size=4))
    for name, changes in sections.items():
        setattr(config, name, replace(getattr(config, name), **changes))
    return config.check()


@pytest.fixture(scope="module")
def embedded() -> Parts:
    return load_parts(small())


@pytest.fixture(scope="module")
def scored(embedded: Parts) -> Scored:
    found = collect(embedded, problems_of(embedded, 5), (0, 5))  # with a group whose wrong answers differ
    assert (found.advantages == 0).any()
    assert (found.advantages != 0).any()
    return found


def by_hand(parts: Parts, completions: list[str], advantages: list[float]) -> Scored:
    """Rollouts of 437+285 (75:12;38:12;42:7#722) and 111+222, two each."""
    rollouts = rollouts_of(parts.policy, [problem(437, 285), problem(111, 222)], completions)
    scores = score(parts, rollouts)
    return Scored(rollouts, scores, scores, torch.tensor(advantages))


RIGHT = "75:12;38:12;42:7#722"
OTHER = "12:3;12:3;12:3#333"


def every(parts: Parts) -> dict[str, Parts]:
    found, without = methods(parts, None)
    assert not without
    return found


CREDITS = ["cepo", "cepo, own r-", "rlsd", "rredcot", "shuffled", "uniform"]
OTHERS = ["dr_grpo", "maxrl", "rl2ml, alpha 0.5", "rl2ml, alpha 1.5", "rl2ml, alpha auto", "rloo", "opsd", "sdpo"]


def trained_as(label: str) -> dict[str, Any]:
    """The sections of a training by the method of this label."""
    name, _, option = label.partition(", ")
    if name in axes.members("losses"):
        return {"loss": {"name": name, "average": None}}
    if name in axes.members("advantages"):
        alpha = yaml.safe_load(option.removeprefix("alpha ") or "null")
        advantage = {"name": name, "alpha": alpha}
        return {"credit": {"name": "uniform", "eps_w": None}, "advantage": advantage, "loss": {"average": None}}
    return {"credit": {"name": name, "eps_w": None, "lam_steps": 0}, "teacher": {"negative": option[:3] or "group"}}


def test_the_gradient_of_a_method_is_the_one_that_training_by_it_takes(embedded: Parts, scored: Scored) -> None:
    trains = [{"prompts_per_pass": n, "max_grad_norm": float("inf")} for n in (0, 1)]
    every_two = [every(replace(embedded, config=small(train=train))) for train in trains]
    assert [*every_two[0]] == [*CREDITS, *OTHERS]
    seen: list[torch.Tensor] = []
    for k, label in enumerate(every_two[0]):
        method, train = every_two[k % 2][label], trains[k % 2]
        trained = load_parts(small(train=train, **trained_as(label)))
        still = torch.optim.SGD(trained.policy.model.parameters(), lr=0.0)
        trainer.train_step(trained, still, 5)
        expected = torch.cat([p.grad.flatten() for p in trained.policy.model.parameters()])
        got = gradient(method, scored, 5)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item()), label
        assert all(p.grad is None for p in embedded.policy.model.parameters())
        assert not any(torch.allclose(got, other, rtol=1e-3, atol=1e-6) for other in seen), label
        seen.append(got)
        if method.adaptive:
            assert method.adaptive.state["histogram"].sum() > 0
            for name, value in trained.adaptive.state.items():
                torch.testing.assert_close(method.adaptive.state[name], value)


def test_a_batch_without_variance_counts_as_a_gradient_of_zero(embedded: Parts, scored: Scored) -> None:
    flat = replace(scored, advantages=torch.zeros_like(scored.advantages))
    assert not gradient(every(embedded)["cepo"], flat).any()


def test_without_lambda_every_method_has_the_gradient_of_uniform(embedded: Parts) -> None:
    parts = replace(embedded, config=small(credit={"lam": 0.0}))
    found = variance(parts, methods(parts, None, ["rlsd", "shuffled"])[0], 2)
    assert len(found) == 5
    assert len({round(of["variance"], 12) for of in found.values()}) == 1
    assert all(of["cosine"] == pytest.approx(1, abs=1e-9) for of in found.values())
    assert all(of["length"] == pytest.approx(1, abs=1e-9) for of in found.values())


def test_leakage_reads_every_rollout_and_the_whole_answer_without_a_hint(embedded: Parts, scored: Scored) -> None:
    uniform, policy, rollouts = every(embedded)["uniform"], embedded.policy, scored.rollouts
    answers = [policy.tokenizer(f"{p.answer}<|end|>")["input_ids"] for p in rollouts.problems]
    cue = policy.tokenizer("#")["input_ids"]
    logits = response_logits(policy, [prompt + cue for prompt in rollouts.prompts], answers)
    labels = torch.tensor([token for ids in answers for token in ids])
    picked = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = torch.stack([part.sum() for part in picked.split([len(ids) for ids in answers])])
    torch.testing.assert_close(answer_logprobs(uniform, rollouts), expected.detach(), rtol=1e-4, atol=1e-4)

    logits = response_logits(policy, rollouts.per_rollout(rollouts.prompts), rollouts.responses)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    found = leakage(uniform, [scored])
    assert found["entropy"].mean == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert found["entropy"].n == labels_of(scored)
    assert found["entropy"].clusters == 4
    assert found["answer_logprob"].mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["accuracy"].mean == sum(r or 0 for r in scored.rewards) / len(scored.rewards)


def labels_of(scored: Scored) -> int:
    return sum(len(ids) for ids in scored.rollouts.responses)


def test_results_are_the_totals_and_the_answer() -> None:
    assert [RIGHT[a:b] for a, b in Addition().result_spans(RIGHT)] == ["12", "12", "7", "722"]
    assert Addition().result_spans("75:;x#") == []


def test_a_slip_is_found_at_its_token_and_its_rivals_are_the_other_results() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy())
    late, lone = "75:12;38:11;42:7#712", "75"
    batch = by_hand(parts, [RIGHT, late, lone, "12:3;92:3;12:3#334"], [1.0, -1.0, -1.0, -1.0])
    tokens = result_tokens(parts, late, batch.rollouts.responses[1])
    assert [(late[t], k) for t, k, _ in tokens] == list(zip("12117712", [0, 0, 1, 1, 2, 3, 3, 3], strict=True))
    found, elsewhere = slips(parts, observe(every(parts), batch))
    assert elsewhere == 2  # one states nothing, one goes wrong first in a digit that is no result
    praised = replace(batch, advantages=-batch.advantages)
    assert slips(parts, observe(every(parts), praised)) == ([], 0)  # wrong, but better than its group
    (slip,) = found
    assert (slip.problem, slip.step, slip.index, slip.own) == (0, 2, 3, True)
    assert all(values.shape == (8,) for values in slip.scores.values())


def test_tokens_of_several_characters_are_placed_by_their_text() -> None:
    pieces = ["75:", "12;38", ":1", "", "1;42", ":7#", "712", ""]
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(pieces[i] for i in ids))
    parts: Any = SimpleNamespace(policy=SimpleNamespace(tokenizer=tokenizer), task=Addition())
    tokens = result_tokens(parts, "".join(pieces), list(range(8)))
    assert [(pieces[t], k) for t, k, _ in tokens] == [("12;38", 0), (":1", 1), ("1;42", 1), (":7#", 2), ("712", 3)]
    assert [characters.start for *_, characters in tokens] == [3, 8, 10, 14, 17]


def test_scores_are_those_of_the_tokens_they_are_shown_for() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy())
    batch = by_hand(parts, [RIGHT, "75:12;38:11;42:7#712", OTHER, OTHER], [1.0, -1.0, 0.0, 0.0])
    (slip,), _ = slips(parts, observe(every(parts), batch))
    response = batch.rollouts.responses[1]

    def logprobs(prompt: str) -> torch.Tensor:
        ids = parts.policy.tokenizer(f"<|user|>{prompt}<|assistant|>")["input_ids"]
        logits = response_logits(parts.policy, [ids], [response]).detach()
        return logits.log_softmax(-1)[range(len(response)), response][[3, 4, 9, 10, 15, 17, 18, 19]]

    hint = "437+285\nHint: the answer is {}."
    policy, positive, negative = (logprobs(p) for p in ("437+285", hint.format(722), hint.format(712)))
    torch.testing.assert_close(slip.scores["surprisal"], -policy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slip.scores["rlsd: evidence"], policy - positive, rtol=1e-4, atol=1e-4)
    for name in ("cepo", "cepo, own r-"):
        torch.testing.assert_close(slip.scores[f"{name}: evidence"], negative - positive, rtol=1e-4, atol=1e-4)
        weight = (negative - positive).exp().clamp(0.5, 1.5)
        torch.testing.assert_close(slip.scores[f"{name}: weight"], weight, rtol=1e-4, atol=1e-4)


def test_values_and_divergences_are_those_of_the_tokens_they_are_shown_for() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy())
    batch = by_hand(parts, [RIGHT, "75:12;38:11;42:7#712", OTHER, OTHER], [1.0, -1.0, 0.0, 0.0])
    (slip,), _ = slips(parts, observe(every(parts), batch))
    response, places = batch.rollouts.responses[1], [3, 4, 9, 10, 15, 17, 18, 19]
    tokens = parts.policy.tokenizer

    def rows(prompt: str, start: int = len(response), rest: str = "") -> torch.Tensor:
        ids = tokens(f"<|user|>{prompt}<|assistant|>")["input_ids"]
        tail = response[:start] + (tokens(rest)["input_ids"] if rest else [])
        return response_logits(parts.policy, [ids], [tail]).detach().log_softmax(-1)

    student, hint = rows("437+285")[places], "437+285\nHint: a{} {}."
    solved, sibling = (rows(hint.format(*told, RIGHT))[places] for told in ([" solution is"], ["nother attempt was"]))
    forward, reverse = ((p.exp() * (p - q)).sum(-1) for p, q in ((solved, student), (student, sibling)))
    torch.testing.assert_close(slip.scores["opsd: divergence"], forward, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(slip.scores["sdpo: divergence"], reverse, rtol=1e-3, atol=1e-6)

    starts, answer = [0, 6, 12], [*tokens("722<|end|>")["input_ids"]]
    scored = [rows("437+285", t, "#722<|end|>")[t + 1 :] for t in starts]
    v = torch.stack([at[range(len(answer)), answer].sum().exp() for at in scored])
    segments = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    torch.testing.assert_close(slip.scores["rredcot: return_to_go"], v[segments], rtol=1e-3, atol=0)
    fall = v - torch.cat([v[1:], torch.zeros(1)])
    torch.testing.assert_close(slip.scores["rredcot: difference"], fall[segments], rtol=1e-3, atol=0)


def test_each_method_leaves_other_rollouts_out() -> None:
    config = small(advantage={"name": "rl2ml", "alpha": 1.0, "baseline": "none"})
    parts = replace(load_parts(config), policy=tiny_policy(), config=config)
    some = by_hand(parts, [RIGHT, "75:12;38:11;42:7#712", "1", "1"], [1.0, 0.0, 0.0, 0.0])
    some = replace(some, of=config.advantage)
    shown = shares(every(parts), [observe(every(parts), some)])
    idle = {label: (of["idle_groups"], of["idle_rollouts"]) for label, of in shown["methods"].items()}
    assert idle["uniform"] == idle["cepo"] == (0.5, 0.75)  # nothing is learnt from failures
    assert idle["grpo"] == idle["maxrl"] == idle["rl2ml, alpha auto"] == (0.5, 0.5)
    assert idle["opsd"] == idle["rredcot"] == (0.0, 0.0)
    assert idle["sdpo"] == (0.5, 0.75)  # one has a sibling that succeeded, none of the others feedback
    assert "shuffled" not in idle


def test_r_minus_is_told_apart_from_the_answers_of_others() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy())
    first, second = "75:12;38:11;42:7#712", "75:12;38:12;42:6#622"
    batch = by_hand(parts, [first, second, OTHER, "12:3;12:3;12:4#433"], [-1.0, -1.0, 0.0, 0.0])
    observed = observe(every(parts), replace(batch, scores=[0.0, 0.0, 1.0, None]))  # the last is not scored
    found, _ = slips(parts, observed)
    assert [slip.own for slip in found] == [True, False]  # of equal rewards the first rollout's answer is r-
    shown = shares(every(parts), [observed])
    assert shown["r_minus_is_own"] == 0.5
    assert shown["zero_variance"] == 0.5
    assert shown["no_r_minus"] == 0.0
    weights = torch.cat([values["weight"] for values in observed.readings["rlsd"]])
    of_each = shown["methods"]
    assert of_each["rlsd"]["at_clip"] == pytest.approx(
        ((weights == 0.8) | (weights == 1.2)).float().mean().item(), abs=0.02
    )
    assert 0 < of_each["rlsd"]["at_clip"] <= 1
    assert of_each["uniform"]["at_clip"] is None


def test_success_and_r_minus_go_by_the_task_whatever_the_reward(scored: Scored) -> None:
    parts = load_parts(small(reward={"name": "self_certainty"}, advantage={"name": "dr_grpo"}))
    found = collect(parts, problems_of(parts, 5), (0, 5))
    assert found.rollouts.completions == scored.rollouts.completions
    assert found.scores == scored.scores == scored.rewards
    assert found.rewards != found.scores
    some, without = methods(parts, None)
    assert without.keys() == {"rredcot", "maxrl", *(label for label in OTHERS if "rl2ml" in label)}
    assert "expected verifier or a function" in without["rredcot"]
    assert "knows nothing of" in without["maxrl"]
    by_task, by_reward = (batch_of(some["cepo"], one).teachers for one in (scored, found))
    assert by_task == by_reward


def test_an_advantage_that_adapts_stays_as_it_starts() -> None:
    parts = load_parts(small(advantage={"name": "rl2ml", "alpha": "auto"}, loss={"average": "constant"}))
    start = parts.adaptive.options()
    found = variance(parts, methods(parts, None, [])[0], 2)
    assert found["cepo"]["variance"] > 0
    assert parts.adaptive.options() == start


def test_ranking_by_hand() -> None:
    scores = {
        "good": torch.tensor([0.0, 1.0, 3.0, 2.0, 2.0]),
        "late": torch.tensor([0.0, 1.0, 3.0, 2.0, 4.0]),
        "tied": torch.tensor([0.0, 3.0, 3.0, 1.0, 1.0]),
        "entropy": torch.tensor([0.0, 0.6, 1.0, 0.6, 0.0]),
        "chance": torch.zeros(5),
    }
    found = rank([Slip(p, 2, p == 0, 2, scores) for p in range(2)])
    assert " | ".join(found) == "all | rivals earlier | rivals later | rivals uncertain | result 2 | r- other | r- own"
    short = rank([Slip(0, 2, None, 2, {k: v for k, v in scores.items() if k != "late"}), Slip(1, 2, None, 2, scores)])
    assert [short["all"][name]["auroc"].n for name in ("good", "late")] == [2, 1]
    assert [found[name]["good"]["auroc"].n for name in ("all", "r- own", "r- other")] == [2, 1, 1]

    def means(name: str, key: str) -> list[float]:
        return [table[key].mean for table in found[name].values()]

    assert means("all", "auroc") == [1, 3 / 4, 3.5 / 4, 1, 0.5]
    assert means("all", "top") == pytest.approx([1, 0, 0.5, 1, 0.2])
    assert means("rivals earlier", "auroc") == [1, 1, 0.75, 1, 0.5]
    assert means("rivals earlier", "top") == pytest.approx([1, 1, 0.5, 1, 1 / 3])
    assert means("rivals later", "auroc") == [1, 0.5, 1, 1, 0.5]
    assert means(UNCERTAIN, "auroc") == [1, 1, 0.5, 1, 0.5]


@pytest.mark.slow
def test_on_the_embedded_model_evidence_at_the_slips_passes_its_gate_and_ranks_them() -> None:
    parts = load_parts(small(prompts=16, eval={"problems": 96}))
    observed = [observe(every(parts), scored) for scored in collect_held_out(parts)]
    found = [slip for one in observed for slip in slips(parts, one)[0]]
    assert {slip.problem for slip in found} <= set(range(96))
    for step in (2, 3):
        at_slips = [slip.scores["rlsd: evidence"][slip.index] for slip in found if slip.step == step]
        assert len(at_slips) >= 8
        assert torch.stack(at_slips).median() > 1
    sets = ranking(parts, observed)["sets"]
    for name in ("cepo, own r-", "rlsd"):
        assert sets["all"][f"{name}: evidence"]["auroc"].mean > 0.95
        assert sets[UNCERTAIN][f"{name}: evidence"]["auroc"].mean > 0.8
    assert sets["r- other"]["cepo: evidence"]["auroc"].mean < sets["r- own"]["cepo: evidence"]["auroc"].mean


def test_a_diagnosis_repeats_and_moves_nothing(embedded: Parts) -> None:
    before = {name: value.clone() for name, value in embedded.policy.model.state_dict().items()}
    torch.manual_seed(1)
    some = replace(FEW, methods=["shuffled", "rredcot", "rl2ml", "sdpo"])
    first = diagnose(embedded, some)
    torch.manual_seed(2)
    second = diagnose(embedded, some)
    assert json.dumps(first, default=asdict) == json.dumps(second, default=asdict)
    assert all(torch.equal(value, before[name]) for name, value in embedded.policy.model.state_dict().items())
    assert first["problems"] == 4
    assert embedded.config.eval.problems == Config().eval.problems


def test_what_a_task_cannot_tell_is_said_in_a_line() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy(), task=Sums())
    report = diagnose(parts, DiagnoseConfig(problems=3, batches=0))
    assert report["ranking"] is None
    shown = text(report).splitlines()
    for words in (
        "not known: task addition does not say where a completion goes wrong",
        "not asked for (diagnose.batches 0)",
        "without opsd: loss.name: opsd needs a worked solution",
    ):
        assert sum(words in line for line in shown) == 1


def test_weights_that_are_gone_are_named_and_cost_nothing_else() -> None:
    def gone() -> Parts:
        raise InputError("policy.model: cannot load 'elsewhere'")

    parts = replace(load_parts(small()), policy=tiny_policy())
    report = diagnose(parts, DiagnoseConfig(problems=2, batches=0), "step 2", {"base": gone})
    assert list(report["leakage"]) == ["base", "step 2"]
    assert "\n  base: policy.model: cannot load 'elsewhere'\n" in text(report)


def test_a_model_that_is_never_wrong_or_never_right_is_no_error() -> None:
    parts = replace(load_parts(small()), policy=tiny_policy())  # random weights solve nothing
    report = diagnose(parts, DiagnoseConfig(problems=3, batches=2))
    assert report["ranking"]["slips"] == 0
    assert report["shares"]["zero_variance"] == 1.0
    assert [report["gradient"]["cepo"][key] for key in ("noise_ratio", "resolved", "cosine", "length")] == 4 * [None]
    assert ["uniform", "-", "-", "-", "-"] in [line.split() for line in text(report).splitlines()]


QUICK = ["--rollout.prompts", "8", "--rollout.group_size", "4", "--diagnose.problems", "4", "--diagnose.batches", "2"]


def test_the_command_shows_a_run_from_its_base_through_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    training = ["--train.steps", "2", "--checkpoint.every", "1", "--eval.problems", "4", "--run_dir", "run"]
    assert main(["train", *training, *QUICK[:4]]) == 0
    capsys.readouterr()
    assert (
        main(["diagnose", "--policy.model", "run", "--out", "found.json", *QUICK[4:], "--diagnose.methods", "[sdpo]"])
        == 0
    )
    shown = capsys.readouterr().out
    for words in (
        "run on addition: 4 problems of validation x 4 rollouts",
        "AUROC",
        "\n  base ",
        "\n  step 1 ",
        "clip",
    ):
        assert words in shown
    found = json.loads(Path("found.json").read_text())
    assert list(found["leakage"]) == ["base", "step 1", "step 2"]
    rows = [found["leakage"][name]["answer_logprob"]["mean"] for name in found["leakage"]]
    assert len(set(rows)) == 3
    last = load_parts(small(8, policy={"model": str(checkpoint.newest(Path("run")))}, eval={"problems": 4}))
    expected = leakage(every(last)["uniform"], list(collect_held_out(last)))
    assert found["leakage"]["step 2"] == asdict_of(expected)
    assert {p["n"] for p in found["ranking"]["sets"]["all"]["entropy"].values()} == {found["ranking"]["slips"]}
    assert set(found["gradient"]) == {"cepo", "cepo, own r-", "uniform", "sdpo"}


def test_a_distillation_is_looked_at_with_its_own_options_and_the_others_as_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, float | None] = {}

    def told(parts: Parts, *rest: Any) -> None:
        found, _ = methods(parts, None, ["opsd", "sdpo"], rest[-1])
        seen.update((label, method.config.loss.beta) for label, method in found.items())
        raise InputError("enough")

    monkeypatch.setattr(command, "diagnose", told)
    assert main(["diagnose", "--loss.name", "opsd", "--loss.divergence", "jsd", "--loss.beta", "0.3"]) == 2
    assert seen == {"cepo": None, "cepo, own r-": None, "uniform": None, "opsd": 0.3, "sdpo": None}


def asdict_of(estimates: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else asdict(value) for name, value in estimates.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--diagnose.problems", "0"], ["diagnose.problems", "at least 1", "0"]),
        (["--diagnose.batches", "1"], ["diagnose.batches", "0 or at least 2", "1"]),
        (["--diagnose.eps_w", "1"], ["diagnose.eps_w", "[0, 1)", "1"]),
        (["--out", "nowhere/found.json"], ["--out", "directory that exists", "nowhere"]),
        (["--policy.model", "./nowhere"], ["policy.model", "./nowhere"]),
        (["--diagnose.magic", "1"], ["magic"]),
        (["--diagnose.methods", "[magic]"], ["diagnose.methods", "rl2ml", "sdpo", "'magic'"]),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
