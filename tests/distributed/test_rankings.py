"""Every ranking, one by one, together and free: the same on two ranks as on one."""

from __future__ import annotations

import pytest
import torch
from support import worker

from colm_scale.randomness import generator

CASES = [name for name in worker.CASES if name.startswith("ranked")]
PAIRS = [("auto", case) for case in CASES]


@pytest.mark.parametrize("case", CASES)
def test_ids_and_weights_are_those_of_one_process(ranks, alone, case):
    for cases in ranks:
        steps = zip(cases[f"auto/{case}"]["steps"], alone[case]["steps"], strict=True)
        for number, (own, expected) in enumerate(steps):
            assert own["ids"].tolist() == expected["ids"].tolist()
            # Gradients are added up in another order, so after the first step adapters, and with them rows, are off by
            # a few last bits; coefficients and probabilities are continuous in them, counts are not.
            exact = number == 0 or case not in ("ranked_pursuit", "ranked_importance")
            torch.testing.assert_close(own["weights"], expected["weights"], rtol=0 if exact else 1e-5, atol=0)


def test_each_ranking_selects_others(alone):
    chosen = {tuple(sorted(alone[case]["steps"][0]["ids"].tolist())) for case in CASES}
    assert len(chosen) == len(CASES) == 6


def test_the_highest_losses_of_each_source_are_picked(alone):
    sources = worker.examples().sources
    for step in alone["ranked_top"]["steps"]:
        positions, losses = step["matrix"]["positions"], step["matrix"]["losses"]
        picked = step["positions"][step["kept"] :]
        for source in sources[step["indices"][picked]].unique():
            of_source = sources[step["indices"][positions]] == source
            count = int((sources[step["indices"][picked]] == source).sum())
            expected = positions[of_source][losses[of_source].topk(count).indices]
            assert torch.isin(expected, picked).all()


def test_what_is_ranked_together_is_compared_in_the_same_columns(alone):
    """The rows of all sources then have the mean that free matching comes near to: nearer than most draws would."""
    step = alone["ranked_matching"]["steps"][0]
    rows = step["matrix"]["rows"].double()
    picked = torch.searchsorted(step["matrix"]["positions"], step["positions"])
    reached = (rows[picked].mean(0) - rows.mean(0)).norm()
    drawn = [torch.randperm(len(rows), generator=generator(seed, "draw"))[: len(picked)] for seed in range(50)]
    draws = [rows[draw].mean(0) - rows.mean(0) for draw in drawn]
    assert reached < min(draw.norm() for draw in draws)
