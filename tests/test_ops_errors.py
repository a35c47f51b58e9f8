"""A bad argument is refused before anything runs, by name, with what was expected and what came; imports stay light."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import cepo_kernels
from cepo_kernels import backends
from cepo_kernels.contrastive import row_arguments
from cepo_kernels.policy_loss import loss_arguments

NAN, INF = float("nan"), float("inf")


def good(**change):
    """Arguments of a call that works, with one of them changed."""
    return {
        "policy_logits": torch.zeros(2, 3, 5),
        "positive_logits": torch.zeros(2, 3, 5),
        "negative_logits": torch.zeros(2, 3, 5),
        "labels": torch.zeros(2, 3, dtype=torch.long),
        "advantages": torch.ones(2, 1),
        **change,
    }


def labels_with(value):
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = value
    return labels


MALFORMED = [
    ({"policy_logits": [[0.0]]}, TypeError, "policy_logits: expected a tensor, got list"),
    ({"policy_logits": torch.zeros(2, 3, 5).int()}, TypeError, "policy_logits: expected bfloat16.*got torch.int32"),
    ({"policy_logits": torch.zeros(2, 3, 5, dtype=torch.complex64)}, TypeError, "policy_logits: .*complex64"),
    ({"policy_logits": torch.zeros(2, 3, 0)}, ValueError, r"policy_logits: .*V >= 1, got \(2, 3, 0\)"),
    ({"policy_logits": torch.zeros(())}, ValueError, r"policy_logits: expected shape \(\.\.\., V\).*got \(\)"),
    ({"policy_logits": torch.zeros(2, 4, 5)}, ValueError, r"policy_logits: .*\(2, 3\).*\(2, 4, 5\)"),
    ({"policy_logits": torch.zeros(6, 5)}, ValueError, r"policy_logits: .*\(2, 3\).*\(6, 5\)"),
    (
        {"policy_logits": torch.zeros(2, 5, 3).mT},
        ValueError,
        "policy_logits: expected a contiguous last dimension.*strides",
    ),
    ({"policy_logits": torch.zeros(2, 3, 10)[..., ::2]}, ValueError, "policy_logits: .*contiguous last dimension"),
    ({"policy_logits": torch.zeros(2, 3, 1).expand(2, 3, 5)}, ValueError, "policy_logits: .*contiguous last dimension"),
    ({"positive_logits": torch.zeros(2, 3, 6)}, ValueError, "positive_logits: expected V = 5 .*got 6"),
    ({"positive_logits": torch.zeros(1, 3, 5)}, ValueError, r"positive_logits: .*\(2, 3\).*\(1, 3, 5\)"),
    ({"positive_logits": "teacher"}, TypeError, "positive_logits: expected a tensor, got str"),
    ({"negative_logits": torch.zeros(2, 3, 4)}, ValueError, "negative_logits: expected V = 5 .*got 4"),
    (
        {"negative_logits": torch.zeros(2, 3, 5, device="meta")},
        ValueError,
        "negative_logits: expected device cpu.*got meta",
    ),
    ({"labels": torch.zeros(2, 3)}, TypeError, "labels: expected int32 or int64, got torch.float32"),
    ({"labels": torch.zeros(2, 3).bool()}, TypeError, "labels: expected int32 or int64, got torch.bool"),
    ({"labels": [0, 1]}, TypeError, "labels: expected a tensor, got list"),
    ({"labels": torch.zeros(2, dtype=torch.long)}, ValueError, r"policy_logits: .*\(2,\).*\(2, 3, 5\)"),
    ({"labels": labels_with(5)}, ValueError, "labels: expected -100 or 0 <= label < 5, got 5"),
    ({"labels": labels_with(-1)}, ValueError, "labels: .*got -1"),
    ({"labels": labels_with(2**40)}, ValueError, "labels: .*got 1099511627776"),
    ({"labels": labels_with(-99).int()}, ValueError, "labels: .*got -99"),
    ({"labels": labels_with(-100), "ignore_index": -1}, ValueError, "labels: expected -1 or .*got -100"),
    ({"advantages": torch.ones(2)}, ValueError, r"advantages: .*\(2, 3\).*got \(2,\).*advantages\[:, None\]"),
    ({"advantages": torch.ones(3)}, ValueError, r"advantages: .*\(2, 3\).*got \(3,\)$"),
    ({"advantages": torch.ones(3, 2)}, ValueError, r"advantages: .*\(2, 3\).*got \(3, 2\)"),
    ({"advantages": torch.ones(2, 3, 1)}, ValueError, r"advantages: .*got \(2, 3, 1\)"),
    ({"advantages": torch.ones(2, 3).long()}, TypeError, "advantages: expected a floating dtype, got torch.int64"),
    ({"advantages": 1.0}, TypeError, "advantages: expected a tensor, got float"),
    ({"negative_mask": torch.ones(2, 3)}, TypeError, "negative_mask: expected bool, got torch.float32"),
    ({"negative_mask": torch.ones(2).bool()}, ValueError, r"negative_mask: .*negative_mask\[:, None\]"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature: .*temperature\[:, None\]"),
    ({"temperature": torch.ones(2, 1).int()}, TypeError, "temperature: expected a floating dtype"),
    ({"temperature": torch.tensor([[1.0], [0.0]])}, ValueError, "temperature: .*positive.*got 0.0"),
    ({"temperature": torch.tensor([[1.0], [NAN]])}, ValueError, "temperature: .*got nan"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number .*, got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature: .*got -1.0"),
    ({"temperature": INF}, ValueError, "temperature: .*got inf"),
    ({"temperature": NAN}, ValueError, "temperature: .*got nan"),
    ({"temperature": None}, TypeError, "temperature: .*got NoneType"),
    ({"temperature": "hot"}, TypeError, "temperature: .*got str"),
    ({"lam": 1.01}, ValueError, r"lam: expected a number in \[0, 1\], got 1.01"),
    ({"lam": -0.5}, ValueError, "lam: .*got -0.5"),
    ({"lam": NAN}, ValueError, "lam: .*got nan"),
    ({"lam": torch.tensor(2.0)}, ValueError, "lam: .*got 2.0"),
    ({"lam": torch.ones(2)}, ValueError, r"lam: expected a number or a 0-d tensor, got shape \(2,\)"),
    ({"lam": torch.ones((), device="meta")}, ValueError, "lam: expected a 0-d tensor on cpu, got one on meta"),
    ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature: expected a 0-d .* on cpu, .* on meta"),
    ({"logit_scale": torch.ones((), device="meta")}, ValueError, "logit_scale: expected a 0-d .* on cpu, .* on meta"),
    ({"advantages": torch.ones((), device="meta")}, ValueError, "advantages: expected a 0-d .* on cpu, .* on meta"),
    ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
    ({"ignore_index": 2**70}, ValueError, r"ignore_index: expected an int of 64 bits, got 1.18e\+21"),
    ({"lam": 10**400}, ValueError, "lam: expected a number that float64 can hold, got a larger one"),
    ({"lam": torch.tensor(1j)}, TypeError, "lam: expected a number .*, got torch.complex64"),
    ({"lam": torch.tensor(True)}, TypeError, "lam: expected a number .*, got torch.bool"),
    ({"backend": None}, TypeError, "backend: expected a name, got NoneType"),
    ({"backend": []}, TypeError, "backend: expected a name, got list"),
    ({"ignore_index": 3.5}, TypeError, "ignore_index: expected an int, got 3.5"),
    ({"eps_w": 1.0}, ValueError, r"eps_w: expected a number in \[0, 1\), got 1.0"),
    ({"eps_w": "half"}, TypeError, "eps_w: .*got str"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: .*got 0.0"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale: .*got -1.0"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap: .*got 0.0"),
    ({"logit_softcap": NAN}, ValueError, "logit_softcap: .*got nan"),
    ({"backend": "cuda-next"}, ValueError, "backend: expected .*auto.*got 'cuda-next'"),
    ({"policy_logits": torch.zeros(2, 3, 5).to_sparse()}, TypeError, "policy_logits: expected a dense .*sparse_coo"),
    ({"labels": torch.zeros(2, 3).long().to_sparse()}, TypeError, "labels: expected a dense tensor, got .*sparse_coo"),
    ({"advantages": torch.ones(2, 3).to_sparse()}, TypeError, "advantages: expected a dense tensor, got .*sparse_coo"),
    (
        {"positive_logits": torch.nested.nested_tensor([torch.zeros(3, 5)] * 2, layout=torch.jagged)},
        TypeError,
        "positive_logits: expected a dense tensor, got a nested one",
    ),
    ({"return_entropy": "yes"}, TypeError, "return_entropy: expected a bool, got str"),
    ({"inplace_grad": None}, TypeError, "inplace_grad: expected a bool, got NoneType"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), MALFORMED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_malformed_argument_is_named_with_what_was_expected_and_what_came(change, error, message):
    cepo_kernels.contrastive_logprobs(**good())
    with pytest.raises(error, match=message):
        cepo_kernels.contrastive_logprobs(**good(**change))


def test_a_0_d_tensor_of_the_cpu_goes_to_the_labels_device():
    """Where a kernel reads its address."""
    labels, one = torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.ones(())
    rows = row_arguments(labels, one, one > 0, 0.5, 0.5, 1.0, 1.0, None, -100, False)
    loss = loss_arguments(labels, one, None, "ppo", 0.2, 0.2, one, None, 0.0, 0.0, 1.0, one > 0, 0.5, 0.5, 1.0, 1.0,
                          None, -100, False)  # fmt: skip
    for name in ("advantages", "negative_mask", "token_weight"):
        assert all(found[name].device.type == "meta" for found in (rows, loss) if name in found), name


def test_the_single_tensor_op_names_its_own_arguments():
    labels = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^logits: .*\(2, 3\).*\(3, 5\)"):
        cepo_kernels.token_logprobs(torch.zeros(3, 5), labels)
    with pytest.raises(ValueError, match=r"^temperature: .*temperature\[:, None\]"):
        cepo_kernels.token_logprobs(torch.zeros(2, 3, 5), labels, temperature=torch.ones(2))
    with pytest.raises(ValueError, match=r"^labels: .*got 5"):
        cepo_kernels.token_logprobs(torch.zeros(2, 3, 5), labels + 5)
    shared = torch.zeros(1, 1, 5, requires_grad=True).mul(1).expand(2, 3, 5)
    with pytest.raises(ValueError, match=r"^inplace_grad: logits is an expanded tensor"):
        cepo_kernels.token_logprobs(shared, labels, inplace_grad=True)
    nothing = torch.zeros(2, 0, 1, requires_grad=True) * 1  # of which no two rows share anything
    cepo_kernels.token_logprobs(nothing, labels[:, :0], inplace_grad=True).logprobs.sum().backward()
    for op in (cepo_kernels.divergence, cepo_kernels.linear_divergence):
        with pytest.raises(TypeError, match=r"^backend: expected a name, got int"):
            op(
                torch.zeros(2, 5),
                torch.zeros(2, 5),
                *[torch.zeros(3, 5)] * (op is not cepo_kernels.divergence),
                backend=3,
            )
    with pytest.raises(ValueError, match=r"^top_k: expected an int of 64 bits"):
        cepo_kernels.divergence(torch.zeros(2, 5), torch.zeros(2, 5), top_k=2**70)


@pytest.mark.parametrize("label", [5, -1, -99, 2**31, 2**40, -(2**40)])
def test_every_backend_refuses_a_label_outside_the_vocabulary(backend, label):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("on a GPU such a row is NaN; reading the labels would stall its queue")
    for labels in (torch.tensor([label, 0]), torch.tensor([0, label])):
        with pytest.raises(ValueError, match=f"labels: .*got {label}"):
            cepo_kernels.token_logprobs(torch.zeros(2, 5), labels, backend=backend)


@pytest.mark.gpu
def test_on_a_gpu_a_label_outside_the_vocabulary_makes_its_row_nan():
    logits = torch.zeros(4, 5, device="cuda", requires_grad=True)
    out = cepo_kernels.token_logprobs(logits, torch.tensor([0, 5, -1, 2], device="cuda"), return_entropy=True)
    assert torch.isnan(out.logprobs).tolist() == [False, True, True, False]
    out.logprobs.sum().backward()
    assert torch.isfinite(logits.grad[[0, 3]]).all()


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_an_ignored_rows_temperature_does_not_matter(value):
    labels, temperature = torch.tensor([0, -100]), torch.tensor([1.0, value])
    out = cepo_kernels.token_logprobs(torch.zeros(2, 5), labels, temperature=temperature)
    assert out.logprobs[1] == 0


class TestBackends:
    def test_a_named_backend_that_cannot_run_says_why(self):
        reasons = {name: backends.unavailable(name, "cpu") for name in backends.NAMES}
        assert reasons["reference"] is None
        for name, reason in reasons.items():
            if reason is None:
                cepo_kernels.contrastive_logprobs(**good(backend=name))
                continue
            with pytest.raises(RuntimeError, match=f"backend: '{name}' cannot run here: .+"):
                cepo_kernels.contrastive_logprobs(**good(backend=name))

    def test_only_the_reference_takes_float64(self, backend):
        wide = good(policy_logits=torch.zeros(2, 3, 5, dtype=torch.float64))
        assert cepo_kernels.contrastive_logprobs(**wide).logprobs.dtype == torch.float64
        if backend != "reference":
            with pytest.raises(ValueError, match=f"float64.*reference.*{backend}"):
                cepo_kernels.contrastive_logprobs(**wide, backend=backend)

    def test_auto_says_once_what_it_uses(self, caplog):
        backends.choose.cache_clear()
        with caplog.at_level(logging.INFO, logger="cepo_kernels"):
            for _ in range(3):
                cepo_kernels.contrastive_logprobs(**good())
                cepo_kernels.token_logprobs(torch.zeros(2, 5), torch.tensor([0, 1]))
        said = [record for record in caplog.records if record.name.startswith("cepo_kernels")]
        assert [record.levelno for record in said] == [logging.INFO]
        assert cepo_kernels.backend_report().chosen["contrastive_logprobs"]["cpu"] in said[0].getMessage()

    def test_the_report_names_a_choice_and_a_reason_for_every_op_and_device(self):
        report = cepo_kernels.backend_report()
        assert set(report.chosen) == {
            name for name in cepo_kernels.__all__ if name.endswith(("_logprobs", "_loss", "divergence"))
        }
        for choices in report.chosen.values():
            for device, name in choices.items():
                assert name == "none" or report.reasons[device][name] is None
            assert choices["cpu"] != "none"
        for device, reasons in report.reasons.items():
            for name, reason in reasons.items():
                assert (reason is None) == (name in str(report) and f"{name}: can run" in section(str(report), device))
                assert reason is None or reason in str(report)


def section(report, device):
    return report[report.index(f"{device} tensors:") :].split(" tensors:")[1]


def fresh(code):
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_where_there_is_no_triton_no_trainer_and_no_compiled_kernel():
    out = fresh(
        "import sys\n"
        "for name in ('triton', 'cepo', 'transformers', 'numpy', 'cepo_kernels._cpu'): sys.modules[name] = None\n"
        "import torch, cepo_kernels\n"
        "out = cepo_kernels.token_logprobs(torch.zeros(2, 4), torch.tensor([1, -100]), return_entropy=True)\n"
        "print(round(out.logprobs[0].item(), 4), out.entropy.tolist()[1])\n"
        "print(cepo_kernels.backend_report())\n"
    )
    assert out.startswith("-1.3863 0.0")
    assert "contrastive_logprobs -> reference" in out


def test_importing_it_loads_neither_triton_nor_the_trainer():
    before = "import sys, torch; had = set(sys.modules); import cepo_kernels; new = set(sys.modules) - had\n"
    new = fresh(before + "print(*sorted(name for name in new if not name.startswith('cepo_kernels')))").split()
    assert not [name for name in new if name.split(".")[0] in ("triton", "cepo", "transformers", "numpy")]


def test_importing_it_costs_no_more_than_50_ms_beyond_torch(tmp_path):
    """With its bytecode there, as it is once installed, and of the processor's time: others run beside it."""
    code = f"""
import sys, time, torch
sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False
t = time.process_time()
import cepo_kernels
print(time.process_time() - t)
"""
    assert min(float(fresh(code)) for _ in range(4)) <= 0.050
