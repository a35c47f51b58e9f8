"""The plan of a comparison: what it may say, and the cells it asks for.

    base: {train: {steps: 40}}                        # any config overrides, shared by all
    methods: {grpo: {credit: {name: uniform}}, cepo: {credit: {name: cepo}}}
    tasks: {addition: {}}                             # name -> overrides; a method's come last
    seeds: [0, 1, 2, 3, 4]
    tuning: {lr: [1e-4, 3e-4, 1e-3], seeds: [100, 101]}   # left out: the base's learning rate
    reference: grpo                                   # the rest are its defaults
    metric: sampled                                   # or greedy: what decides the learning rate and the verdict
    test_problems: 2000
    pass_at: {k: 8, problems: 256}                    # at most test_problems
    cell_seconds: 90                                  # a longer cell is told of; null: none

The learning rate of a method on a task is the one of best mean accuracy over the tuning seeds, on validation problems
(`eval.problems` of them); of equals the smallest. Its cells on `seeds` then meet the test problems.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cepo import cli
from cepo.compare.files import digests, models
from cepo.config import Config, document
from cepo.config.checks import check_seed, one_of, require
from cepo.config.effects import require_effect
from cepo.errors import InputError, one_line

BASE = "base"
METRICS = ("sampled", "greedy")
_DEFAULTS: dict[str, Any] = {
    "base": {},
    "tuning": None,
    "reference": "grpo",
    "metric": "sampled",
    "test_problems": 2000,
    "pass_at": {"k": 8, "problems": 256},
    "cell_seconds": None,
}
_NEEDED = ("methods", "tasks", "seeds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*")
# What a method may not change, or it would be compared on other terms.
_SHARED = ("policy", "task", "rollout", "train", "eval", "checkpoint", "backend", "run_dir", "reward.success_threshold")
_SET_HERE = {"train.seed": "seeds", "eval.split": "the kind of cell", "run_dir": "--out"}


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: "base" (evaluation alone), "tuning" (on validation) or "final" (on test)."""

    kind: str
    task: str
    method: str
    config: Config
    pass_at: Mapping[str, int] | None
    files: Mapping[str, str | None] = field(default_factory=dict)
    """Digests of those that its config names, as they were when the cell was made."""
    models: Mapping[str, str] = field(default_factory=dict)
    """The same of directories with models; no part of its hash, as they may be put away when it is finished."""

    @property
    def lr(self) -> float:
        return self.config.train.lr

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def name(self) -> str:
        return f"{self.task}-{BASE}" if self.kind == BASE else f"{self.task}-{self.method}-{self._run}"

    @property
    def directory(self) -> Path:
        return Path(self.task, self.method, self._run)

    @property
    def _run(self) -> str:
        return f"lr{self.lr:g}-seed{self.seed}"

    @property
    def content(self) -> dict[str, Any]:
        """What of its config decides its numbers."""
        return identity(asdict(self.config))

    @property
    def hash(self) -> str:
        return digest([self.content, self.pass_at, *([self.files] if self.files else [])])


@dataclass(frozen=True)
class Plan:
    """A checked plan."""

    name: str
    configs: Mapping[tuple[str, str], Config]
    """For each task and method; for each task and "base" without any method's overrides."""
    methods: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[float]
    """To choose from, ascending; none: each config's own stands."""
    tuning_seeds: Sequence[int]
    reference: str
    metric: str
    test_problems: int
    pass_at: Mapping[str, int]
    cell_seconds: float | None

    def base(self, task: str) -> Cell:
        return self._cell("base", task, BASE, {})

    def tuning(self, task: str, method: str, lr: float, seed: int) -> Cell:
        return self._cell("tuning", task, method, {"lr": lr, "seed": seed})

    def final(self, task: str, method: str, lr: float, seed: int) -> Cell:
        return self._cell("final", task, method, {"lr": lr, "seed": seed})

    def rates_of(self, task: str, method: str) -> Sequence[float]:
        return self.rates or (self.configs[task, method].train.lr,)

    def every(self) -> Iterator[Cell]:
        """All cells that could be asked for, whichever learning rates are chosen."""
        for task in self.tasks:
            yield self.base(task)
            for method in self.methods:
                for lr in self.rates_of(task, method):
                    yield from (self.tuning(task, method, lr, seed) for seed in self.tuning_seeds)
                    yield from (self.final(task, method, lr, seed) for seed in self.seeds)

    def __len__(self) -> int:
        """The number of cells that will be run."""
        per_method = len(self.rates) * len(self.tuning_seeds) + len(self.seeds)
        return len(self.tasks) * (1 + len(self.methods) * per_method)

    def _cell(self, kind: str, task: str, method: str, train: Mapping[str, Any]) -> Cell:
        config = copy.deepcopy(self.configs[task, method])
        for name, value in train.items():
            setattr(config.train, name, value)
        if kind == "tuning":
            config.eval.split, config.eval.every = "validation", 0
        else:
            config.eval.split, config.eval.problems = "test", self.test_problems
        return Cell(
            kind, task, method, config, None if kind == "tuning" else self.pass_at, digests(config), models(config)
        )


@functools.cache
def defaults() -> dict[str, Any]:
    """The config of a run that is told nothing."""
    return asdict(Config().check())


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What sets a config apart from the default one, but for where the run is kept and how often it is saved.

    A finished cell thus stays what it is when an option comes along whose default is how it was made.
    """
    apart: dict[str, Any] = {}
    for name, value in config.items():
        default = defaults().get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = {key: each for key, each in value.items() if key not in default or each != default[key]}
        if value != default and value != {} and name not in ("run_dir", "checkpoint"):
            apart[name] = value
    return apart


def digest(value: Any) -> str:
    """A short hash of anything JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path) -> Plan:
    """Read and check a plan. Raises InputError, in one line, for the first mistake."""
    try:
        content = document.load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise InputError(f"expected {', '.join(_NEEDED)}, got {content!r:.60}")
        return _check(Path(path).stem, content)
    except OSError as error:
        raise InputError(f"PLAN: expected a YAML file, got {str(path)!r}: {error.strerror}") from error
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"PLAN: expected a YAML file, got {str(path)!r}: {one_line(error)[:200]}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _check(name: str, content: dict[str, Any]) -> Plan:
    for key in content:
        one_of("keys", key, (*_NEEDED, *_DEFAULTS))
    for key in _NEEDED:
        require(key in content, key, "to be there", None)
    content, given = {**_DEFAULTS, **content}, content
    methods, tasks = _names(content, "methods"), _names(content, "tasks")
    require(BASE not in methods, "methods", "other names than that of the untrained model", BASE)
    one_of("reference", content["reference"], methods)
    one_of("metric", content["metric"], METRICS)
    rates, tuning_seeds = _tuning(content["tuning"])
    seeds = _seeds("seeds", content["seeds"])
    both = sorted({*seeds} & {*tuning_seeds})
    require(not both, "tuning.seeds", "none of seeds", both)
    pass_at, tests = content["pass_at"], content["test_problems"]
    require(isinstance(pass_at, dict) and pass_at.keys() == {"k", "problems"}, "pass_at", "k and problems", pass_at)
    counts = {"pass_at.k": (pass_at["k"], 1), "pass_at.problems": (pass_at["problems"], 0),
              "test_problems": (tests, 1)}  # fmt: skip
    for key, (value, least) in counts.items():
        require(type(value) is int and value >= least, key, f"a whole number, at least {least}", value)
    if "pass_at" not in given:
        pass_at = {**pass_at, "problems": min(pass_at["problems"], tests)}
    enough = pass_at["problems"] <= tests
    require(enough, "pass_at.problems", f"at most test_problems, {tests}", pass_at["problems"])
    limit = content["cell_seconds"]
    require(limit is None or (_is_number(limit) and limit > 0), "cell_seconds", "a number above 0, or null", limit)
    return Plan(
        name, _configs(content, bool(rates)), methods, tasks, seeds, rates, tuning_seeds, content["reference"],
        content["metric"], tests, pass_at, limit,
    )  # fmt: skip


def _names(content: dict[str, Any], key: str) -> list[str]:
    value = content[key]
    require(isinstance(value, dict) and len(value) > 0, key, "name: overrides", value)
    for name in value:
        require(isinstance(name, str) and _NAME.fullmatch(name) is not None, key, "names of [A-Za-z0-9_.+]", name)
    return list(value)


def _seeds(key: str, value: Any) -> list[int]:
    distinct = isinstance(value, list) and len(value) > 0 and all(type(seed) is int for seed in value)
    require(distinct and len({*value}) == len(value), key, "a list of different whole numbers", value)
    for seed in value:
        check_seed(key, seed)
    return list(value)


def _tuning(value: Any) -> tuple[list[float], list[int]]:
    if value is None:
        return [], []
    require(isinstance(value, dict) and value.keys() == {"lr", "seeds"}, "tuning", "lr and seeds", value)
    rates = value["lr"]
    good = isinstance(rates, list) and len(rates) > 0 and all(_is_number(lr) and 0 < lr < float("inf") for lr in rates)
    # They name directories, by six digits.
    require(good and len({f"{lr:g}" for lr in rates}) == len(rates), "tuning.lr", "different numbers above 0", rates)
    return sorted(map(float, rates)), _seeds("tuning.seeds", value["seeds"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _configs(content: dict[str, Any], tuned: bool) -> dict[tuple[str, str], Config]:
    """One config for each task and method, parsed as on the command line; a mistake is told where it stands."""
    taken = {**_SET_HERE, **({"train.lr": "tuning.lr"} if tuned else {})}
    base = _flat("base", content["base"], taken)
    _config("base", base)
    configs = {}
    for task, overrides in content["tasks"].items():
        shared = base | _flat(f"tasks.{task}", overrides, taken)
        configs[task, BASE] = _config(f"tasks.{task}", shared)
        for method, changes in content["methods"].items():
            where = f"methods.{method}"
            own = _flat(where, changes, taken)
            for key in own:
                section = key.partition(".")[0]
                what = key if key in _SHARED else section
                require(what not in _SHARED, where, "nothing that all methods share", what)
            config = _config(where, shared | own, own)
            for other in content["methods"]:
                if configs.get((task, other)) == config:
                    raise InputError(f"{where}: expected another config than methods.{other} on {task}, got the same")
            configs[task, method] = config
    return configs


def _flat(where: str, overrides: Any, taken: Mapping[str, str]) -> dict[str, str]:
    """Overrides by section as the values of `--section.key` options."""
    require(isinstance(overrides, dict), where, "a dictionary of sections, {} for none", overrides)
    flat: dict[str, str] = {}
    for section, value in overrides.items():
        one_of(where, section, [field.name for field in fields(Config)])
        keys = (
            {f"{section}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {section: value}
        )
        for key, each in keys.items():
            if key in taken:
                raise InputError(f"{where}: {key}: expected to be left to {taken[key]}, got {each!r}")
            flat[key] = each if isinstance(each, str) else json.dumps(each, default=str)
    return flat


def _config(where: str, flat: Mapping[str, str], own: Collection[str] = ()) -> Config:
    """`own`: options that have to have an effect; what is shared may be there for other methods."""
    try:
        config = cli.read(*(f"--{key}={value}" for key, value in flat.items()))
        require_effect(config, among=own)
        return config
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
