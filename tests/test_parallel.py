"""Vocabulary-parallel calls: ranks that hold columns give what one process gives, and fail together or not at all.

The cases of a world size run in one set of processes; each test asks how its case went there.
"""

from __future__ import annotations

import datetime
import functools
import traceback
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parallel_cases import CASES, ROWS, TILE, WIDTH, Held, case, close, layouts, logits_and_rows

import cepo_kernels
from cepo_kernels import LogprobHead, contrastive_logprobs, contrastive_policy_loss, token_logprobs
from cepo_kernels.backends import sharded
from cepo_kernels.linear import linear_contrastive_policy_loss, linear_token_logprobs

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    sharded.TILE = TILE
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for name, function in CASES.items():
        try:
            function(rank, world)
        except Exception:
            Path(folder, f"{name}.{rank}").write_text(traceback.format_exc())
            raise
        Path(folder, f"{name}.{rank}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4])
def went(request, tmp_path_factory):
    """What a case's ranks had to say: nothing where all is well."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    try:
        mp.spawn(_rank, args=(world, str(folder)), nprocs=world)
    except Exception as error:
        said = {path.name: path.read_text() for path in folder.iterdir() if path.suffix and path.stat().st_size}
        ended = f"not run; before it: {sorted(said) or error}"
    else:
        ended = "not run"

    def report(name: str) -> list[str]:
        files = [folder / f"{name}.{rank}" for rank in range(world)]
        return [text for file in files if (text := file.read_text() if file.exists() else ended)]

    return report


@pytest.mark.parametrize("name", [
    "logits", "the_bits_do_not_depend_on_the_ranks", "near_certain_labels", "rows_without_a_distribution",
    "logits_of_any_size", "the_policy_loss", "in_place", "hidden_states", "the_policy_loss_from_hidden_states",
    "rows_that_are_not_scored_may_hold_anything", "a_head_that_is_a_dtensor", "errors_on_every_rank",
    "disagreement_is_named", "compiled",
])  # fmt: skip
def test_ranks(went, name):
    assert not (said := went(name)), "\n".join(said)


def test_every_case_is_asked_for():
    (mark,) = [mark for mark in test_ranks.pytestmark if mark.name == "parametrize"]
    assert mark.args[1] == list(CASES)


@case
def a_head_that_is_a_dtensor(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    for vocabulary in (11, 5, 2):  # shards of unequal size, some of them empty
        plain = LogprobHead(WIDTH, vocabulary)
        hidden, labels = torch.randn(ROWS, WIDTH), torch.randint(vocabulary, (ROWS,))
        want = plain(hidden.requires_grad_(), labels=labels)
        want.logprobs.sum().backward()
        right, hidden.grad = hidden.grad, None
        for placement in (Shard(0), Replicate()):
            head = LogprobHead(WIDTH, vocabulary)
            for name in ("weight", "bias"):
                whole = distribute_tensor(getattr(plain, name).detach(), mesh, [placement])
                setattr(head, name, torch.nn.Parameter(whole))
            got = head(hidden, labels=labels)
            got.logprobs.sum().backward()
            torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-6)
            close(hidden.grad, right)
            hidden.grad = None
            for name in ("weight", "bias"):
                found = getattr(head, name).grad
                assert isinstance(found, DTensor)
                assert found.placements == (placement,)
                close(found.full_tensor(), getattr(plain, name).grad)
    wrong = distribute_tensor(torch.randn(12, WIDTH), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"lm_head_weight: expected a DTensor that is Shard\(0\)"):
        linear_token_logprobs(hidden, wrong, labels)
    sharded_head = distribute_tensor(torch.randn(12, WIDTH), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="tp_group: expected None"):
        linear_token_logprobs(hidden, sharded_head, labels, tp_group=dist.group.WORLD)


# --- errors ----------------------------------------------------------------------------------------------------------


def raises(rank, culprit, error, own, others, call):
    """``own`` where rank is the culprit, ``others`` elsewhere; and the group is still good for a call after it."""
    with pytest.raises(error if rank == culprit else ValueError, match=own if rank == culprit else others):
        call()
    good = token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), tp_group=dist.group.WORLD)
    assert torch.isfinite(good.logprobs).all()


@case
def errors_on_every_rank(rank, world):
    culprit = world - 1
    other = f"tp_group: its rank {culprit} was called with a wrong argument"
    base = {"policy_logits": torch.zeros(4, 6), "positive_logits": None, "negative_logits": None,
            "labels": torch.arange(4), "advantages": torch.ones(4)}  # fmt: skip
    for change, error, own in (
        ({"labels": torch.zeros(4)}, TypeError, "labels: expected int32 or int64"),
        ({"labels": None}, TypeError, "labels: expected a tensor"),
        ({"policy_logits": torch.zeros(4, 6).long()}, TypeError, "policy_logits: expected bfloat16"),
        ({"policy_logits": torch.zeros(5, 6)}, ValueError, "policy_logits: expected leading shape"),
        ({"positive_logits": torch.zeros(4, 5)}, ValueError, "positive_logits: expected V = 6"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages: expected a 0-d tensor"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number"),
        ({"lam": 2}, ValueError, r"lam: expected a number in \[0, 1\], got 2"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
        ({"vocab_start": -1}, ValueError, "vocab_start: expected None or a number of columns, got -1"),
        ({"vocab_size": 2**70}, ValueError, "vocab_size: expected None or a number of columns, got 1180"),
        ({"advantages": torch.ones(4).to_sparse()}, TypeError, "advantages: expected a dense tensor"),
    ):
        for op in (contrastive_logprobs, contrastive_policy_loss):
            call = {**base, **(change if rank == culprit else {})}
            raises(rank, culprit, error, own, other, functools.partial(op, tp_group=dist.group.WORLD, **call))
    base = {"hidden_states": torch.zeros(4, 3), "lm_head_weight": torch.zeros(5, 3), "labels": torch.arange(4)}
    for change, error, own in (
        ({"hidden_states": torch.zeros(4, 2)}, ValueError, "hidden_states: expected shape"),
        ({"lm_head_weight": None}, TypeError, "lm_head_weight: expected a tensor"),
        ({"lm_head_bias": torch.zeros(4)}, ValueError, r"lm_head_bias: expected shape \(5,\)"),
    ):
        call = {**base, **(change if rank == culprit else {})}
        raises(rank, culprit, error, own, other,
               functools.partial(linear_token_logprobs, tp_group=dist.group.WORLD, **call))  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, placement = init_device_mesh("cpu", (world,)), Shard(int(rank == culprit))
    head = DTensor.from_local(torch.zeros(6, 2), mesh, [placement])
    raises(rank, culprit, ValueError, "lm_head_weight: expected a DTensor that is Shard", other,
           functools.partial(linear_token_logprobs, torch.zeros(4, 2), head, torch.arange(4)))  # fmt: skip


@case
def disagreement_is_named(rank, world):
    odd = rank == world - 1
    loss = functools.partial(contrastive_policy_loss, torch.zeros(4, 6), None, None, torch.arange(4))
    x, y = torch.zeros(4, 6), torch.arange(4)
    group = {"tp_group": dist.group.WORLD}
    total = 6 * world
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    unscored = states + float(odd) * (y == 2)[:, None]
    linear_token_logprobs(unscored, torch.zeros(5, 3), y.masked_fill(y == 2, -100), **group)
    for message, call in (
        ("labels: expected the same number of rows .* got 4 on rank 0 and 3 on rank",
         lambda: token_logprobs(x[: 4 - odd], y[: 4 - odd], **group)),
        ("labels: expected the same on every rank", lambda: token_logprobs(x, y + odd, **group)),
        ("temperature: expected the same", lambda: token_logprobs(x, y, temperature=1.0 + odd, **group)),
        ("return_entropy: expected the same .* got False on rank 0 and True",
         lambda: token_logprobs(x, y, return_entropy=odd, **group)),
        ("logits: expected the same dtype on every rank of tp_group, got torch.float32 on rank 0 and torch.bfloat16 on",
         lambda: token_logprobs(x.bfloat16() if odd else x, y, **group)),
        ("lm_head_weight: expected the same requires_grad .* got False on rank 0 and True on rank",
         lambda: linear_token_logprobs(states, torch.zeros(5, 3, requires_grad=odd), y, **group)),
        ("surrogate: expected the same",
         lambda: loss(torch.ones(4), surrogate="cispo" if odd else "ppo", **group)),
        ("advantages: expected the same", lambda: loss(torch.ones(4) + odd, **group)),
        ("tp_group: expected the same op",
         lambda: loss(torch.ones(4), **group) if odd else token_logprobs(x, y, **group)),
        ("vocab_size: expected the same .* got None on rank 0 and 6 on rank",
         lambda: token_logprobs(x, y, vocab_size=6 if odd else None, **group)),
        ("vocab_start: expected a number on every rank or None",
         lambda: token_logprobs(x, y, vocab_start=6 * rank if odd else None, **group)),
        (r"vocab_start: ranks \d and \d both hold column",
         lambda: token_logprobs(x, y, vocab_start=6 * rank - odd, **group)),
        (r"vocab_size: expected shards that hold columns 0 to .*, but none holds",
         lambda: token_logprobs(x, y, vocab_start=6 * rank + odd, **group)),
        (f"vocab_size: expected shards .* 0 to {total + 1}, but none holds {total}",
         lambda: token_logprobs(x, y, vocab_size=total + 1, **group)),
        ("labels: expected -100 or 0 <= label < 7, got 9", lambda: token_logprobs(x, y * 3, vocab_size=7, **group)),
        ("labels: expected -100 or 0 <= label < .*, got -3", lambda: token_logprobs(x, -y, **group)),
        ("hidden_size: expected the same on every rank",
         lambda: linear_token_logprobs(torch.zeros(4, 3 + odd), torch.zeros(5, 3 + odd), y, **group)),
        ("hidden_states: expected the same on every rank .* broadcast",
         lambda: linear_token_logprobs(states + 2.0**-20 * odd, torch.zeros(5, 3), y, **group)),
        ("negative_hidden: expected the same on every rank",
         lambda: linear_contrastive_policy_loss(
             states, None, states.roll(int(odd), 0), torch.zeros(5, 3), y, torch.ones(4), **group)),
        ("labels: .* LogprobHead",
         lambda: linear_token_logprobs(torch.zeros(4, 3), torch.zeros(5, 3), y + odd, **group)),
    ):  # fmt: skip
        raises(rank, -1, ValueError, "", message, call)


@case
def compiled(rank, world):
    """A graph break, and right. Two ranks say it: importing the compiler takes longer than all else."""
    if world > 2:
        return
    torch._dynamo.reset()
    (policy, *_), labels, advantages = logits_and_rows()
    held = Held(rank, next(layouts(world))[1], {})

    def loss_of(leaf):
        out = contrastive_logprobs(leaf * 1.0, None, None, labels, advantages, return_entropy=True, **held.options)
        return (out.logprobs * out.advantages).sum() + out.entropy.sum()

    found = []
    for function in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        leaf = held.of(policy)
        function(leaf).backward()
        found.append(leaf.grad)
    oracle.assert_same_bits(found[1], found[0])


# --- without a group -------------------------------------------------------------------------------------------------


def test_what_needs_a_group_says_so():
    x, y = torch.zeros(4, 6), torch.arange(4)
    with pytest.raises(ValueError, match="vocab_size: expected None without tp_group, got 6"):
        token_logprobs(x, y, vocab_size=6)
    with pytest.raises(ValueError, match="vocab_start: expected None without tp_group, got 0"):
        linear_token_logprobs(torch.zeros(4, 3), torch.zeros(6, 3), y, vocab_start=0)
    with pytest.raises(TypeError, match=r"tp_group: expected a torch.distributed.ProcessGroup, got str"):
        cepo_kernels.contrastive_policy_loss(x, None, None, y, torch.ones(4), tp_group="tp")
