"""Shares of the budget, and kept sources that are chosen again: the same on any number of ranks, under any engine, and
after a restart."""

from __future__ import annotations

import pytest
import torch
from support import worker

CASES = ("shared", "shared_ranked", "refreshed", "refreshed_broken")
PAIRS = [
    ("auto", "shared"),
    ("fsdp", "shared"),
    ("zero3", "shared_ranked"),
    ("auto", "refreshed"),
    ("auto", "refreshed_broken"),
]
SOURCES = len(worker.SIZES)


def quotas(step: dict) -> list[int]:
    data = worker.examples()
    return torch.bincount(data.sources[step["indices"][step["positions"]]], minlength=SOURCES).tolist()


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_are_those_of_one_rank(ranks, alone, engine, case):
    for rank in ranks:
        for own, expected in zip(rank[f"{engine}/{case}"]["steps"], alone[case]["steps"], strict=True):
            assert own["ids"].tolist() == expected["ids"].tolist()
            assert own["kept_sources"].tolist() == expected["kept_sources"].tolist()


def test_every_source_with_a_share_gets_its_one_and_without_one_none(alone):
    data = worker.examples()
    for step in alone["shared"]["steps"]:
        present = torch.bincount(data.sources[step["indices"]], minlength=SOURCES).tolist()
        found = quotas(step)
        assert sum(found) == 12
        assert all(min(1, there) <= found[source] for source, there in enumerate(present) if source != 3)
        assert found[3] == 0


def test_kept_sources_are_chosen_again_among_the_candidates_since(alone):
    steps, data = alone["refreshed"]["steps"], worker.examples()
    known = worker.kept(worker.CASES["refreshed"].selection, data).tolist()
    for number, step in enumerate(steps, 1):
        if number % 2 == 0:
            seen = torch.cat([row["indices"] for row in steps[number - 2 : number]])
            counts = torch.bincount(data.sources[seen], minlength=SOURCES)
            present = counts.nonzero().flatten()
            smallest = present[counts[present].argsort(stable=True)[: int(0.4 * len(present))]]
            known = [source in smallest for source in range(SOURCES)]
        assert step["kept_sources"].tolist() == known
    assert len({tuple(step["kept_sources"].tolist()) for step in steps}) > 1


def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(alone):
    for own, expected in zip(alone["refreshed_broken"]["steps"], alone["refreshed"]["steps"], strict=True):
        assert own["ids"].tolist() == expected["ids"].tolist()
        assert own["kept_sources"].tolist() == expected["kept_sources"].tolist()
        assert own["loss"] == expected["loss"]
