"""The configuration: one small dataclass per part of the loop, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from cepo import axes
from cepo.config.checks import require
from cepo.config.launch import LogConfig, ProcessesConfig
from cepo.config.methods import AdvantageConfig, CreditConfig, LossConfig, RewardConfig, RredcotConfig
from cepo.config.parts import (
    FEEDBACK_HINT,
    HINT,
    SIBLING_HINT,
    SOLUTION_HINT,
    SPLICE,
    CheckpointConfig,
    DiagnoseConfig,
    EvalConfig,
    LoraConfig,
    PolicyConfig,
    ReportConfig,
    RolloutConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "FEEDBACK_HINT",
    "HINT",
    "SIBLING_HINT",
    "SOLUTION_HINT",
    "SPLICE",
    "AdvantageConfig",
    "CheckpointConfig",
    "Config",
    "CreditConfig",
    "DiagnoseConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "PolicyConfig",
    "ProcessesConfig",
    "ReportConfig",
    "RewardConfig",
    "RolloutConfig",
    "RredcotConfig",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
]


@dataclass
class Config:
    """Everything a run is made of.

    Args:
        policy: the model that learns.
        task: where the problems come from.
        rollout: how completions are sampled.
        teacher: what the teachers are told.
        reward: how good is a rollout?
        advantage: relative to its group?
        credit: which tokens earned it?
        rredcot: how credit `rredcot` splits a response and values its segments.
        loss: how does the policy move?
        train: the optimisation.
        eval: held-out accuracy, sampled and greedy.
        checkpoint: what survives a crash.
        report: which rollouts are kept token by token.
        processes: several that train one model.
        log: who is told of the run besides its metrics.jsonl.
        backend: of cepo_kernels: auto, triton, cpu, cpu:avx512, cpu:avx2, cpu:portable or reference; `cepo doctor` says
            which run here.
        run_dir: where the run is kept; null: a fresh directory under runs/.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    rredcot: RredcotConfig = field(default_factory=RredcotConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    log: LogConfig = field(default_factory=LogConfig)
    backend: str = "auto"
    run_dir: str | None = None

    def check(self) -> Config:
        """Fill in what depends on a method's name. Raises InputError, in one line, for the first bad value."""
        for section in fields(self):
            part: Any = getattr(self, section.name)
            for name, hint in get_type_hints(type(part)).items() if is_dataclass(part) else ():
                given = getattr(part, name) is not None or type(None) in get_args(hint)
                require(given, f"{section.name}.{name}", "a value", None)
        for part in (self.policy, self.rollout, self.teacher, self.reward, self.advantage, self.credit,
                     self.rredcot, self.loss, self.train, self.eval, self.checkpoint, self.report,
                     self.log):  # fmt: skip
            part.check()
        if self.loss.distils:
            for name in ("reward", "advantage", "credit"):
                got, default = getattr(self, name).name, type(getattr(self, name))().name
                require(got == default, f"{name}.name",
                         f"{default}, the default, as loss {self.loss.name} has a teacher and reads no {name}",
                         got)  # fmt: skip
        else:
            require(self.rollout.group_size >= 2, "rollout.group_size", "at least 2 to compare",
                     self.rollout.group_size)  # fmt: skip
        counts = self.reward.name == "verifier" or self.reward.is_function
        require(counts or not self.advantage.counts_successes, "advantage.name",
                 f"one that does not count successes, which reward {self.reward.name} knows nothing of",
                 self.advantage.name)  # fmt: skip
        require(self.reward.verifier != "embedded" or self.task.name == "addition", "reward.verifier",
                 f"a model that knows task {self.task.name}", self.reward.verifier)  # fmt: skip
        for name in ("lora", "gguf_file") if self.rollout.engine == "vllm" else ():
            require(getattr(self.policy, name) is None, f"policy.{name}", "none with rollout.engine vllm",
                     getattr(self.policy, name))  # fmt: skip
        self.loss.average = self.loss.average or self.advantage.average or "token"
        if check := getattr(axes.module("credit", self.credit.name), "check", None):
            check(self)
        return self
