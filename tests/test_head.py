"""`LogprobHead`: the ops behind a module's call, in a model and under FSDP2."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cepo_kernels import (
    LogprobHead,
    linear_contrastive_logprobs,
    linear_contrastive_policy_loss,
    linear_products,
    linear_token_logprobs,
    restore_head,
    use_logprob_head,
)
from cepo_kernels.head import logit_options

H, V = 12, 60


class Model(nn.Module):
    """As transformers' models are: an embedding, something in between, a head that may share the embedding's weight."""

    def __init__(self, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids, **options):
        return self.lm_head(self.body(self.embed(ids)).tanh(), **options)


def inputs(seed=0, shape=(2, 5)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, shape, generator=generator)
    return torch.randint(V, shape, generator=generator), labels, torch.randn(shape, generator=generator)


def test_each_form_is_the_op_of_its_name():
    torch.manual_seed(0)
    head = LogprobHead(H, V)
    policy, positive, negative = torch.randn(3, 2, 5, H)
    _, labels, advantages = inputs()
    shared = {"lm_head_bias": head.bias}
    assert torch.equal(head(policy), nn.functional.linear(policy, head.weight, head.bias))
    same = [
        (head(policy, labels=labels, return_entropy=True),
         linear_token_logprobs(policy, head.weight, labels, return_entropy=True, **shared)),
        (head(policy, positive, negative, labels=labels, advantages=advantages, lam=1.0),
         linear_contrastive_logprobs(policy, positive, negative, head.weight, labels, advantages, lam=1.0, **shared)),
        (head(policy, positive, None, labels=labels, advantages=advantages, policy_loss=True).credit,
         linear_contrastive_policy_loss(policy, positive, None, head.weight, labels, advantages, **shared).credit),
    ]  # fmt: skip
    for got, want in same:
        assert type(got) is type(want)
        for value, expected in zip(got, want, strict=True):
            assert (value is None and expected is None) or torch.equal(value, expected)
    for options in ({"positive_hidden": labels}, {"temperature": 2.0}, {"policy_loss": True}):
        with pytest.raises(ValueError, match=r"labels: expected a tensor, given as labels=\.\.\., got None"):
            head(policy, **options)
    with pytest.raises(TypeError, match="lm_head_bias: expected none"):
        head(policy, labels=labels, lm_head_bias=head.bias)


@pytest.mark.parametrize("tied", [False, True])
def test_swapped_into_a_model_and_back(tied):
    model = Model(tied)
    ids, labels, _ = inputs()
    state, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(ids)
    head = use_logprob_head(model)
    assert head is model.lm_head is use_logprob_head(model)
    assert (model.lm_head.weight is model.embed.weight) == tied
    assert torch.equal(model(ids), logits)
    want = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    got = model(ids, labels=labels).logprobs
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(x.sum(), list(model.parameters()), retain_graph=True) for x in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    restore_head(model)
    assert type(model.lm_head) is nn.Linear
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    ids, labels, _ = inputs()
    logits = model(ids).logits
    head = use_logprob_head(model)
    hidden = model.model(ids).last_hidden_state
    want = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(head(hidden, labels=labels).logprobs, want)
    assert torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path)
    again = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear


def test_what_is_no_plain_linear_layer_is_refused_with_the_reason():
    class Lora(nn.Module):
        base_layer = None

    class FSDPLinear(nn.Linear):
        pass

    for head, reason in ((Lora(), "adapter"), (FSDPLinear(H, V), "before fully_shard"), (nn.Identity(), "Identity")):
        model, kind = Model(), type(head)
        model.lm_head = head
        with pytest.raises(TypeError, match=reason):
            use_logprob_head(model)
        restore_head(model)
        assert type(model.lm_head) is kind
    model = Model()
    model.lm_head.forward = lambda x: x
    with pytest.raises(TypeError, match="one that was replaced"):
        use_logprob_head(model)
    model = Model()
    model.config = SimpleNamespace(final_logit_softcapping=30.0)
    with pytest.raises(TypeError, match=r"asks for \{'logit_softcap': 30\.0\}; call linear_token_logprobs"):
        use_logprob_head(model)
    for config, reason in (
        ({"is_encoder_decoder": True}, "a decoder alone, got Model"),
        ({"unpadded_vocab_size": V - 1}, f"a head of {V} that is cut to {V - 1}"),
    ):
        model.config = SimpleNamespace(**config)
        with pytest.raises(TypeError, match=reason):
            use_logprob_head(model)
    for config, scale in (
        ({"logit_scale": 0.25}, 0.25),
        ({"logits_scaling": 8.0}, 0.125),
        ({"logits_scaling": 1}, None),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
        ({"lm_head_multiplier": 0.04}, 0.04),
        ({"output_multiplier": 0.2}, 0.2),
        ({"logits_mup_width_multiplier": 24}, 1 / 24),
    ):
        assert logit_options(SimpleNamespace(**config)).get("logit_scale") == scale
    for name in ("logits_soft_cap", "output_logit_soft_cap"):
        assert logit_options(SimpleNamespace(**{name: 30.0})) == {"logit_softcap": 30.0}
    with pytest.raises(TypeError, match="expected a model with output embeddings, got Linear"):
        use_logprob_head(nn.Linear(2, 2))


def zero3(head):
    """What ZeRO-3's hooks do to a head's parameters: there within its calls and their backwards, else empty."""
    whole = {parameter: parameter.data.clone() for parameter in head.parameters()}

    def gather(*_):
        for parameter, values in whole.items():
            parameter.data = values.clone()

    def release(*_):
        for parameter in whole:
            parameter.data.fill_(float("nan"))  # for whoever has kept the memory
            parameter.data = torch.empty(0)

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    head.register_full_backward_hook(release)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [10, 20], ids=["kept logits", "made again"])
def test_under_zero3_the_heads_own_hooks_gather_it(monkeypatch, rows, frozen):
    monkeypatch.setattr(linear_products, "LOGITS_BYTES", 0)  # chunks of 16 rows
    torch.manual_seed(0)
    hidden = torch.randn(3, rows, H)
    _, labels, advantages = inputs(shape=(rows,))
    told = {"labels": labels, "advantages": advantages}
    calls = (
        lambda head, x: head(x, labels=labels, return_entropy=True)[:2],
        lambda head, x: [head(x, *hidden[1:], **told).logprobs],
        lambda head, x: [head(x, *hidden[1:], **told, policy_loss=True, entropy_coef=0.1).loss],
    )
    plain = LogprobHead(H, V).requires_grad_(not frozen)
    sharded = copy.deepcopy(plain)
    zero3(sharded)
    for call in calls:
        found = []
        for head in (plain, sharded):
            head.zero_grad()
            leaf = hidden[0].clone().requires_grad_()
            values = call(head, leaf)
            assert (head.weight.numel() == 0) == (head is sharded)
            sum(x.sum() for x in values).backward()
            found.append([*values, leaf.grad, *(x.grad for x in head.parameters() if not frozen)])
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"^lm_head_weight: .* got \(0,\).* LogprobHead.*GatheredParameters"):
        linear_token_logprobs(hidden[0], sharded.weight, labels)


def losses(model, shard, steps=3):
    """Of a few steps in which each rank takes its rows of the batch; the mean over ranks is that of the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for step in range(steps):
        ids, labels, advantages = (x[shard] for x in inputs(step, (4, 5)))
        hidden = model.body(model.embed(ids)).tanh()
        out = model.lm_head(hidden, labels=labels, advantages=advantages, policy_loss=True, denominator=20.0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        found.append(out.loss.detach())
    return torch.stack(found)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Model(tied=False)
    use_logprob_head(model)
    mesh = init_device_mesh("cpu", (world,))
    for module in (model.embed, model.body, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    share = 4 // world
    found = losses(_Summed(model, world), slice(rank * share, (rank + 1) * share))
    dist.all_reduce(found)
    if rank == 0:
        torch.save(found, Path(folder) / "losses.pt")
    dist.destroy_process_group()


class _Summed(nn.Module):
    """FSDP averages gradients over ranks; the loss is a sum over them."""

    def __init__(self, model, world):
        super().__init__()
        self.embed, self.body, self.lm_head = model.embed, model.body, model.lm_head
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(world))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_under_fsdp2_two_processes_train_to_the_losses_of_one(tmp_path):
    torch.manual_seed(0)
    model = Model(tied=False)
    use_logprob_head(model)
    want = losses(model, slice(0, 4))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, args=(2, port, str(tmp_path)), nprocs=2)
    torch.testing.assert_close(torch.load(tmp_path / "losses.pt"), want, rtol=1e-5, atol=1e-6)
    assert want[0] != want[-1]
