"""Every ranking, of the package and of one's own: the same on two ranks as on one."""

from __future__ import annotations

import pytest
import torch
from support import worker

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
