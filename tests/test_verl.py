"""In verl: the credit is that of the kernels, and without credit the advantages are verl's bit for bit.

verl's config, trainer classes, batches and the code of its FSDP engine around the model are the installed ones; a
dictionary takes the place of TransferQueue, and one process that of Ray's workers.
"""

from __future__ import annotations

import copy
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Sums, load_afresh, one_thread, rollouts_of, tiny_policy  # noqa: F401

pytest.importorskip("verl", reason="verl is not installed: pip install '.[verl]'")
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine
from verl.workers.engine.utils import prepare_micro_batches

from cepo.config import TeacherConfig
from cepo.errors import InputError
from cepo.integrations import verl as integration
from cepo.integrations.verl import CEPOOptions, TokenCredit, read_options
from cepo.policy import Policy, response_logits
from cepo.tasks import Problem
from cepo.teacher import build
from cepo_kernels import contrastive_logprobs

GROUP = 4
RIGHT, WRONG, OTHER, CUT = "a#7", "b#8", "b2#9", "cc#5"
SAID = [RIGHT, WRONG, OTHER, CUT, CUT, RIGHT, CUT, RIGHT]  # the second group has no r-: RLSD
PROBLEMS = [Problem("3+4", "7"), Problem("9-2", "7")]  # prompts of one length come as one tensor
OPTIONS = {"parse_answer": "test_verl:parse"}


def parse(completion: str) -> str | None:
    return completion.partition("#")[2] or None


class Queue:
    """`transfer_queue.kv_batch_put` and `kv_batch_get` without processes; fields that are not there are left out."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def put(self, keys: Sequence[str], partition_id: str, fields: TensorDict, tags: Any = None) -> tq.KVBatchMeta:
        for name, values in fields.items():
            parts = values.unbind() if isinstance(values, torch.Tensor) else list(values)
            for key, value in zip(keys, parts, strict=True):
                self.rows.setdefault(key, {})[name] = value
        return tq.KVBatchMeta(keys=list(keys), tags=tags or [{} for _ in keys], partition_id=partition_id)

    def get(self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str] | None = None) -> TensorDict:
        names = [name for name in self.rows[keys[0]] if select_fields is None or name in select_fields]
        data: TensorDict = tu.list_of_dict_to_tensordict(
            [{name: self.rows[key][name] for name in names} for key in keys]
        )
        for name, values in data.items():
            if name != "prompts" and isinstance(values, torch.Tensor) and values.dim() > 1 and not values.is_nested:
                data[name] = torch.nested.as_nested_tensor(list(values), layout=torch.jagged)
        return data


class Workers:
    """A worker group of two ranks: splits, micro batches, model inputs and outputs are made by verl's own code."""

    def __init__(self, policy: Policy, micro: int) -> None:
        self.model, self.micro, self._dispatch_info = policy.model.eval(), micro, {"actor": [0, 0, 1, 1]}
        self.passes: list[int] = []
        self.saved: dict[int, Any] = {}

    def save_model_to_cpu(self, number: int) -> None:
        self.saved[number] = copy.deepcopy(self.model.state_dict())

    def restore_model_from_cpu(self, number: int) -> None:
        self.model.load_state_dict(self.saved[number])

    def clear_cpu_model(self, number: int) -> None:
        del self.saved[number]

    def compute_log_prob(self, data: Any) -> Any:
        if not isinstance(data, tq.KVBatchMeta):
            self.passes.append(len(data))
            return self._infer(data)
        batch = tq.kv_batch_get(keys=data.keys, partition_id=data.partition_id)
        tu.assign_non_tensor(batch, **data.extra_info)
        return tq.kv_batch_put(data.keys, data.partition_id, self._infer(batch).select("log_probs", "entropy"))

    @torch.no_grad()
    def _infer(self, data: TensorDict) -> TensorDict:
        tu.assign_non_tensor(data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=self.micro)
        engine = SimpleNamespace(
            pad_to_length=False, use_ulysses_sp=False, compute_entropy_from_logits=entropy_from_logits,
            engine_config=FSDPEngineConfig(),
        )  # fmt: skip
        rows: dict[str, list[torch.Tensor]] = {}
        for part in tu.chunk_tensordict(data, 2):
            for micro in prepare_micro_batches(part)[0]:
                inputs, arguments = Engine.prepare_model_inputs(engine, micro)
                output = Engine.prepare_model_outputs(engine, self.model(**inputs), arguments, micro, None)
                for name, values in output.items():
                    rows.setdefault(name, []).extend(values.unbind())
        return TensorDict(
            {name: torch.nested.as_nested_tensor(x, layout=torch.jagged) for name, x in rows.items()}, len(data)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    policy = tiny_policy()
    policy.model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(tq, "kv_batch_put", made.put)
    monkeypatch.setattr(tq, "kv_batch_get", made.get)
    return made


@functools.cache
def composed() -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.temperature=0.8"])


def make(folder: Path, name: str = "cepo", micro: int = 4, config: Any = None, **options: Any) -> Any:
    """A trainer of the tiny policy before its first step; `options` go under trainer.v1.cepo."""
    config = copy.deepcopy(composed()) if config is None else config
    changes = {
        "actor_rollout_ref.model.path": str(folder), "trainer.v1.trainer_mode": name,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": micro,
        **{f"trainer.v1.cepo.{key}": value for key, value in {**OPTIONS, **options}.items()},
    }  # fmt: skip
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    trainer = get_trainer_cls(name)(config)
    trainer._init_tokenizer()
    trainer.actor_rollout_wg, trainer.global_steps = Workers(tiny_policy(), micro), 1
    return trainer


def rows_of(texts: Sequence[str] = SAID) -> tuple[list[str], list[dict[str, Any]]]:
    """What verl's agent loop puts into its queue, in an order in which groups straddle ranks and micro batches."""
    policy = tiny_policy()
    rollouts = rollouts_of(policy, PROBLEMS, texts, [b for b, text in enumerate(texts) if text == CUT])
    keys, rows = [], []
    for b in [b for i in range(GROUP) for b in range(i, len(texts), GROUP)]:
        p = b // GROUP
        prompt, response = torch.tensor(rollouts.prompts[p]), torch.tensor(rollouts.responses[b])
        whole, mask = torch.cat([prompt, response]), torch.ones_like(response)
        score = torch.zeros(len(response))
        score[-1] = float(parse(texts[b]) == PROBLEMS[p].answer)
        keys.append(f"u{p}_{b % GROUP}_0")
        rows.append({
            "uid": f"u{p}", "prompts": prompt, "responses": response, "input_ids": whole, "response_mask": mask,
            "loss_mask": mask, "position_ids": torch.arange(len(whole)), "rm_scores": score,
            "rollout_log_probs": -torch.rand(len(response)), "multi_modal_inputs": {},
            "raw_prompt": [{"role": "user", "content": PROBLEMS[p].prompt}],
            "reward_model": {"style": "rule", "ground_truth": PROBLEMS[p].answer}, "gold": 7,
        })  # fmt: skip
    return keys, rows


def step(
    trainer: Any, texts: Sequence[str] = SAID, change: Any = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Advantages by key and metrics of a batch, by the trainer's own methods up to the update."""
    keys, rows = rows_of(texts)
    if change is not None:
        change(keys, rows)
    batch = tq.kv_batch_put(keys, "train", tu.list_of_dict_to_tensordict(rows))
    metrics: dict[str, Any] = {}
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    data = tq.kv_batch_get(batch.keys, "train", ["advantages", "returns"])
    return dict(zip(keys, data["advantages"].unbind(), strict=True)), metrics


def test_it_is_registered_by_the_entry_point(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    declared = (root / "pyproject.toml").read_text().partition('[project.entry-points."verl.plugins"]\n')[2]
    info = tmp_path / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\n" + declared.splitlines()[0].replace('"', ""))
    code = """
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, get_trainer_cls
for name, base in (("cepo", PPOTrainerSync), ("cepo_colocate_async", PPOTrainerColocateAsync),
                   ("cepo_separate_async", PPOTrainerSeparateAsync)):
    made = get_trainer_cls(name)
    assert made.on_step_end is base.on_step_end and made._compute_advantage is not base._compute_advantage
"""
    path = os.pathsep.join([str(tmp_path), str(root), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["cepo", "cepo_colocate_async"])
@pytest.mark.parametrize(("credit", "template"), [("cepo", "hint"), ("cepo", "splice"), ("rlsd", "hint")])
def test_the_credit_is_that_of_our_own_trainer(folder: Path, name: str, credit: str, template: str) -> None:
    plain, _ = step(make(folder, name="sync"))
    trainer = make(folder, name=name, credit=credit, template=template, lam=0.7)
    advantages, metrics = step(trainer)
    # r- and its context are those of four rows: padded to two ranks of one micro batch
    assert trainer.actor_rollout_wg.passes == ([8, 8] if credit == "cepo" else [8])

    policy = tiny_policy()
    cut = [b for b, text in enumerate(SAID) if text == CUT]
    rollouts, rewards = rollouts_of(policy, PROBLEMS, SAID, cut), [float(parse(text) == "7") for text in SAID]
    told = build(policy, TeacherConfig(template=template), Sums(), rollouts, rewards, 1.0)
    contexts = [
        [rollouts.prompts[b // GROUP] for b in range(8)],
        [told.prefixes[k] for k in told.positive],
        [told.prefixes[0 if k is None else k] for k in told.negative],
    ]
    lengths = [len(ids) for ids in rollouts.responses]
    order = [f"u{b // GROUP}_{b % GROUP}_0" for b in range(8)]
    has_negative = torch.tensor([credit == "cepo" and k is not None for k in told.negative])
    expected = contrastive_logprobs(
        *(response_logits(policy, prefixes, rollouts.responses).detach() for prefixes in contexts),
        torch.tensor([token for ids in rollouts.responses for token in ids]),
        torch.cat([plain[key] for key in order]),
        negative_mask=has_negative.repeat_interleave(torch.tensor(lengths)),
        lam=0.7, eps_w=0.5 if credit == "cepo" else 0.2, temperature=0.8,
    )  # fmt: skip
    assert torch.allclose(torch.cat([advantages[key] for key in order]), expected.advantages, atol=1e-5)
    right = torch.tensor(rewards).repeat_interleave(torch.tensor(lengths)) == 1
    assert metrics["cepo/lam"] == 0.7
    assert metrics["cepo/weight"] == pytest.approx(expected.weight.mean().item(), abs=1e-5)
    assert metrics["cepo/evidence_right"] == pytest.approx(expected.evidence[right].mean().item(), abs=1e-4)
    assert metrics["cepo/evidence_wrong"] == pytest.approx(expected.evidence[~right].mean().item(), abs=1e-4)
    assert 0 < metrics["cepo/weight_clipped"] < 1
    if credit == "cepo":
        assert [metrics[f"cepo/negative_{x}"] for x in ("missing", "last_line", "same_as_positive")] == [0.5, 0, 0]


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"credit": "uniform"}, 0), ({"lam": 0.0}, 0), ({"lam_steps": 3}, 0), ({"lam": 0.0, "skip_teachers": False}, 2)],
)
def test_without_credit_the_advantages_are_verls_bit_for_bit(
    folder: Path, options: dict[str, Any], passes: int
) -> None:
    plain, _ = step(make(folder, name="sync"))
    trainer = make(folder, **options)
    trainer.global_steps = 4
    advantages, metrics = step(trainer)
    assert all(torch.equal(advantages[key], plain[key]) for key in plain)
    assert any(value.any() for value in plain.values())
    assert len(trainer.actor_rollout_wg.passes) == passes
    assert metrics.get("cepo/lam", 0) == 0


def test_rows_that_cannot_matter_meet_no_teacher(folder: Path) -> None:
    said = [RIGHT, WRONG, RIGHT, CUT, *[RIGHT] * GROUP]
    results = {}
    for skip in (True, False):
        trainer = make(folder, micro=1, skip_teachers=skip)
        results[skip], _ = step(trainer, said)
        assert trainer.actor_rollout_wg.passes == ([4, 4] if skip else [8, 4])
    assert all(torch.allclose(results[True][key], results[False][key], atol=1e-6) for key in results[True])
    assert not any(results[True][f"u1_{i}_0"].any() for i in range(GROUP))
    trainer = make(folder)
    step(trainer, [RIGHT] * 8)
    assert not trainer.actor_rollout_wg.passes


def test_lambda_is_a_function_of_the_global_step() -> None:
    credit = TokenCredit(read_options({"lam_steps": 4}), None, 512, [])
    assert [credit.lam(s) for s in (3, 1, 2, 4, 5)] == [0.25, 0.5, 0.375, 0.125, 0]
    assert [credit.needed(s) for s in (4, 5)] == [True, False]
    assert (read_options(None).lam_steps, read_options({"credit": "rlsd"}).eps_w) == (25, 0.2)


def test_the_rollout_engines_log_probs_are_no_denominator(folder: Path) -> None:
    advantages, _ = step(make(folder))
    config = copy.deepcopy(composed())
    config.algorithm.rollout_correction.bypass_mode = True
    bypass = make(folder, config=config)
    bypassed, _ = step(bypass)
    assert bypass.actor_rollout_wg.passes == [8, 8, 8]  # the policy's too
    assert all(torch.allclose(advantages[key], bypassed[key], atol=1e-6) for key in advantages)


def separate() -> Any:
    config = copy.deepcopy(composed())
    OmegaConf.update(config, "actor_rollout_ref.rollout.nnodes", 1)
    OmegaConf.update(config, "actor_rollout_ref.rollout.n_gpus_per_node", 1)
    OmegaConf.update(config, "actor_rollout_ref.rollout.checkpoint_engine.backend", "nccl")
    config.trainer.v1.separate_async.parameter_sync_step = 4
    config.data.train_batch_size = 4 * config.actor_rollout_ref.actor.ppo_mini_batch_size
    return config


@pytest.mark.parametrize("credit", ["cepo", "rlsd"])
def test_where_weights_move_between_synchronisations_teachers_have_those_of_the_old_log_probs(
    folder: Path, credit: str
) -> None:
    expected, _ = step(make(folder, credit=credit))
    trainer = make(folder, name="cepo_separate_async", config=separate(), credit=credit)
    workers, trainer.local_trigger_step = trainer.actor_rollout_wg, 0
    first, _ = step(trainer)
    assert workers.saved.keys() == {0}
    with torch.no_grad():
        for p in workers.model.parameters():
            p.mul_(1.5)
    moved = copy.deepcopy(workers.model.state_dict())
    trainer.local_trigger_step = 1
    second, _ = step(trainer)
    assert all(torch.equal(expected[key], got[key]) for got in (first, second) for key in expected)
    assert all(torch.equal(value, moved[name]) for name, value in workers.model.state_dict().items())
    assert workers.saved.keys() == {0}


def test_padding_rows_and_earlier_outputs_of_a_rollout_state_no_answer(folder: Path, queue: Queue) -> None:
    """The worst rollout of a group has an earlier output, which alone states 9; padding rows have nothing."""
    told: list[str] = []

    def change(keys: list[str], rows: list[dict[str, Any]]) -> None:
        at = keys.index("u0_2_0")
        keys[at] = "u0_2_1"
        earlier = dict(rows[at])  # says b2#9
        rows[at] = dict(rows[keys.index("u0_1_0")])  # says b#8
        rows[keys.index("u0_1_0")] = dict(rows[keys.index("u0_0_0")])
        keys.insert(0, "u0_2_0")
        rows.insert(0, earlier)
        batch = tq.kv_batch_put(
            keys, "train", tu.list_of_dict_to_tensordict(rows), [{"i": i} for i in range(len(keys))]
        )
        padded = upsample_batch_to_divisible_size(batch, 16, trainer.tokenizer.eos_token_id)
        for key in padded.keys[len(keys) :]:
            keys.append(key)
            rows.append(queue.rows[key])

    trainer = make(folder, micro=1)
    original = trainer._credit._context_of
    trainer._credit._context_of = lambda *given: told.append(given[-1]) or original(*given)
    advantages, _ = step(trainer, change=change)
    assert set(told) == {"7", "8"}
    assert len(advantages) == 16
    assert not any(value.any() for key, value in advantages.items() if key.startswith("pad"))


def test_advantages_per_token_and_prompts_padded_on_the_left(folder: Path) -> None:
    """The batches of verl's older trainers; tokens that the policy did not write keep what they had."""
    _, rows = rows_of()
    policy, workers = tiny_policy(), Workers(tiny_policy(), 1)
    P, T = (max(len(row[name]) for row in rows) for name in ("prompts", "responses"))

    def pad(name: str, left: bool = False) -> torch.Tensor:
        width = P if left else T
        rest = [torch.zeros(width - len(row[name]), dtype=row[name].dtype) for row in rows]
        return torch.stack([torch.cat([z, r[name]] if left else [r[name], z]) for r, z in zip(rows, rest, strict=True)])

    for row in rows:
        row["ones"] = torch.ones_like(row["prompts"])
    valid = pad("response_mask")
    mask = valid.clone()
    mask[:, 1] = 0  # a tool's word
    torch.manual_seed(0)
    given = torch.randn(8, T) * mask
    tensors = {
        "prompts": pad("prompts", True), "responses": pad("responses"), "response_mask": mask, "advantages": given,
        "attention_mask": torch.cat([pad("ones", True), valid], dim=1), "token_level_scores": pad("rm_scores"),
    }  # fmt: skip
    others = {name: integration._objects([row[name] for row in rows]) for name in ("uid", "raw_prompt", "gold")}
    data = DataProto.from_dict(tensors, others, {"temperature": 1.0})
    options = CEPOOptions(answer_column="gold", lam=1.0, lam_steps=0, eps_w=0.5, **OPTIONS)
    credit = TokenCredit(options, policy.tokenizer, 512, policy.eos_ids)
    credit.apply(data, 1, workers.compute_log_prob, multiple=2)
    ratio = data.batch["advantages"] / given
    assert not data.batch["advantages"][mask == 0].any()
    assert ((ratio >= 0.5 - 1e-6) & (ratio <= 1.5 + 1e-6))[mask == 1].all()
    assert ratio[mask == 1].unique().numel() > 5
    data.non_tensor_batch["multi_modal_inputs"] = integration._objects([{"pixel_values": 1}] * 8)
    with pytest.raises(InputError, match="multi_modal_inputs: expected prompts of text alone"):
        credit.apply(data, 1, workers.compute_log_prob)


def test_a_wrong_answer_too_long_for_the_context_is_left_out_and_a_right_one_refused(folder: Path) -> None:
    long = "8" * 40
    said = [f"#{long}", RIGHT] * 4
    trainer = make(folder)
    chat = [{"role": "user", "content": f"{PROBLEMS[1].prompt}\nHint: the answer is {long}."}]
    need = len(trainer._credit._render(chat)) + 42
    for context, missing in ((need, 0), (need - 1, 1)):
        trainer._credit._context = context
        assert step(trainer, said)[1]["cepo/negative_missing"] == missing
    trainer._credit._context = 50
    with pytest.raises(InputError, match="teacher context of answer '7': expected at most 50 tokens"):
        step(trainer, said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 2.0}, r"^lam: expected a number in \[0, 1\], got 2"),
        ({"lam": "much"}, r"^trainer\.v1\.cepo: expected the fields of CEPOOptions, got: .*much"),
        ({"lamda": 0.5}, r"^trainer\.v1\.cepo: expected the fields of CEPOOptions, got: .*lamda"),
        ({"credit": "rredcot"}, "^credit: expected one of cepo, rlsd, uniform, got 'rredcot'"),
        ({"accepts": "math:nothing"}, "^accepts: expected module:function, got 'math:nothing'"),
        ({"parse_answer": "nothing"}, "^parse_answer: expected module:function, got 'nothing'"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(options)


@pytest.mark.parametrize(
    ("options", "field", "value", "message"),
    [
        ({}, "reward_model", {"ground_truth": None}, "answer_column: expected the right answer, a text or a number, in "
                                                     "ground_truth of column reward_model, got None"),
        ({"answer_column": "gold"}, "gold", ["7"], r"in column gold, got \['7'\]"),
        ({"answer_column": "silver"}, "gold", 7, "in column silver, got None; the columns are"),
        ({}, "raw_prompt", [{"role": "user", "content": "5"}], "prompt: expected the rollout's prompt to be its chat"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_named(
    folder: Path, options: Mapping[str, Any], field: str, value: Any, message: str
) -> None:
    def change(keys: list[str], rows: list[dict[str, Any]]) -> None:
        rows[3][field] = value

    with pytest.raises(InputError, match=message):
        step(make(folder, **options), change=change)


def test_routers_that_replay_are_refused(folder: Path) -> None:
    config = OmegaConf.merge(composed(), {})
    OmegaConf.update(config, "actor_rollout_ref.actor.megatron.router_replay.mode", "R2", force_add=True)
    with pytest.raises(InputError, match=r"actor\.megatron\.router_replay\.mode: expected disabled, .*got 'R2'"):
        make(folder, config=config)


def test_the_examples_overrides_make_a_trainer(folder: Path) -> None:
    script = (Path(__file__).parent.parent / "examples" / "verl" / "train.sh").read_text()
    words = shlex.split(script.partition("verl.trainer.main_ppo")[2].replace("\\\n", " "))
    overrides = [word for word in words if "=" in word and "$" not in word]
    assert len(overrides) > 10
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    trainer = make(folder, config=config)
    assert (trainer._options.credit, trainer._options.lam, trainer._multiple()) == ("cepo", 0.5, 2)


def test_other_versions_are_refused_with_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import verl

    wanted = r"expected verl >= 0\.9\.1, < 0\.10 \(pip install 'verl>=0\.9\.1,<0\.10'\), got"
    for version in ("0.8.0", "0.9.0", "0.10.0"):
        monkeypatch.setattr(verl, "__version__", version)
        with pytest.raises(ImportError, match=f"{wanted} {version}"):
            load_afresh(integration)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=f"{wanted} .*verl"):
        load_afresh(integration)
