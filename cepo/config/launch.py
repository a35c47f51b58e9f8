"""What surrounds a run: the processes it is divided among, and who else is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cepo.config.checks import one_of

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class ProcessesConfig:
    """Several processes, started by `torchrun` or `accelerate launch`.

    Args:
        shard: divide weights, gradients and the optimiser's state among them (FSDP2); false: each has all; null: as the
            launcher was told (`accelerate launch --use_fsdp`).
    """

    shard: bool | None = None


@dataclass
class LogConfig:
    """Who is told of a run besides its metrics.jsonl.

    Args:
        trackers: any of tensorboard, wandb, trackio, through accelerate; each has to be installed.
    """

    trackers: list[str] = field(default_factory=list)

    def check(self) -> None:
        for name in self.trackers:
            one_of("log.trackers", name, TRACKERS)
