"""`cepo tokens`: what is kept of a step is what its update computed, costs no bit, and is shown as it is."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import one_thread  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cepo import checkpoint, trainer
from cepo.cli import main
from cepo.config import (
    CheckpointConfig,
    Config,
    CreditConfig,
    EvalConfig,
    LossConfig,
    ReportConfig,
    RolloutConfig,
    TrainConfig,
)
from cepo.credit import lam_at
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.report import samples, terminal
from cepo.report.samples import Group, Rollout, Sample
from cepo.report.shades import Scale, scales
from cepo_kernels import contrastive_credit


def config(credit: str = "cepo", steps: int = 2, every: int = 1, **options: Any) -> Config:
    return Config(
        rollout=RolloutConfig(prompts=3, group_size=4),
        credit=CreditConfig(credit, **options),
        train=TrainConfig(steps=steps, lr=1e-3),
        eval=EvalConfig(problems=4, every=0),
        checkpoint=CheckpointConfig(every=2, keep=9),
        report=ReportConfig(every=every, prompts=2),
    ).check()


def trained(run: Path, given: Config, start: Path | None = None) -> dict[int, Sample]:
    run.mkdir(exist_ok=True)
    (run / checkpoint.CONFIG).touch()
    list(trainer.train(load_parts(given, None if start is None else str(start)), run, start))
    return {step: samples.read(path) for step, path in samples.files(run).items()}


def rollout(tokens: list[str], right: bool = True, **columns: list[float | None]) -> Rollout:
    return Rollout(right, float(right), 1.0 if right else -1.0, "42", "41", False, tokens, columns)


def kept(run: Path, *steps: Sample) -> Path:
    """A run that has kept these."""
    (run / samples.FOLDER).mkdir(parents=True)
    (run / checkpoint.CONFIG).touch()
    for sample in steps:
        (run / samples.FOLDER / f"step-{sample.step:06d}.json").write_text(json.dumps(asdict(sample)))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    run = tmp_path_factory.mktemp("whole")
    trained(run, config(steps=4))
    return run


def test_a_step_keeps_the_credit_of_its_update(whole: Path) -> None:
    found = {step: samples.read(path) for step, path in samples.files(whole).items()}
    assert list(found) == [1, 2, 3, 4]
    assert {len(sample.groups) for sample in found.values()} == {2}
    groups = [group for sample in found.values() for group in sample.groups]
    assert {r.right for group in groups for r in group.rollouts} == {True, False}
    credited = 0
    for step, sample in found.items():
        assert sample.lam == lam_at(step, 0.5, 25)
        for group in sample.groups:
            first, second = group.prompt.split("+")
            assert int(group.positive) == int(first) + int(second)
            for r in group.rollouts:
                if r.advantage == 0:  # its group agrees
                    assert r.columns.keys() == {"entropy"}
                    continue
                credited += 1
                assert r.reward == r.right == (r.answer == group.positive)
                assert r.negative in {other.answer for other in group.rollouts if not other.right}
                columns = {name: torch.tensor(column) for name, column in r.columns.items()}
                out = contrastive_credit(
                    columns["positive_logprobs"][None], columns["negative_logprobs"][None],
                    torch.tensor([[r.advantage]]), lam=sample.lam, eps_w=sample.eps_w,
                )  # fmt: skip
                for name in ("evidence", "weight", "advantages"):
                    torch.testing.assert_close(columns[name][None], getattr(out, name), rtol=1e-4, atol=1e-5)
                assert (columns["logprobs"] <= 0).all()
    assert credited >= 12


@pytest.mark.parametrize(
    ("method", "by", "lam", "multiplies", "has", "lacks"),
    [
        ("uniform", "advantage", None, True, {"logprobs", "entropy"}, {"weight", "evidence", "positive_logprobs"}),
        ("rredcot", "advantage", None, False, {"value", "segment_reward"}, {"weight", "negative_logprobs"}),
        ("shuffled", "weight", 0.5, True, {"evidence", "advantages"}, {"positive_logprobs"}),
        ("opsd", "divergence", None, False, {"logprobs", "entropy"}, {"weight", "advantages", "evidence"}),
    ],
)
def test_other_methods_keep_and_show_what_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, by: str, lam: float | None, multiplies: bool,
    has: set[str], lacks: set[str],
) -> None:  # fmt: skip
    distils = method == "opsd"
    made = replace(config(steps=1), loss=LossConfig(method)).check() if distils else config(method, steps=1)
    (sample,) = trained(tmp_path / "run", made).values()
    assert (sample.method, sample.lam) == (method, lam)
    assert has <= sample.columns()
    assert not lacks & sample.columns()
    assert {r.advantage is None for group in sample.groups for r in group.rollouts} == {not multiplies}
    assert main(["tokens", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"step 1 (kept: 1), {method}{'' if lam is None else ', lambda 0.5'}\n{by}: ")
    assert (" advantage " in said) == multiplies


def test_keeping_tokens_changes_no_bit_of_the_training(whole: Path, tmp_path: Path) -> None:
    assert not trained(tmp_path, config(steps=4, every=0))
    one, other = (load_file(run / "checkpoints/step-000004/model.safetensors") for run in (whole, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_the_same_tokens_once(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in samples.files(whole).values()}
    # As a crash leaves it: what was kept of steps that will be taken again, and a file that was never finished.
    (whole / "tokens/step-000009.json").write_text("{}")
    (whole / "tokens/.step-000004.json.partial").write_text("{")
    trained(whole, config(steps=4), whole / "checkpoints/step-000002")
    assert {path.name: path.read_bytes() for path in (whole / "tokens").iterdir()} == before


@pytest.mark.parametrize(("every", "expected"), [(0, []), (2, [1, 2, 4, 5]), (3, [1, 3, 5]), (9, [1, 5])])
def test_the_first_the_last_and_every_so_many_steps_are_kept(every: int, expected: list[int]) -> None:
    report = ReportConfig(every=every)
    assert [step for step in range(1, 6) if samples.due(report, step, last=5)] == expected


def test_tokens_that_cannot_be_written_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / samples.FOLDER).touch()
    with pytest.raises(InputError, match=r"cannot write .*step-000001"):
        trained(tmp_path, config())
    assert checkpoint.newest(tmp_path) is not None


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def word_pieces() -> PreTrainedTokenizerFast:
    """Words that begin with their blank, and bytes: a text's first blank is left out."""
    words = ["▁the", "▁cat", "s", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


BYTES, PIECES = byte_level(), word_pieces()


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_texts_of_tokens_join_to_the_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert "".join(samples.texts(BYTES, ids)) == text


@given(st.lists(st.integers(0, 255), max_size=100))
def test_bytes_that_are_no_text_lose_nothing(ids: list[int]) -> None:
    assert "".join(samples.texts(BYTES, ids)) == BYTES.decode(ids)


def test_the_token_that_completes_a_character_has_it() -> None:
    assert samples.texts(BYTES, BYTES("é😀")["input_ids"]) == ["", "é", "", "", "", "😀"]
    ids = [0, 1, 2, *(3 + byte for byte in "中".encode()), 0]
    assert samples.texts(PIECES, ids) == ["the", " cat", "s", "", "", "中", " the"]


# Characters are of all kinds, surrogates too.
HOSTILE = st.one_of(
    st.text(st.characters(), max_size=30), st.sampled_from(["\x1b[2J", "\r\x07", "\u202e", "\x9b", "\u2028"])
)


@given(st.lists(HOSTILE, min_size=1), HOSTILE, st.booleans())
def test_nothing_a_model_writes_moves_the_terminal(tokens: list[str], prompt: str, colour: bool) -> None:
    evidence: list[float | None] = [float(i % 5 - 2) for i in range(len(tokens))]
    group = Group(prompt, prompt, [replace(rollout(tokens, evidence=evidence), answer=prompt)])
    sample = Sample(1, "cepo", 0.5, 0.5, [group])
    drawn = terminal.draw(sample, "evidence", scales([sample])["evidence"], [1], 60, colour)
    theirs = re.sub(r"\x1b\[([01]|(4;)?38;5;[0-9]+;48;5;[0-9]+)m", "", drawn) if colour else drawn
    kinds = {unicodedata.category(c) for c in theirs if c not in "\n\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_marks_stand_beneath_their_tokens() -> None:
    tokens, weight = ["ab", "中", "\n", "", "x\ty"], [1.5, 0.5, 1.0, 1.2, None]
    sample = Sample(1, "cepo", 0.5, 0.5, [Group("1+1", "2", [rollout(tokens, weight=weight)])])  # type: ignore[arg-type]
    lines = terminal.draw(sample, "weight", scales([sample])["weight"], [1], 60, False).split("\n")
    assert lines[-5:] == ["  ab中↵", "  ##==", "  ·x⇥y", "  +", ""]


def test_a_scale_has_shades_both_ways_and_stands_infinities() -> None:
    scale = Scale("weight", "", "", 1.0, 0.5)
    assert [scale.level(x) for x in (0.0, 0.5, 0.9, 1.0, 1.3, 9e37, None)] == [-4, -4, -1, 0, 2, 4, 0]
    advantages = [3.0, -2.0, 3.4028e38, None]
    made = scales([Sample(1, "cepo", 0.5, 0.5, [Group("", "", [rollout(["a"] * 4, advantages=advantages)])])])  # type: ignore[arg-type]
    assert made["advantage"].span == 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    groups = [Group(f"{i}+{i}", str(2 * i), [rollout(["4", "1"], False, weight=[1.0, 1.5], evidence=[0.0, -3.0]),
                                             rollout(["4", "2"], weight=[1.0, 1.25], evidence=[0.0, 0.2])])
              for i in (1, 2)]  # fmt: skip
    flat = [replace(g, rollouts=[replace(r, columns={"logprobs": [-1.0, -2.0]}) for r in g.rollouts]) for g in groups]
    return kept(tmp_path / "run", Sample(1, "cepo", 0.5, 0.5, groups), Sample(20, "cepo", 0.0, 0.5, flat))


def test_the_command_shows_the_last_step_that_has_credit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("step 1 (kept: 1, 20), cepo, lambda 0.5\nweight: ")
    assert out.index("right #2") < out.index("wrong #1")
    assert out.count("prompt ") == 2
    assert main(["tokens", str(run), "--prompt", "2", "--step", "20", "--by", "logprob"]) == 0
    out = capsys.readouterr().out
    assert "step 20" in out
    assert "1+1" not in out
    assert "2+2" in out


def test_colour_is_for_terminals_that_want_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for wish, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", wish)
        assert main(["tokens", str(run)]) == 0
        assert ("\x1b[" in capsys.readouterr().out) == coloured


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokens", "nowhere"], ["RUN", "run directory", "'nowhere'"]),
        (["tokens", "empty"], ["RUN", "--report.every", "'empty'"]),
        (["tokens", "run", "--step", "7"], ["--step", "1, 20", "7"]),
        (["tokens", "run", "--step", "20", "--by", "weight"], ["--by", "logprob", "step 20", "'weight'"]),
        (["tokens", "run", "--by", "luck"], ["luck", "evidence"]),
        (["tokens", "run", "--prompt", "3"], ["--prompt", "1 to 2", "3"]),
        (["tokens", "run", "--html", "no/where.html"], ["--html", "no/where.html"]),
        (["tokens", "broken"], ["step-000003.json", "training run"]),
        (["tokens", "cut"], ["step-000003.json", "differ in length"]),
        (["tokens", "bare"], ["RUN", "something to shade", "step 3"]),
        (["tokens", "bare", "--html", "x.html"], ["RUN", "something to shade", "step 3"]),
        (["plot"], ["runs"]),
        (["plot", "nowhere"], ["RUN", "'nowhere'"]),
        (["plot", "empty"], ["RUN", "metrics.jsonl", "'empty'"]),
        (["plot", "run", "--out", "x.gif"], ["--out", ".svg", "'x.gif'"]),
        (["train", "--report.every", "-1"], ["report.every", "at least 0"]),
        (["train", "--report.prompts", "0"], ["report.prompts", "at least 1"]),
    ],
)
def test_bad_input_is_one_line(
    run: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(run.parent)
    (run / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "sampled": 0.5, "greedy": 0.5}\n')
    kept(Path("empty"))
    (kept(Path("broken")) / "tokens/step-000003.json").write_text('{"groups": [{"rollouts": [1]}]}')
    kept(Path("bare"), Sample(3, "cepo", 0.5, 0.5, []))
    kept(Path("cut"), Sample(3, "cepo", 0.5, 0.5, [Group("", "", [rollout(["a"], weight=[1.0, 1.0])])]))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cepo: error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_a_file_with_any_value_of_another_type_is_refused(run: Path) -> None:
    path = run / "tokens/step-000001.json"
    content = json.loads(path.read_text())
    group = content["groups"][0]
    rollout = group["rollouts"][0]
    of_types: dict[str, list[Any]] = {
        "prompt positive method": [5, True, None, ["x"]],
        "answer negative": [5, True, ["x"]],
        "reward advantage lam eps_w step": ["x", True, math.nan, 10**400, [1.0]],
        "right truncated": [None, 1, "x"],
        "tokens weight evidence": [None, "4", [5, "x"], ["x", None], [math.nan, 1.0], {"0": 1.0}],
        "columns groups rollouts": [None, 5, "x", [5], {"x": 5}],
    }
    wrong = {key: odds for keys, odds in of_types.items() for key in keys.split()}
    for part in (content, group, rollout, rollout["columns"]):
        for key, before in list(part.items()):
            for odd in wrong[key]:
                part[key] = odd
                path.write_text(json.dumps(content))
                with pytest.raises(
                    InputError, match=r"step-000001.json: expected what a training run writes there, got"
                ):
                    samples.read(path)
            part[key] = before
    path.write_text(json.dumps(content))
    assert samples.read(path).groups[0].prompt == "1+1"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="expected what a training run writes"):
        samples.read(path)


def test_plot_lays_runs_over_each_other_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")  # text, to be read here
    for name, score in (("one", 0.5), ("_other$x$", 0.7), ("deep/one", 0.9)):
        lines = [{"kind": "train", "step": 1, "accuracy": score, "entropy": None, "seconds": {"update": 1}}]
        lines += [{"kind": "eval", "step": step, "sampled": score, "greedy": score} for step in (0, 1)]
        (kept(Path(name)) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["plot", "one", "_other$x$", "deep/one", "--out", "runs.svg"]) == 0
    drawn = Path("runs.svg").read_text()
    legend = re.findall(r">([^<]*)</text>", drawn[drawn.index('id="legend_1"') :])
    assert [name.replace("\u200b", "") for name in legend] == ["one", "_other$x$", "deep/one"]
    assert main(["plot", "one", "deep/one"]) == 0
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "one"]) == 0
    assert Path("one/curves.png").exists()
    assert "one/curves.png" in capsys.readouterr().err
