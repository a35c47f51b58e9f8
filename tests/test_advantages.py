"""The advantage axis: what each member computes, and what none of them may do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cepo import axes
from cepo.errors import InputError

MEMBERS = axes.members("advantages")
rewards = st.integers(2, 6).flatmap(
    lambda g: st.lists(st.lists(st.floats(0, 1, width=32), min_size=g, max_size=g), min_size=1, max_size=4)
)


def test_grpo_divides_by_the_unbiased_standard_deviation() -> None:
    got = axes.lookup("advantages", "grpo")(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5]]) / (torch.tensor([1.0, 0, 0, 1]).std() + 1e-4)
    assert torch.allclose(got, expected)


def test_dr_grpo_only_centres() -> None:
    got = axes.lookup("advantages", "dr_grpo")(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(got, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_rloo_compares_with_the_others() -> None:
    values = torch.tensor([[0.1, 0.7, 0.4]])
    expected = [0.1 - 0.55, 0.7 - 0.25, 0.4 - 0.4]
    assert torch.allclose(axes.lookup("advantages", "rloo")(values), torch.tensor([expected]), atol=1e-6)


@pytest.mark.parametrize("name", MEMBERS)
@given(rows=rewards)
def test_advantages_of_a_group_follow_the_rewards_and_sum_to_zero(name: str, rows: list[list[float]]) -> None:
    values = torch.tensor(rows)
    got = axes.lookup("advantages", name)(values)
    assert got.shape == values.shape
    assert torch.equal(
        axes.lookup("advantages", name)(values.round().long()), axes.lookup("advantages", name)(values.round())
    )
    if name != "rl2ml":  # whose multiplier depends on the others: its advantages have mean 0 over outcomes alone
        assert torch.allclose(got.sum(1), torch.zeros(len(rows)), atol=1e-4)
    assert (got.sort(1).values == got.gather(1, values.argsort(1))).all()


@pytest.mark.parametrize("name", MEMBERS)
@given(value=st.floats(0, 1, width=32), size=st.integers(2, 9))
def test_a_group_that_agrees_has_advantage_exactly_zero(name: str, value: float, size: int) -> None:
    assert (axes.lookup("advantages", name)(torch.full((1, size), value)) == 0).all()


@pytest.mark.parametrize("name", MEMBERS)
def test_unscored_rollouts_are_left_out_of_their_group(name: str) -> None:
    advantage = axes.lookup("advantages", name)
    nan = float("nan")
    got = advantage(torch.tensor([[1.0, nan, 0.0, 0.0], [nan, nan, nan, nan], [1.0, nan, nan, nan]]))
    assert torch.allclose(got[0, [0, 2, 3]], advantage(torch.tensor([[1.0, 0.0, 0.0]]))[0])
    assert got[0, 1] == 0
    assert (got[1:] == 0).all()


@pytest.mark.parametrize("name", MEMBERS)
def test_groups_of_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="at least 2, got 1"):
        axes.lookup("advantages", name)(torch.ones(3, 1))


@pytest.mark.parametrize("axis", ["rewards", "advantages", "credit", "losses"])
def test_an_unknown_member_is_answered_with_the_members(axis: str) -> None:
    with pytest.raises(InputError) as error:
        axes.lookup(axis, "nonesuch")
    assert all(name in str(error.value) for name in axes.members(axis))
