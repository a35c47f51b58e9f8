"""What only a GPU can show: no waiting for the device, graphs, streams, large tensors, memory."""

from __future__ import annotations

import oracle
import pytest
import torch

import cepo_kernels
from cepo_kernels import backends

pytestmark = pytest.mark.gpu

ROWS, VOCABULARY = 24, 20_001


@pytest.fixture(params=["triton", "cuda", "cuda:streaming", "cuda:cluster"])
def name(request):
    reason = backends.unavailable(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def inputs(vocabulary=VOCABULARY, dtype=torch.bfloat16):
    logits = [oracle.logits_like((ROWS, vocabulary), seed, dtype).cuda() for seed in (1, 2, 3)]
    return *logits, oracle.labels_like((ROWS,), vocabulary, 4, 0.2).cuda(), oracle.logits_like((ROWS,), 5).cuda()


def fused(name, policy, *rest, **options):
    """Loss and gradient."""
    leaf = policy.detach().requires_grad_()
    out = cepo_kernels.contrastive_policy_loss(leaf, *rest, backend=name, **options)
    out.loss.backward()
    return out.loss.detach(), leaf.grad


def test_nothing_waits_for_the_device(name):
    arguments = inputs()
    numbers = {"lam": torch.tensor(0.3, device="cuda"), "temperature": torch.tensor(0.8, device="cuda")}
    fused(name, *arguments, **numbers)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(name, *arguments, **numbers)
        cepo_kernels.contrastive_logprobs(*arguments, backend=name, **numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_records_the_call(name):
    arguments = inputs()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            cepo_kernels.contrastive_logprobs(*arguments, return_entropy=True, backend=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        recorded = cepo_kernels.contrastive_logprobs(*arguments, return_entropy=True, backend=name)
    arguments[0].copy_(arguments[0].flip(0))
    graph.replay()
    with torch.no_grad():
        want = cepo_kernels.contrastive_logprobs(*arguments, return_entropy=True, backend=name)
    for value, expected in zip(recorded, want, strict=True):
        oracle.assert_same_bits(value, expected)


def test_work_goes_to_the_callers_stream(name):
    arguments = inputs()
    want = fused(name, *arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [x.clone() for x in arguments]
        got = fused(name, *late)
    stream.synchronize()
    for value, expected in zip(got, want, strict=True):
        oracle.assert_same_bits(value, expected)


@pytest.mark.parametrize("vocabulary", [32_000, 151_936, 262_144])
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_streaming_and_clusters_agree_bit_for_bit(dtype, vocabulary):
    if backends.unavailable("cuda:cluster", "cuda") is not None:
        pytest.skip("needs clusters")
    arguments = inputs(vocabulary, dtype)
    results = [fused(f"cuda:{kernel}", *arguments) for kernel in ("streaming", "cluster")]
    for value, expected in zip(*results, strict=True):
        oracle.assert_same_bits(value, expected)


def test_more_than_two_to_the_31_elements(name):
    vocabulary = 131_072
    rows = 2**31 // vocabulary + 8
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-8:] = oracle.logits_like((8, vocabulary), 1, torch.bfloat16).cuda()
    labels = torch.arange(rows, device="cuda") % vocabulary
    with torch.no_grad():
        whole = cepo_kernels.token_logprobs(logits, labels, backend=name).logprobs[-8:]
        few = cepo_kernels.token_logprobs(logits[-8:], labels[-8:], backend=name).logprobs
    oracle.assert_same_bits(whole, few)


def test_memory_beyond_the_inputs(name):
    """In place nothing of the size of the vocabulary is allocated."""
    arguments = inputs(151_936)
    leaf = arguments[0].detach().requires_grad_()
    fed = leaf * 1.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = cepo_kernels.contrastive_policy_loss(fed, *arguments[1:], inplace_grad=True, backend=name)
    torch.autograd.grad(out.loss, fed)
    assert torch.cuda.max_memory_allocated() - before < fed.nbytes / 20


DIVERGENCES = [{}, {"kind": "jsd", "beta": 0.3, "clip": 0.05}, {"kind": "reverse_kl", "top_k": 50}]


@pytest.mark.parametrize("how", DIVERGENCES, ids=str)
def test_a_divergence_waits_for_nothing_and_a_graph_records_it(name, how):
    student, teacher, *_ = inputs()
    options = {"temperature": torch.tensor(0.8, device="cuda"), "backend": name, **how}

    def step():
        leaf = student.detach().requires_grad_()
        values = cepo_kernels.divergence(leaf, teacher, **options)
        values.sum().backward()
        return values.detach(), leaf.grad

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        recorded = cepo_kernels.divergence(student, teacher, **options)
    student.copy_(student.flip(0))
    graph.replay()
    oracle.assert_same_bits(recorded, step()[0])


@pytest.mark.parametrize("how", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", oracle.NATIVE)
def test_a_divergence_of_long_rows_is_the_references(name, dtype, how):
    """What the suite of all backends has no time for."""
    student, teacher = (x[:4] for x in inputs(151_936, dtype)[:2])
    found = []
    for backend in (name, "reference"):
        leaf = student.detach().requires_grad_()
        values = cepo_kernels.divergence(leaf, teacher, backend=backend, **how)
        values.sum().backward()
        found.append((values.detach(), leaf.grad.float()))
    (values, gradient), (want, want_gradient) = found
    torch.testing.assert_close(values, want, rtol=1e-5, atol=2e-6 if "clip" in how else 1e-9)
    scale = want_gradient.abs().amax(1, keepdim=True)
    assert ((gradient - want_gradient).abs() <= (1e-4 + torch.finfo(dtype).eps) * scale).all()


def test_a_divergence_of_more_than_two_to_the_31_elements(name):
    vocabulary = 131_072
    rows = 2**31 // vocabulary + 8
    student = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    student[-8:] = oracle.logits_like((8, vocabulary), 1, torch.bfloat16).cuda()
    teacher = oracle.logits_like((1, vocabulary), 2, torch.bfloat16).cuda().expand(rows, -1)
    whole = cepo_kernels.divergence(student, teacher, backend=name)[-8:]
    oracle.assert_same_bits(whole, cepo_kernels.divergence(student[-8:], teacher[-8:], backend=name))


def test_a_divergence_in_place_allocates_nothing_of_the_size_of_the_logits(name):
    student, teacher, *_ = inputs(151_936)
    fed = student.requires_grad_() * 1.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = cepo_kernels.divergence(fed, teacher, inplace_grad=True, backend=name)
    torch.autograd.grad(values.sum(), fed)
    assert torch.cuda.max_memory_allocated() - before < fed.nbytes / 20
