"""Writes the tables of README.md and of pages of docs from the files in benchmarks/results.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cepo.compare.table import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


CPU = {"cpu.json": "", "cpu-avx2.json": ", all held to AVX2"}
PEERS = ("torch.compile", "eager", "TRL")


def speed() -> str:
    """One line for each measured group of `logits`."""
    lines = ["| three tensors, V = 151,936 | ms | of a plain read | torch.compile | eager | TRL | error |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, held in CPU.items():
        for group in _measured(name)["groups"]:
            if group["group"].startswith("forward"):
                rows = group["rows"]
                ours = next(row for row in rows if row["name"] == "cepo")
                share = "" if ours["share_of_read"] is None else f"{ours['share_of_read']:.0%}"
                peers = [next(row for row in rows if row["name"].startswith(peer)) for peer in PEERS]
                faster = " | ".join(f"{peer['speedup']:.1f}x" for peer in peers)
                what = f"{group['group']}{held}"
                lines.append(f"| {what} | {ours['ms']:.1f} | {share} | {faster} | {ours['error']:.1e} |")
    return "\n".join(lines)


def logits() -> str:
    """The machine as it is, and held to AVX2."""
    found = [(_measured(name), held) for name, held in CPU.items()]
    return "\n\n".join(
        f"{_machine(measured)}{held}. Medians of interleaved runs in one process; the error is the largest relative "
        f"one against float64 (of log-probs; with gradient, of the gradient).\n\n{_tables(measured, 'of a plain read')}"
        for measured, held in found
    )


def linear() -> str:
    measured = _measured("linear.json")
    return (
        f"{_machine(measured)}. Medians of interleaved runs in one process.\n\n{_tables(measured, 'of the last row')}"
    )


def divergence() -> str:
    if not (RESULTS / "divergence.json").exists():
        return "**Not yet measured.**"
    measured = _measured("divergence.json")
    return (
        f"{_machine(measured)}. Medians of interleaved runs in one process; the error is the relative one of the sum "
        f"against float64 (with gradient, of the gradient).\n\n{_tables(measured, 'of a plain read')}"
    )


def memory() -> str:
    """MiB beyond inputs, gradients and one float32 head."""
    measured = _measured("memory.json")
    names = list(dict.fromkeys(row["name"] for row in measured["measured"]))
    found = {
        (row["rows"], row["name"]): "failed" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f}"
        for row in measured["measured"]
    }
    lines = [f"H = {measured['width']:,}, V = {measured['vocabulary']:,}, bfloat16.", ""]
    lines += ["| MiB | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for rows in sorted({rows for rows, _ in found}):
        cells = [found.get((rows, name), "") for name in names]
        lines.append(f"| N = {rows:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updates() -> str:
    """MiB and seconds of one update of the trainer, from hidden states and by logits."""
    lines = ["| one update | | MiB beyond the model | seconds |", "|---|---|---:|---:|"]
    for model, about in _measured("memory.json")["updates"].items():
        what = f"{model}, {about['tokens']} tokens"
        lines += [
            f"| {what} | {row['name']} | {row['bytes'] / 2**20:,.0f} | {row['seconds']:.2f} |"
            for row in about["measured"]
        ]
    return "\n".join(lines)


def _measured(name: str) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return measured


def _machine(measured: dict[str, Any]) -> str:
    machine = measured["machine"]
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"


def _tables(measured: dict[str, Any], share_of: str) -> str:
    """Medians per group: milliseconds, our speed-up, a share, error."""
    lines = []
    for group in measured["groups"]:
        if "adversarial" in group["group"]:
            continue
        lines += [f"**{group['title']}**", "", f"| | ms | GB/s | {share_of} | `cepo` is faster by | error |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for row in group["rows"]:
            speed = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}"
            share = "" if row["share_of_read"] is None else f"{row['share_of_read']:.0%}"
            faster = "" if row["speedup"] is None or row["name"] == "cepo" else f"{row['speedup']:.1f}x"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {row['name']} | {row['ms']:.1f} | {speed} | {share} | {faster} | {error} |")
        lines.append("")
    return "\n".join(lines).rstrip()


GPU_COLUMNS = [(v, "bfloat16") for v in (32_000, 128_256, 151_936, 262_144)] + [(151_936, "float32")]
GPU_ROWS = (  # what, floor, wanted, and the cell
    ("three log-probs + credit, forward", "6NV", ">= 90 % of measured bandwidth", lambda at: _share(at, "forward")),
    ("the same + policy gradient, fused loss, in place", "8NV", ">= 85 %", lambda at: _share(at, "fused")),
    ("forward, then separate backward", "10NV", ">= 88 %", lambda at: _share(at, "separate")),
    ("divergence of two rows (JSD) + student gradient", "6NV", ">= 85 %",
     lambda at: _share(at, "divergence") if "divergence" in at else "-"),
    ("against TRL: forward, separate, fused", "", ">= 1.0x, >= 1.0x, >= 1.15x",
     lambda at: ", ".join(_faster(at, kind, "TRL") for kind in ("forward", "separate", "fused"))),
    ("against Liger, quack, torch.compile: forward", "", "ahead of each",
     lambda at: ", ".join(f"{name} {_faster(at, 'forward', name)}" for name in ("Liger", "quack", "torch.compile"))),
    ("against eager PyTorch: forward; fused, MiB beyond the inputs", "", ">= 8x, none of the size of the logits",
     lambda at: f"{_faster(at, 'forward', 'eager')}; {_best(at['fused'])['peak_mib']:.0f}"),
)  # fmt: skip


def gpu() -> str:
    """The table of each GPU that `run_gpu.sh` has measured, or the table that waits for one."""
    paths = sorted(RESULTS.glob("gpu-*.json"))
    return (
        "\n\n".join(map(_gpu, paths))
        if paths
        else f"**Not yet measured**: no GPU has run these kernels yet.\n\n{_gpu_table({})}"
    )


def _gpu(path: Path) -> str:
    measured = json.loads(path.read_text())
    machine = measured["machine"]
    cells: dict[tuple[int, str], dict[str, Any]] = {}
    for group in measured["groups"]:
        cells.setdefault((group["vocabulary"], group["dtype"].removeprefix("torch.")), {})[group["kind"]] = group
    return (
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; the faster of cuda and triton. Shares are of "
        f"a plain read (forward) and of three reads to one write in the same run.\n\n{_gpu_table(cells)}"
    )


def _gpu_table(cells: dict[tuple[int, str], dict[str, Any]]) -> str:
    titles = [f"V = {v:,}" + (", fp32" if dtype == "float32" else "") for v, dtype in GPU_COLUMNS]
    lines = ["| N = 8192, bf16 | floor, bytes | wanted | " + " | ".join(titles) + " |"]
    lines.append("|---|---|---|" + "---:|" * len(titles))
    for what, floor, wanted, cell in GPU_ROWS:
        found = [cell(cells[column]) if column in cells else "" for column in GPU_COLUMNS]
        lines.append(f"| {what} | {floor} | {wanted} | " + " | ".join(found) + " |")
    return "\n".join(lines)


LINEAR_COLUMNS = [(rows, width) for rows in (4096, 8192) for width in (2048, 4096)]
LINEAR_ROWS = (  # what, wanted, and the cell
    ("forward, three contexts", ">= 90 % of cuBLAS's own time", lambda at: _of_products(at, "forward")),
    ("log-probs with gradient, frozen head", "", lambda at: _of_products(at, "frozen head")),
    ("log-probs with gradient, trained head", "", lambda at: _of_products(at, "trained head")),
    ("policy loss with gradients", ">= 88 %", lambda at: _of_products(at, "policy loss")),
    ("against TRL: forward, trained head, policy loss", ">= 1.2x forward", lambda at: _than(at, "TRL")),
    ("against torch.compile", "ahead", lambda at: _than(at, "torch.compile")),
    ("against Liger", "ahead", lambda at: _than(at, "Liger")),
    ("against F.linear_cross_entropy", "ahead", lambda at: _than(at, "F.linear_cross_entropy")),
    ("policy loss: MiB beyond the inputs, cepo's and eager's", "",
     lambda at: f"{_row(at['policy loss'], 'cepo')['peak_mib']:,.0f}, {_mib(at['policy loss'], 'eager')}"),
)  # fmt: skip


def gpu_linear() -> str:
    """From hidden states: a table for each GPU that has been measured, or the one that waits."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]
    found = [measured for measured in found if "linear" in measured]
    if not found:
        return f"Not yet measured.\n\n{_gpu_linear_table([])}"
    return "\n\n".join(
        f"{of['machine']['gpu']}, torch {of['machine']['torch']}, {of['machine']['date']}; cepo with 4 GiB of logits, "
        f"memory without.\n\n{_gpu_linear_table(of['linear'])}"
        for of in found
    )


def _gpu_linear_table(groups: list[dict[str, Any]]) -> str:
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for group in groups:
        cells.setdefault((group["n"], group["width"]), {})[group["kind"]] = group
    titles = [f"N = {rows}, H = {width}" for rows, width in LINEAR_COLUMNS]
    lines = ["| bf16, V = 151,936 | wanted | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(titles)]
    for what, wanted, cell in LINEAR_ROWS:
        found = [cell(cells[column]) if column in cells else "" for column in LINEAR_COLUMNS]
        lines.append(f"| {what} | {wanted} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _row(group: dict[str, Any], name: str) -> dict[str, Any]:
    return next((row for row in group["rows"] if row["name"].startswith(name)), {})


def _of_products(at: dict[str, Any], kind: str) -> str:
    return f"{_row(at[kind], 'cepo, 4 GiB')['share']:.0%}"


def _than(at: dict[str, Any], name: str) -> str:
    """Times that cepo is faster, of each kind in which the other takes part; a dash where it could not run."""
    found = []
    for kind in ("forward", "trained head", "policy loss"):
        other = _row(at[kind], name)
        found.append(f"{other['ms'] / _row(at[kind], 'cepo, 4 GiB')['ms']:.2f}x" if other else "-")
    return ", ".join(found)


def _mib(group: dict[str, Any], name: str) -> str:
    return f"{row['peak_mib']:,.0f}" if (row := _row(group, name)) else "-"


def _best(group: dict[str, Any]) -> dict[str, Any]:
    """Ours."""
    return min((row for row in group["rows"] if row["name"] in ("cuda", "triton")), key=lambda row: row["ms"])


def _share(at: dict[str, Any], kind: str) -> str:
    return f"{_best(at[kind])['share']:.0%}"


def _faster(at: dict[str, Any], kind: str, than: str) -> str:
    """Times that ours is faster; a dash where the other, whose version its name may end with, did not run."""
    ms = next((row["ms"] for row in at[kind]["rows"] if row["name"].partition(" ")[0] == than), None)
    return "-" if ms is None else f"{ms / _best(at[kind])['ms']:.2f}x"


def learning() -> str:
    """Held-out accuracy before and after `cepo train`, per seed."""
    measured = json.loads((RESULTS / "learning.json").read_text())
    machine = measured["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['date']}; "
        f"{measured['problems']} held-out problems.",
        "",
        "| seed | sampled at T = 1, before | after | greedy, before | after | seconds in all |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run['seed']} | {run['before']['sampled']:.3f} | {run['after']['sampled']:.3f} "
        f"| {run['before']['greedy']:.3f} | {run['after']['greedy']:.3f} | {run['seconds']:.0f} |"
        for run in measured["runs"]
    ]
    return "\n".join(lines)


# Of cells that ran beside other work; `cost` has better ones.
TIMES = ("s/step", "active", "credit")


def worth(name: str) -> str:
    """The tables of a comparison of methods, a task each."""
    path = RESULTS / name / "results.json"
    if not path.exists():
        return "**Not yet run.**"
    summary = json.loads(path.read_text())
    plan, cells = summary["plan"], summary["cells"]
    lines = [f"{cells['finished']} of {cells['planned']} cells are finished."]
    for task, found in summary["tasks"].items():
        if any(method["seeds"] for method in found["methods"].values()):
            failed = [check["what"] for check in found["checks"] if not check["held"]]
            fair = f"FAILED: {'; '.join(failed)}" if failed else f"{len(found['checks'])} checks of fairness held"
            lines += ["", f"**{task}** ({fair})", "", *table(plan, found, TIMES)]
    return "\n".join(lines)


def cost() -> str:
    """Seconds of an active step of each method, and of what it has beside GRPO's."""
    lines = []
    for model, about in _measured("cost.json").items():
        machine = about["machine"]
        lines += [
            f"**{model}**: {machine['processor']}, {about['threads']} threads, {machine['date']}; medians of "
            f"{about['rounds']} steps, methods taking turns.",
            "",
            "| | seconds of a step | of GRPO's, step by step | in all | teachers, values | credit, divergence |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in about["measured"]:
            phases = row["phases"]
            told = phases.get("teacher", 0.0) + phases.get("token_advantages", 0.0)
            kernel = phases.get("credit", 0.0) + phases.get("divergence", 0.0)
            lines.append(
                f"| {row['name']} | {row['seconds']:.3f} | {row['ratio']:.2f}x | {row['total_ratio']:.2f}x "
                f"| {told:.3f} | {kernel:.3f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def campaign() -> str:
    """What was tried, how often, and how often it went wrong."""
    measured = _measured("reliability.json")
    tried = {
        "kills": lambda of: (f"SIGKILL at a random moment; {of['runs']} runs resumed to their end", of["kills"]),
        "damage": lambda of: (
            "files of a run damaged, or with code in them",
            sum(sum(outcomes.values()) for outcomes in of["of"].values()) + len(of["code"]),
        ),
        "disk": lambda of: ("a disk that fills up", of["trials"]),
        "steps": lambda of: ("something not finite, failing or empty in a step", len(of["cases"])),
        "ops": lambda of: ("random calls of the kernels' ops", of["calls"]),
        "inputs": lambda of: (
            "random configs and JSONL files", sum(of["configs"].values()) + sum(of["files"].values())
        ),
        "network": lambda of: ("commands where no connection can be made", len(of["commands"])),
    }  # fmt: skip
    lines = [f"{_machine(measured)}.", "", "| | tried | wrong |", "|---|---:|---:|"]
    for part, told in tried.items():
        if part not in measured:
            continue
        what, count = told(measured[part])
        lines.append(f"| {what} | {count:,} | {len(measured[part]['wrong'])} |")
    return "\n".join(lines)


def killed() -> str:
    of = _measured("reliability.json").get("kills")
    if of is None:
        return "**Not yet measured.**"
    return _counts("where it was killed", of["where"])


def damaged() -> str:
    of = _measured("reliability.json")["damage"]
    lines = ["| damaged | what came of it | times |", "|---|---|---:|"]
    lines += [f"| {name} | {what} | {n} |" for name, outcomes in of["of"].items() for what, n in outcomes.items()]
    return "\n".join([*lines, *(f"| {name} | {what} | 1 |" for name, what in of["code"].items())])


def filled() -> str:
    return _counts("what could not be written", _measured("reliability.json")["disk"]["where"])


def broken() -> str:
    cases = _measured("reliability.json")["steps"]["cases"]
    return "\n".join(
        ["| in a run of 7 steps, from step 3 on | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cases.items())]
    )


def fuzzed() -> str:
    of: dict[str, Any] = {"inputs": {"configs": {}, "files": {}}} | _measured("reliability.json")
    rows = {
        "calls of ops": of["ops"]["outcomes"],
        "configs": of["inputs"]["configs"],
        "JSONL files": of["inputs"]["files"],
    }
    lines = ["| random | outcome | times |", "|---|---|---:|"]
    return "\n".join(
        [*lines, *(f"| {what} | {name} | {n:,} |" for what, counts in rows.items() for name, n in counts.items())]
    )


def resident() -> str:
    of = _measured("reliability.json")["memory"]
    lines = ["| in 10,000 steps | grows by | standard error |", "|---|---:|---:|"]
    for name, what, unit in (("resident", "KiB resident", 1024), ("allocated", "KiB that malloc has given out", 1024),
                             ("blocks", "Python's objects", 1)):  # fmt: skip
        rise, error = (value / unit for value in of["per_10000_steps"][name])
        lines.append(f"| {what} | {rise:+,.0f} | {error:,.0f} |")
    return "\n".join(lines) + (
        f"\n\nThe last {of['measured']:,} of {of['steps']:,} steps in {of['minutes']:g} minutes, "
        f"beside {of['last'] / 2**20:,.0f} MiB."
    )


def _counts(what: str, counts: dict[str, int]) -> str:
    lines = [f"| {what} | times |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {n} |" for name, n in sorted(counts.items(), key=lambda x: -x[1]))])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed": speed, "gpu": gpu, "learning": learning},
    "docs/performance.md": {
        "logits": logits,
        "divergence": divergence,
        "linear": linear,
        "memory": memory,
        "updates": updates,
        "gpu-linear": gpu_linear,
    },
    "docs/results.md": {
        "family": partial(worth, "family"),
        "addition_more": partial(worth, "addition_more"),
        "cme": partial(worth, "cme"),
        "siblings": partial(worth, "siblings"),
        "cepo_knobs": partial(worth, "cepo_knobs"),
        "smollm2": partial(worth, "smollm2"),
        "cost": cost,
    },
    "docs/reliability.md": {
        "campaign": campaign,
        "killed": killed,
        "damaged": damaged,
        "filled": filled,
        "broken": broken,
        "fuzzed": fuzzed,
        "resident": resident,
    },
}


def main() -> int:
    for page, tables in PAGES.items():
        path = ROOT / page
        text = path.read_text()
        for name, made in tables.items():
            begin, end = f"<!-- {name}: benchmarks/readme.py writes this -->", f"<!-- /{name} -->"
            if begin not in text or end not in text:
                print(f"{page}: expected the markers {begin!r} and {end!r}", file=sys.stderr)
                return 2
            before, after = text.split(begin)[0], text.split(end)[1]
            text = f"{before}{begin}\n{made()}\n{end}{after}"
        path.write_text(text)
    shutil.copyfile(RESULTS / "family" / "results.png", ROOT / "docs" / "family.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
