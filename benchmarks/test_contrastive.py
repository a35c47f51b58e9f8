"""Three log-probs and token credit at a vocabulary of 151,936 on the CPU: time, bytes per second, and error.

Every round runs a plain read of the same bytes and each contender once, so that whatever else the machine does falls on
all of them alike. The error is the largest relative one of the policy's log-probs against float64, and of its gradient
relative to the largest entry of a row.
"""

from __future__ import annotations

import contenders
import pytest
import torch
from interleaved import line, race
from torch import Tensor

from cepo_kernels import backends

VOCABULARY = 151_936
ROUNDS = 7
CHECKED = 16  # rows whose error is measured
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

needs_native = pytest.mark.skipif(
    backends.unavailable("cpu", "cpu") is not None, reason=str(backends.unavailable("cpu", "cpu"))
)


def make_inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(rows, VOCABULARY).mul_(3).to(dtype) for _ in range(3)]
    labels = torch.randint(VOCABULARY, (rows,))
    for tensor in logits:  # half of the tokens likely, as sampled tokens are
        tensor[::2].scatter_(1, labels[::2, None], 18.0)
    return [*logits, labels, torch.randn(rows)]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+gradient"])
def test_throughput(benchmark, tables: list[dict], request: pytest.FixtureRequest, gradient: bool, dtype: str) -> None:
    from cepo_kernels.backends.cpu import plain_read

    rows = request.config.getoption("--rows")
    inputs = make_inputs(rows, DTYPES[dtype])
    found, absent = contenders.on_cpu(request.config.getoption("--isa"))
    if gradient:
        found = {name: contenders.with_gradient(contender) for name, contender in found.items()}
        isa = request.config.getoption("--isa")
        found = {"cepo, fused loss": contenders.fused(f"cpu:{isa}" if isa else "cpu"), **found}
    item = inputs[0].element_size()
    moved = (5 if gradient else 3) * rows * VOCABULARY * item  # a separate backward reads and writes the policy again
    flat = torch.ones(3 * rows * VOCABULARY * item // 4)

    errors = {name: _error(contender, inputs, gradient) for name, contender in found.items()}
    calls = {"plain read": lambda: plain_read(flat)}
    calls |= {name: (lambda run=run: run(*inputs)) for name, run in found.items()}
    benchmark.group = f"{'forward+gradient' if gradient else 'forward'} {dtype}"
    medians = race(benchmark, calls, ROUNDS)
    table = [line("plain read", medians.pop("plain read"), None, moved=flat.nbytes)]
    for name, seconds in medians.items():
        share = None if gradient else table[0]["ms"] / (seconds * 1e3)
        table.append(line(name, seconds, medians["cepo"], moved=moved, share=share, error=errors.get(name)))
    title = f"{benchmark.group}: N = {rows}, V = {VOCABULARY:,}, three tensors"
    tables.append({"group": benchmark.group, "title": title, "rows": table, "absent": absent})
    benchmark.extra_info["table"] = table


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_rows_cost_at_most_twice_a_plain_row(benchmark, tables: list[dict], request, dtype: str) -> None:
    rows = request.config.getoption("--rows") // 4
    plain = make_inputs(rows, DTYPES[dtype])
    rising = torch.linspace(-2000, 2000, VOCABULARY).to(DTYPES[dtype]).expand(rows, -1).contiguous()
    masked, poisoned = torch.full_like(rising, -torch.inf), plain[0].clone()
    poisoned[:, -1] = torch.nan
    kinds = {"rising rows": rising, "rows of -inf": masked, "rows with NaN": poisoned}
    run = contenders.ours("cpu")
    calls = {"plain rows": lambda: run(*plain)}
    calls |= {name: (lambda x=x: run(x, x, x, *plain[3:])) for name, x in kinds.items()}
    benchmark.group = f"adversarial rows {dtype}"
    medians = race(benchmark, calls, 3 * ROUNDS, "plain rows")
    base = medians["plain rows"]
    table = [line(name, seconds, base) for name, seconds in medians.items()]
    title = f"{benchmark.group}: the time of each as a multiple of plain rows"
    tables.append({"group": benchmark.group, "title": title, "rows": table, "absent": {}})
    for name in kinds:
        assert medians[name] <= 2 * base, f"{name}: {medians[name] / base:.2f}x a plain row"


def _error(contender: contenders.Contender, inputs: list[Tensor], gradient: bool) -> float:
    """Largest relative error over the first rows; bf16 gradients are compared before their own rounding's size."""
    got = contender(*inputs)[1 if gradient else 0][:CHECKED].double()
    few = [tensor[:CHECKED].double() if tensor.is_floating_point() else tensor[:CHECKED] for tensor in inputs]
    exact = contenders.ours("reference")
    if not gradient:
        expected = exact(*few)[0]
        return float(((got - expected).abs() / expected.abs()).max())
    expected = contenders.with_gradient(exact)(*few)[1]
    return float(((got - expected).abs().amax(1) / expected.abs().amax(1)).max())
