"""The CUDA kernels, thread by thread on a CPU: float64's results, and one row's bits whichever kernel computes it.

`cuda_emulated` as a plugin runs the suite that all backends share on them, too.
"""

from __future__ import annotations

import itertools
import mmap

import cuda_emulated
import oracle
import pytest
import test_policy_loss
import torch

import cepo_kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(cuda_emulated.missing() is not None, reason=str(cuda_emulated.missing())),
]

INF, NAN = float("inf"), float("nan")
CHUNK = {torch.float32: 4096, torch.bfloat16: 8192, torch.float16: 8192}  # columns that all lanes take at once
KERNELS = ["streaming", "cluster2", "cluster4", "cluster8"]
RESULTS = ("loss", "ratio", "clipped", "gradient")


@pytest.fixture(scope="module", autouse=True)
def emulated():
    """The backends by name, and the module itself."""
    with cuda_emulated.registered():
        yield cuda_emulated.module()


@pytest.fixture(params=["forward", "reverse", "random"])
def order(request, emulated):
    """The order in which threads go on, for the time of a test."""
    emulated.order(cuda_emulated.ORDERS[request.param], 7)
    yield request.param
    emulated.order(0, 0)


def rows(count, vocabulary, seed, dtype=torch.float32, spread=3.0):
    return oracle.logits_like((count, vocabulary), seed, dtype, spread)


def check(policy, positive, negative, labels, advantages=None, upstream=(0.7, -0.3), **options):
    """Every output, and the gradient, against float64."""
    got = oracle.run("emulated", policy, positive, negative, labels, advantages, **options)
    oracle.assert_forward(got, oracle.contrastive(policy, positive, negative, labels, advantages, **options))
    for unused in ("negative_mask", "lam", "eps_w"):
        options.pop(unused, None)
    gradient = oracle.gradient_of("emulated", policy, labels, *upstream, **options)
    oracle.assert_gradient(gradient, oracle.logits_gradient(policy, labels, *upstream, **options), policy.dtype)
    return got


def loss(kernel, policy, positive, negative, labels, advantages, values=False, in_place=False, **options):
    """`contrastive_policy_loss` by one kernel, everything it returns by name."""
    cuda_emulated.KNOWN["emulated:one"] = cuda_emulated.Emulated(kernel, values)
    leaf = policy.detach().requires_grad_()
    got = cepo_kernels.contrastive_policy_loss(
        _in_its_place(leaf) if in_place else leaf, positive, negative, labels, advantages, inplace_grad=in_place,
        backend="emulated:one", **options,
    )  # fmt: skip
    got.loss.backward()
    credit = {name: value for name, value in got.credit._asdict().items() if value is not None}
    return {"loss": got.loss, "ratio": got.ratio, "clipped": got.clipped.float(), "gradient": leaf.grad, **credit}


def _in_its_place(leaf):
    """A copy with the strides and start of ``leaf``."""
    whole = leaf.detach().new_empty(leaf.untyped_storage().nbytes() // leaf.element_size())
    view = whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
    return view.copy_(leaf)


def assert_same(got, want, names=()):
    for name in names or want:
        oracle.assert_same_bits(got[name].detach(), want[name].detach(), name)


def as_float(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def case(vocabulary, dtype, count=6):
    tensors = [rows(count, vocabulary, seed, dtype) for seed in (1, 2, 3)]
    labels = oracle.labels_like((count,), vocabulary, 4)
    labels[1] = -100
    return (*tensors, labels, torch.tensor([1.0, 2.0, -1.0, 0.0, 0.5, -0.25])[:count])


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("more", [1, 8, 1000])
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_any_vocabulary_and_dtype(chunks, more, dtype):
    vocabulary = min(chunks * CHUNK[dtype], 16384) + more
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2, -100])
    logits = [rows(4, vocabulary, seed, dtype) for seed in (1, 2, 3)]
    check(*logits, labels, torch.tensor([1.0, -1.0, 0.0, 2.0]), lam=0.3, eps_w=0.9)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(oracle.NATIVE)), ids=str)
def test_dtypes_may_differ(dtypes):
    logits = [rows(3, 700, seed, dtype) for seed, dtype in enumerate(dtypes)]
    check(*logits, oracle.labels_like((3,), 700, 1), torch.ones(3))


@pytest.mark.parametrize("options", [
    {"logit_softcap": 5.0, "logit_scale": 1.5},
    {"temperature": torch.tensor([0.5, 1.0, 3.0, 0.1])},
    {"logit_softcap": 10.0, "temperature": torch.tensor([0.5, 1.0, 3.0, 2.0])},
], ids=["cap", "temperatures", "both"])  # fmt: skip
@pytest.mark.parametrize("vocabulary", [1003, 9001])
def test_options(options, vocabulary):
    logits = [rows(4, vocabulary, seed, torch.bfloat16, 6.0) for seed in (1, 2, 3)]
    check(*logits, oracle.labels_like((4,), vocabulary, 4), torch.ones(4), **options)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("softcap", [None, 7.0])
def test_edge_rows(dtype, softcap):
    logits = rows(8, 9000, 1, dtype)
    labels = torch.full((8,), 8999)
    logits[0, 4500] = NAN
    logits[1, 8500] = INF if softcap is None else 0.0  # the cap must not hide it: see the suite of all backends
    logits[2] = -INF
    logits[3, :8999] = -INF
    logits[4] = torch.finfo(dtype).min
    logits[5, 77] = 30000.0  # one column holds all that the label does not
    logits[6, ::2] = -INF
    logits[7] *= 1000.0
    options = {} if softcap is None else {"logit_softcap": softcap}
    check(logits, None, None, labels, **options)
    check(logits, logits.flip(0), logits.roll(3, 0), labels, torch.ones(8), upstream=(1.0, None), **options)


def test_exponents_beyond_float32_take_the_slow_way():
    logits = rows(5, 9000, 1)
    logits[0] *= 1e30
    logits[1, 3] = 3e38
    logits[2] = -3e38
    logits[3, 5000] = 2e38
    logits[3, 8000] = NAN
    check(logits, None, None, torch.tensor([5, 6, 7, 8, 9]), upstream=(1.0, None))


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_a_row_has_its_bits_at_any_alignment(dtype):
    vocabulary = CHUNK[dtype] + 1005
    apart = torch.full((5 * (vocabulary + 64),), NAN, dtype=dtype)
    want = rows(1, vocabulary, 1, dtype)
    labels = torch.tensor([17])
    first = oracle.run("emulated", want, want, None, labels, torch.ones(1))
    first_gradient = oracle.gradient_of("emulated", want, labels, 1.0, 0.5)
    for shift in (1, 2, 3, 4, 5, 6, 7, 16 // apart.element_size()):
        moved = apart[64 + shift : 64 + shift + vocabulary].view(1, -1)
        moved.copy_(want)
        got = oracle.run("emulated", moved, moved, None, labels, torch.ones(1))
        for name in ("logprobs", "entropy", "evidence"):
            oracle.assert_same_bits(getattr(got, name), getattr(first, name), f"{name}, shift {shift}")
        # the gradient, too, is written there
        found = cuda_emulated.raw_forward(moved, None, None, labels, None)
        values = cuda_emulated.raw_backward(moved, labels, 1.0, 0.5, found, moved)
        oracle.assert_same_bits(values, first_gradient, f"gradient, shift {shift}")


@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_every_kernel_has_the_same_bits(dtype, order):
    tensors = case(CHUNK[dtype] * 2 + 808, dtype)
    options = {"return_entropy": True, "entropy_coef": 0.02, "kl_coef": 0.1, "old_logprobs": torch.full((6,), -8.0)}
    options["ref_logprobs"] = torch.full((6,), -7.0)
    want = loss("streaming", *tensors, **options)
    for kernel in ("cluster2", "cluster4", "cluster8"):
        assert_same(loss(kernel, *tensors, **options), want)
    assert_same(loss("cluster4", *tensors, in_place=True, **options), want, RESULTS)
    plain = oracle.run("emulated", *tensors)
    for name in ("logprobs", "positive_logprobs", "negative_logprobs"):
        live = [0, 2, 4, 5]
        oracle.assert_same_bits(want[name].detach()[live], getattr(plain, name)[live], name)


@pytest.mark.parametrize("kernel", ["streaming", "cluster4"])
@pytest.mark.parametrize("surrogate", test_policy_loss.SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_the_formula(kernel, surrogate, dtype):
    tensors, rows = test_policy_loss.inputs(dtype, 1000)
    options = {"surrogate": surrogate, "kl_coef": 0.3, "entropy_coef": -0.05, **rows}
    want, ratio, clipped, gradient = test_policy_loss.expected(tensors, **options)
    got = loss(kernel, *tensors, **options)
    assert got["loss"].item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    oracle.assert_close(got["ratio"], ratio, 1e-5, name="ratio")
    assert got["clipped"].tolist() == clipped.tolist()
    oracle.assert_gradient(got["gradient"], gradient, dtype, 3e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 9.0}, {"surrogate": "cispo", "entropy_coef": 0.3}],
                         ids=str)  # fmt: skip
def test_a_loss_whose_numbers_are_on_the_device_has_the_same_bits(kernel, options):
    tensors = case(1000, torch.bfloat16)
    assert_same(loss(kernel, *tensors, values=True, **options), loss(kernel, *tensors, **options))


@pytest.mark.parametrize("kernel", KERNELS)
def test_broken_and_huge_rows_in_a_loss(kernel, order):
    tensors = case(5000, torch.float32)
    clean = loss(kernel, *tensors)
    policy, positive = tensors[0].clone(), tensors[1].clone()
    policy[0, 4999] = NAN
    policy[2] *= 1e31
    positive[4, 7] = INF
    got = loss(kernel, policy, positive, *tensors[2:], in_place=True)
    for row in (0, 4):
        assert torch.isnan(got["gradient"][row]).all()
    assert torch.isfinite(got["gradient"][2]).all()
    for row in (1, 3):
        assert (got["gradient"][row] == 0).all()
    oracle.assert_same_bits(got["gradient"][5], clean["gradient"][5], "gradient")
    oracle.assert_same_bits(got["ratio"][5], clean["ratio"][5], "ratio")
    oracle.assert_same_bits(
        got["gradient"], loss("streaming", policy, positive, *tensors[2:])["gradient"], "the kernels"
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_label_that_is_no_column_makes_its_row_nan(kernel):
    policy, positive, negative, labels, advantages = case(1000, torch.float16)
    for wrong in (1000, -1, 2**40):
        labels[2] = wrong
        outputs = cuda_emulated.raw_loss(cuda_emulated.Emulated(kernel), policy, positive, negative, labels, advantages)
        for name, value in outputs.items():
            bad = torch.isnan(value.float()).reshape(6, -1).all(dim=1)
            assert bad.tolist() == [False, False, name != "clipped", False, False, False], name


def test_a_cluster_is_refused_where_rows_do_not_start_at_16_bytes():
    with pytest.raises(RuntimeError, match="invalid argument"):
        loss("cluster", *case(1001, torch.bfloat16))
    with pytest.raises(ValueError, match="cluster4"):
        loss("fastest", *case(1000, torch.bfloat16))
    assert_same(loss("auto", *case(1001, torch.bfloat16)), loss("streaming", *case(1001, torch.bfloat16)))


@pytest.mark.parametrize(("shape", "strides", "start"), [((6, 1), (1008, 0), 4), ((6, 1), (1012, 0), 0),
                                                         ((3, 2), (2 * 1008 + 4, 1008), 0), ((2, 3), (4096, 1012), 0)],
                         ids=["start", "rows", "outer", "inner"])  # fmt: skip
def test_a_cluster_is_refused_where_a_view_starts_elsewhere(shape, strides, start):
    """Rows are whole 16 bytes, so that nothing but where they start, or how far apart, is in the way."""
    policy, positive, negative, labels, advantages = case(1000, torch.bfloat16)
    memory = torch.zeros(16384, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    view = memory.as_strided((*shape, 1000), (*strides, 1), start).copy_(policy.view(*shape, 1000))
    tensors = [view, *(x.view(*shape, *x.shape[1:]) for x in (positive, negative, labels, advantages))]
    for kernel in ("cluster", "cluster4"):
        with pytest.raises(RuntimeError, match="invalid argument"):
            loss(kernel, *tensors, in_place=True)
    got, want = loss("auto", *tensors, in_place=True), loss("streaming", policy, positive, negative, labels, advantages)
    for name in RESULTS:
        oracle.assert_same_bits(got[name].detach().reshape(want[name].shape), want[name].detach(), name)


@pytest.mark.parametrize("kernel", ["streaming", "cluster4"])
def test_rows_lie_beyond_2_to_the_31_columns(kernel):
    """Four GiB, of which the rows alone are ever touched."""
    tensors = case(1000, torch.bfloat16, 2)
    backend, apart = cuda_emulated.Emulated(kernel), 2**31 + 64
    whole = mmap.mmap(-1, 2 * apart + 2**16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(whole, dtype=torch.bfloat16)
    far = [memory.as_strided((2, 1000), (apart, 1), 1024 * i).copy_(x) for i, x in enumerate(tensors[:3])]
    labels, advantages = torch.tensor([5, 999]), torch.ones(2)
    found, want = (cuda_emulated.raw_forward(*x, labels, advantages) for x in (far, tensors[:3]))
    for name, value in want._asdict().items():
        oracle.assert_same_bits(getattr(found, name), value, name)
    want_loss = cuda_emulated.raw_loss(backend, *tensors[:3], labels, advantages)
    want_gradient = cuda_emulated.raw_backward(tensors[0], labels, 0.7, 0.1, want, torch.empty_like(tensors[0]))
    gradient = memory.as_strided((2, 1000), (apart, 1), 1024 * 3)
    gradient = cuda_emulated.raw_backward(far[0], labels, 0.7, 0.1, found, gradient)
    oracle.assert_same_bits(gradient, want_gradient, "gradient")
    got_loss = cuda_emulated.raw_loss(backend, *far, labels, advantages, far[0])
    oracle.assert_same_bits(far[0], want_loss["gradient"][0], "gradient of the loss")
    oracle.assert_same_bits(got_loss["losses"], want_loss["losses"], "losses")


@pytest.mark.parametrize(("shared_limit", "fits"), [(0, False), (8 * 1024, False), (20 * 1024, True)])
def test_a_cluster_needs_the_devices_shared_memory(shared_limit, fits):
    tensors = case(20_000, torch.float32)  # 80 KB, in chunks of 16
    backend = cuda_emulated.Emulated("cluster", shared_limit=shared_limit)
    run = lambda: cuda_emulated.raw_loss(backend, *tensors)  # noqa: E731
    if fits:
        assert_same(as_float(run()), as_float(cuda_emulated.raw_loss(cuda_emulated.Emulated(), *tensors)))
    else:
        with pytest.raises(RuntimeError, match="invalid argument"):
            run()


def test_the_bandwidth_kernels(emulated):
    data = [torch.randint(-(2**31), 2**31, (40_000,), dtype=torch.int32) for _ in range(3)]
    out = torch.zeros(40_000, dtype=torch.int32)
    emulated.stream31(*(tensor.data_ptr() for tensor in (*data, out)), out.nbytes, 0)
    assert torch.equal(out, data[0] ^ data[1] ^ data[2])
    emulated.plain_read(out.data_ptr(), out.nbytes, torch.zeros(1).data_ptr(), 0)


@pytest.mark.parametrize("dtype", oracle.NATIVE)
@pytest.mark.parametrize("factor", [1.0, -3.0, 65536.0, NAN])
@pytest.mark.parametrize("size", [1, 7, 8, 4099])
def test_rescaling_is_a_product_and_at_one_nothing(dtype, factor, size):
    gradient = rows(1, size, 1, dtype)[0].clone()
    want = (gradient.float() * factor).to(dtype)
    cuda_emulated.Emulated().rescale(gradient, torch.tensor(factor))
    assert torch.equal(gradient.isnan(), want.isnan())
    oracle.assert_same_bits(gradient.nan_to_num(), want.nan_to_num())
