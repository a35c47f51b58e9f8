"""The ops from hidden states: what the ops from logits give, with no logits of all rows anywhere."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F

import cepo_kernels
from cepo_kernels import linear_products
from cepo_kernels.backends import cpu
from cepo_kernels.linear import linear_contrastive_logprobs, linear_contrastive_policy_loss, linear_token_logprobs

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS, WIDTH, VOCABULARY = 40, 24, 301
DTYPES = (torch.float64, *oracle.NATIVE)
# of the largest entry of a gradient, which is itself of the dtype
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(dtype=torch.float32, bias=True, shape=(ROWS,)):
    hidden = [oracle.logits_like((*shape, WIDTH), seed, dtype, 1.0) for seed in (1, 2, 3)]
    weight = oracle.logits_like((VOCABULARY, WIDTH), 4, dtype, 0.4)
    labels, advantages = oracle.labels_like(shape, VOCABULARY, 5, 0.2), oracle.logits_like(shape, 6)
    advantages.view(-1)[::5] = 0.0
    return hidden, weight, oracle.logits_like((VOCABULARY,), 7, dtype, 1.0) if bias else None, labels, advantages


def logits_of(hidden, weight, bias):
    return F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())


def gradients(loss_of, hidden, weight, bias, frozen):
    """Of the policy's hidden states, the head and its bias."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(not frozen)]
    leaves.append(None if bias is None else bias.detach().clone().requires_grad_(not frozen))
    loss = loss_of(*leaves)
    loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def compare(got, want, dtype):
    (loss, found), (expected_loss, expected) = got, want
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-5)
    for name, gradient, right in zip(("hidden", "weight", "bias"), found, expected, strict=True):
        assert (gradient is None) == (right is None), name
        if gradient is not None:
            assert gradient.dtype == dtype
            error = (gradient.double() - right.double()).abs().max() / right.double().abs().max()
            assert error < BOUND[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_chunks")
def test_log_probs_and_their_gradients(dtype, frozen, bias):
    hidden, weight, bias, labels, advantages = inputs(dtype, bias)

    def ours(policy, weight, bias):
        out = linear_contrastive_logprobs(
            policy, hidden[1], hidden[2], weight, labels, advantages, lm_head_bias=bias, return_entropy=True
        )
        return (out.logprobs * out.advantages).sum() + 0.1 * out.entropy.sum()

    def plain(policy, weight, bias):
        logits = [logits_of(x, weight, bias) for x in (policy, hidden[1], hidden[2])]
        out = cepo_kernels.contrastive_logprobs(*logits, labels, advantages.double(), return_entropy=True)
        return (out.logprobs * out.advantages).sum() + 0.1 * out.entropy.sum()

    compare(gradients(ours, hidden[0], weight, bias, frozen), gradients(plain, hidden[0], weight, bias, frozen), dtype)


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
@pytest.mark.parametrize("terms", [(0.0, 0.0), (0.1, 0.02)], ids=["surrogate", "kl and entropy"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_chunks")
def test_the_policy_loss_and_its_gradients(dtype, frozen, terms, surrogate):
    hidden, weight, bias, labels, advantages = inputs(dtype)
    own = cepo_kernels.token_logprobs(logits_of(hidden[0], weight, bias), labels).logprobs
    rows = {"old_logprobs": own + oracle.logits_like((ROWS,), 8, spread=0.4), "ref_logprobs": own + 0.2,
            "token_weight": oracle.logits_like((ROWS,), 9).abs()}  # fmt: skip
    options = {"surrogate": surrogate, "kl_coef": terms[0], "entropy_coef": terms[1], "temperature": 1.3, **rows}

    def ours(policy, weight, bias):
        out = linear_contrastive_policy_loss(
            policy, hidden[1], hidden[2], weight, labels, advantages, lm_head_bias=bias, **options
        )
        return out.loss * 3.0

    def plain(policy, weight, bias):
        logits = [logits_of(x, weight, bias) for x in (policy, hidden[1], hidden[2])]
        return cepo_kernels.contrastive_policy_loss(*logits, labels, advantages.double(), **options).loss * 3.0

    compare(gradients(ours, hidden[0], weight, bias, frozen), gradients(plain, hidden[0], weight, bias, frozen), dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": 5.0, "logit_scale": 0.5},
        {"temperature": torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) + 0.5},
        {"ignore_index": 7, "return_entropy": True},
    ],
    ids=["cap", "temperatures", "ignore_index"],
)
@pytest.mark.usefixtures("_chunks")
def test_options_and_leading_shapes(options):
    hidden, weight, bias, labels, advantages = inputs(shape=(4, 10))
    labels = labels.clamp(min=0)
    logits = [logits_of(x, weight, bias) for x in hidden]
    want = cepo_kernels.contrastive_logprobs(*logits, labels, advantages.double(), **options)
    got = linear_contrastive_logprobs(*hidden, weight, labels, advantages, lm_head_bias=bias, **options)
    for name, value in got._asdict().items():
        expected = getattr(want, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    token = linear_token_logprobs(hidden[0], weight, labels, lm_head_bias=bias, **options)
    oracle.assert_same_bits(token.logprobs.isfinite().float(), torch.ones(4, 10))
    torch.testing.assert_close(token.logprobs.double(), want.logprobs, rtol=2e-5, atol=2e-5)


def products(monkeypatch):
    """The number of rows of every product with the head, in the order in which they are made."""
    made = []
    for name in ("logits", "hidden_gradient", "add_weight_gradient"):
        original = getattr(linear_products.Products, name)

        def counted(self, first, *rest, name=name, original=original):
            made.append((name, (first if name != "add_weight_gradient" else rest[0]).shape[0]))
            return original(self, first, *rest)

        monkeypatch.setattr(linear_products.Products, name, counted)
    return made


def test_rows_that_cannot_matter_meet_no_product(monkeypatch):
    hidden, weight, _, labels, advantages = inputs()
    scored = int((labels != -100).sum())
    active = int(((labels != -100) & (advantages != 0)).sum())
    made = products(monkeypatch)
    weight.requires_grad_()
    out = linear_token_logprobs(hidden[0], weight, labels)
    out.logprobs.backward(advantages)
    assert made == [("logits", scored), ("add_weight_gradient", active)]
    made.clear()
    with monkeypatch.context() as small:
        small.setattr(linear_products, "LOGITS_BYTES", 0)  # chunks of 16 rows: the logits are made again
        linear_token_logprobs(hidden[0], weight, labels).logprobs.backward(advantages)
    first, again = ([len(x) for x in torch.arange(n).tensor_split(-(-n // 16))] for n in (scored, active))
    assert [size for name, size in made if name == "add_weight_gradient"] == again
    assert [size for name, size in made if name == "logits"] == first + again
    made.clear()
    old = out.logprobs.detach() - advantages.sign()  # every row far beyond the bound that its sign has
    out = linear_contrastive_policy_loss(*hidden, weight, labels, advantages, old)
    out.loss.backward()
    assert bool((out.clipped == ((labels != -100) & (advantages != 0))).all())
    assert made == [("logits", 3 * active)]
    made.clear()
    weights = torch.zeros(ROWS)
    weights[:10] = 1.0
    kept = int(((labels != -100) & (advantages != 0))[:10].sum())
    linear_contrastive_policy_loss(*hidden, weight, labels, advantages, token_weight=weights).loss.backward()
    assert made == [("logits", 3 * active), ("add_weight_gradient", kept)]
    made.clear()
    policy = hidden[0].clone().requires_grad_()
    out = linear_contrastive_policy_loss(policy, None, hidden[2], weight.detach(), labels, advantages)
    out.loss.backward()
    assert made == [("logits", 2 * active), ("hidden_gradient", active)]


def test_a_frozen_head_makes_the_gradient_in_the_forward(monkeypatch):
    hidden, weight, _, labels, _ = inputs()
    made = products(monkeypatch)
    policy = hidden[0].clone().requires_grad_()
    out = linear_token_logprobs(policy, weight, labels)
    assert [name for name, _ in made] == ["logits", "hidden_gradient"]
    out.logprobs.sum().backward()
    assert [name for name, _ in made] == ["logits", "hidden_gradient"]


def test_rows_that_are_not_scored_may_hold_anything():
    hidden, weight, bias, labels, advantages = inputs()
    idle = (labels == -100) | (advantages == 0)
    broken = [x.masked_fill(idle[:, None], math.nan) for x in hidden]

    def loss_of(states):
        return lambda policy, weight, bias: (
            linear_contrastive_policy_loss(policy, *states[1:], weight, labels, advantages, lm_head_bias=bias).loss
        )

    want = gradients(loss_of(hidden), hidden[0], weight, bias, False)
    got = gradients(loss_of(broken), broken[0], weight, bias, False)
    oracle.assert_same_bits(got[0], want[0])
    for found, expected in zip(got[1], want[1], strict=True):
        oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_scored_row_everything_is_zero_and_attached(rows):
    hidden, weight, _, _, advantages = inputs()
    policy = hidden[0][:rows].clone().requires_grad_()
    weight.requires_grad_()
    nothing = torch.full((rows,), -100)
    out = linear_contrastive_policy_loss(policy, None, None, weight, nothing, advantages[:rows])
    (out.loss + linear_token_logprobs(policy, weight, nothing).logprobs.sum()).backward()
    assert out.loss.item() == 0.0
    assert not policy.grad.any()
    assert not weight.grad.any()


def test_without_a_row_a_frozen_heads_hidden_states_are_attached():
    hidden, weight, _, _, _ = inputs()
    policy = hidden[0][:0].clone().requires_grad_()
    out = linear_token_logprobs(policy, weight, torch.zeros(0, dtype=torch.long), return_entropy=True)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert policy.grad.shape == policy.shape


@pytest.mark.parametrize("form", ["frozen", "trainable", "loss"])
@pytest.mark.usefixtures("_chunks")
def test_upcast_gradients_are_rounded_once(form, monkeypatch):
    """Then nearly all of them are the exact ones' nearest; a rounding before the products' sums would move half."""
    monkeypatch.setattr(cpu, "product", None)  # which does round logits' gradients before
    hidden, weight, bias, labels, advantages = inputs(torch.bfloat16)

    def loss_of(linear):
        def loss(policy, weight, bias):
            states = [policy, *hidden[1:]]
            if form == "loss":
                options = {"entropy_coef": 0.3}
                if linear:
                    return linear_contrastive_policy_loss(
                        *states, weight, labels, advantages, lm_head_bias=bias, **options
                    ).loss
                logits = [logits_of(x, weight, bias) for x in states]
                return cepo_kernels.contrastive_policy_loss(*logits, labels, advantages.double(), **options).loss
            if linear:
                out = linear_token_logprobs(policy, weight, labels, lm_head_bias=bias, return_entropy=True)
            else:
                out = cepo_kernels.token_logprobs(logits_of(policy, weight, bias), labels, return_entropy=True)
            return (out.logprobs * advantages).sum() + out.entropy.sum()

        return loss

    leaves = hidden[0], weight, bias
    (_, found) = gradients(loss_of(True), *leaves, form == "frozen")
    (_, exact) = gradients(loss_of(False), *(x.double() for x in leaves), form == "frozen")
    for gradient, right in zip(found, exact, strict=True):
        assert gradient is None or (gradient == right.bfloat16()).double().mean() > 0.98


def test_a_frozen_heads_slopes_of_log_probs_and_of_the_entropy():
    """Alone and together they are the gradients of a trained head; a row that nobody asked for may be NaN."""
    hidden, weight, _, labels, advantages = inputs()
    labels[3], advantages[3] = 5, 0.0
    hidden[0][3] = math.inf
    for asked in ((advantages, None), (None, advantages), (advantages, advantages + 0.5 * (advantages != 0))):
        found = []
        for frozen in (True, False):
            leaf = hidden[0].clone().requires_grad_()
            out = linear_token_logprobs(leaf, weight.clone().requires_grad_(not frozen), labels, return_entropy=True)
            terms = [(out[i], grad) for i, grad in enumerate(asked) if grad is not None]
            torch.autograd.backward(*zip(*terms, strict=True))
            found.append(leaf.grad)
        assert not found[0][3].any()
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_equals_eager_bit_for_bit(frozen):
    torch._dynamo.reset()
    hidden, weight, bias, labels, advantages = inputs(torch.bfloat16)

    def loss_of(policy, weight, bias):
        log = linear_contrastive_logprobs(policy, hidden[1], None, weight, labels, advantages, lm_head_bias=bias)
        fused = linear_contrastive_policy_loss(policy, hidden[1], None, weight, labels, advantages, lm_head_bias=bias)
        return fused.loss - (log.logprobs * log.advantages).sum()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, hidden[0], weight, bias, frozen)
    want = gradients(loss_of, hidden[0], weight, bias, frozen)
    torch.testing.assert_close(got[0], want[0])
    for found, expected in zip(got[1], want[1], strict=True):
        oracle.assert_same_bits(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("_chunks")
def test_gradcheck_and_no_second_derivative(frozen):
    hidden, weight, bias, labels, advantages = inputs(torch.float64, shape=(3, 7))
    hidden, weight, bias = [x[..., :5] for x in hidden], weight[:19, :5].clone(), bias[:19].clone()
    labels = labels.clamp(max=18)
    leaves = [hidden[0].clone().requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)]

    def log_probs(policy, weight, bias):
        out = linear_token_logprobs(policy, weight, labels, lm_head_bias=bias, return_entropy=True)
        return out.logprobs, out.entropy

    old = log_probs(*leaves)[0].detach()

    def loss(policy, weight, bias):
        return linear_contrastive_policy_loss(
            policy, *hidden[1:], weight, labels, advantages, old, lm_head_bias=bias, entropy_coef=0.1
        ).loss

    assert torch.autograd.gradcheck(log_probs, leaves)
    gradient = torch.autograd.grad(loss(*leaves) * 2.0, leaves[0])[0].flatten()
    step = torch.zeros_like(hidden[0])
    for index in (0, 31, 77):
        step.zero_().view(-1)[index] = 1e-6
        with torch.no_grad():  # teachers and the token advantages do not move
            rise = loss(leaves[0] + step, *leaves[1:]) - loss(leaves[0] - step, *leaves[1:])
        assert gradient[index].item() == pytest.approx(rise.item() * 2.0 / 2e-6, rel=1e-5, abs=1e-9)
    for value in (log_probs(*leaves)[0].square().sum(), loss(*leaves).square()):
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(value, leaves[0], create_graph=True)


def test_kept_logits_serve_several_backwards():
    hidden, weight, _, labels, advantages = inputs()
    for scored in (labels, labels.clamp(min=0)):
        leaves = hidden[0].clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = linear_token_logprobs(*leaves, scored).logprobs
        first = torch.autograd.grad(logprobs, leaves, advantages, retain_graph=True)
        second = torch.autograd.grad(logprobs, leaves, advantages)
        for a, b in zip(first, second, strict=True):
            oracle.assert_same_bits(a, b)


def test_a_kept_graph_keeps_the_gradients_of_its_loss():
    """A graph's last backward gives them away, scaled where they are; earlier ones must not."""
    hidden, weight, _, labels, advantages = inputs()
    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(
        linear_contrastive_policy_loss(*hidden, leaf, labels, advantages).loss, leaf, torch.tensor(3.0)
    )
    loss = linear_contrastive_policy_loss(*hidden, leaf, labels, advantages).loss
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
        oracle.assert_same_bits(found, want)
        found.zero_()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("_chunks")
def test_sixteen_bit_logits_are_those_of_a_plain_linear_layer(frozen):
    hidden, weight, bias, labels, advantages = inputs(torch.bfloat16)
    options = {"lm_head_bias": bias, "logits_dtype": torch.bfloat16, "entropy_coef": 0.02}

    def ours(policy, weight, bias):
        shared = {**options, "lm_head_bias": bias}
        return linear_contrastive_policy_loss(policy, *hidden[1:], weight, labels, advantages, **shared).loss

    def plain(policy, weight, bias):
        logits = [F.linear(x, weight) + bias for x in (policy, *hidden[1:])]
        return cepo_kernels.contrastive_policy_loss(*logits, labels, advantages, entropy_coef=0.02).loss

    got, want = (gradients(run, hidden[0], weight, bias, frozen) for run in (ours, plain))
    compare(got, want, torch.bfloat16)
    logits = F.linear(hidden[0], weight)
    out = linear_token_logprobs(hidden[0], weight, labels, logits_dtype=torch.bfloat16)
    exact = cepo_kernels.token_logprobs(logits_of(hidden[0], weight, None), labels).logprobs
    torch.testing.assert_close(out.logprobs, cepo_kernels.token_logprobs(logits, labels).logprobs)
    assert (out.logprobs - exact).abs().max() <= 2 * 2**-9 * logits.abs().max()

    def both(policy, weight, bias):
        out = linear_token_logprobs(policy, weight, labels, lm_head_bias=bias, logits_dtype=torch.bfloat16)
        return (out.logprobs * advantages).sum()

    def both_plain(policy, weight, bias):
        return (cepo_kernels.token_logprobs(F.linear(policy, weight) + bias, labels).logprobs * advantages).sum()

    compare(*(gradients(run, hidden[0], weight, bias, frozen) for run in (both, both_plain)), torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "frozen", "bias"),
    [(torch.float32, False, True), (torch.bfloat16, True, False), (torch.float16, True, True)],
    ids=str,
)  # fmt: skip
def test_the_ops_are_registered_as_torch_wants_them(dtype, frozen, bias):
    hidden, weight, bias, labels, advantages = inputs(dtype, bias, (5,))
    policy = hidden[0].clone().requires_grad_()
    for tensor in (weight, bias):
        tensor is None or tensor.requires_grad_(not frozen)
    needs = [True, not frozen, not frozen and bias is not None]
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.5)]
    options = [torch.tensor(1.0, dtype=torch.float64)] * 2
    torch.library.opcheck(
        torch.ops.cepo_kernels.linear_forward.default,
        (policy, hidden[1], hidden[2], weight, bias, labels, advantages, None, *numbers, *options, None, -100, True,
         "slopes" if frozen else "logits", None, "auto"),
    )  # fmt: skip
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    with torch.no_grad():
        *values, logits, _ = torch.ops.cepo_kernels.linear_forward.default(
            policy, None, None, weight, bias, labels, None, None, *numbers, *options, None, -100, True, "logits", None,
            "auto",
        )  # fmt: skip
    for kept in (None, logits):
        torch.library.opcheck(
            torch.ops.cepo_kernels.linear_grad.default,
            (policy.detach(), weight.detach(), None if bias is None else bias.detach(), labels, torch.ones(5), None,
             values[0], values[6], values[7], kept, *options, None, -100, needs, None, "auto"),
            test_utils=checks,
        )  # fmt: skip
    # An eager last backward overwrites the gradients among the outputs, in float16 by another factor than 1.
    aot = ["test_aot_dispatch_dynamic"] * (dtype != torch.float16)
    more = [torch.tensor(value, dtype=torch.float64) for value in (0.2, 0.28, 0.0, 0.0, 4.0)]
    torch.library.opcheck(
        torch.ops.cepo_kernels.linear_policy_loss.default,
        (policy, hidden[1], hidden[2], weight, bias, labels, advantages, None, None, None, None, *numbers, *more,
         *options, None, -100, "ppo", False, needs, None, "auto"),
        test_utils=[*checks, *aot],
    )  # fmt: skip
