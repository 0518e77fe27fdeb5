"""docs/support.md is what its rows and the rules give."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import support_page
from support.matrix import PAGE, ROUNDING, _compared, read_rows
from support.support_page import PLAIN, cells, lines_of_rules, page
from support.zoo import ZOO


@pytest.mark.slow
def test_the_page_is_what_the_rows_give():
    assert PAGE.read_text("utf-8") == page(*read_rows())


def test_every_row_has_a_cell_and_a_family_has_all_rows_or_none():
    found = [*read_rows()[1]]
    families = {family for family, _, _ in found}
    assert found == [cell.key for cell in cells(family for family in ZOO if family in families)]
    assert len(families) >= 24


def test_an_outcome_without_a_line_is_that_it_works():
    for cell in read_rows()[1].values():
        assert cell.outcome in ("works", "refused", "fails")
        assert (cell.outcome == "works") == (not cell.message)


@pytest.mark.slow
def test_every_rule_refuses_its_example_with_a_line_of_its_own():
    lines = [line for _, line in lines_of_rules()]
    assert len(set(lines)) == len(lines) > 20
    assert all(lines)


STEPS = [{"ids": [3, 1], "loss": 2.0}, {"ids": [4], "loss": 1.5}]
WORKS = {"steps": STEPS, "trained": [1.0, 2.0], "loaded": [1.0, 2.0], "base": [1.1, 2.1]}


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, ("works", "")),
        ({"steps": [STEPS[0], {"ids": [5], "loss": 1.5}]}, ("fails", "step 2 selects other examples than one process")),
        (
            {"steps": [{"ids": [3, 1], "loss": 2.0 * (1 + 3 * ROUNDING)}, STEPS[1]]},
            ("fails", "step 1 has another loss than one process, by 3e-05 of it"),
        ),
        (
            {"loaded": [1.0, 2.5]},
            ("fails", "the saved adapter computes other losses than the trained one, by 0.2 of them"),
        ),
        ({"base": [1.0, 2.0]}, ("fails", "the adapter changes nothing")),
    ],
)
def test_a_cell_works_if_it_trains_as_one_process_does_and_its_adapter_loads(change, outcome):
    assert _compared(WORKS | change, WORKS) == outcome


def test_a_cell_that_is_refused_or_breaks_off_says_why():
    assert _compared({"refused": "no"}, {"refused": "no"}) == ("refused", "no")
    assert _compared({"error": "KeyError: x"}, WORKS) == ("fails", "KeyError: x")
    assert _compared(WORKS, {"refused": "no"}) == ("fails", "trains, but one process does not")


def test_the_page_shows_what_differs_between_engines(monkeypatch):
    monkeypatch.setattr(support_page, "lines_of_rules", list)
    found = {cell.key: replace(cell, outcome="works") for cell in cells(["llama", "opt"])}
    refused = replace(found["llama", "FSDP2", "4-bit"], outcome="refused", message="not <there>")
    fails = replace(found["opt", "DDP", PLAIN], outcome="fails", message="not <there>")
    found |= {refused.key: refused, fails.key: fails}
    made = page({"torch": "2.0"}, found)
    assert "| `llama` | grouped queries | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓; FSDP2 – 1 | ✓ |" in made
    assert "| `opt` | learned positions | ✓ | ✗ 1 | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ |" in made
    assert "| `phi` | parallel blocks; partial rotary | · | · | · | · | · | · | · | · | · |" in made
    assert "| 1 | not \\<there\\> |" in made
