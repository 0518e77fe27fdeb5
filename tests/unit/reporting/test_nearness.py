"""The verdict on a selection at the end of a run: nearer, farther, or neither."""

from __future__ import annotations

import json
import math

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.reporting.nearness import Nearness


def after(errors: list[tuple[float, float]]) -> Nearness:
    """A run whose selection had these relative errors, and its random draw those."""
    total = Nearness()
    for own, drawn in errors:
        total.add({"sketch_error": own, "sketch_error_stratified": drawn})
    return total


def test_a_selection_that_is_nearer():
    (sentence,) = after([(0.5, 1.0)] * 9 + [(1.5, 1.0)]).sentences()
    assert sentence == (
        "The coreset's mean sketch is nearer to the candidates' mean than that of a random draw with the same quotas: "
        "relative error 0.600 against 1.000, nearer in 9 of 10 steps."
    )


def test_a_selection_that_is_farther():
    (sentence,) = after([(0.5, 1.0)] + [(1.25, 1.0)] * 9).sentences()
    assert sentence == (
        "The coreset's mean sketch is farther from the candidates' mean than that of a random draw with the same "
        "quotas: relative error 1.175 against 1.000, nearer in 1 of 10 steps."
    )


def test_a_selection_that_cannot_be_told_from_random():
    """Though its mean error is half of the draw's: one step makes the difference."""
    (sentence,) = after([(0.9, 1.0), (1.1, 1.0)] * 5 + [(0.1, 12.0)]).sentences()
    assert "sketch cannot be told apart from that of a random draw with the same quotas: " in sentence
    assert sentence.endswith("nearer in 6 of 11 steps.")


@pytest.mark.parametrize(("nearer", "steps", "told"), [(6, 6, True), (5, 5, None), (8, 9, True), (7, 9, False)])
def test_the_sign_test_is_the_exact_one_at_few_steps(nearer, steps, told):
    """Two-sided binomial: 6 of 6 has p = 0.03, 8 of 9 has 0.04, 7 of 9 has 0.18; 5 of 5 cannot be below 0.05."""
    found = after([(0.5, 1.0)] * nearer + [(1.5, 1.0)] * (steps - nearer)).sentences()
    assert [("is nearer" in sentence) for sentence in found] == ([] if told is None else [told])


def test_selections_that_are_random_are_told_from_random_in_one_run_of_twenty():
    draw = generator(0, "test")
    pairs = torch.rand(300, 80, 2, generator=draw).tolist()
    told = sum("cannot be told apart" not in after(pair).sentences()[0] for pair in pairs)
    assert 0 < told / 300 < 0.08


def test_equal_errors_count_for_neither():
    (sentence,) = after([(0.5, 0.5)] * 50 + [(0.5, 1.0)] * 6).sentences()
    assert sentence.endswith("nearer in 6 of 6 steps.")


def test_means_are_over_the_steps_that_have_a_number():
    total = Nearness()
    total.add({"rank": 2.0, "reused_share": 0.5})
    total.add({"rank": 4.0, "reused_share": math.nan})
    total.add({})
    assert total.means() == {"rank": 3.0, "reused_share": 0.5}


def test_rows_name_everything_once():
    total = Nearness()
    for steps in ({"rank": 3.0}, {"effective_sources": 4.0, "effective_sources_candidates": 5.0}):
        total.add(steps | {"overlap": 0.5, "overlap_by_chance": 0.25, "reused_share": 0.5})
    total.add({f"sketch_{what}{end}": 0.5 for what in ("error", "cosine") for end in ("", "_stratified")})
    compared = "0.500 (random draw with the same quotas: 0.500)"
    assert total.rows() == {
        "effective number of sources": "4.0 (candidates: 5.0)",
        "effective rank of the sketches": "3.0",
        "picks shared with a random draw": "50.0% (expected by chance: 25.0%)",
        "relative error of the coreset's mean sketch": compared,
        "cosine between mean sketches of coreset and candidates": compared,
        "reused share": "0.5",
    }


def test_it_goes_on_from_its_state():
    total, again = after([(0.5, 1.0)] * 5), Nearness()
    again.load(json.loads(json.dumps(total.state())))
    for one in (total, again):
        one.add({"sketch_error": 0.5, "sketch_error_stratified": 1.0})
    assert again.sentences() == total.sentences() != []
    assert again.state() == total.state()
