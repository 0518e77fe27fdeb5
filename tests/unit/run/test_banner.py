from __future__ import annotations

import pytest
import torch

from colm_scale.config import RunConfig, SelectionConfig, TrainConfig
from colm_scale.run.banner import kept_lines, start_line, update_lines

NAMES = ("a", "b", "c")
SIZES = torch.tensor([10, 60, 30])
KEPT = torch.tensor([True, False, True])
NONE = torch.zeros(3, dtype=torch.int64)
SOME = torch.tensor([0, 12, 3])


def facts(protected: torch.Tensor = NONE, **options) -> list[str]:
    return kept_lines(SelectionConfig(candidates=100, **options), NAMES, SIZES, KEPT, protected)


@pytest.mark.parametrize("method", ["colm", "stratified"])
def test_kept_sources_and_protected_examples_are_named(method):
    assert facts(method=method, budget=52) == ["kept sources (2): a, c"]
    assert facts(SOME, method=method, budget=52) == ["kept sources (2): a, c", "protected examples: 15 (b 12, c 3)"]


def test_methods_that_keep_nothing():
    assert facts(method="random") == facts(method="full") == facts(SOME, method="full") == []
    (fact,) = facts(SOME, method="random")
    assert fact == "protected examples: 15 (b 12, c 3); --selection.method random does not protect them"


def test_too_little_room_is_told_with_the_share_that_enters():
    # On average 40 of 100 candidates are of a kept source, and 12 more are protected.
    assert len(facts(budget=40)) == 1
    *_, warning = facts(budget=30)
    assert "about 75% of the candidates of kept sources fit" in warning
    *_, warning = facts(SOME, budget=39)
    assert "about 75% of the kept and protected candidates fit" in warning


@pytest.mark.parametrize(
    ("optimizer", "method", "estimator", "probes", "warned"),
    [
        ("lion", "colm", "zeroth_order", 1, True),
        ("muon", "colm", "zeroth_order", 1, True),
        ("muon", "colm", "zeroth_order", 2, False),
        ("lion", "colm", "last_layer", 1, False),
        ("lion", "stratified", "zeroth_order", 1, False),
        ("sgd", "colm", "zeroth_order", 1, False),
    ],
)
def test_updates_that_are_nothing_but_a_sign_are_told(optimizer, method, estimator, probes, warned):
    selection = SelectionConfig(method=method, estimator=estimator, num_probes=probes)
    facts = update_lines(RunConfig(selection=selection, train=TrainConfig(optimizer=optimizer)))
    assert len(facts) == warned
    assert all(f"--train.optimizer {optimizer}" in fact and "--selection.num_probes" in fact for fact in facts)


def test_the_start_is_told_by_part():
    line = start_line({"process": 3.04, "data": 0.5, "model": 2.0})
    assert line == "started in 5.5 s: process 3.0, data 0.5, model 2.0"
