from __future__ import annotations

import pytest
import torch

from colm_scale.config import TrainConfig
from colm_scale.modeling.optimizers import make_optimizer
from colm_scale.randomness import generator
from colm_scale.selection import moments as maps
from colm_scale.selection.mask import LARGEST, to_fixed
from colm_scale.selection.moments import AdamMoments, Moments, make_moments

BETAS, EPSILON = (0.9, 0.99), 1e-8


def normal(*shape: int, trial: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(trial, "test rows"), dtype=torch.float64)


def after_steps(steps: int, d: int = 5) -> AdamMoments:
    moments = AdamMoments(*torch.zeros(2, d, dtype=torch.float64), 0, BETAS, EPSILON)
    for step in range(steps):
        rows = normal(3, d, trial=step)
        moments = moments.learn(rows.mean(0), rows.square().mean(0))
    return moments


def test_a_row_becomes_the_update_that_adam_makes_of_it():
    """One row per step is plain Adam: compare with torch's own."""
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=BETAS, eps=EPSILON)
    moments = AdamMoments(*torch.zeros(2, 5, dtype=torch.float64), 0, BETAS, EPSILON)
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
    moments = AdamMoments(*torch.zeros(2, 3), 0, BETAS, EPSILON)
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
    moments = AdamMoments(*torch.zeros(2, 5), 0, BETAS, EPSILON)
    assert moments.first.dtype == moments.second.dtype == torch.float32
    assert moments.normalise(normal(2, 5).to(dtype)).dtype == dtype


def test_an_entry_far_below_its_gradients_scale_counts_as_what_it_is():
    """The first update of Adam is the sign, of rounding too; with a floor of 1 % of the scale it is not."""
    rows = torch.tensor([[3.0, -1.0, 0.02, -2e-8, 0.0]], dtype=torch.float64)
    moments = AdamMoments(*torch.zeros(2, 5, dtype=torch.float64), 0, BETAS, 0.0)
    scale = (10.0004 / 5) ** 0.5
    floor = moments.floor(rows.square().mean(1))
    torch.testing.assert_close(floor, torch.tensor([[0.01 * scale]], dtype=torch.float64), rtol=1e-12, atol=0)
    expected = [3 / (3 + 0.01 * scale), -1 / (1 + 0.01 * scale), 0.02 / (0.02 + 0.01 * scale), -2e-6 / scale, 0.0]
    torch.testing.assert_close(
        moments.normalise(rows, floor=floor), torch.tensor([expected], dtype=torch.float64), rtol=1e-5, atol=0
    )
    smaller = 1e-3 * rows  # the update does not depend on the gradient's scale
    torch.testing.assert_close(
        moments.normalise(smaller, floor=moments.floor(smaller.square().mean(1))),
        moments.normalise(rows, floor=floor),
        rtol=1e-12,
        atol=0,
    )


def test_the_scale_is_that_of_the_averages_too():
    """A small gradient among large ones is divided by what the large ones left."""
    moments, row = after_steps(2), 1e-6 * normal(1, 5, trial=9)
    second = (0.99 * moments.second + 0.01 * row.square()) / (1 - 0.99**3)
    floor = moments.floor(row.square().mean(1))
    torch.testing.assert_close(floor, 0.01 * second.mean(1, keepdim=True).sqrt(), rtol=1e-12, atol=0)


# The other optimizers

SHAPES = ((6, 3), (4, 3))
D = sum(rows * columns for rows, columns in SHAPES)
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")


def fresh(optimizer: str, shapes: maps.Shapes = SHAPES) -> Moments:
    return make_moments(TrainConfig(optimizer=optimizer, betas=BETAS, adam_epsilon=EPSILON), shapes)


def learned(optimizer: str, steps: int, shapes: maps.Shapes = SHAPES) -> Moments:
    moments = fresh(optimizer, shapes)
    for step in range(steps):
        rows = normal(3, moments.size, trial=step).float()
        moments = moments.learn(rows.mean(0), rows.square().mean(0))
    return moments


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_row_becomes_the_update_that_the_users_optimizer_makes_of_it(optimizer):
    """One row per step is that optimizer itself: compare with the one that trains."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    trained = make_optimizer(parameters, TrainConfig(optimizer=optimizer, betas=BETAS, adam_epsilon=EPSILON))
    trained.param_groups[0]["lr"] = 0.125
    moments = fresh(optimizer)
    for step in range(4):
        gradient = normal(D, trial=step).float()
        before = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, part in zip(parameters, gradient.split([a * b for a, b in SHAPES])):
            parameter.grad = part.view_as(parameter)
        trained.step()
        moved = before - torch.cat([parameter.detach().flatten() for parameter in parameters])
        # float32 rounding of parameters, divided by the learning rate; of Muon that of bfloat16, five times applied.
        apart = (moments.normalise(gradient) - moved / 0.125).abs().max()
        assert apart <= (0.03 if optimizer == "muon" else 1e-5)
        moments = moments.learn(gradient, gradient.square())
    assert moved.abs().max() > 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_do_not_depend_on_each_other(optimizer):
    moments, rows = learned(optimizer, 2), normal(4, D, trial=9).float()
    together = moments.normalise(rows)
    assert together.shape == rows.shape
    for row, u in zip(rows, together):
        torch.testing.assert_close(moments.normalise(row), u, rtol=1e-5, atol=1e-6)  # matrix products in other shapes


@pytest.mark.parametrize("optimizer", ["sgd", "lion"])
def test_columns_of_the_other_element_wise_updates(optimizer):
    moments, rows = learned(optimizer, 2), normal(4, D, trial=9).float()
    own = torch.tensor([[0, 1], [1, 4], [2, 3], [0, 29]])
    assert not moments.whole_rows
    assert torch.equal(moments.normalise(rows.gather(1, own), own), moments.normalise(rows).gather(1, own))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_from_means_is_the_mean_of_what_each_row_alone_would_make(optimizer):
    moments, rows = learned(optimizer, 2), normal(7, D, trial=9).float()
    together = moments.learn(rows.mean(0), rows.square().mean(0))
    alone = [moments.learn(row, row.square()) for row in rows]
    assert together.step == 3
    assert together.tensors().keys() == moments.tensors().keys()
    for name, value in together.tensors().items():
        expected = torch.stack([one.tensors()[name] for one in alone]).mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, moments.tensors()[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_averages_are_all_there_is_to_save(optimizer):
    moments, rows = learned(optimizer, 3), normal(4, D, trial=9).float()
    back = fresh(optimizer).with_tensors(moments.tensors(), 3)
    assert moments.size == back.size == D
    assert torch.equal(back.normalise(rows), moments.normalise(rows))
    assert moments.skip() is moments


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_number_stands_for_a_row_along_one_direction(optimizer):
    """With gradients ``c z`` every update is ``f(c)`` times one pattern, that of z."""
    shapes, c = ((200, 30),), normal(5, 6, trial=3).float()
    z = normal(6000, trial=1).float()
    scalar, full = fresh(optimizer, ((1, 1),)), fresh(optimizer, shapes)
    for coefficients in c[:3]:
        mean, square = coefficients.mean().view(1), coefficients.square().mean().view(1)
        scalar, full = scalar.learn(mean, square), full.learn(mean * z, square * z.square())
    f = scalar.normalise(c[4].unsqueeze(1))
    u = full.normalise(c[4].unsqueeze(1) * z)
    scale = (u @ u[0]) / (u[0] @ u[0])  # of each row against the first
    torch.testing.assert_close(scale.unsqueeze(1) * u[0], u, rtol=0, atol=0.02 * float(u.abs().max()))
    # Adafactor: the root mean square of z's factored pattern is within 1 % of 1. The others: Adam's epsilon, rounding.
    tolerance = 0.01 if optimizer == "adafactor" else 1e-4
    torch.testing.assert_close(f[:, 0] / f[0, 0], scale, rtol=tolerance, atol=tolerance)
    signs_only = optimizer in ("lion", "muon")
    assert (len(set(f.flatten().tolist())) <= 2) == signs_only


def test_sgds_rows_are_fitted_by_a_power_of_two():
    moments, rows = learned("sgd", 2), 1e-5 * normal(4, D, trial=9).float()
    assert not to_fixed(rows, 4).any() or to_fixed(rows, 4).abs().max() < 1000, "as they are, they are rounding"
    fitted = moments.fitted(rows.abs().amax(1))
    u = fitted.normalise(rows)
    assert LARGEST / 4 <= u.abs().max() <= LARGEST
    ratio = (u / moments.normalise(rows)).unique()
    assert len(ratio) == 1
    assert float(ratio).hex().startswith("0x1.0000000000000p")
    assert fitted.learn(rows[0], rows[0].square()).scale == 1.0
    assert fresh("sgd").fitted(torch.zeros(0)).normalise(torch.zeros(1, D)).isfinite().all()


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "sgd"])
def test_the_others_fit_as_they_are(optimizer):
    moments, rows = learned(optimizer, 2), 1e4 * normal(4, D, trial=9).float()
    assert moments.fitted(rows.abs().amax(1)) is moments
    assert moments.normalise(rows).abs().max() < LARGEST


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("steps", [0, 2])
def test_floors_are_a_hundredth_of_the_scale(optimizer, steps):
    """Of a gradient as large as those before it, whose entries all are of size 1."""
    moments = fresh(optimizer)
    for _ in range(steps):
        moments = moments.learn(torch.ones(D), torch.ones(D))
    ahead = (0.9 * (1 - 0.99**steps)) ** 2 + 0.1**2 if optimizer == "lion" else 1.0
    floor = moments.floor(torch.ones(3))
    torch.testing.assert_close(floor, torch.full((3, 1), 0.01 * ahead**0.5), rtol=1e-5, atol=0)
    rows = torch.full((3, D), 1e-9)
    u = fresh(optimizer).normalise(rows, floor=floor)
    assert 0 < u.max() < 1e-5


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_where_no_entry_is_divided_by_its_own_size_there_is_no_floor(optimizer):
    """Muon enlarges what is small by at most 3.4 in each of its five rounds."""
    assert not learned(optimizer, 2).floor(torch.ones(3)).any()


def test_muon_orthogonalises():
    u = fresh("muon", ((20, 4),)).normalise(normal(20 * 4).float()).view(20, 4)
    singular = torch.linalg.svdvals(u) / (maps.MUON_SCALE * 20**0.5)
    assert ((singular > 0.6) & (singular < 1.3)).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_of_zeros_is_no_problem(optimizer):
    assert fresh(optimizer).normalise(torch.zeros(2, D)).abs().max() == 0
