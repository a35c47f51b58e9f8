"""Many processes that train one model: which part each does, and what they tell each other.

`torchrun` and `accelerate launch` start them; a process that nobody launched is `ALONE`, and all of this costs it
nothing. Each process generates and scores its share of the groups, and all of them get all rollouts and rewards, so
that advantages, r- and whatever else is decided for a batch is decided by everyone alike, from the same numbers. Then
each learns from its share of the rollouts with a gradient, and the gradients are summed.

Between two exchanges a process works for itself, in a function that it hands to the exchange. What fails there is told
to the others: either all go on or none does. A process that dies is noticed by its closed connection.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from cepo.config import Config
from cepo.errors import InputError, ProcessError, one_line

T = TypeVar("T")

# A process that waits longer than this for another ends the run; no phase of a step should take as long.
TIMEOUT = timedelta(minutes=30)
# What launchers are told and we do not heed: the variable, what it may be, and what does it here.
_NOT_HEEDED = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "--train.prompts_per_pass divides a batch into passes"),
    ("ACCELERATE_USE_DEEPSPEED", ("false",), "--processes.shard true shards the weights"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false",), "--processes.shard true shards the weights"),
    ("FSDP_OFFLOAD_PARAMS", ("false",), "weights stay on their device"),
)
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Alone:
    """One process: everything is its own, and it waits for nobody."""

    rank, world = 0, 1
    sharded = False
    """Whether they divide the model among them."""

    def share(self, n: int, rank: int | None = None) -> range:
        """Which of n things are this process's, or another's: as many in a row as its neighbours have, or one more."""
        rank = self.rank if rank is None else rank
        return range(rank * n // self.world, (rank + 1) * n // self.world)

    def gather(self, what: str, compute: Callable[[], T], exchanges: bool = False) -> list[T]:
        """What `compute()` gives in each process, in their order.

        Args:
            what: where in the run this is.
            compute: works for itself; an error of its own is raised here and told to the others.
            exchanges: it does not, and the others may wait in the midst of it: its error ends the run.

        Raises InputError if it failed elsewhere in this way, else ProcessError.
        """
        return [compute()]

    def together(self, what: str, compute: Callable[[], T]) -> T:
        """`compute()`, if it succeeds in every process."""
        return compute()

    def first(self, what: str, compute: Callable[[], T]) -> T:
        """`compute()` of the first process alone, told to all."""
        return compute()

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Replace each gradient by its sum over processes."""

    def broadcast(self, model: torch.nn.Module) -> None:
        """Give every process the first one's weights."""

    def described(self) -> str:
        """How many they are, to be printed behind something; nothing where one is alone."""
        how = "the model divided among them" if self.sharded else "the model whole in each"
        return f" ({self.world} processes, {how})" if self.world > 1 else ""


ALONE = Alone()


class Launched(Alone):
    """One of several processes, its group initialised by accelerate, as the launcher's variables say."""

    def __init__(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InputError(
                'processes: training in several needs accelerate: pip install "cepo[accelerate]"'
            ) from error
        import torch.distributed as dist

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
        try:
            state = PartialState(cpu=cpu, timeout=TIMEOUT)
            # Facts travel by the host, whatever the gradients travel by.
            self._facts = dist.new_group(backend="gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"processes: cannot join the others: {one_line(error)[:300]}") from error
        self._dist = dist
        self.rank, self.world = state.process_index, state.num_processes

    def gather(self, what: str, compute: Callable[[], T], exchanges: bool = False) -> list[T]:
        value: T | None = None
        error = None
        try:
            value = compute()
        except ProcessError:
            raise  # the others know, or are gone
        except Exception as raised:  # whatever it is, the others wait for what this process says
            if exchanges and isinstance(raised, InputError):
                raise ProcessError(f"process {self.rank}: {one_line(raised)}") from raised
            if exchanges:
                raise
            error = raised
        bad_input = isinstance(error, InputError)
        failure = (
            None if error is None else one_line(error) if bad_input else f"{type(error).__name__}: {one_line(error)}"
        )
        told: list[Any] = [None] * self.world
        with self._connected():
            self._dist.all_gather_object(told, (what, value, failure, bad_input), group=self._facts)
        if error is not None:
            raise error
        for rank, (where, _, failure, bad_input) in enumerate(told):
            if failure is not None:
                raise (InputError if bad_input else ProcessError)(f"process {rank}: {failure[:500]}")
            if where != what:
                raise ProcessError(f"processes: process {rank} is at {where!r}, and process {self.rank} at {what!r}")
        return [value for _, value, _, _ in told]

    def together(self, what: str, compute: Callable[[], T]) -> T:
        box: list[T] = []
        self.gather(what, lambda: box.append(compute()))
        return box[0]

    def first(self, what: str, compute: Callable[[], T]) -> T:
        value: T = self.gather(what, lambda: compute() if self.rank == 0 else None)[0]  # type: ignore[assignment]
        return value

    def sum_gradients(self, model: torch.nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        # A weight that nobody's rollouts reach keeps no gradient at all, as in one process.
        reached = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        with self._connected():
            self._dist.all_reduce(reached, self._dist.ReduceOp.MAX, group=self._facts)
            pending = []
            for p, somewhere in zip(trained, reached.tolist(), strict=True):
                if somewhere:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    pending.append(self._dist.all_reduce(p.grad, group=self._group(p), async_op=True))
            for work in pending:
                work.wait()

    @torch.no_grad()
    def broadcast(self, model: torch.nn.Module) -> None:
        with self._connected():
            for tensor in (*model.parameters(), *model.buffers()):
                self._dist.broadcast(tensor, 0, group=self._group(tensor))

    def says_first(self) -> bool:
        """Whether no other process has asked this before: of those that find the run ended, one says so."""
        try:
            return int(self._dist.distributed_c10d._get_default_store().add("cepo/ended", 1)) == 1
        except RuntimeError:  # the one that kept the count is gone
            return True

    def leave(self) -> None:
        self._dist.destroy_process_group()

    def _group(self, tensor: torch.Tensor) -> Any:
        return self._facts if tensor.device.type == "cpu" else None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Say in one line what a failed exchange means."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"processes: another one has died or does not answer: {one_line(error)[:200]}"
            ) from error


def launched() -> bool:
    """Whether a launcher started this process as one of several. Raises InputError for one that does not say which."""
    told = os.environ.get
    size = told("WORLD_SIZE")
    if size is None and told("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
        found = "accelerate launch --cpu, which starts one process whatever --num_processes says"
    elif size is None and (name := next((n for n in _OF_MPI if told(n, "1") != "1"), None)):
        found = f"{name}={told(name)} of MPI, whose processes would each train alone"
    else:
        return size not in (None, "1")
    raise InputError(f"processes: expected torchrun or accelerate launch --multi_gpu (on CPUs as well), got {found}")


def shards(config: Config, many: Alone) -> bool:
    """Whether the run divides its model. Raises InputError for what the launcher was told and the run would not do."""
    precision = {"bfloat16": ("no", "bf16")}.get(config.policy.compute_dtype, ("no",))
    for name, allowed, instead in (
        ("ACCELERATE_MIXED_PRECISION", precision, "--policy.compute_dtype says in what the model computes"),
        *_NOT_HEEDED,
    ):
        if (got := os.environ.get(name, allowed[0]).lower()) not in allowed:
            raise InputError(f"{name} of the launcher: expected {' or '.join(allowed)}, got {got}; {instead}")
    wanted = config.processes.shard
    if wanted is None:
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wanted and many.world > 1  # one alone has all parts


@contextmanager
def started() -> Iterator[Alone]:
    """The processes of this run. Of an end that all of them meet, one speaks; the others leave without a word."""
    if not launched():
        yield ALONE
        return
    many = Launched()
    # Launchers end the others when one fails: that is to be told as well, and to leave the way any error does.
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        yield many
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # on its way out, with perhaps a word to say
        shared = isinstance(error, (InputError, KeyboardInterrupt))  # the first process has it too
        if many.says_first() if isinstance(error, ProcessError) else not (shared and many.rank):
            raise
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    signal.signal(signal.SIGTERM, before)
    many.leave()


def _told_to_end(number: int, frame: object) -> None:
    raise ProcessError("processes: the launcher ends this one, as it does when another has failed")
