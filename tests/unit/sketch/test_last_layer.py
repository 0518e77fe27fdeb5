from __future__ import annotations

import dataclasses

import pytest
import torch
from support.families import PROBES, ROWS, adapted_model, batch_of
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.randomness import generator
from colm_scale.selection.mask import to_fixed
from colm_scale.selection.moments import AdamMoments, Moments, make_moments
from colm_scale.sketch import last_layer
from colm_scale.sketch.last_layer import Gradients
from colm_scale.sketch.tap import Tap

D_OUT, RANK, TOKENS = 6, 3, 2
D = D_OUT * RANK
GROUPS = torch.tensor([1, -1, 0, 1, 0, 1, 0])
VALID = torch.tensor([True, True, True, True, False, True, True])
ROWS_TOTAL = len(GROUPS)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums of two products of numbers of size 1."""


def normal(purpose: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def factors() -> tuple[Tensor, Tensor]:
    """Of all examples: ``[s, T, d_out]`` and ``[s, T, r]``. The invalid example's gradient is not finite."""
    delta, a = normal("delta", ROWS_TOTAL, TOKENS, D_OUT), normal("a", ROWS_TOTAL, TOKENS, RANK)
    return delta.masked_fill(~VALID.view(-1, 1, 1), torch.nan), a


def dense() -> Tensor:
    """``[s, d]``."""
    delta, a = factors()
    return torch.einsum("sto,str->sor", delta, a).flatten(1)


def moments() -> AdamMoments:
    return AdamMoments(0.1 * normal("m", D), normal("v", D).square(), step=3, betas=(0.9, 0.99), epsilon=1e-8)


def updates(moments: Moments) -> Tensor:
    """``[s, d]`` of `dense`, above the rounding of each."""
    return moments.normalise(dense(), floor=moments.floor(dense().square().mean(1)))


def as_factors(rows: Tensor, delta: Tensor, a: Tensor) -> Gradients:
    return dataclasses.replace(Gradients.of(rows, delta, a), parts=(delta, a))


def as_product(rows: Tensor, delta: Tensor, a: Tensor) -> Gradients:
    return dataclasses.replace(Gradients.of(rows, delta, a), parts=(delta.transpose(1, 2) @ a,))


def held(split: list[list[int]], make=as_factors) -> list[Gradients]:
    """The examples, dealt to micro-batches as ``split`` says."""
    delta, a = factors()
    return [make(torch.tensor(rows), delta[rows], a[rows]) for rows in split]


SPLITS = [[[0, 1, 2, 3, 4, 5, 6]], [[6, 2], [0], [5, 1, 3], [4]]]
each_split = pytest.mark.parametrize("split", SPLITS, ids=["together", "apart"])
each_form = pytest.mark.parametrize("make", [as_factors, as_product])


@pytest.fixture(params=[10**6, 25, 1], ids=["one block", "few rows", "row by row"])
def _block_size(request, monkeypatch):
    monkeypatch.setattr(last_layer, "BLOCK_NUMBERS", request.param)


def test_the_smaller_form_is_kept():
    short = Gradients.of(torch.arange(2), normal("delta", 2, 1, D_OUT), normal("a", 2, 1, RANK))
    long = Gradients.of(torch.arange(2), normal("delta", 2, 5, D_OUT), normal("a", 2, 5, RANK))
    assert len(short.parts) == 2
    assert short.numbers == 2 * (D_OUT + RANK)
    assert len(long.parts) == 1
    assert long.numbers == 2 * D
    assert short.shape == long.shape == (D_OUT, RANK)
    torch.testing.assert_close(
        long.parts[0], torch.einsum("sto,str->sor", normal("delta", 2, 5, D_OUT), normal("a", 2, 5, RANK)), **ROUNDING
    )


@each_form
@pytest.mark.usefixtures("_block_size")
def test_blocks_cover_every_column_once(make):
    (gradients,) = held([[0, 2, 3]], make)
    columns, blocks = zip(*gradients.blocks())
    assert [c for block in columns for c in range(D)[block]] == list(range(D))
    torch.testing.assert_close(torch.cat(blocks, dim=1), dense()[[0, 2, 3]], **ROUNDING)


@each_form
def test_entries_at_each_examples_own_columns(make):
    (gradients,) = held([[3, 0]], make)
    columns = torch.tensor([[0, 5, 17, 4], [3, 2, 1, 16]])
    torch.testing.assert_close(gradients.at(columns), dense()[[3, 0]].gather(1, columns), **ROUNDING)


@each_split
@each_form
@pytest.mark.usefixtures("_block_size")
def test_source_sums_by_brute_force(split, make):
    sums = last_layer.source_sums(held(split, make), GROUPS, 2, moments(), VALID)
    u = updates(moments())
    expected = torch.stack([u[[2, 6]].sum(0), u[[0, 3, 5]].sum(0)])  # row 1 is not ranked, row 4 not finite
    one = float(to_fixed(torch.tensor(1.0), ROWS_TOTAL))
    assert sums.dtype == torch.int32
    # Three roundings to the unit of fixed point, and float32 rounding of u through the square root and division.
    torch.testing.assert_close(sums.float() / one, expected, rtol=1e-5, atol=3e-6)


@each_form
def test_sums_do_not_depend_on_how_examples_are_held(make):
    together, apart = (held(split, make) for split in SPLITS)
    picked = torch.tensor([True, True, False, True, False, False, True])
    assert torch.equal(
        last_layer.source_sums(together, GROUPS, 2, moments(), VALID),
        sum(last_layer.source_sums([one], GROUPS, 2, moments(), VALID) for one in apart),
    )
    assert torch.equal(
        last_layer.moment_sums(together, picked, D, torch.tensor(4)),
        sum(last_layer.moment_sums([one], picked, D, torch.tensor(4)) for one in apart),
    )


@each_split
@each_form
def test_rows_at_their_sources_columns(split, make):
    columns = torch.tensor([[0, 4, 9], [2, 7, 17]])
    rows = last_layer.rows_at(held(split, make), columns, GROUPS, moments())
    order = [row for rows_of in split for row in rows_of]
    u = updates(moments())
    for row, at in zip(rows, order):
        if not VALID[at]:
            assert row.isnan().all()
            continue
        expected = u[at, columns[GROUPS[at]]] if GROUPS[at] >= 0 else torch.zeros(3)
        torch.testing.assert_close(row, expected, **ROUNDING)


@each_split
@each_form
@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_moment_sums_are_means_of_g_and_its_square(split, make, scale):
    picked = torch.tensor([True, True, False, True, False, False, True])
    delta, a = factors()
    gradients = [make(torch.tensor(rows), scale * delta[rows], a[rows]) for rows in split]
    g = scale * dense()[picked].double()
    exponent = torch.frexp(g.abs().max() * (1 + 1e-6)).exponent
    sums = last_layer.moment_sums(gradients, picked, D, exponent)
    mean, mean_square = last_layer.from_moment_sums(sums, ROWS_TOTAL, 4, exponent)
    # The g themselves are float32 products: 1e-7 of the largest, and more of a mean that cancels.
    torch.testing.assert_close(mean.double(), g.mean(0), rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(mean_square.double(), g.square().mean(0), rtol=1e-5, atol=1e-6 * scale**2)


def test_moment_sums_of_the_largest_entries_fit():
    count = 1000
    largest = torch.full((count, 1, 1), 4.0 - 2**-22)  # just below 2 ** exponent
    gradients = [Gradients.of(torch.arange(count), largest, torch.ones_like(largest))]
    sums = last_layer.moment_sums(gradients, torch.ones(count, dtype=torch.bool), 1, torch.tensor(2))
    mean, mean_square = last_layer.from_moment_sums(sums, count, count, torch.tensor(2))
    torch.testing.assert_close(mean, largest[0, 0])
    torch.testing.assert_close(mean_square, largest[0, 0].square())


def test_a_rank_that_holds_nothing():
    columns = torch.tensor([[0, 4, 9], [2, 7, 17]])
    assert torch.equal(last_layer.source_sums([], GROUPS, 2, moments(), VALID), torch.zeros(2, D, dtype=torch.int32))
    assert torch.equal(last_layer.moment_sums([], VALID, D, torch.tensor(0)), torch.zeros(2, D, dtype=torch.int64))
    rows = last_layer.rows_at([], columns, GROUPS, moments())
    assert rows.shape == (0, 3)
    assert rows.dtype == torch.float32


@each_split
def test_rows_are_zero_where_no_source_is_ranked(split):
    """Every quota takes all that its source has: there are sketches, for the moments, and nothing to compare."""
    rows = last_layer.rows_at(held(split), torch.zeros(0, 3).long(), torch.full_like(GROUPS, -1), moments())
    order = [row for rows_of in split for row in rows_of]
    assert torch.equal(rows[VALID[order]], torch.zeros(int(VALID.sum()), 3))


@pytest.mark.parametrize("lengths", [[3, 2], [40, 30]], ids=["factors", "product"])
def test_the_sketch_of_a_model(lengths):
    family = "phi3"
    probe = Probe("model.layers.1", PROBES[family], torch.tensor(ROWS[family]))
    tap, batch = Tap(ExampleLoss(adapted_model(family)), probe), batch_of(lengths, prompt=1)
    losses, gradients = last_layer.sketch(tap, batch, torch.tensor([5, 2]))
    exact_losses, delta, a = tap.factors(batch)
    exact = delta.transpose(1, 2) @ a
    assert len(gradients.parts) == (2 if lengths[0] == 3 else 1)
    assert gradients.rows.tolist() == [5, 2]
    assert gradients.shape == tap.shape
    torch.testing.assert_close(losses, exact_losses)
    torch.testing.assert_close(gradients.largest, exact.abs().amax((1, 2)))
    torch.testing.assert_close(gradients.mean_square, exact.square().mean((1, 2)))
    torch.testing.assert_close(torch.cat([b for _, b in gradients.blocks()], dim=1), exact.flatten(1), **ROUNDING)


def test_a_gradient_that_is_not_finite_shows_in_its_largest_entry():
    class Broken:
        def factors(self, _batch):
            delta, a = factors()
            return torch.zeros(ROWS_TOTAL), delta, a

    _, gradients = last_layer.sketch(Broken(), None, torch.arange(ROWS_TOTAL))
    assert torch.equal(gradients.largest.isfinite(), VALID)


# Updates that depend on whole rows


def whole_row_moments(optimizer: str) -> Moments:
    moments = make_moments(TrainConfig(optimizer=optimizer), ((D_OUT, RANK),))
    return moments.learn(0.1 * normal("m", D), normal("v", D).square())


@each_split
@each_form
@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_updates_of_whole_rows_by_brute_force(optimizer, split, make):
    moments, columns = whole_row_moments(optimizer), torch.tensor([[0, 4, 9], [2, 7, 17]])
    u = updates(moments)
    sums = last_layer.source_sums(held(split, make), GROUPS, 2, moments, VALID)
    one = float(to_fixed(torch.tensor(1.0), ROWS_TOTAL))
    expected = torch.stack([u[[2, 6]].sum(0), u[[0, 3, 5]].sum(0)])
    torch.testing.assert_close(sums.float() / one, expected, rtol=1e-4, atol=1e-4)  # five rounds of matrix products
    rows = last_layer.rows_at(held(split, make), columns, GROUPS, moments)
    for row, at in zip(rows, [row for rows_of in split for row in rows_of]):
        if VALID[at] and GROUPS[at] >= 0:
            torch.testing.assert_close(row, u[at, columns[GROUPS[at]]], rtol=1e-4, atol=1e-4)
