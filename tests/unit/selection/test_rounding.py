"""Rounding does not choose the coreset: what differs in the last places of the gradients leaves every pick as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_scale.config import SelectionConfig, TrainConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Quota
from colm_scale.selection.mask import source_sums, top_columns
from colm_scale.selection.moments import Moments, make_moments
from colm_scale.selection.select import select_coreset

STEPS = 1000
CANDIDATES, D, COLUMNS = 16, 256, 64
ROUNDED = 16
"""Entries of every gradient that are 0 but for rounding."""
LAST_PLACES = 4 * torch.finfo(torch.float32).eps
"""Of a gradient's largest entry. The backward of one block, in another order, differs by about this much."""
SOURCES = torch.arange(CANDIDATES) % 2
QUOTA = Quota(kept=torch.tensor([], dtype=torch.int64), per_source=torch.tensor([4, 4]))
CONFIG = SelectionConfig(candidates=CANDIDATES, budget=8)


def rounded(rows: Tensor, draw: torch.Generator) -> Tensor:
    """``rows`` with other last places."""
    return rows + (torch.rand(rows.shape, generator=draw) * 2 - 1) * LAST_PLACES * rows.abs().amax(1, keepdim=True)


def gradients(step: int) -> Tensor:
    """``[n, d]`` of any scale, with entries that are 0."""
    draw = generator(step, "gradients")
    rows = torch.randn(CANDIDATES, D, generator=draw) * torch.randn(CANDIDATES, 1, generator=draw).exp()
    rows[:, torch.randperm(D, generator=draw)[:ROUNDED]] = 0
    return rows


def picks(moments: Moments, rows: Tensor, *, floored: bool) -> list[int]:
    floor = moments.floor(rows.square().mean(1)) if floored else torch.zeros(())
    u = moments.normalise(rows, floor=floor)
    columns = top_columns(source_sums(u, SOURCES, 2, len(rows)), COLUMNS)
    everyone = torch.arange(len(rows))
    valid = torch.ones(len(rows), dtype=torch.bool)
    matrix = CandidateMatrix(everyone, u.gather(1, columns[SOURCES]), valid, torch.zeros(len(rows)))
    return select_coreset(matrix, SOURCES, QUOTA, CONFIG, lambda _source: torch.Generator()).positions.tolist()


def changed(optimizer: str, steps: int, *, floored: bool) -> int:
    """The number of steps whose picks depend on last places, half of them first steps, the others third ones."""
    count = 0
    for step in range(steps):
        draw = generator(step, "last places")
        once = again = make_moments(TrainConfig(optimizer=optimizer), ((D, 1),))
        for before in range(2 * (step % 2)):
            rows = gradients(STEPS + 2 * step + before)
            once = once.learn(rows.mean(0), rows.square().mean(0))
            rows = rounded(rows, draw)
            again = again.learn(rows.mean(0), rows.square().mean(0))
        rows = rounded(gradients(step), draw)
        count += picks(once, rows, floored=floored) != picks(again, rounded(rows, draw), floored=floored)
    return count


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_last_places_change_no_pick(optimizer):
    assert changed(optimizer, STEPS, floored=True) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_they_would_without_a_floor(optimizer):
    """In most first steps."""
    assert changed(optimizer, 40, floored=False) >= 12
