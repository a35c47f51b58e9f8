"""Edge rows: what the contract says of every row that is not an ordinary one."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

import cepo_kernels

BLOCK_EDGES = [0, 1, 7, 8, 15, 16, 63, 64, 1023, 1024, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 12287, 12288]
INF, NAN = float("inf"), float("nan")


def check(backend, logits, labels, **options):
    """All of one tensor's results, and its gradients, against float64."""
    got = oracle.run(backend, logits, None, None, labels, **options)
    oracle.assert_forward(got, oracle.contrastive(logits, None, None, labels, **options))
    for upstreams in ((1.0, None), (None, 1.0)):
        gradient = oracle.gradient_of(backend, logits, labels, *upstreams, **options)
        want = oracle.logits_gradient(logits, labels, *upstreams, **options)
        oracle.assert_gradient(gradient, want, logits.dtype)
    return got


@pytest.mark.usefixtures("poisoned")
class TestRows:
    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    def test_a_vocabulary_of_one_has_nothing_to_choose(self, backend, dtype):
        logits = torch.tensor([[-5.0], [0.0], [300.0], [torch.finfo(dtype).min]], dtype=dtype)
        labels = torch.zeros(4, dtype=torch.long)
        got = oracle.run(backend, logits, logits, logits, labels, torch.ones(4))
        for value in (got.logprobs, got.entropy, got.evidence):
            assert (value == 0).all()
        assert (got.weight == 1).all()
        assert (got.advantages == 1).all()
        for upstreams in ((1.0, None), (None, 1.0), (2.0, 3.0)):
            assert (oracle.gradient_of(backend, logits, labels, *upstreams) == 0).all()

    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("poison", [NAN, INF, "all -inf"])
    @pytest.mark.parametrize("vocabulary", [5, 4099, 12300])
    def test_a_row_without_a_distribution_is_nan_and_only_that_row(self, backend, poison, vocabulary, dtype):
        clean = oracle.logits_like((7, vocabulary), 1, dtype)
        labels = oracle.labels_like((7,), vocabulary, 2)
        labels[5] = vocabulary - 1
        places = {1: 0, 3: vocabulary // 2, 5: vocabulary - 1}  # in row 5 at the label
        logits = clean.clone()
        for row, column in places.items():
            if poison == "all -inf":
                logits[row] = -INF
            else:
                logits[row, column] = poison
        got, kept = check(backend, logits, labels), oracle.run(backend, clean, None, None, labels)
        good = torch.tensor([row not in places for row in range(7)])
        assert torch.isnan(got.logprobs.cpu()[~good]).all()
        assert torch.isnan(got.entropy.cpu()[~good]).all()
        oracle.assert_same_bits(got.logprobs.cpu()[good], kept.logprobs.cpu()[good], "logprobs")
        oracle.assert_same_bits(got.entropy.cpu()[good], kept.entropy.cpu()[good], "entropy")
        gradient = oracle.gradient_of(backend, logits, labels, 1.0)
        assert torch.isnan(gradient[~good]).all()
        oracle.assert_same_bits(gradient[good], oracle.gradient_of(backend, clean, labels, 1.0)[good], "gradient")

    @pytest.mark.parametrize("poison", [NAN, INF, "all -inf"])
    def test_a_teacher_row_without_a_distribution_spoils_its_own_evidence_only(self, backend, poison):
        policy, positive, negative = (oracle.logits_like((5, 4500), seed) for seed in (1, 2, 3))
        for row, teacher in ((1, positive), (3, negative)):
            teacher[row, 4400 if poison != "all -inf" else slice(None)] = poison if poison != "all -inf" else -INF
        labels, advantages = oracle.labels_like((5,), 4500, 4), torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0])
        got = oracle.run(backend, policy, positive, negative, labels, advantages)
        oracle.assert_forward(got, oracle.contrastive(policy, positive, negative, labels, advantages))
        assert torch.isfinite(got.logprobs).all()
        assert torch.isnan(got.evidence).tolist() == [False, True, False, True, False]
        assert float(got.advantages[3]) == 0  # A = 0: 0, whatever the evidence
        assert float(got.weight[3]) == 1

    @pytest.mark.parametrize("poison", [NAN, INF])
    def test_a_cap_does_not_hide_an_overflowed_logit(self, backend, poison):
        logits = oracle.logits_like((3, 300), 1)
        logits[1, 250] = poison
        got = oracle.run(backend, logits, None, None, torch.tensor([1, 2, 3]), logit_softcap=30.0)
        assert torch.isnan(got.logprobs).tolist() == [False, True, False]
        assert torch.isnan(got.entropy).tolist() == [False, True, False]

    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("fill", [-INF, "min"])
    @pytest.mark.parametrize("allowed", [(4500, 4501), (9000, 12300), (0, 3), (12299, 12300)])
    def test_masked_columns_add_nothing(self, backend, allowed, fill, dtype):
        """Whole blocks of -inf or of the most negative number, as a tokenizer's or grammar's mask leaves them."""
        logits = oracle.logits_like((4, 12300), 3, dtype)
        fill = torch.finfo(dtype).min if fill == "min" else fill
        outside = torch.ones(12300, dtype=torch.bool)
        outside[slice(*allowed)] = False
        logits[:, outside] = fill
        labels = torch.tensor([allowed[0], allowed[1] - 1, allowed[0], (allowed[1] + 5) % 12300])  # the last: masked
        got = check(backend, logits, labels)
        if dtype != torch.float16 and fill != -INF:
            assert got.logprobs[3] < -1e38
        if fill == -INF:
            assert got.logprobs[3] == -INF
            assert torch.isfinite(got.entropy).all()
        gradient = oracle.gradient_of(backend, logits, labels, None, 1.0)
        assert (gradient[:3, outside] == 0).all()

    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("temperature", [1.0, 0.5, torch.full((2,), 0.5)])
    def test_the_most_negative_number_is_a_number(self, backend, dtype, temperature):
        logits = torch.full((2, 5000), torch.finfo(dtype).min, dtype=dtype)
        labels = torch.tensor([0, 4999])
        got = oracle.run(backend, logits, None, None, labels, temperature=temperature)
        assert got.logprobs.tolist() == pytest.approx([-math.log(5000)] * 2, rel=1e-5)
        assert got.entropy.tolist() == pytest.approx([math.log(5000)] * 2, rel=1e-5)
        gradient = oracle.gradient_of(backend, logits, labels, 1.0, temperature=temperature)
        assert torch.isfinite(gradient).all()
        assert float(gradient[1, 4999]) > 0

    def test_impossible_labels_under_both_teachers_carry_no_evidence(self, backend):
        policy = oracle.logits_like((4, 60), 1)
        positive, negative = policy.clone(), policy.clone() + 1
        labels = torch.tensor([5, 6, 7, 8])
        positive[0, 5] = negative[0, 5] = -INF
        positive[1, 6] = -INF
        negative[2, 7] = -INF
        for sign in (1.0, -1.0):
            got = oracle.run(backend, policy, positive, negative, labels, torch.full((4,), sign), lam=1.0, eps_w=0.25)
            oracle.assert_forward(
                got, oracle.contrastive(policy, positive, negative, labels, torch.full((4,), sign), lam=1.0, eps_w=0.25)
            )
            assert got.evidence[:3].tolist() == [0.0, -INF, INF]
            assert got.weight[:3].tolist() == [1.0, 1 - sign * 0.25, 1 + sign * 0.25]

    @pytest.mark.parametrize("gap", [89.0, 104.0, 200.0, 710.0, 5000.0, 3e38])
    @pytest.mark.parametrize("vocabulary", [2, 100, 5000])
    def test_a_gap_that_overflows_an_exponential_is_finite(self, backend, gap, vocabulary):
        logits = torch.zeros(2, vocabulary)
        logits[0, 0], logits[1, 0] = -gap, gap
        labels = torch.tensor([0, 1])
        got = oracle.run(backend, logits, None, None, labels)
        oracle.assert_forward(got, oracle.contrastive(logits, None, None, labels), but=("entropy",))
        assert torch.isfinite(got.logprobs).all()
        assert torch.isfinite(got.entropy).all()
        assert torch.isfinite(oracle.gradient_of(backend, logits, labels, 1.0, 1.0)).all()

    @pytest.mark.parametrize("scale", [1e6, 4e6, 1e7, 3e9, 5e9, 1e10, 1e20, 1e35])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("vocabulary", [8, 5000])
    def test_logits_of_any_size(self, backend, vocabulary, dtype, scale):
        """A row masked by a large number, one far below another, and rows as wide as that."""
        logits = torch.cat([
            torch.full((1, vocabulary), -scale), torch.zeros(1, vocabulary) - scale,
            torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1)) * scale,
        ])  # fmt: skip
        logits[1, 0], logits[1, 1] = scale, 1.0
        logits, labels = logits.to(dtype), torch.tensor([1, 1, 0, 3, vocabulary - 1])
        got = oracle.run(backend, logits, None, None, labels)
        oracle.assert_forward(got, oracle.contrastive(logits, None, None, labels), but=("entropy",))
        oracle.assert_gradient(
            oracle.gradient_of(backend, logits, labels, 1.0), oracle.logits_gradient(logits, labels, 1.0), dtype
        )

    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("vocabulary", [12289, 4096, 4097])
    def test_the_label_may_stand_in_any_column(self, backend, vocabulary, dtype):
        columns = sorted({c for c in (*BLOCK_EDGES, vocabulary - 2, vocabulary - 1) if c < vocabulary})
        logits = oracle.logits_like((1, vocabulary), 1, dtype, 1.0).repeat(2 * len(columns), 1)
        labels = torch.tensor(columns * 2)
        logits[range(len(columns)), columns] = 40.0  # p -> 1 there, and an ordinary label in the second half
        check(backend, logits, labels)

    @pytest.mark.parametrize("dtype", oracle.NATIVE)
    @pytest.mark.parametrize("vocabulary", [13, 1001, 4097, 9999])
    @pytest.mark.parametrize("shift", [1, 3, 5])
    def test_an_odd_vocabulary_may_start_at_any_element(self, backend, vocabulary, shift, dtype):
        """Rows packed end to end: none is aligned, and a stray read past a row would meet the next one's NaN."""
        storage = torch.full((3 * (vocabulary + 1) + shift,), NAN, dtype=dtype)
        logits = storage[shift:].as_strided((3, vocabulary), (vocabulary + 1, 1), shift)
        logits.copy_(oracle.logits_like((3, vocabulary), 7, dtype))
        check(backend, logits, torch.tensor([0, vocabulary // 2, vocabulary - 1]))

    @pytest.mark.parametrize("order", ["rising", "falling", "late peak", "steps"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_order_of_magnitudes_along_the_row(self, backend, order, dtype):
        vocabulary = 20001
        ramp = torch.linspace(-500, 500, vocabulary)
        rows = {
            "rising": ramp,
            "falling": ramp.flip(0),
            "late peak": torch.where(torch.arange(vocabulary) == vocabulary - 3, 300.0, ramp / 500),
            "steps": (torch.arange(vocabulary) // 4096 * 30).float() + ramp / 500,
        }
        logits = rows[order].to(dtype).repeat(4, 1)
        top = int(logits[0].argmax())
        check(backend, logits, torch.tensor([top, (top + 1) % vocabulary, 4096, 0]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_an_offset_changes_nothing(self, backend, offset, dtype):
        logits = oracle.logits_like((4, 5001), 1, dtype, 3.0 if dtype == torch.float32 else 300.0, offset)
        labels = torch.tensor([0, 1, int(logits[2].argmax()), 5000])
        check(backend, logits, labels)


class TestIgnoredRows:
    def test_they_are_never_read_and_return_zero(self, backend):
        logits = [oracle.logits_like((6, 4100), seed) for seed in (1, 2, 3)]
        labels = oracle.labels_like((6,), 4100, 4)
        advantages = torch.ones(6)
        clean = oracle.run(backend, *logits, labels, advantages)
        for row in (0, 3, 5):
            labels[row] = -100
            for tensor in logits:
                tensor[row] = NAN
        advantages[3] = NAN
        got = oracle.run(backend, *logits, labels, advantages)
        ignored = labels == -100
        for name, value in got._asdict().items():
            assert (value.cpu()[ignored] == 0).all(), name
            oracle.assert_same_bits(value.cpu()[~ignored], getattr(clean, name).cpu()[~ignored], name)

    def test_they_may_point_at_memory_that_is_not_there(self):
        """A row that is never read may even be a page that faults: the proof is that this test survives."""
        mmap = pytest.importorskip("mmap")
        ctypes = pytest.importorskip("ctypes")
        page = mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "mprotect"):
            pytest.skip("needs mprotect")
        area = mmap.mmap(-1, 3 * page)
        values = np.frombuffer(area, dtype=np.float32).reshape(3, page // 4)
        values[:] = 1.0
        logits = torch.from_numpy(values)
        middle = ctypes.c_void_p(logits.data_ptr() + page)
        assert libc.mprotect(middle, page, 0) == 0
        try:
            labels = torch.tensor([1, -100, 2])
            out = cepo_kernels.contrastive_logprobs(logits, logits, logits, labels, return_entropy=True)
            assert out.logprobs.tolist() == pytest.approx([-math.log(page / 4), 0, -math.log(page / 4)])
        finally:
            libc.mprotect(middle, page, 3)

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
    def test_no_rows_at_all(self, backend, shape):
        leaf = torch.zeros(*shape, 11, device=oracle.device_of(backend), requires_grad=True)
        labels = torch.empty(shape, dtype=torch.long)
        out = oracle.run(backend, leaf, leaf.detach(), None, labels, torch.ones(()))
        assert all(value.shape == shape for value in out)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        assert leaf.grad.shape == leaf.shape

    def test_all_rows_ignored(self, backend):
        leaf = torch.full((2, 3, 9), NAN, device=oracle.device_of(backend), requires_grad=True)
        out = oracle.run(backend, leaf, leaf.detach(), None, torch.full((2, 3), -100), torch.ones(2, 1))
        assert all((value == 0).all() for value in out)
        (out.logprobs + out.entropy).sum().backward()
        assert (leaf.grad == 0).all()


class TestLargeIndices:
    def big(self, backend, elements):
        """Address space that no one touches: only the pages that the test writes exist."""
        try:
            return torch.empty(elements, dtype=torch.bfloat16, device=oracle.device_of(backend))
        except RuntimeError:
            pytest.skip("cannot reserve 4 GiB of address space")

    def test_rows_beyond_two_to_the_31_elements(self, backend):
        vocabulary, stride = 5001, 2**30 + 8
        storage = self.big(backend, 2 * stride + vocabulary)
        far = storage.as_strided((3, vocabulary), (stride, 1))
        far.copy_(oracle.logits_like((3, vocabulary), 1, torch.bfloat16))
        near, labels = far.cpu(), oracle.labels_like((3,), vocabulary, 2)
        got = oracle.run(backend, far, far, far, labels, torch.ones(3))
        for name, want in oracle.run(backend, near, near, near, labels, torch.ones(3))._asdict().items():
            oracle.assert_same_bits(getattr(got, name), want, name)
        leaf = far.detach().requires_grad_()
        oracle.run(backend, leaf, None, None, labels).logprobs.sum().backward()
        oracle.assert_same_bits(leaf.grad, oracle.gradient_of(backend, near, labels, 1.0), "gradient")

    def test_more_than_two_to_the_31_logits_in_a_call(self, backend):
        vocabulary, rows = 2**20 + 1, 2**11 + 3
        row = oracle.logits_like((1, vocabulary), 1, torch.bfloat16)
        storage = self.big(backend, rows * vocabulary)
        policy = storage.view(rows, vocabulary)
        policy[0], policy[-1] = row[0].to(policy.device), row[0].to(policy.device)
        labels = torch.full((rows,), -100)
        labels[0] = labels[-1] = vocabulary - 1
        teacher = row.to(policy.device).expand(rows, vocabulary)  # every row the same memory
        got = oracle.run(backend, policy, teacher, None, labels, torch.ones(rows))
        alone = oracle.run(backend, row, row, None, labels[:1], torch.ones(1))
        for name, value in got._asdict().items():
            for index in (0, -1):
                oracle.assert_same_bits(value[index], getattr(alone, name)[0], name)
            assert (value[1:-1] == 0).all()
