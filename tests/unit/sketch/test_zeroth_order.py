from __future__ import annotations

import math

import pytest
import torch
from support.families import PROBES, ROWS, adapted_model, batch_of
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.randomness import generator
from colm_scale.records import SketchPlan
from colm_scale.selection.moments import AdamMoments, Moments, make_moments
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.tap import Tap
from colm_scale.sketch.zeroth_order import (
    directional_derivatives,
    learn_from_coefficients,
    probes,
    rows_from_coefficients,
)

CPU = torch.device("cpu")
D = 40
GROUPS = torch.tensor([1, -1, 0, 1, 0, 1, 0, 0])
VALID = torch.tensor([True, True, True, True, False, True, True, True])
BETAS, EPSILON = (0.9, 0.99), 1e-8
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of K terms of size 1 in another order, through a square root and a division."""

each_block_size = pytest.mark.parametrize("block_columns", [1, 7, 40, 16_384])


def normal(purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def plan(groups: Tensor = GROUPS) -> SketchPlan:
    return SketchPlan(torch.arange(len(groups)), groups, int(groups.max()) + 1, ())


def coefficients(num_probes: int) -> Tensor:
    """``[s, K]``; of a row that is not valid what the estimator leaves of it: zeros."""
    return normal("coefficients", len(GROUPS), num_probes) * VALID.unsqueeze(1)


def moments(d: int) -> AdamMoments:
    return AdamMoments(0.1 * normal("m", d), normal("v", d).square() + 0.1, step=3, betas=BETAS, epsilon=EPSILON)


def dense(coefficients: Tensor, directions: Tensor) -> Tensor:
    """``g_i = mean_k c_ik z_k``, ``[s, d]``, term by term."""
    rows = [sum(c * z for c, z in zip(row, directions)) for row in coefficients]
    return torch.stack(rows) / len(directions)


def updates(moments: Moments, gradients: Tensor) -> Tensor:
    """Of whole rows, above the rounding of each."""
    return moments.normalise(gradients, floor=moments.floor(gradients.square().mean(1)))


def largest_columns(u: Tensor, h: int) -> list[int]:
    mean = u.mean(0).abs().tolist()
    return sorted(sorted(range(len(mean)), key=lambda column: (-mean[column], column))[:h])


def test_probes_are_keyed_by_seed_and_number_only():
    three = probes(5, 3, D, CPU)
    assert three.shape == (3, D)
    assert torch.equal(probes(5, 1, D, CPU), three[:1])  # more probes leave the first as they are
    torch.randn(10)  # nor does what else is drawn matter
    assert torch.equal(probes(5, 3, D, CPU), three)
    assert not torch.equal(probes(6, 3, D, CPU), three)
    assert not torch.equal(three[0], three[1])
    many = probes(0, 4, 10_000, CPU)
    # 40,000 draws: the mean has standard deviation 0.005, the variance 0.007; four of each.
    assert abs(many.mean()) < 0.02
    assert abs(many.var() - 1) < 0.03


def test_probes_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    probes(0, 2, D, CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_coefficients_estimate_the_exact_derivatives(family, num_probes):
    probe = Probe("model.layers.1", PROBES[family], torch.tensor(ROWS[family]))
    tap, batch = Tap(ExampleLoss(adapted_model(family)), probe), batch_of([9, 5, 7])
    z = probes(0, num_probes, tap.size, CPU)
    losses, found = directional_derivatives(tap, batch, z, 1e-2)
    exact_losses, delta, a = tap.factors(batch)
    exact = (delta.transpose(1, 2) @ a).flatten(1) @ z.T
    # Losses of about 5 are rounded to 5e-7, divided by 2 eps: 3e-5 a step. The third derivative along a z of length
    # 8 leaves 0.5 % of the largest derivative.
    assert (found - exact).abs().max() <= 5e-3 * exact.abs().max()
    # The branches are averaged, so their second derivative stays: eps^2 |z|^2 / 2 = 0.3 %.
    torch.testing.assert_close(losses, exact_losses, rtol=3e-3, atol=0)


@each_block_size
@pytest.mark.parametrize("columns", [1, 6, 40, 100])
@pytest.mark.parametrize("num_probes", [2, 5])
def test_rows_by_brute_force(monkeypatch, block_columns, columns, num_probes):
    monkeypatch.setattr(zeroth_order, "BLOCK_COLUMNS", block_columns)
    z, c = probes(0, num_probes, D, CPU), coefficients(num_probes)
    rows = rows_from_coefficients(c, VALID, z, moments(D), plan(), columns)
    u = updates(moments(D), dense(c, z))
    expected = torch.zeros(len(GROUPS), min(columns, D))
    for of_source in ([2, 6, 7], [0, 3, 5]):  # row 1 is not ranked, row 4 not valid
        expected[of_source] = u[of_source][:, largest_columns(u[of_source], columns)]
    torch.testing.assert_close(rows, expected, **ROUNDING)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_a_row_that_is_not_valid_is_zero_and_changes_no_other(num_probes):
    d = 1 if num_probes == 1 else D
    z, c = probes(0, num_probes, D, CPU), coefficients(num_probes)
    rows = rows_from_coefficients(c, VALID, z, moments(d), plan(), 6)
    assert not rows[~VALID].any()
    without = rows_from_coefficients(c[VALID], VALID[VALID], z, moments(d), plan(GROUPS[VALID]), 6)
    torch.testing.assert_close(rows[VALID], without, **ROUNDING)
    # It would have counted: zero coefficients give the update of the momentum alone.
    counted = rows_from_coefficients(c, torch.ones_like(VALID), z, moments(d), plan(), 6)
    assert counted[~VALID].abs().min() > 1e-3


@pytest.mark.parametrize("num_probes", [1, 3])
def test_without_ranked_sources(num_probes):
    unranked = SketchPlan(torch.arange(8), torch.full((8,), -1), 0, ())
    z, m = probes(0, num_probes, D, CPU), moments(1 if num_probes == 1 else D)
    rows = rows_from_coefficients(coefficients(num_probes), VALID, z, m, unranked, 6)
    assert rows.shape == (8, 1 if num_probes == 1 else 6)
    assert rows.isfinite().all()


def test_one_probe_is_the_sign_of_the_direction_times_one_number():
    """With moments that are multiples of z and z^2, every column says the same."""
    z, c = probes(0, 1, D, CPU), coefficients(1)
    scalar = moments(1)
    flat = z
    full = AdamMoments(flat * scalar.first, flat.square() * scalar.second, scalar.step, BETAS, EPSILON)
    f = rows_from_coefficients(c, VALID, z, scalar, plan(), 6)
    assert f.shape == (len(GROUPS), 1)
    u = full.normalise(dense(c, z))
    # Adam's epsilon is felt where |z| sqrt(v) is small: here above 1e-3, so 1e-8 of it is 1e-5.
    assert (flat.abs() * scalar.second.sqrt() * 0.9).min() > 1e-3
    torch.testing.assert_close(u[VALID], (flat.sign() * f)[VALID], rtol=3e-5, atol=1e-6)


@each_block_size
def test_learning_with_several_probes_equals_dense_learning(monkeypatch, block_columns):
    monkeypatch.setattr(zeroth_order, "BLOCK_COLUMNS", block_columns)
    z, c = probes(0, 3, D, CPU), coefficients(3)[VALID]
    learned = learn_from_coefficients(moments(D), c, z)
    g = dense(c, z)
    before = moments(D)
    torch.testing.assert_close(learned.first, (0.9 * before.first + 0.1 * g).mean(0), **ROUNDING)
    torch.testing.assert_close(learned.second, (0.99 * before.second + 0.01 * g.square()).mean(0), **ROUNDING)
    assert learned.step == before.step + 1


def test_learning_with_one_probe_equals_dense_learning_along_it():
    z, c = probes(0, 1, D, CPU), coefficients(1)[VALID]
    scalar, flat = moments(1), z
    full = AdamMoments(flat * scalar.first, flat.square() * scalar.second, scalar.step, BETAS, EPSILON)
    learned, g = learn_from_coefficients(scalar, c, z), dense(c, z)
    dense_learned = full.learn(g.mean(0), g.square().mean(0))
    torch.testing.assert_close(flat * learned.first, dense_learned.first, **ROUNDING)
    torch.testing.assert_close(flat.square() * learned.second, dense_learned.second, **ROUNDING)
    assert learned.step == dense_learned.step == 4


@each_block_size
@pytest.mark.parametrize("optimizer", ["sgd", "lion", "adafactor", "muon"])
def test_rows_of_the_other_optimizers_are_the_dense_ones(monkeypatch, block_columns, optimizer):
    monkeypatch.setattr(zeroth_order, "BLOCK_COLUMNS", block_columns)
    z, c = probes(0, 3, D, CPU), coefficients(3)
    of = make_moments(TrainConfig(optimizer=optimizer), ((8, 5),))
    of = of.learn(0.1 * normal("m", D), normal("v", D).square())
    rows = rows_from_coefficients(c, VALID, z, of, plan(), D)  # every column of every source
    u = updates(of, dense(c, z))
    ranked = VALID & (GROUPS >= 0)
    assert not rows[~ranked].any()
    scale = 2.0 ** round(math.log2(float(rows[0] @ u[0] / (u[0] @ u[0]))))  # SGD's rows are fitted
    assert optimizer == "sgd" or scale == 1
    # Lion's sign of what is rounding is arbitrary; here nothing is. Muon: five rounds of matrix products.
    torch.testing.assert_close(rows[ranked], scale * u[ranked], rtol=1e-4, atol=1e-4)
