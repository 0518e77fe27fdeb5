"""Error feedback: the sums themselves, and what picks that make up for them gain over steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Selection, long_tensor
from colm_scale.selection.feedback import NO_FEEDBACK, ErrorFeedback
from colm_scale.selection.rule import SelectionRule

SOURCES = long_tensor([0] * 3 + [1] * 10 + [2] * 5)
KEPT = torch.tensor([True, False, False])
N, H = len(SOURCES), 4
CONFIG = SelectionConfig(candidates=N, budget=9, columns=H)


def matrix(rows: Tensor, invalid: int | None = None) -> CandidateMatrix:
    """The rows of sources 1 and 2; those of a kept source have none."""
    positions, valid = torch.arange(3, N), torch.ones(N - 3, dtype=torch.bool)
    if invalid is not None:
        valid[invalid - 3] = False
    return CandidateMatrix(positions, rows[3:] * valid.unsqueeze(1), valid, torch.zeros(N - 3))


def drawn(step: int) -> Tensor:
    """Rows as gradients are: most short, some long, of a common direction."""
    rows = torch.randn(N, H, generator=generator(step, "rows"))
    return rows * torch.rand(N, 1, generator=generator(step, "lengths")) ** 3 * 9 + 1


def candidates(step: int) -> Candidates:
    n = torch.arange(N)
    return Candidates(step, n, n, SOURCES, n)


def test_sums_are_those_of_weighted_deviations_and_fade():
    rows, feedback = drawn(1), ErrorFeedback.beginning(3, H)
    picks, weights = long_tensor([0, 1, 2, 4, 7, 14]), torch.tensor([1.0, 1, 1, 2, 2, 3])
    after = feedback.after(matrix(rows, invalid=5), SOURCES, Selection(picks, weights, kept=3))
    valid = rows[[3, 4, 6, 7, 8, 9, 10, 11, 12]].double()
    of_one = 2 * (rows[4].double() - valid.mean(0)) + 2 * (rows[7].double() - valid.mean(0))
    of_two = 3 * (rows[14].double() - rows[13:].double().mean(0))
    expected = 0.98 * torch.stack([torch.zeros(H, dtype=torch.float64), of_one, of_two])
    torch.testing.assert_close(after.deviations, expected)
    later = after.after(CandidateMatrix.without_rows(), SOURCES, Selection(picks[:3], weights[:3], kept=3))
    torch.testing.assert_close(later.deviations, 0.98 * expected)
    assert feedback.deviations.eq(0).all(), "a new object"


def test_a_source_that_enters_whole_owes_nothing():
    whole = Selection(long_tensor([0, 1, 2, 13, 14, 15, 16, 17]), torch.ones(8), kept=3)
    after = ErrorFeedback.beginning(3, H).after(matrix(drawn(1)), SOURCES, whole)
    torch.testing.assert_close(after.deviations, torch.zeros(3, H, dtype=torch.float64))


def test_without_columns_nothing_is_fed_back():
    selection = Selection(long_tensor([4]), torch.ones(1))
    assert NO_FEEDBACK.after(matrix(drawn(1)), SOURCES, selection) is NO_FEEDBACK
    assert NO_FEEDBACK.of(1, H).tolist() == [0.0] * H


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, H),
        ({"compression": "columns"}, 0),
        ({"ranking": "facility"}, 0),
        ({"estimator": "zeroth_order", "num_probes": 2}, 0),
        ({"method": "stratified"}, 0),
        ({"preset": "paper"}, 0),
    ],
)
def test_errors_are_fed_back_where_a_column_stays_the_same(options, columns):
    config = SelectionConfig(candidates=N, budget=9, **{"columns": H} | options)
    assert config.feedback_columns(100) == columns
    assert config.feedback_columns(H - 1) == min(columns, H - 1), "of a tiny model"


def errors(feedback: ErrorFeedback, weights: str = "uniform", steps: int = 200) -> tuple[float, float]:
    """Mean square error of a step and of the average of ten, in the weighted sums of the picks of both sources."""
    rule, found = SelectionRule(dataclasses.replace(CONFIG, weights=weights), KEPT, seed=1), []
    for step in range(1, steps + 1):
        of, given = matrix(drawn(step)), candidates(step)
        selection = rule.select(given, rule.quota(given), of, feedback)
        found.append(ErrorFeedback.beginning(3, H).after(of, SOURCES, selection).deviations)
        feedback = feedback.after(of, SOURCES, selection)
    each = torch.stack(found)
    return tuple(float(e.square().sum((1, 2)).mean()) for e in (each, each.view(-1, 10, 3, H).mean(1)))


@pytest.mark.parametrize("weights", ["uniform", "unbiased"])
def test_errors_cancel_over_steps(weights):
    """Alone, the picks have an error that is the same in every step; made up for, most of it cancels."""
    alone, alone_over_ten = errors(NO_FEEDBACK, weights)
    step, over_ten = errors(ErrorFeedback.beginning(3, H), weights)
    assert alone < step, "a step alone can only be farther"
    assert over_ten < 0.4 * alone_over_ten
