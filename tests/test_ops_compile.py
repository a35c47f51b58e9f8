"""Under torch.compile the ops are one node of the graph: the same bits, and no new compilation as values move."""

from __future__ import annotations

import oracle
import pytest
import torch

import cepo_kernels
from cepo_kernels import ops


@pytest.fixture(autouse=True)
def _forgetful():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compilations:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def inputs(backend, rows=(2, 5), vocabulary=131, dtype=torch.bfloat16):
    policy, positive, negative = (
        oracle.place(backend, oracle.logits_like((*rows, vocabulary), seed, dtype)) for seed in (1, 2, 3)
    )
    labels = oracle.place(backend, oracle.labels_like(rows, vocabulary, 4, 0.2))
    advantages = oracle.place(backend, oracle.logits_like((rows[0], *(1 for _ in rows[1:])), 5))
    return policy, positive, negative, labels, advantages


def loss_of(policy, positive, negative, labels, advantages, backend, **options):
    """What a trainer does: log-probs, credit, a loss made of both and of the entropy."""
    out = cepo_kernels.contrastive_logprobs(
        policy, positive, negative, labels, advantages, return_entropy=True, backend=backend, **options
    )
    return -(out.logprobs * out.advantages).sum() - 0.01 * out.entropy.sum(), out


def step(function, arguments, backend, **options):
    policy = arguments[0].detach().requires_grad_()
    loss, out = function(policy, *arguments[1:], backend, **options)
    loss.backward()
    return {**out._asdict(), "loss": loss, "gradient": policy.grad}


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiled_equals_eager_bit_for_bit(backend, compiler):
    if compiler == "inductor" and backend not in ("cpu:portable", "triton"):
        pytest.skip("once through a compiler is enough: the ops are opaque to it")
    arguments = inputs(backend)
    options = {"lam": 0.3, "eps_w": 0.4, "temperature": 0.8, "logit_softcap": 30.0}
    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler)
    got, want = step(compiled, arguments, backend, **options), step(loss_of, arguments, backend, **options)
    for name, value in want.items():
        if name == "loss":  # a sum that the compiler may order as it likes
            torch.testing.assert_close(got[name], value)
        else:
            oracle.assert_same_bits(got[name], value, name)


@pytest.mark.parametrize("teachers", ["both", "positive", "negative", "none"])
@pytest.mark.parametrize("given", [False, True])
def test_every_form_of_a_call_compiles_whole(backend, teachers, given):
    policy, positive, negative, labels, advantages = inputs(backend)
    positive = positive if teachers in ("both", "positive") else None
    negative = negative if teachers in ("both", "negative") else None
    options = {
        "negative_mask": advantages > 0 if given else None,
        "temperature": advantages.abs() + 0.5 if given else 1.0,
        "return_entropy": given,
    }

    def call(policy):
        return cepo_kernels.contrastive_logprobs(
            policy, positive, negative, labels, advantages if given else None, backend=backend, **options
        )

    for tensor in (policy, policy.transpose(0, 1).contiguous().transpose(0, 1)):
        got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(tensor), call(tensor)
        for name, value in want._asdict().items():
            oracle.assert_same_bits(getattr(got, name), value, name)


@pytest.mark.parametrize("given_as", ["tensors", "floats", "floats, dynamic"])
def test_a_schedule_of_fifty_steps_compiles_once(backend, given_as):
    """Torch takes a float of the first call for a constant, unless told otherwise, and for a variable from then on."""
    counter, arguments = Compilations(), inputs(backend, (4,), 17)
    dynamic = True if given_as == "floats, dynamic" else None
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter, dynamic=dynamic)
    wrap = torch.tensor if given_as == "tensors" else float
    for index in range(50):
        values = {
            "lam": 1 - index / 49,
            "eps_w": 0.1 + index / 100,
            "temperature": 1 + index / 70,
            "logit_scale": 1 + index / 200,
            "logit_softcap": 30.0 + index,
        }
        options = {name: wrap(value) for name, value in values.items()}
        got, want = step(compiled, arguments, backend, **options), step(loss_of, arguments, backend, **options)
        for name, value in want.items():
            oracle.assert_same_bits(got[name], value, name)
    assert counter.count <= (2 if given_as == "floats" else 1)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_change_of_n_costs_at_most_one_recompilation_and_n_one_another(backend, kind):
    counter = Compilations()
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    for count in (8, 5, 13, 29, 6, 300):
        arguments = inputs(backend, (count,) if kind == "packed" else (3, count), 17)
        got, want = step(compiled, arguments, backend), step(loss_of, arguments, backend)
        for name, value in want.items():
            oracle.assert_same_bits(got[name], value, name)
    assert counter.count <= 2
    step(compiled, inputs(backend, (1,) if kind == "packed" else (3, 1), 17), backend)
    assert counter.count <= 3


def test_entropy_not_asked_for_costs_the_compiled_gradient_nothing(backend):
    policy, *_, labels, _ = inputs(backend)

    def call(policy):
        return cepo_kernels.token_logprobs(policy, labels, backend=backend).logprobs.sum()

    gradients = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = policy.detach().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    oracle.assert_same_bits(*gradients, "gradient")


def test_in_place_gradients_are_harmless_under_the_compiler(backend):
    arguments = inputs(backend)

    def through(policy, *rest, inplace):
        out = cepo_kernels.contrastive_logprobs(policy * 1, *rest, inplace_grad=inplace, backend=backend)
        return out.logprobs.sum()

    gradients = []
    for function in (through, torch.compile(through, fullgraph=True, backend="aot_eager")):
        policy = arguments[0].detach().requires_grad_()
        function(policy, *arguments[1:], inplace=True).backward()
        gradients.append(policy.grad)
    oracle.assert_same_bits(*gradients, "gradient")


def forward_arguments(backend, **change):
    policy, positive, negative, labels, advantages = inputs(backend, dtype=torch.float32)
    arguments = {
        "policy": policy.requires_grad_(), "positive": positive, "negative": negative, "labels": labels,
        "advantages": advantages, "negative_mask": None, "lam": torch.tensor(0.5), "eps_w": torch.tensor(0.5),
        "temperature": torch.tensor(1.0), "logit_scale": torch.tensor(1.0), "logit_softcap": None,
        "ignore_index": -100, "return_entropy": True, "backend": backend, **change,
    }  # fmt: skip
    return tuple(arguments.values())


@pytest.mark.parametrize(
    "change",
    [{}, {"positive": None}, {"negative": None, "advantages": None}, {"return_entropy": False}],
    ids=["all", "no positive", "no negative", "no entropy"],
)
def test_the_forward_op_is_registered_as_torch_expects(backend, change):
    torch.library.opcheck(ops.forward, forward_arguments(backend, **change))


def test_the_gradient_ops_are_registered_as_torch_expects(backend):
    arguments = forward_arguments(backend)
    policy, labels, options = arguments[0].detach(), arguments[3], arguments[8:12]
    logprobs, *_, entropy, stats = (value.detach() for value in ops.forward(*arguments))
    for upstreams in ((torch.ones_like(logprobs), None), (torch.ones_like(logprobs), torch.ones_like(entropy))):
        rest = (labels, *upstreams, logprobs, entropy, stats, *options, backend)
        torch.library.opcheck(ops.logits_grad, (policy, *rest))
        torch.library.opcheck(ops.logits_grad_, (policy.clone(), *rest))


def test_fake_tensors_give_shapes_without_data():
    with torch._subclasses.FakeTensorMode():
        fake = cepo_kernels.token_logprobs(
            torch.zeros(3, 4, 50), torch.zeros(3, 4, dtype=torch.long), return_entropy=True
        )
    assert fake.logprobs.shape == fake.entropy.shape == (3, 4)
    assert fake.logprobs.dtype == torch.float32
