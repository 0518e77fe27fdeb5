"""Sources that are found anew while a run goes on: the same on one rank and two, under every engine, and after a
resume."""

from __future__ import annotations

import pytest
import torch
from support import worker

CASES = (
    *("reclustered", "reclustered_broken", "reclustered_broken_after", "reclustered_branched"),
    *("reclustered_stratified", "reclustered_forward_reused"),
)
PAIRS = (
    ("auto", "reclustered"),
    ("auto", "reclustered_broken"),
    ("auto", "reclustered_branched"),
    ("auto", "reclustered_stratified"),
    ("fsdp", "reclustered"),
    ("fsdp", "reclustered_forward_reused"),
    ("zero3", "reclustered"),
    ("auto > zero2", "reclustered_broken_after"),
)


def told(steps: list[dict]) -> list[tuple]:
    """What each step went by and what came of it."""
    return [
        (step["ids"].tolist(), step["sources"].tolist(), step["kept_sources"].tolist(), step["drift"])
        for step in steps
    ]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_two_ranks_do_what_one_does(ranks, alone, engine, case):
    expected = alone[case.removesuffix("_after").removesuffix("_broken")]["steps"]
    for cases in ranks:
        assert told(cases[f"{engine}/{case}"]["steps"]) == told(expected)


@pytest.mark.parametrize("case", ["reclustered_broken", "reclustered_broken_after"])
def test_a_run_goes_on_bit_for_bit(alone, case):
    whole, broken = alone["reclustered"], alone[case]
    assert told(broken["steps"]) == told(whole["steps"])
    assert all(torch.equal(broken["adapters"][name], value) for name, value in whole["adapters"].items())


@pytest.mark.parametrize("case", CASES)
def test_examples_have_the_source_that_they_moved_to(alone, case):
    data = worker.examples()
    now = dict(zip(data.ids.tolist(), data.sources.tolist()))
    for number, step in enumerate(alone[case]["steps"], 1):
        assert step["sources"].tolist() == [now[id_] for id_ in step["candidate_ids"].tolist()]
        before, drift = dict(now), step["drift"]
        now |= dict(step["moved"].tolist())
        assert (drift is not None) == (number % 2 == 0)
        changed = sum(now[id_] != source for id_, source in before.items())
        assert changed == (0 if drift is None else drift["moved"])
        if drift is not None:
            assert changed, "nothing has moved, so this says little"
            sizes = torch.bincount(torch.tensor([*now.values()]), minlength=5)
            assert [*drift["sizes"].values()] == sizes.tolist()
            assert torch.equal(step["kept_sources"], sizes * len(sizes) < sizes.sum())


@pytest.mark.parametrize(
    ("case", "looked_at"), [("reclustered", 48), ("reclustered_branched", 48), ("reclustered_stratified", 24)]
)
def test_every_candidate_is_known_where_the_model_sketches(alone, case, looked_at):
    """And where it does not, the coreset; within an epoch, which is four steps, no example comes twice."""
    drifts = [step["drift"] for step in alone[case]["steps"][:4]]
    assert [drift["examples"] for drift in drifts if drift] == [looked_at, looked_at]


def test_following_costs_no_forward(alone, ranks):
    for steps in (alone["reclustered"]["steps"], *(cases["zero3/reclustered"]["steps"] for cases in ranks)):
        for step in steps:
            assert step["forwards"] == step["sketched_batches"] + step["trained_batches"]
    for cases in ranks:
        exchanged = {step["bytes"]["sources"] for step in cases["auto/reclustered"]["steps"]}
        assert exchanged == {4 * 24 * 65}
