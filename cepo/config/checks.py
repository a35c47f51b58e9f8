"""The checks of a configuration: one line that names the option, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection

from cepo.errors import InputError


def require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise InputError(f"{name}: expected {expected}, got {got!r}")


def one_of(name: str, got: str, choices: Collection[str]) -> None:
    require(got in choices, name, f"one of {', '.join(choices)}", got)


def check_seed(name: str, seed: int) -> None:
    require(0 <= seed < 1 << 63, name, "a number in [0, 2^63)", seed)


def check_temperature(name: str, temperature: float) -> None:
    require(1e-30 <= temperature <= 1e30, name, "a number in [1e-30, 1e30]", temperature)
