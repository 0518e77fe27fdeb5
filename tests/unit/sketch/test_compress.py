from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments, SgdMoments, make_moments
from colm_scale.sketch import last_layer
from colm_scale.sketch.compress import CountSketch
from colm_scale.sketch.last_layer import Gradients

CPU = torch.device("cpu")
SHAPE = (13, 3)
D = 13 * 3
EXAMPLES, TOKENS = 4, 3
SEEDS = range(400)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of a few dozen products of numbers of size 1, in another order."""


def normal(purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def factors() -> tuple[Tensor, Tensor]:
    """Delta ``[B, T, d_out]`` and a ``[B, T, r]``."""
    d_out, r = SHAPE
    return normal("delta", EXAMPLES, TOKENS, d_out), normal("a", EXAMPLES, TOKENS, r) + 0.5


def dense() -> Tensor:
    """``[B, d]``."""
    return torch.einsum("bto,btr->bor", *factors()).flatten(1)


def gradients() -> Gradients:
    return Gradients.of(torch.arange(EXAMPLES), *factors())


def as_they_are() -> SgdMoments:
    """The update is the gradient."""
    return SgdMoments(torch.zeros(D), 0, momentum=0.0)


def averages(optimizer: str) -> Moments:
    fresh = make_moments(TrainConfig(optimizer=optimizer), (SHAPE,))
    return fresh.learn(0.1 * normal("mean", D), normal("mean square", D).square())


def matrix_of(sketch: CountSketch) -> Tensor:
    """``[d, h]``, from what becomes of each number by itself."""
    basis = Gradients.of(torch.arange(D), torch.eye(D).view(D, *SHAPE).mT, torch.eye(SHAPE[1]).expand(D, -1, -1))
    return sketch.rows(basis, as_they_are())


def count_sketch(columns: int, seed: int = 0) -> CountSketch:
    return CountSketch(seed, D, columns, CPU)


def rows_of(sketch: CountSketch) -> Tensor:
    return sketch.rows(gradients(), as_they_are())


@pytest.mark.parametrize("columns", [1, 8])
def test_each_number_has_one_sign_and_one_place(columns):
    matrix = matrix_of(count_sketch(columns))
    assert matrix.shape == (D, columns)
    assert torch.equal(matrix.abs().sum(1), torch.ones(D))
    assert torch.equal(matrix.square().sum(1), torch.ones(D))
    assert {1.0, -1.0} <= set(matrix.unique().tolist())


@pytest.mark.parametrize("block_numbers", [10**6, 30, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_a_count_sketch_is_that_of_the_update(monkeypatch, optimizer, block_numbers):
    """Adafactor and Muon need whole rows, the others take a few columns at a time."""
    monkeypatch.setattr(last_layer, "BLOCK_NUMBERS", block_numbers)
    sketch, moments = count_sketch(8), averages(optimizer)
    floor = moments.floor(dense().square().mean(1))
    expected = moments.normalise(dense(), floor=floor) @ matrix_of(sketch)
    torch.testing.assert_close(sketch.rows(gradients(), moments), expected, **ROUNDING)


def test_a_count_sketch_with_a_place_for_each_number_loses_nothing():
    for columns in (D, D + 20):
        rows = rows_of(count_sketch(columns))
        assert rows.shape == (EXAMPLES, D)
        torch.testing.assert_close(rows.abs(), dense().abs(), **ROUNDING)
        torch.testing.assert_close(rows @ rows.T, dense() @ dense().T, **ROUNDING)


def test_inner_products_are_kept_on_average():
    exact = dense().double() @ dense().double().T
    found = torch.stack([(rows := rows_of(count_sketch(8, seed)).double()) @ rows.T for seed in SEEDS])
    # Signs leave norms of a single place as they are, so some entries hardly vary: hence the last digits.
    error = found.std(0) / len(SEEDS) ** 0.5 + 1e-6
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert found.std(0).max() > 0.1 * exact.abs().max()  # the average is one of different things


def test_more_columns_keep_them_better():
    exact = dense() @ dense().T

    def error(columns: int) -> Tensor:
        found = [rows_of(count_sketch(columns, seed)) for seed in range(50)]
        return torch.stack([(rows @ rows.T - exact).norm() for rows in found]).mean()

    few, many = error(4), error(26)
    assert many < 0.7 * few


def test_draws_are_keyed_by_the_seed_only():
    first = rows_of(count_sketch(8, seed=3))
    state = torch.get_rng_state()
    torch.randn(7)
    assert torch.equal(rows_of(count_sketch(8, seed=3)), first)
    torch.set_rng_state(state)
    assert not torch.equal(rows_of(count_sketch(8, seed=4)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_finite_stays_in_its_row():
    sketch, healthy = count_sketch(8), rows_of(count_sketch(8))
    delta, a = factors()
    delta[2, 0, 0] = torch.nan
    found = sketch.rows(Gradients.of(torch.arange(EXAMPLES), delta, a), as_they_are())
    assert found.isfinite().all(1).tolist() == [True, True, False, True]
    torch.testing.assert_close(found[[0, 1, 3]], healthy[[0, 1, 3]], **ROUNDING)
