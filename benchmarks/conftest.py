"""Prints one table per measured group, and keeps them as JSON with ``--results FILE``."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import pytest
import torch

TABLES = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write the tables to this JSON file")
    parser.addoption("--isa", choices=["avx2"], help="hold everyone to AVX2 (with ATEN_CPU_CAPABILITY=avx2)")
    parser.addoption("--rows", type=int, default=512, help="rows N of the measured logits (default: 512)")


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> list[dict]:
    return request.config.stash.setdefault(TABLES, [])


def machine() -> dict[str, object]:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    groups = config.stash.get(TABLES, [])
    for group in groups:
        terminalreporter.section(group["title"])
        terminalreporter.write_line(f"{'':24}{'ms':>9}{'GB/s':>8}{'of a read':>11}{'our speed-up':>14}  error")
        for row in group["rows"]:
            share = f"{row['share_of_read']:.0%}" if row["share_of_read"] is not None else ""
            speedup = f"{row['speedup']:.2f}x" if row["speedup"] is not None else ""
            error = f"{row['error']:.1e}" if row["error"] is not None else ""
            gigabytes = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] is not None else ""
            terminalreporter.write_line(
                f"{row['name']:24}{row['ms']:9.1f}{gigabytes:>8}{share:>11}{speedup:>14}  {error}"
            )
        for name, reason in group["absent"].items():
            terminalreporter.write_line(f"{name:24}  skipped: {reason}")
    path = config.getoption("--results")
    if path and groups:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "groups": groups}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {path}")
