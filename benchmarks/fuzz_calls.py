"""Calls of every op made of random numbers, and ways to make one of their arguments wrong: for `fuzz_ops`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cepo_kernels import backends

NAN, INF = float("nan"), float("inf")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (*SIXTEEN_BIT, torch.float32)
WIDTHS = (1, 2, 3, 5, 8, 17, 33, 100, 257, 1030)
SHAPES = ((), (1,), (4,), (5,), (2, 3), (3, 1), (0,), (2, 0), (2, 1, 2))
CPU = tuple(name for name in ("cpu", "cpu:portable", "cpu:avx2", "cpu:avx512", "auto")
            if name == "auto" or backends.unavailable(name, "cpu") is None)  # fmt: skip

Arguments = dict[str, Any]


class Maker:
    """What a call is made of, all of it decided by one number."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(63))
        self.shape: tuple[int, ...] = self.rng.choice(SHAPES)
        self.vocabulary: int = self.rng.choice(WIDTHS)
        self.width: int = self.rng.choice((1, 2, 7, 32))
        self.hostile = self.rng.random() < 0.35

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def matrix(self, columns: int, dtype: torch.dtype, spread: float, poison: tuple[float, ...]) -> Tensor:
        """(*shape, columns) in a random layout whose last dimension is contiguous, perhaps with poison in it."""
        values = self.normal(*self.shape, columns) * spread
        if self.hostile and values.numel():
            flat = values.view(-1, columns)
            for _ in range(self.rng.randint(1, 3)):
                row, what = self.rng.randrange(len(flat)), self.rng.choice(poison)
                if self.rng.random() < 0.15:
                    flat[row] = what
                else:
                    flat[row, self.rng.randrange(columns)] = what
        return self.laid_out(values.to(dtype))

    def laid_out(self, values: Tensor) -> Tensor:
        """The same values elsewhere: rows apart, off alignment, leading dimensions swapped or expanded."""
        layout = self.rng.randrange(5)
        if layout == 1 and values.ndim > 1:
            apart = torch.full((*values.shape[:-1], values.shape[-1] + self.rng.randint(1, 9)), NAN, dtype=values.dtype)
            apart[..., : values.shape[-1]] = values
            return apart[..., : values.shape[-1]]
        if layout == 2:
            shift = self.rng.randint(1, 7)
            storage = torch.full((values.numel() + shift,), NAN, dtype=values.dtype)
            return storage[shift:].view(values.shape).copy_(values)
        if layout == 3 and values.ndim == 3:
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == 4 and values.ndim == 2 and len(values):
            return values[:1].expand(values.shape)
        return values

    def logits(self) -> Tensor:
        dtype = self.rng.choice((*DTYPES, torch.float32))
        most = torch.finfo(dtype).max
        spread = self.rng.choice((0.0, 0.1, 1.0, 3.0, 10.0, 100.0))
        return self.matrix(self.vocabulary, dtype, spread, (NAN, INF, -INF, -INF, -most, -most, 1e4, -1e4))

    def hidden(self, width: int | None = None) -> Tensor:
        return self.matrix(width or self.width, self.rng.choice(DTYPES), 1.0, (NAN, INF, -INF, 0.0))

    def per_row(self, make: Callable[..., Tensor]) -> Tensor:
        """One value per row, of any shape that is allowed."""
        sizes = [1 if self.rng.random() < 0.2 else size for size in self.shape]
        return make(*(() if self.rng.random() < 0.2 else sizes))

    def number(self, low: float, high: float) -> float | Tensor:
        value = self.rng.choice((low, high, *(self.rng.uniform(low, high) for _ in range(3))))
        return value if self.rng.random() < 0.7 else torch.tensor(value, dtype=torch.float64)

    def maybe(self, share: float, make: Callable[[], Any]) -> Any:
        return make() if self.rng.random() < share else None

    def labels(self) -> Tensor:
        labels = torch.randint(self.vocabulary, self.shape, generator=self.generator)
        ignored = torch.rand(self.shape, generator=self.generator) < self.rng.choice((0.0, 0.3, 1.0))
        return labels.masked_fill(ignored, -100).to(self.rng.choice((torch.int64, torch.int32)))

    def advantages(self) -> Tensor:
        values = self.per_row(self.normal)
        values = torch.where(torch.rand(values.shape, generator=self.generator) < 0.3, 0.0, values)
        if self.hostile and values.ndim and values.numel() and self.rng.random() < 0.3:
            values.view(-1)[0] = self.rng.choice((NAN, INF, -INF))
        return values.to(self.rng.choice((torch.float32, torch.float64, torch.bfloat16)))

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.7

    def options(self) -> Arguments:
        found: Arguments = {"backend": self.rng.choice(CPU)}
        if self.rng.random() < 0.4:
            row = self.rng.random() < 0.5
            found["temperature"] = self.per_row(lambda *s: self.normal(*s).abs() + 0.3) if row else self.number(0.3, 3)
        if self.rng.random() < 0.3:
            found["logit_scale"] = self.number(0.25, 2)
        if self.rng.random() < 0.25:
            found["logit_softcap"] = self.number(1, 50)
        return found

    def of_labels(self) -> Arguments:
        return {"labels": self.labels(), "return_entropy": self.rng.random() < 0.6, **self.options()}

    def of_credit(self, required: bool) -> Arguments:
        found: Arguments = {"lam": self.number(0, 1), "eps_w": self.number(0, 0.99)}
        found["advantages"] = self.advantages() if required else self.maybe(0.7, self.advantages)
        found["negative_mask"] = self.maybe(0.4, lambda: self.per_row(self.mask))
        return found

    def of_loss(self) -> Arguments:
        rng = self.rng
        found = {
            "surrogate": rng.choice(("ppo", "cispo")),
            "clip_low": self.number(0, 1),
            "clip_high": self.number(0, 2),
        }
        found["old_logprobs"] = self.maybe(0.6, lambda: -self.normal(*self.shape).abs() * 3)
        found["token_weight"] = self.maybe(0.5, lambda: self.per_row(self.normal))
        found["denominator"] = self.maybe(0.4, lambda: self.number(0.5, 9))
        found["entropy_coef"] = rng.choice((0.0, 0.0, 0.02, -0.3))
        if rng.random() < 0.4:
            found |= {"kl_coef": self.number(0.01, 0.5), "ref_logprobs": -self.normal(*self.shape).abs() * 3}
        return found

    def of_divergence(self) -> Arguments:
        rng = self.rng
        found: Arguments = {"kind": rng.choice(("forward_kl", "reverse_kl", "jsd")), "beta": self.number(0, 1)}
        found["mask"] = self.maybe(0.4, lambda: self.per_row(self.mask))
        found["token_weight"] = self.maybe(0.4, lambda: self.per_row(self.normal))
        found["clip"] = self.maybe(0.3, lambda: self.number(0.01, 0.5))
        found["top_k"] = self.maybe(0.3, lambda: rng.choice((1, 2, 5, 40, 10_000)))
        return found | self.options()

    def head(self, prefix: str = "", width: int | None = None) -> Arguments:
        weight = self.normal(self.vocabulary, width or self.width) * self.rng.choice((0.1, 1.0, 2.0))
        bias = self.maybe(0.4, lambda: self.normal(self.vocabulary).to(self.rng.choice(DTYPES)))
        weight = weight.to(self.rng.choice(DTYPES))
        return {f"{prefix}lm_head_weight": weight, f"{prefix}lm_head_bias": bias,
                "logits_dtype": self.maybe(0.1, lambda: self.rng.choice(SIXTEEN_BIT))}  # fmt: skip

    def logprobs(self) -> Tensor:
        values = -self.normal(*self.shape).abs() * self.rng.choice((0.1, 3.0, 50.0))
        if self.hostile and values.numel():
            values.view(-1)[0] = self.rng.choice((NAN, INF, -INF))
        return values.to(self.rng.choice((torch.float32, torch.float64)))

    def call(self, op: str) -> Arguments:
        """Arguments by name, every one of them allowed."""
        teacher = self.hidden if op.startswith("linear") else self.logits
        if op == "contrastive_credit":
            found = {"positive_logprobs": self.logprobs(), "policy_logprobs": self.logprobs(),
                     "mask": self.maybe(0.4, lambda: self.per_row(self.mask)), **self.of_credit(True)}  # fmt: skip
            return found | {"negative_logprobs": self.maybe(0.7, self.logprobs)}
        if op == "divergence":
            return {"student_logits": self.logits(), "teacher_logits": self.logits(), **self.of_divergence()}
        if op == "linear_divergence":
            other = self.rng.choice((self.width, 3))
            found = {"student_hidden": self.hidden(), **self.head(), **self.of_divergence()}
            if other == self.width and self.rng.random() < 0.5:
                return found | {"teacher_hidden": self.hidden()}
            theirs = self.head("teacher_", other)
            return found | {"teacher_hidden": self.hidden(other), **theirs, "logits_dtype": found["logits_dtype"]}
        found = self.of_labels() | (self.head() if op.startswith("linear") else {})
        if op.endswith("token_logprobs"):
            return found | {"hidden_states" if op.startswith("linear") else "logits": teacher()}
        found |= self.of_credit(op.endswith("loss")) | (self.of_loss() if op.endswith("loss") else {})
        kind = "hidden" if op.startswith("linear") else "logits"
        return found | {f"policy_{kind}": teacher(), f"positive_{kind}": self.maybe(0.8, teacher),
                        f"negative_{kind}": self.maybe(0.7, teacher)}  # fmt: skip


FROM_LOGITS = ("token_logprobs", "contrastive_logprobs", "contrastive_policy_loss", "divergence")
OPS = (*FROM_LOGITS, *(f"linear_{op}" for op in FROM_LOGITS), "contrastive_credit")
STATES = {"token_logprobs": "logits", "linear_token_logprobs": "hidden_states", "divergence": "student_logits",
          "linear_divergence": "student_hidden", "contrastive_credit": "positive_logprobs"}  # fmt: skip


def states_of(op: str) -> str:
    """The argument that a gradient goes to."""
    return STATES.get(op, "policy_hidden" if op.startswith("linear") else "policy_logits")


# --- one argument wrong ----------------------------------------------------------------------------------------------

ODD: dict[str, tuple[Any, ...]] = {
    "lam": (1.5, -0.1, NAN, INF, "x", None, True, torch.tensor(2.0), torch.ones(2), torch.tensor(1j), 10**400, [0.5]),
    "eps_w": (1.0, -0.1, NAN, "x", None, torch.ones(1), torch.tensor(-1.0)),
    "temperature": (0.0, -1.0, NAN, INF, "hot", None, True, 1e31, torch.tensor(0.0), torch.tensor(1), 10**400),
    "logit_scale": (0.0, -1.0, NAN, INF, None, "x", torch.ones(2), 1e-31),
    "logit_softcap": (0.0, -1.0, NAN, INF, "x", torch.ones(2)),
    "ignore_index": (None, 3.5, True, "x", 2**70),
    "backend": ("abacus", "", None, 3, [], "cuda", b"cpu"),
    "surrogate": ("gspo", "", None, [], 1),
    "clip_low": (-0.1, 1.5, NAN, None, "x"),
    "clip_high": (-1.0, NAN, None, "x"),
    "denominator": (0.0, -1.0, NAN, INF, "x", torch.ones(2)),
    "entropy_coef": (INF, NAN, None, "x"),
    "kl_coef": (INF, NAN, None, "x"),
    "kind": ("hellinger", "", None, [], 0),
    "beta": (1.5, -0.1, NAN, None, "x", torch.ones(2)),
    "clip": (-1.0, NAN, INF, "x"),
    "top_k": (0, -3, 2.5, True, "x", 2**70),
    "logits_dtype": (torch.float32, torch.int8, "bfloat16", 16),
    "labels": ("float", "list", "shape", "range", "range", "range", "bool"),
    "advantages": ("int", "number", "shape", "list"),
    "negative_mask": ("float", "number", "shape"),
    "mask": ("float", "number", "shape"),
    "token_weight": ("int", "number", "shape"),
    "old_logprobs": ("int", "number", "shape"),
    "ref_logprobs": ("int", "number", "shape"),
    "policy_logprobs": ("int", "number", "shape"),
    "lm_head_bias": ("int", "number", "longer", "deeper"),
}
OF_STATES = ("int", "complex", "list", "None", "shape", "strided")
OF_TEACHERS = ("int", "number", "shape", "longer")
OF_HEADS = ("int", "complex", "list", "scalar", "longer", "empty", "None")


def spoil(op: str, call: Arguments, make: Maker) -> str | None:
    """Make one argument of `call` wrong; what was done, or None if that was not possible."""
    rng, states = make.rng, states_of(op)
    weights = [name for name in call if name.endswith("lm_head_weight")]
    others = [
        name
        for name, value in call.items()
        if isinstance(value, Tensor)
        and name.startswith(("positive_", "negative_", "teacher_"))
        and name not in (*weights, "negative_mask", states)
    ]
    known = set(ODD) & (set(call) | {"ignore_index"} - {"ignore_index" if "labels" not in call else ""})
    name = rng.choice((*sorted(known), states, *others, *weights))
    odd = ODD.get(name, OF_STATES if name == states else OF_HEADS if name in weights else OF_TEACHERS)
    what, value = rng.choice(odd), call.get(name)
    if what == "None" and name == "teacher_lm_head_weight":  # the student's, then
        return None
    if (name in ODD and not isinstance(ODD[name][0], str)) or name in ("backend", "surrogate", "kind"):
        call[name] = what
        if name == "kl_coef":
            call.setdefault("ref_logprobs", torch.zeros(make.shape))
        return f"{name}={str(what)[:40]}"
    if what == "strided" and "logits" not in name:  # which a matrix product takes
        return None
    spoilt = _spoilt(what, value, make)
    if spoilt is None:
        return None
    call[name] = None if what == "None" else spoilt
    return f"{name}: {what}"


def _spoilt(what: str, value: Tensor, make: Maker) -> Any:
    if what == "range":
        if not value.numel():
            return None
        wrong = value.clone().view(-1)
        far = (make.vocabulary, -1, -99, -101, 2**31 - 1, *((2**40, -(2**40)) if value.dtype == torch.int64 else ()))
        wrong[make.rng.randrange(len(wrong))] = make.rng.choice(far)
        return wrong.view(value.shape)
    if what == "strided":
        if value.shape[-1] < 2:
            return None
        return value.repeat_interleave(2, -1)[..., ::2]
    if what == "longer" and not (value.ndim and value.numel()):
        return None
    made: dict[str, Callable[[], Any]] = {
        "float": lambda: value.double(), "bool": lambda: value > 0, "int": lambda: torch.zeros(value.shape).int(),
        "complex": lambda: torch.zeros(value.shape).cfloat(), "list": lambda: [[1.0]], "number": lambda: 1.5,
        "None": lambda: 0, "scalar": lambda: torch.ones(()), "empty": lambda: value[:0],
        "shape": lambda: torch.ones((2, *value.shape, 3, 1)).to(value.dtype),
        "longer": lambda: torch.cat([value, value[..., :1]], -1), "deeper": lambda: value[None],
    }  # fmt: skip
    return made[what]()
