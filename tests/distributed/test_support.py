"""Cells of docs/support.md, run again: as their committed rows say. `make support` runs them all."""

from __future__ import annotations

import pytest
from support.matrix import read_rows, run_cells, versions
from support.support_page import ENGINES, FEATURES, Cell
from support.zoo import ZOO

MEASURED, ROWS = read_rows()
SAMPLE = [
    cell
    for number, family in enumerate(ZOO)
    if (
        cell := Cell(family, [*ENGINES][number % len(ENGINES)], [*FEATURES][number // len(ENGINES) % len(FEATURES)])
    ).key in ROWS
]
"""Every family that has rows once, and every engine with every feature."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple, Cell]:
    if versions() != MEASURED:
        pytest.skip(f"the rows are of {MEASURED}, and these are {versions()}")
    return {cell.key: cell for cell in run_cells(SAMPLE, tmp_path_factory.mktemp("models"))}


def test_the_sample_covers_families_engines_and_features():
    assert [cell.family for cell in SAMPLE] == [*dict.fromkeys(family for family, _, _ in ROWS)]
    pairs = {(cell.engine, cell.feature) for cell in SAMPLE}
    assert pairs == {(engine, feature) for engine in ENGINES for feature in FEATURES}
    assert {"works", "refused"} <= {ROWS[cell.key].outcome for cell in SAMPLE}


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: "/".join(cell.key))
def test_a_cell_is_as_its_row_says(found, cell):
    assert found[cell.key] == ROWS[cell.key]
