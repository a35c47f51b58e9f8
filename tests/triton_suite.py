"""What the Triton backend promises, on shapes small enough for Triton's interpreter.

`test_triton` runs it in a process of its own, as one process either interprets kernels or compiles them. The suite that
all backends share runs through the interpreter too, in some twenty minutes:

    TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p interpreter_rounding -k triton tests
"""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch

import cepo_kernels
from cepo_kernels import backends
from cepo_kernels.backends import triton as backend
from cepo_kernels.rows import BackwardInputs, ForwardInputs, ForwardOutputs, LossInputs, LossOutputs, RowOptions

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = oracle.device_of("triton")
INF, NAN = float("inf"), float("nan")
STEP = 8 * 512  # columns of one iteration at the largest block
NAMES = cepo_kernels.ContrastiveLogprobs._fields


def rows(count, vocabulary, seed, dtype=torch.float32, spread=3.0, offset=0.0):
    return oracle.logits_like((count, vocabulary), seed, dtype, spread, offset)


def check(policy, positive, negative, labels, advantages=None, gradient=(0.7, -0.3), **options):
    """Every output, and the gradient, against float64."""
    got = oracle.run("triton", policy, positive, negative, labels, advantages, **options)
    oracle.assert_forward(got, oracle.contrastive(policy, positive, negative, labels, advantages, **options))
    for unused in ("negative_mask", "lam", "eps_w"):
        options.pop(unused, None)
    got_gradient = oracle.gradient_of("triton", policy, labels, *gradient, **options)
    want = oracle.logits_gradient(policy, labels, *gradient, **options)
    oracle.assert_gradient(got_gradient, want, policy.dtype)
    return got


@pytest.mark.parametrize("vocabulary", [1, 2, 257, 1000, STEP, STEP + 1, 2 * STEP + 513])
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_any_vocabulary_and_dtype(vocabulary, dtype):
    logits = [rows(5, vocabulary, seed, dtype) for seed in (1, 2, 3)]
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2, -100, min(512, vocabulary - 1)])
    check(*logits, labels, torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5]), lam=0.3, eps_w=0.9)


@pytest.mark.parametrize("dtypes", itertools.permutations(oracle.NATIVE), ids=str)
def test_dtypes_may_differ(dtypes):
    logits = [rows(4, 700, seed, dtype) for seed, dtype in enumerate(dtypes)]
    check(*logits, oracle.labels_like((4,), 700, 1), torch.ones(4))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": torch.tensor([0.5, 1.0, 7.0, 0.9], dtype=torch.bfloat16)},
        {"temperature": torch.tensor([0.5, 1.0, 7.0, 0.9], dtype=torch.float64), "logit_scale": 0.25},
        {"logit_softcap": 30.0, "temperature": 0.6},
        {"logit_softcap": 5.0, "logit_scale": 3.0, "temperature": torch.tensor([0.5, 1.0, 7.0, 0.9])},
        {"ignore_index": 7},
        {"negative_mask": torch.tensor([True, False, True, False]), "lam": 1.0, "eps_w": 0.999},
    ],
    ids=str,
)
def test_options(options):
    logits = [rows(4, 5000, seed, spread=spread) for seed, spread in ((1, 3.0), (2, 8.0), (3, 1.0))]
    labels = torch.tensor([7, 4999, 4096, int(logits[0][3].argmax())])
    check(*logits, labels, torch.tensor([1.0, -0.4, 1.0, -1.0]), **options)


@pytest.mark.parametrize("log_odds", [-69.0, -30.0, -10.0, -1e-3, 3.0, 30.0, 69.0])
def test_both_ends_of_a_probability(log_odds):
    logits, labels = rows(2, 6001, 1, spread=1.0), torch.tensor([17, 6000])
    others = logits.double().scatter(1, labels[:, None], -INF).logsumexp(1)
    logits.scatter_(1, labels[:, None], (others - log_odds).float()[:, None])
    check(logits, None, None, labels, gradient=(1.0, None))
    gradient = oracle.gradient_of("triton", logits, labels, 1.0).gather(1, labels[:, None])[:, 0]
    oracle.assert_close(gradient, -torch.expm1(torch.from_numpy(oracle.logprobs(logits, labels))).numpy(), 1e-5)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("spread", [3.0, 30.0])
def test_an_offset_changes_nothing(spread, offset):
    logits = rows(3, 5001, 1, spread=spread, offset=offset)
    check(logits, logits.flip(0), logits.bfloat16(), torch.tensor([0, 5000, int(logits[2].argmax())]), torch.ones(3))


@pytest.mark.parametrize("spread", [6.0, 12.0, 30.0])
def test_a_cap_keeps_the_bound_on_evidence(spread):
    """cap / T = 50 magnifies what tanh loses; worst where one column has most of the mass."""
    logits, labels = [rows(6, 900, seed, spread=spread) for seed in (1, 2, 3)], oracle.labels_like((6,), 900, 4)
    check(*logits, labels, torch.ones(6), logit_softcap=30.0, temperature=0.6)


def test_entropy_keeps_its_digits_where_another_column_has_all_the_mass():
    logits = rows(4, 5000, 1, spread=1.0)
    logits[:, 4321] = torch.tensor([20.0, 30.0, 45.0, 60.0])
    check(logits, None, None, torch.tensor([0, 1, 2, 3]), gradient=(None, 1.0))


@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_rows(order):
    logits = torch.linspace(-500.0 * order, 500.0 * order, 9001).repeat(3, 1)
    check(logits, None, None, torch.tensor([0, 4500, 9000]))


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_edge_rows(dtype, softcap):
    """NaN; +inf; +inf at the label; all -inf; -inf but at the label; -inf at the label; finfo.min; ordinary."""
    logits = rows(8, 4200, 1, dtype)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4199])
    logits[0, 4150], logits[1, 77], logits[2, 2] = NAN, INF, INF
    logits[3], logits[6] = -INF, torch.finfo(dtype).min
    logits[4, :4], logits[4, 5:], logits[5, 5] = -INF, -INF, -INF
    options = {} if softcap is None else {"logit_softcap": softcap}
    got = oracle.run("triton", logits, logits, rows(8, 4200, 2), labels, torch.ones(8), **options)
    broken = [True] * 4 + [False] * 4
    if softcap is None:
        check(logits, None, None, labels)
        assert torch.isnan(got.logprobs).tolist() == broken
        assert float(got.evidence[5]) == -INF
        assert float(got.entropy[4]) == 0
    else:  # a cap makes -inf a number, and +inf must not become one
        check(logits[3:], None, None, labels[3:], **options)
        assert torch.isnan(got.logprobs).tolist() == [True] * 3 + [False] * 5
    for upstreams in ((1.0, None), (None, 1.0)):
        gradient = oracle.gradient_of("triton", logits, labels, *upstreams, **options)
        assert torch.isnan(gradient).any(1).tolist() == torch.isnan(got.logprobs).tolist()


def test_two_impossible_teachers_carry_no_evidence():
    policy, teachers, labels = rows(2, 90, 1), rows(2, 90, 2), torch.tensor([3, 4])
    teachers[0, 3] = -INF
    got = oracle.run("triton", policy, teachers, teachers * 2, labels, torch.ones(2))
    assert float(got.evidence[0]) == 0
    assert float(got.weight[0]) == 1


def test_what_need_not_be_read_is_not():
    logits, labels = [rows(4, 300, seed) for seed in (1, 2, 3)], torch.tensor([5, -100, 7, 9])
    for tensor in logits:
        tensor[1] = NAN
    logits[2][3] = NAN
    mask = torch.tensor([True, True, True, False])
    got = check(*logits, labels, torch.tensor([1.0, NAN, 1.0, 1.0]), negative_mask=mask)
    for name in NAMES:
        assert float(getattr(got, name)[1]) == 0, name
    # A row on which nothing acts gets its zeros unread too.
    logits[0][2] = NAN
    gradient = oracle.gradient_of("triton", logits[0], labels, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.isnan(gradient).any(1).tolist() == [False] * 4
    assert (gradient[1:3] == 0).all()


@pytest.mark.parametrize("label", [-1, 500, 2**31 + 7, -(2**40)])
def test_a_label_outside_the_vocabulary_is_nan_and_reads_nothing(label):
    """As on a GPU, where the op cannot look at labels beforehand."""
    logits, labels = rows(2, 500, 1).to(DEVICE)[None], torch.tensor([3, label], device=DEVICE)
    one = torch.ones((), dtype=torch.float64)
    options = RowOptions(one, one, None, -100)

    def empty(*shape):
        return torch.empty(shape, device=DEVICE)

    outputs = ForwardOutputs(*(empty(2) for _ in range(7)), empty(2, 4))
    advantages = torch.ones(2, device=DEVICE)
    backend.forward(ForwardInputs(logits, logits, None, labels, advantages, None, one, one * 0.5, options), outputs)
    for name in ("logprobs", "positive_logprobs", "evidence", "weight", "advantages", "entropy"):
        assert torch.isnan(getattr(outputs, name)).tolist() == [False, True], name
    gradient = empty(1, 2, 500)
    saved = (outputs.logprobs, outputs.entropy, outputs.stats)
    backend.backward(BackwardInputs(gradient, logits, labels, torch.ones(2, device=DEVICE), None, *saved, options))
    assert torch.isnan(gradient[0]).all(1).tolist() == [False, True]


def test_a_row_has_its_bits_whatever_else_is_asked_for_and_wherever_it_lies():
    vocabulary = 4500
    logits = [rows(6, vocabulary, seed, torch.bfloat16) for seed in (1, 2, 3)]
    labels, advantages = oracle.labels_like((6,), vocabulary, 4), torch.ones(6)
    crowd = oracle.run("triton", *logits, labels, advantages)
    alone = oracle.run("triton", *(tensor[4:5] for tensor in logits), labels[4:5], advantages[4:5])
    for name in NAMES:
        oracle.assert_same_bits(getattr(alone, name)[0], getattr(crowd, name)[4], name)
    for positive, negative, entropy in ((None, None, False), (logits[1], None, True), (logits[1], logits[2], False)):
        got = oracle.run("triton", logits[0], positive, negative, labels, return_entropy=entropy)
        oracle.assert_same_bits(got.logprobs, crowd.logprobs, "logprobs")
    odd = torch.full((6 * (vocabulary + 3) + 1,), NAN, dtype=torch.bfloat16)
    moved = odd.as_strided((6, vocabulary), (vocabulary + 3, 1), 1).copy_(logits[0])
    oracle.assert_same_bits(oracle.run("triton", moved, None, None, labels).logprobs, crowd.logprobs, "logprobs")
    want = oracle.gradient_of("triton", logits[0], labels, 1.0, -0.5)
    oracle.assert_same_bits(oracle.gradient_of("triton", moved, labels, 1.0, -0.5), want, "gradient")


def test_leading_strides_are_taken_as_they_are():
    whole, teacher = oracle.logits_like((2, 4, 130), 1).to(DEVICE).requires_grad_(), oracle.logits_like((1, 1, 130), 2)
    labels = oracle.labels_like((2, 3), 130, 3)
    view, expanded = whole[:, :-1], teacher.expand(2, 3, 130)
    got = oracle.run("triton", view, expanded, None, labels, torch.ones(2, 1))
    oracle.assert_forward(got, oracle.contrastive(view, expanded, None, labels, torch.ones(2, 1)))
    got.logprobs.sum().backward()
    want = oracle.logits_gradient(view.detach(), labels, 1.0)
    oracle.assert_gradient(whole.grad[:, :-1].reshape(6, 130).cpu(), want, torch.float32)
    assert (whole.grad[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_the_gradient_may_be_written_over_the_logits(dtype):
    logits, labels = rows(4, 4300, 1, dtype), torch.tensor([0, 4299, -100, 5])
    want = oracle.gradient_of("triton", logits, labels, 0.5, 0.25)
    leaf = logits.clone().to(DEVICE).requires_grad_()
    source = leaf * 1
    out = oracle.run("triton", source, None, None, labels, inplace_grad=True)
    (0.5 * out.logprobs + 0.25 * out.entropy).sum().backward()
    oracle.assert_same_bits(leaf.grad, want, "gradient")
    oracle.assert_same_bits(source.detach(), want, "the logits' own memory")


def test_options_that_live_on_the_device_give_the_same_bits():
    """`_values` is asked directly: on the CPU no option looks as if it lived elsewhere."""
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (1.5, 20.0, 0.8, 0.3, 0.2)]
    values, numbers = backend._values([*scalars[:4], scalars[4].to(DEVICE)], torch.device(DEVICE))
    if DEVICE == "cpu":
        assert values is None
        assert numbers == [1.5, 20.0, 0.8, 0.3, 0.2]
        values = torch.stack(scalars)
    logits = [rows(3, 700, seed).to(DEVICE) for seed in (1, 2, 3)]
    labels, advantages = torch.tensor([1, 2, 3]), torch.tensor([1.0, -1.0, 0.5])
    options = {"logit_scale": 1.5, "logit_softcap": 20.0, "temperature": 0.8}
    want = oracle.run("triton", *logits, labels, advantages, lam=0.3, eps_w=0.2, **options)
    want_gradient = oracle.gradient_of("triton", logits[0], labels, 1.0, 0.5, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_values", lambda given, device: (values[: len(given)], [NAN] * len(given)))
        got = oracle.run("triton", *logits, labels, advantages, lam=0.3, eps_w=0.2, **options)
        got_gradient = oracle.gradient_of("triton", logits[0], labels, 1.0, 0.5, **options)
    for name in NAMES:
        oracle.assert_same_bits(getattr(got, name), getattr(want, name), name)
    oracle.assert_same_bits(got_gradient, want_gradient, "gradient")


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
def test_a_loss_whose_numbers_live_on_the_device_has_the_same_bits(surrogate):
    """As on a GPU, where the default denominator is counted there."""
    logits, labels = [rows(4, 700, seed) for seed in (1, 2, 3)], torch.tensor([1, 2, -100, 3])
    advantages, near = torch.tensor([1.0, -1.0, 0.5, 0.0]), torch.full((4,), -7.0)
    options = {"lam": 0.3, "eps_w": 0.2, "logit_scale": 1.5, "logit_softcap": 20.0, "temperature": 0.8,
               "clip_low": 0.1, "clip_high": 0.4, "kl_coef": 0.2, "entropy_coef": 0.03,
               "surrogate": surrogate, "old_logprobs": near, "ref_logprobs": near + 0.5}  # fmt: skip

    def run():
        leaf = oracle.place("triton", logits[0]).requires_grad_()
        others = [oracle.place("triton", x) for x in (*logits[1:], labels, advantages)]
        given = {name: oracle.place("triton", x) for name, x in options.items()}
        out = cepo_kernels.contrastive_policy_loss(leaf, *others, backend="triton", **given)
        out.loss.backward()
        return {"loss": out.loss, "ratio": out.ratio, "clipped": out.clipped.float(), "gradient": leaf.grad}

    def on_the_host(scalars, device):
        return None, [float(x) for x in scalars]

    def on_the_device(scalars, device):
        return torch.tensor([float(x) for x in scalars], dtype=torch.float64, device=device), [NAN] * len(scalars)

    results = []
    for numbers in (on_the_host, on_the_device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "_values", numbers)
            results.append(run())
    for name, want in results[0].items():
        oracle.assert_same_bits(results[1][name], want, name)


@pytest.mark.parametrize("label", [-1, 500, 2**31 + 7, -(2**40)])
def test_a_label_outside_the_vocabulary_makes_its_row_of_a_loss_nan(label):
    logits, labels = rows(2, 500, 1).to(DEVICE)[None], torch.tensor([3, label], device=DEVICE)
    one = torch.ones((), dtype=torch.float64)

    def empty(*shape):
        return torch.empty(shape, device=DEVICE)

    options = RowOptions(one, one, None, -100)
    given = ForwardInputs(logits, logits, None, labels, torch.ones(2, device=DEVICE), None, one, one * 0.5, options)
    made = ForwardOutputs(*(empty(2) for _ in range(7)), empty(0))
    clipped = torch.empty(2, dtype=torch.bool, device=DEVICE)
    outputs = LossOutputs(made, empty(2), empty(2), clipped, empty(1, 2, 500))
    backend.policy_loss(LossInputs(given, None, None, None, "ppo", (one, one, 0 * one, 0 * one, one)), outputs)
    for name in ("losses", "ratio"):
        assert torch.isnan(getattr(outputs, name)).tolist() == [False, True], name
    assert torch.isnan(made.logprobs).tolist() == [False, True]
    assert torch.isnan(outputs.gradient[0]).all(1).tolist() == [False, True]


def test_auto_never_interprets():
    assert "triton" not in backends.preference("cpu", torch.bfloat16)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("factor", [1.0, -3.0, 65536.0, NAN])
def test_rescaling_is_a_product_and_at_one_nothing(dtype, factor):
    gradient = rows(3, 5001, 1, dtype)
    want = (gradient.float() * factor).to(dtype)
    gradient = gradient.to(DEVICE)
    backend.rescale(gradient, torch.tensor(factor, device=DEVICE))
    gradient = gradient.cpu()
    assert torch.equal(gradient.isnan(), want.isnan())
    oracle.assert_same_bits(gradient.nan_to_num(), want.nan_to_num())
