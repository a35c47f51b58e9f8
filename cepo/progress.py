"""What a person sees of a run: training in a bar, evaluations and now and then a whole step as lines above it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
_LINES = 20  # whole steps shown over a run


def follow(records: Iterable[dict[str, Any]], steps: int, done: int = 0) -> None:
    """Show the records of a run of `steps`, of which `done` were taken before, as they come."""
    from tqdm import tqdm

    first: dict[str, Any] | None = None
    latest: dict[str, Any] = {}
    warned = False
    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, bar_format=_BAR) as bar:
        for record in records:
            step = record["step"]
            if record["kind"] == "eval":
                first, latest = first or record, record
                bar.write(
                    f"step {step:4d}  held-out accuracy: sampled {record['sampled']:.3f}, "
                    f"greedy {record['greedy']:.3f}  ({record['problems']} problems of {record['split']})"
                )
                continue
            reward = "" if record["reward"] is None else f"reward {record['reward']:.2f} "
            bar.set_postfix_str(f"{reward}acc {record['accuracy'] or 0:.2f}", refresh=False)
            bar.update(step - bar.n)
            if record["skipped_updates"] and not warned:
                warned = True
                # metrics.jsonl counts them all
                bar.write(
                    f"warning: step {step}: {record['not_finite']} not finite, its update is skipped", file=sys.stderr
                )
            if step == steps or step % max(1, steps // _LINES) == 0:
                width = shutil.get_terminal_size().columns
                bar.write(textwrap.fill(summary(record), width, subsequent_indent=" " * 11), file=sys.stderr)
    if first is not None and latest["step"] > first["step"]:
        gain = 100 * (latest["sampled"] - first["sampled"])
        print(f"sampled accuracy {first['sampled']:.3f} -> {latest['sampled']:.3f} ({gain:+.1f} points)")


def summary(record: dict[str, Any]) -> str:
    """A step in one line: the numbers a person watches, and where its time went."""

    def show(key: str, label: str, form: str = ".2f") -> list[str]:
        return [] if record.get(key) is None else [f"{label} {record[key]:{form}}"]

    whole = sum(record["seconds"].values())
    phases = " ".join(f"{name} {seconds / whole:.0%}" for name, seconds in record["seconds"].items() if name != "other")
    parts = [
        *show("reward", "reward"),
        *show("reward_control", "control"),
        *show("accuracy", "acc"),
        *show("entropy", "H", ".3f"),
        *show("zero_variance", "flat"),
        *show("alpha", "alpha"),
        *show("lam", "lam"),
        *show("evidence_right", "ev+"),
        *show("evidence_wrong", "ev-"),
        *show("weight_clipped", "clip"),
        *show("divergence", "div", ".3f"),
        *show("dropped", "dropped"),
        *show("tokens_per_second", "tok/s", ".0f"),
    ]
    return f"step {record['step']:4d}  {' '.join(parts)} | {phases}"
