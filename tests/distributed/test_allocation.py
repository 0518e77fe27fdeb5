"""What the training pass tells about sources decides how many of each are trained on: the same on any number of ranks,
under any engine, and after a restart."""

from __future__ import annotations

import pytest
import torch
from support import worker

CASES = ("excess_loss", "excess_loss_ranked", "excess_loss_broken")
PAIRS = [
    ("auto", "excess_loss"),
    ("auto", "excess_loss_broken"),
    ("zero3", "excess_loss_ranked"),
    ("fsdp", "excess_loss"),
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


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_all_ranks_know_the_same_and_what_one_rank_knows(ranks, alone, engine, case):
    """Micro-batches differ with the number of ranks, and with them the last bits of losses and, slowly, weights."""
    known = [rank[f"{engine}/{case}"]["steps"][-1]["statistics"] for rank in ranks]
    assert torch.equal(*known)
    expected = alone[case]["steps"][-1]["statistics"]
    torch.testing.assert_close(known[0], expected, rtol=1e-4, atol=1e-4 * float(expected[:, 1:].abs().max()))


def test_a_run_that_is_broken_off_goes_on_as_if_it_had_not_been(alone):
    for own, expected in zip(alone["excess_loss_broken"]["steps"], alone["excess_loss_ranked"]["steps"], strict=True):
        assert own["ids"].tolist() == expected["ids"].tolist()
        assert torch.equal(own["statistics"], expected["statistics"])


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_shows_each_trained_example(alone, case):
    step = alone[case]["steps"][0]
    trained = torch.tensor(quotas(step), dtype=torch.float64)
    assert torch.equal(step["statistics"][:, 0], trained)
    assert float(step["statistics"][:, 1].sum()) == pytest.approx(step["loss"] * 12, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_moves_examples(alone, case):
    """Every source with candidates gets its one, and who gets more changes."""
    data = worker.examples()
    for step in alone[case]["steps"]:
        present = torch.bincount(data.sources[step["indices"]], minlength=SOURCES)
        found = quotas(step)
        assert sum(found) == 12
        assert all(min(1, there) <= quota <= there for quota, there in zip(found, present.tolist()))
    assert len({tuple(quotas(step)) for step in alone[case]["steps"]}) > 1
