from __future__ import annotations

import torch

from colm_scale.config import RunConfig, SelectionConfig, SourcesConfig
from colm_scale.records import CandidateMatrix, Candidates, Selection, long_tensor
from colm_scale.step.source_state import SourceState

NONE = torch.zeros(3, dtype=torch.bool)
SOURCES = long_tensor([0] * 6 + [1] * 3 + [2])
NO_ROWS = CandidateMatrix.without_rows()


def kept_after(steps: int, config: RunConfig) -> list[tuple[bool, list[bool]]]:
    """Whether kept sources were chosen again after each step, and which they then are."""
    state = SourceState(NONE, None, config.selection, config.sources.refresh_every)
    n, found = torch.arange(len(SOURCES)), []
    for step in range(1, steps + 1):
        candidates = Candidates(step, n, n, SOURCES, n)
        again = state.after(candidates, Selection(n[:4], torch.ones(4)), NO_ROWS, applied=True)
        found.append((again, state.kept.tolist()))
    return found


def test_kept_sources_are_chosen_again_when_due():
    refreshed = SourcesConfig(refresh_every=2)
    assert kept_after(3, RunConfig(sources=refreshed)) == [
        (False, NONE.tolist()),
        (True, [False, True, True]),
        (False, [False, True, True]),
    ]
    third = SelectionConfig(kept_sources=0.34)
    assert kept_after(2, RunConfig(sources=refreshed, selection=third))[-1] == (True, [False, False, True])
    assert not any(again for again, _ in kept_after(9, RunConfig()))


def test_what_was_no_update_has_trained_on_nothing():
    config, n = RunConfig(selection=SelectionConfig(coverage_floor=0.5)), torch.arange(len(SOURCES))
    state = SourceState(NONE, None, config.selection, columns=512)
    rows = CandidateMatrix(n, torch.eye(len(n), 512), torch.ones(len(n), dtype=torch.bool), torch.zeros(len(n)))
    for applied in (False, True):
        state.after(Candidates(1, n, n, SOURCES, n), Selection(n[:4], torch.ones(4)), rows, applied=applied)
        assert bool(state.feedback.deviations.any()) == applied
        assert applied or state.coverage.owed.tolist() == [3_000_000, 1_500_000, 500_000]
    state.renew(torch.zeros(2, dtype=torch.bool), None)
    assert state.feedback.deviations.tolist() == [[0.0] * 512] * 2, "of the new sources"
