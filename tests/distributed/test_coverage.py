"""A floor under what is trained of each source: the same on any number of ranks, and after a restart."""

from __future__ import annotations

import pytest
import torch
from support import worker

CASES = ("covered", "covered_broken", "last_layer")
PAIRS = [("auto", "covered"), ("zero2", "covered_broken")]
SOURCES = len(worker.SIZES)


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_and_what_is_owed_are_those_of_one_rank(ranks, alone, engine, case):
    for rank in ranks:
        for own, expected in zip(rank[f"{engine}/{case}"]["steps"], alone["covered"]["steps"], strict=True):
            assert own["ids"].tolist() == expected["ids"].tolist()
            assert torch.equal(own["owed"], expected["owed"])


def test_a_run_that_is_broken_off_owes_what_it_owed(alone):
    for own, expected in zip(alone["covered_broken"]["steps"], alone["covered"]["steps"], strict=True):
        assert own["ids"].tolist() == expected["ids"].tolist()
        assert torch.equal(own["owed"], expected["owed"])
    assert alone["covered"]["steps"][2]["owed"].any()  # there was something to forget


def test_every_source_has_its_share_in_every_stretch(alone):
    data, seen, trained = worker.examples(), [], []
    for step in alone["covered"]["steps"]:
        seen.append(torch.bincount(data.sources[step["indices"]], minlength=SOURCES))
        trained.append(torch.bincount(data.sources[step["indices"][step["positions"]]], minlength=SOURCES))
    for start in range(len(seen)):
        for end in range(start + 1, len(seen) + 1):
            assert (sum(trained[start:end]) > 0.45 * sum(seen[start:end]) - 1).all()
    assert alone["last_layer"]["steps"][-1]["owed"].tolist() == [0] * SOURCES  # without a floor nothing is owed
