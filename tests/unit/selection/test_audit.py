from __future__ import annotations

import dataclasses

import pytest
import torch

from colm_scale.config import SelectionConfig
from colm_scale.records import REASONS, CandidateMatrix, Candidates, Quota, Selection, long_tensor
from colm_scale.selection.audit import audit

CONFIG = SelectionConfig(candidates=9, budget=5)
SOURCES = long_tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
KEPT = torch.tensor([False, False, True, False])
QUOTA = Quota(kept=long_tensor([5, 6]), per_source=long_tensor([2, 0, 0, 0]), overflow=1)
CANDIDATES = Candidates(
    1, torch.arange(9), 10 + torch.arange(9), SOURCES, torch.ones(9).long(),
    protected=torch.tensor([False] * 5 + [True] + [False] * 3),
)
SELECTION = Selection(long_tensor([5, 6, 2, 0]), torch.ones(4), kept=2, overflow=1, invalid=1)
MATRIX = CandidateMatrix(
    positions=long_tensor([0, 1, 2, 3]),
    rows=torch.tensor([[0.0, 0.0], [3.0, 1.0], [10.0, 0.0], [0.0, 0.0]]),
    valid=torch.tensor([True, True, True, False]),
    losses=torch.tensor([1.0, 2.0, 3.0, torch.nan]),
)


def audited(**options):
    config = dataclasses.replace(CONFIG, **options)
    matrix = MATRIX if config.sketches else CandidateMatrix.without_rows()
    return audit(CANDIDATES, QUOTA, SELECTION, matrix, KEPT, config)


def test_every_candidate_has_its_reason():
    assert [REASONS[code] for code in audited().reasons.tolist()] == [
        *("selected", "passed over", "selected", "invalid", "no quota", "protected", "kept", "overflow", "no quota")
    ]


def test_methods_without_quotas_pass_over_only():
    found = {REASONS[code] for code in audited(method="random").reasons[long_tensor([1, 3, 4, 7, 8])].tolist()}
    assert found == {"passed over"}


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [0, 4, 0]),  # the nearest picked one is the first row, 3 + 1 away
        ({"metric": "l2"}, [0, 10**0.5, 0]),
        ({"ranking": "matching"}, [0, 4, 0]),
        ({"ranking": "own.py:best"}, [0, 4, 0]),
        ({"ranking": "systematic"}, [0, 3 * 13 / 3 + 1 / 3, 10 * 13 / 3]),
    ],
)
def test_the_score_is_what_the_ranking_goes_by(options, scores):
    found = audited(**options)
    assert found.scores[:3].tolist() == pytest.approx(scores)
    assert found.scores[3:].isnan().all()


def test_the_cosine_is_told_as_a_distance():
    matrix = dataclasses.replace(MATRIX, rows=torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0], [0.0, 0.0]]))
    found = audit(CANDIDATES, QUOTA, SELECTION, matrix, KEPT, dataclasses.replace(CONFIG, metric="cosine"))
    assert found.scores[:3].tolist() == pytest.approx([0, 1 - 0.5**0.5, 0], abs=1e-6)


def test_losses_are_those_of_the_sketch():
    assert audited().losses.tolist()[:3] == [1, 2, 3]
    assert audited().losses[3:].isnan().all()
    assert audited(estimator="length").losses.isnan().all()


def test_nothing_sketched_is_nothing_compared():
    found = audited(method="stratified")
    assert found.scores.isnan().all()
    assert found.losses.isnan().all()
    assert [REASONS[code] for code in found.reasons[:4].tolist()] == ["selected", "passed over"] * 2
