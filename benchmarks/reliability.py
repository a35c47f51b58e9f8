"""Tries to break the trainer and the kernels, and counts: `python benchmarks/reliability.py [PART ...]`.

Writes benchmarks/results/reliability.json, part by part; without arguments all parts, in about an hour of one core:

    kills     runs killed at random moments, resumed, and compared bit for bit with runs that were left alone
    damage    every file of a checkpoint cut, changed, emptied or removed; files that bring code
    disk      a disk that fills up in the midst of a save (in a tmpfs of its own: needs `unshare`)
    steps     NaN and infinities in weights, logits, loss and gradient; rewards of every bad kind; odd generations
    ops       random calls of the kernels (`fuzz_ops.py`)
    inputs    random configs and JSONL files (`fuzz_inputs.py`)
    memory    resident memory over as many steps of a tiny model as fit into --minutes
    network   training and evaluation where no connection can be made

With `--add --seed N` a part of which there are results already is tried again at random, and counted with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import broken_steps
import fuzz_inputs
import torch
import trials
from conftest import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/reliability.json"


def kills(count: int, folder: Path, seed: int = 0, most: int = 6) -> dict[str, Any]:
    """Kill runs of every kind, up to `most` times each, `count` times in all, and let them end."""
    rng = random.Random(seed)
    whole = {name: trials.whole_run(folder / f"whole-{name}", options) for name, options in trials.KINDS.items()}
    found: Counter[str] = Counter()
    wrong: list[str] = []
    runs = 0
    while found.total() < count:
        name = list(trials.KINDS)[runs % len(trials.KINDS)]
        run, (reference, seconds) = folder / f"killed-{runs}", whole[name]
        runs += 1
        for _ in range(rng.randint(1, most)):
            arguments = trials.start_of(run, trials.KINDS[name])
            moment = rng.choice(("save", "save", "any")) if (run / "checkpoints").is_dir() else "any"
            where = trials.kill_one(arguments, run, rng, moment, seconds)
            if where is None:  # it had ended
                break
            found[where] += 1
        status, told = trials.ends(trials.start_of(run, trials.KINDS[name]))
        difference = f"status {status}: {told}" if status else trials.difference(reference, run)
        if difference:
            wrong.append(f"run {runs} ({name}): {difference}")
        shutil.rmtree(run, ignore_errors=True)
        print(f"{found.total()} kills, {runs} runs, {len(wrong)} wrong", file=sys.stderr)
    return {"kills": found.total(), "runs": runs, "where": dict(found), "wrong": wrong}


def damage(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Damage each file of a run; every outcome is a refusal that names the file, or the undisturbed result."""
    rng = random.Random(seed)
    run, whole = folder / "run", folder / "whole"
    options = trials.KINDS["opsd"]
    trials.whole_run(whole, options)
    trials.whole_run(run, [*options, "--train.steps", "2"])
    newest = run / "checkpoints" / "step-000002"
    found: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    for path in (*files, run / "teacher.pt"):
        of = found.setdefault("teacher.pt" if path.parent == run else "checkpoint", Counter())
        for kind, content in trials.damages(path.read_bytes(), rng):
            kept = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            resume = ["train", "--resume", str(run), "--train.steps", str(trials.STEPS)]
            look = ["eval", "--policy.model", str(run), "--eval.problems", "4"]  # which reads no teacher
            for arguments in (resume, look) if path.parent != run and kind in ("removed", "cut in half") else (resume,):
                status, told = trials.ends(arguments)
                of_manifest = path.name == "manifest.json" and "is damaged" in told  # which names what it has no sum of
                named = status == 2 and trials.one_error(told) and (path.name in told or of_manifest)
                offered = path.parent == run or ("--resume" in told and "step-000001" in told)
                of["refused, the file named"] += named and offered
                if not (named and offered):
                    wrong.append(f"{path.name} {kind}, {arguments[0]}: status {status}: {told[-400:]}")
            path.write_bytes(kept)
    for path in (run / "metrics.jsonl", run / "config.yaml", *sorted((run / "tokens").iterdir())):
        of = found.setdefault(path.parent.name if path.parent != run else path.name, Counter())
        for kind, content in trials.damages(path.read_bytes(), rng):
            copy = folder / "copy"
            shutil.copytree(run, copy)
            damaged = copy / path.relative_to(run)
            damaged.unlink() if content is None else damaged.write_bytes(content)
            status, told = trials.ends(["train", "--resume", str(copy), "--train.steps", str(trials.STEPS)])
            if status == 2 and trials.one_error(told):
                of["refused in one line"] += 1
            elif status == 0 and (path.name == "config.yaml" or not trials.weights_differ(whole, copy)):
                of["the same weights" if path.name != "config.yaml" else "another config, as valid"] += 1
            else:
                wrong.append(f"{path.name} {kind}: status {status}: {told[-400:]}")
            shutil.rmtree(copy)
    status, told = trials.ends(
        ["train", "--resume", str(run / "checkpoints" / "step-000001"), "--train.steps", str(trials.STEPS)]
    )
    if status or (told := trials.weights_differ(whole, run)):
        wrong.append(f"from the previous checkpoint: status {status}: {told}")
    code = trials.bring_code(folder)
    return {"of": {name: dict(of) for name, of in found.items()}, "files": [p.name for p in files], "code": code,
            "wrong": [*wrong, *(f"{name}: {what}" for name, what in code.items() if what != "refused")]}  # fmt: skip


def disk(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """In a tmpfs at `folder`: leave room for a random part of the next save, then all the room it needs."""
    rng = random.Random(seed)
    whole, base, run = folder.parent / "whole", folder.parent / "base", folder / "run"
    options = trials.KINDS["cepo"]
    trials.whole_run(whole, options)
    trials.whole_run(base, [*options, "--train.steps", "1"])
    size = sum(p.stat().st_size for p in (base / "checkpoints").rglob("*") if p.is_file())
    found: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        shutil.copytree(base, run)
        room = int(size * rng.uniform(0, 1)) if number % 4 else rng.randrange(1 << 16)
        trials.fill(folder / "ballast", room)
        status, told = trials.ends(["train", "--resume", str(run), "--train.steps", str(trials.STEPS)])
        if status == 0:
            found["there was room"] += 1
        elif (
            status == 2
            and "No space left on device" in told
            and told.strip().splitlines()[-1].startswith("cepo: error:")
        ):
            what = told.partition("cannot write ")[2].partition(":")[0]
            found[
                next((name for name in ("config.yaml", "metrics.jsonl", "tokens") if name in what), "checkpoint")
            ] += 1
        else:
            wrong.append(f"{room} bytes: status {status}: {told[-400:]}")
        if trials.damaged(run):
            wrong.append(f"{room} bytes: a checkpoint is damaged: {trials.damaged(run)}")
        (folder / "ballast").unlink()
        status, told = trials.ends(["train", "--resume", str(run), "--train.steps", str(trials.STEPS)])
        if status or (told := trials.weights_differ(whole, run)):
            wrong.append(f"{room} bytes, then room enough: status {status}: {told[-400:]}")
        shutil.rmtree(run)
    return {"trials": count, "where": dict(found), "wrong": wrong}


def disk_in_tmpfs(count: int, seed: int) -> dict[str, Any]:
    """`disk` in a process with a mount of its own."""
    with tempfile.TemporaryDirectory() as folder:
        inside, out = Path(folder, "small"), Path(folder, "out.json")
        inside.mkdir()
        again = f"{sys.executable} {__file__} disk --at {inside} --out {out} --disk {count} --seed {seed}"
        command = f"mount -t tmpfs -o size=64m tmpfs {inside} && exec {again}"
        done = subprocess.run(["unshare", "-rm", "sh", "-c", command], check=False)
        if not out.exists():
            return {"trials": 0, "where": {}, "wrong": [f"could not be tried: status {done.returncode}"]}
        found: dict[str, Any] = json.loads(out.read_text())["disk"]
        return found


def ops(calls: int, chunk: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Processes of `chunk` calls each, so that one that crashes or hangs is known by its number."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder, "at")
        for first in range(0, calls, chunk):
            span = ("--first", str(first), "--calls", str(min(chunk, calls - first)), "--seed", str(seed))
            command = [sys.executable, str(ROOT / "benchmarks/fuzz_ops.py"), *span, "--at", str(at)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
                told = json.loads(done.stdout)
            except (subprocess.TimeoutExpired, ValueError) as error:
                wrong.append(f"{at.read_text() if at.exists() else first}: crashed or hung: {type(error).__name__}")
                break
            found.update(told["outcomes"])
            wrong += told["wrong"]
    return {"calls": found.total(), "outcomes": dict(found), "seconds": time.perf_counter() - start, "wrong": wrong}


def inputs(configs: int, files: int, seed: int = 0) -> dict[str, Any]:
    found = {what: fuzz_inputs.fuzz(what, count, seed) for what, count in (("configs", configs), ("files", files))}
    return {**{what: part["outcomes"] for what, part in found.items()},
            "wrong": [f"{what} {line}" for what, part in found.items() for line in part["wrong"]]}  # fmt: skip


def memory(minutes: float, folder: Path) -> dict[str, Any]:
    """Memory at every step of a run with evaluations, checkpoints and samples; how it grows after the first third."""
    found = torch.full((3, int(60 * minutes * 50)), -1.0, dtype=torch.float64)  # touched before the first step
    page = os.sysconf("SC_PAGE_SIZE")
    end, steps = time.perf_counter() + 60 * minutes, 0

    def each(record: dict[str, Any]) -> bool:
        nonlocal steps
        if record["kind"] == "train":
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            for row, value in zip(found, (resident, trials.allocated(), sys.getallocatedblocks()), strict=True):
                row[steps] = value
            steps += 1
        return time.perf_counter() < end and steps < found.shape[1]

    trials.endless_run(folder, each)
    slopes = {
        name: [1e4 * of for of in trials.slope(values[steps // 3 : steps])]
        for name, values in zip(("resident", "allocated", "blocks"), found, strict=True)
    }
    return {"steps": steps, "measured": steps - steps // 3, "minutes": minutes, "per_10000_steps": slopes,
            "last": int(found[0, steps - 1]), "wrong": []}  # fmt: skip


def network(folder: Path) -> dict[str, Any]:
    """Commands of a user in a process that cannot open a connection, and would say so."""
    run = folder / "run"
    tried = {
        "train": ["train", "--run_dir", str(run), *trials.SMALL],
        "resume": ["train", "--resume", str(run), "--train.steps", str(trials.STEPS + 1)],
        "eval": ["eval", "--policy.model", str(run), "--eval.problems", "4"],
        "tokens": ["tokens", str(run), "--html", str(folder / "page.html")],
        "plot": ["plot", str(run)],
        "dry run": ["train", "--dry-run"],
        "doctor": ["doctor"],
    }
    found = {name: trials.ends(arguments, trials.without_network) for name, arguments in tried.items()}
    return {
        "commands": list(found),
        "wrong": [f"{name}: status {s}: {told[-300:]}" for name, (s, told) in found.items() if s],
    }


def added(one: Any, other: Any) -> Any:
    """Two results of a part as one."""
    if isinstance(one, dict):
        return {**one, **{name: added(one[name], value) if name in one else value for name, value in other.items()}}
    return other if isinstance(one, str) else one + other


def main() -> int:
    parts = ("kills", "damage", "disk", "steps", "ops", "inputs", "memory", "network")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)}; none: all")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disk", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--configs", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="count kills, disk, ops and inputs with those of before")
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"expected any of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def within(part: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return part(Path(folder))

    numbers = (arguments.disk, arguments.seed)
    doing: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: within(lambda folder: kills(arguments.kills, folder, arguments.seed)),
        "damage": lambda: within(damage),
        "disk": lambda: disk(*numbers, arguments.at) if arguments.at else disk_in_tmpfs(*numbers),
        "steps": lambda: within(broken_steps.run_all),
        "ops": lambda: ops(arguments.calls, seed=arguments.seed),
        "inputs": lambda: inputs(arguments.configs, arguments.files, arguments.seed),
        "memory": lambda: within(lambda folder: memory(arguments.minutes, folder)),
        "network": lambda: within(network),
    }
    failed = False
    for name in arguments.parts or parts:
        start = time.perf_counter()
        found = doing[name]()
        found |= {"seconds": time.perf_counter() - start, "date": date.today().isoformat()}
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        if arguments.add and name in ("kills", "disk", "ops", "inputs") and name in result:
            found = added(result[name], found)
        result |= {"machine": machine(), name: found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{name}: {len(found['wrong'])} wrong in {found['seconds']:.0f} s",
            *found["wrong"][:20],
            sep="\n  ",
            flush=True,
        )
        failed |= bool(found["wrong"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
