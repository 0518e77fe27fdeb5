from __future__ import annotations

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments

BETAS, EPSILON = (0.9, 0.99), 1e-8


def normal(*shape: int, trial: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(trial, "test rows"), dtype=torch.float64)


def after_steps(steps: int, d: int = 5) -> Moments:
    moments = Moments(*torch.zeros(2, d, dtype=torch.float64), 0, BETAS, EPSILON)
    for step in range(steps):
        rows = normal(3, d, trial=step)
        moments = moments.learn(rows.mean(0), rows.square().mean(0))
    return moments


def test_a_row_becomes_the_update_that_adam_makes_of_it():
    """One row per step is plain Adam: compare with torch's own."""
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=BETAS, eps=EPSILON)
    moments = Moments(*torch.zeros(2, 5, dtype=torch.float64), 0, BETAS, EPSILON)
    for step in range(4):
        gradient = normal(5, trial=step)
        before = parameter.detach().clone()
        parameter.grad = gradient
        adam.step()
        # float64 rounding of differently ordered operations.
        torch.testing.assert_close(moments.normalise(gradient), before - parameter.detach(), rtol=1e-10, atol=1e-12)
        moments = moments.learn(gradient, gradient.square())


def test_the_first_update_is_the_sign():
    rows = torch.tensor([[2.0, -3.0, 0.0]])
    moments = Moments.zeros(3, BETAS, EPSILON)
    # 1 up to epsilon and float32 rounding; 0 stays 0.
    torch.testing.assert_close(moments.normalise(rows), torch.tensor([[1.0, -1.0, 0.0]]), rtol=0, atol=1e-6)


def test_columns_pick_entries_of_the_moments():
    moments, rows = after_steps(2), normal(4, 5, trial=9)
    whole = moments.normalise(rows)
    columns = torch.tensor([0, 3, 4])
    own = torch.tensor([[0, 1], [1, 4], [2, 3], [0, 4]])
    assert torch.equal(moments.normalise(rows[:, columns], columns), whole[:, columns])
    assert torch.equal(moments.normalise(rows[:, 1:4], slice(1, 4)), whole[:, 1:4])
    assert torch.equal(moments.normalise(rows.gather(1, own), own), whole.gather(1, own))


def test_learning_from_means_is_the_mean_of_the_rows_moments():
    moments, rows = after_steps(2), normal(7, 5, trial=9)
    learned = moments.learn(rows.mean(0), rows.square().mean(0))
    first = (0.9 * moments.first + (1 - 0.9) * rows).mean(0)
    second = (0.99 * moments.second + (1 - 0.99) * rows.square()).mean(0)
    torch.testing.assert_close(learned.first, first, rtol=1e-12, atol=1e-15)  # float64 rounding
    torch.testing.assert_close(learned.second, second, rtol=1e-12, atol=1e-15)
    assert learned.step == 3


def test_a_step_without_picks_changes_nothing():
    moments = after_steps(2)
    skipped = moments.skip()
    assert skipped.step == 2
    assert torch.equal(skipped.first, moments.first)
    assert torch.equal(skipped.second, moments.second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_type_of_the_rows(dtype):
    moments = Moments.zeros(5, BETAS, EPSILON)
    assert moments.first.dtype == moments.second.dtype == torch.float32
    assert moments.normalise(normal(2, 5).to(dtype)).dtype == dtype
