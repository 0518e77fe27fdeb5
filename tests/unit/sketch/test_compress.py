from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments, SgdMoments, make_moments
from colm_scale.sketch import last_layer
from colm_scale.sketch.compress import CountSketch, KroneckerSketch
from colm_scale.sketch.last_layer import Gradients, Part

CPU = torch.device("cpu")
SHAPES = ((6, 4), (5, 3))
D = 6 * 4 + 5 * 3
EXAMPLES, TOKENS = 4, 3
SEEDS = range(400)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of a few dozen products of numbers of size 1, in another order."""


def normal(purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def factors() -> list[tuple[Tensor, Tensor]]:
    """Of each probe, delta ``[B, T, d_out]`` and a ``[B, T, r]``."""
    return [(normal("delta", EXAMPLES, TOKENS, d_out), normal("a", EXAMPLES, TOKENS, r) + 0.5) for d_out, r in SHAPES]


def dense() -> Tensor:
    """``[B, d]``."""
    return torch.cat([torch.einsum("bto,btr->bor", delta, a).flatten(1) for delta, a in factors()], dim=1)


def gradients() -> Gradients:
    """One probe's as factors, the other's multiplied out."""
    (delta, a), (other_delta, other_a) = factors()
    parts = Part(delta, a, None), Part(None, None, other_delta.transpose(1, 2) @ other_a)
    return Gradients(torch.arange(EXAMPLES), parts)


def as_they_are() -> SgdMoments:
    """The update is the gradient."""
    return SgdMoments(torch.zeros(D), 0, momentum=0.0)


def averages(optimizer: str) -> Moments:
    fresh = make_moments(TrainConfig(optimizer=optimizer), SHAPES)
    return fresh.learn(0.1 * normal("mean", D), normal("mean square", D).square())


def count_sketch_matrix(sketch: CountSketch) -> Tensor:
    """``[d, h]``, from what becomes of each number by itself."""
    basis = torch.eye(D).split([d_out * r for d_out, r in SHAPES], dim=1)
    parts = tuple(Part(None, None, part.view(D, *shape)) for part, shape in zip(basis, SHAPES))
    return sketch.rows(Gradients(torch.arange(D), parts), as_they_are())


def kronecker_matrix(sketch: KroneckerSketch) -> Tensor:
    """The same, where number (o, r) of a probe is the product of one factor that is 1 at o and one that is 1 at r."""
    rows, nothing = [], [(torch.zeros(1, 1, d_out), torch.zeros(1, 1, r)) for d_out, r in SHAPES]
    for number, (d_out, r) in enumerate(SHAPES):
        for place in range(d_out * r):
            one = list(nothing)
            one[number] = torch.eye(d_out)[place // r].view(1, 1, -1), torch.eye(r)[place % r].view(1, 1, -1)
            rows.append(sketch.rows(one))
    return torch.cat(rows)


def count_sketch(columns: int, seed: int = 0) -> CountSketch:
    return CountSketch(seed, D, columns, CPU)


def kronecker_sketch(columns: int, seed: int = 0) -> KroneckerSketch:
    return KroneckerSketch(seed, SHAPES, columns, CPU)


def rows_of(sketch: CountSketch | KroneckerSketch) -> Tensor:
    return sketch.rows(factors()) if isinstance(sketch, KroneckerSketch) else sketch.rows(gradients(), as_they_are())


each_sketch = pytest.mark.parametrize("make", [count_sketch, kronecker_sketch])


@pytest.mark.parametrize("columns", [1, 8])
def test_each_number_has_one_sign_and_one_place(columns):
    matrix = count_sketch_matrix(count_sketch(columns))
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
    expected = moments.normalise(dense()) @ count_sketch_matrix(sketch)
    torch.testing.assert_close(sketch.rows(gradients(), moments), expected, **ROUNDING)


def test_a_count_sketch_with_a_place_for_each_number_loses_nothing():
    for columns in (D, D + 20):
        rows = rows_of(count_sketch(columns))
        assert rows.shape == (EXAMPLES, D)
        torch.testing.assert_close(rows.abs(), dense().abs(), **ROUNDING)
        torch.testing.assert_close(rows @ rows.T, dense() @ dense().T, **ROUNDING)


@pytest.mark.parametrize("columns", [2, 8, 26, 1000])
def test_a_kronecker_sketch_is_the_projection_that_it_stands_for(columns):
    sketch = kronecker_sketch(columns)
    matrix = kronecker_matrix(sketch)
    assert matrix.shape == (D, sketch.columns)
    assert sketch.columns <= columns
    torch.testing.assert_close(sketch.rows(factors()), dense() @ matrix, **ROUNDING)


def test_a_kronecker_sketch_is_a_product_of_two_projections_of_each_probe():
    sketch = kronecker_sketch(8)  # 4 columns a probe, 2 by 2
    matrix = kronecker_matrix(sketch)
    first, second = matrix.split([6 * 4, 5 * 3])
    assert not first[:, 4:].any()
    assert not second[:, :4].any()
    for part, (d_out, r) in ((first[:, :4], (6, 4)), (second[:, 4:], (5, 3))):
        torch.testing.assert_close(part.abs(), torch.full_like(part, 0.5))
        # Rearranged, a Kronecker product is the outer product of its factors: of rank one.
        singular = torch.linalg.svdvals(part.view(d_out, r, 2, 2).transpose(1, 2).reshape(2 * d_out, 2 * r))
        assert singular[1] < 1e-6 * singular[0]


def test_a_kronecker_sketch_leaves_short_sides_as_they_are():
    rows = rows_of(kronecker_sketch(2 * 6 * 4))
    assert torch.equal(rows, torch.cat([(delta.transpose(1, 2) @ a).flatten(1) for delta, a in factors()], dim=1))
    narrow = KroneckerSketch(0, ((6, 2),), 9, CPU)  # r is shorter than the root of 9: 4 by 2 instead of 3 by 3
    assert narrow.columns == 8


@each_sketch
def test_inner_products_are_kept_on_average(make):
    exact = dense().double() @ dense().double().T
    found = torch.stack([(rows := rows_of(make(8, seed)).double()) @ rows.T for seed in SEEDS])
    # Signs leave norms of a single place as they are, so some entries hardly vary: hence the last digits.
    error = found.std(0) / len(SEEDS) ** 0.5 + 1e-6
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert found.std(0).max() > 0.1 * exact.abs().max()  # the average is one of different things


@each_sketch
def test_more_columns_keep_them_better(make):
    exact = dense() @ dense().T
    few, many = (
        torch.stack([((rows := rows_of(make(columns, seed))) @ rows.T - exact).norm() for seed in range(50)]).mean()
        for columns in (4, 26)
    )
    assert many < 0.7 * few


@each_sketch
def test_draws_are_keyed_by_the_seed_only(make):
    first = rows_of(make(8, seed=3))
    state = torch.get_rng_state()
    torch.randn(7)
    assert torch.equal(rows_of(make(8, seed=3)), first)
    torch.set_rng_state(state)
    assert not torch.equal(rows_of(make(8, seed=4)), first)
    assert torch.equal(torch.get_rng_state(), state)


@each_sketch
def test_what_is_not_finite_stays_in_its_row(make):
    sketch, healthy = make(8), rows_of(make(8))
    broken = [(delta.clone(), a) for delta, a in factors()]
    broken[1][0][2, 0, 0] = torch.nan
    parts = tuple(Part(delta, a, None) for delta, a in broken)
    found = (
        sketch.rows(broken)
        if isinstance(sketch, KroneckerSketch)
        else sketch.rows(Gradients(torch.arange(EXAMPLES), parts), as_they_are())
    )
    assert found.isfinite().all(1).tolist() == [True, True, False, True]
    torch.testing.assert_close(found[[0, 1, 3]], healthy[[0, 1, 3]], **ROUNDING)
