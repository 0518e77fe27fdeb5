"""The audit of a step: why each candidate was trained on or not, and its score. It influences no selection.

The score is the number that the ranking uses, or, for rankings that compare candidates with each other, how well the
coreset represents the candidate:

| ranking | score |
|---|---|
| systematic | the product of the sketch with the mean sketch of the source |
| every other | distance, in the metric, to the nearest picked candidate that it was compared with |

In the last case a picked candidate scores 0, and the one that the coreset represents least scores highest; the cosine
distance is 1 minus the cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.records import REASONS, Audit, CandidateMatrix, Candidates, Quota, Selection
from colm_scale.selection.ranking.rank import along_the_mean
from colm_scale.selection.ranking.similarity import nearest

_CODE = {reason: code for code, reason in enumerate(REASONS)}


def audit(
    candidates: Candidates,
    quota: Quota,
    selection: Selection,
    matrix: CandidateMatrix,
    kept: Tensor,
    config: SelectionConfig,
) -> Audit:
    """Find the reason, score and loss of each candidate of a step.

    Args:
        matrix: Without rows if nothing was sketched; scores and losses are then unknown.
        kept: ``[Q]`` bool, the sources kept in this step.
    """
    sources, protected, valid = candidates.sources, candidates.protected_mask, matrix.valid
    scores, losses = torch.full((2, len(candidates)), torch.nan).unbind()
    scores[matrix.positions[valid]] = _scores(matrix, sources, selection, config)[valid]
    if config.estimator != "length":
        losses[matrix.positions] = matrix.losses.float()
    reasons = torch.full((len(candidates),), _CODE["passed over"], dtype=torch.uint8)
    if config.method in ("colm", "stratified"):
        reasons[quota.per_source[sources] == 0] = _CODE["no quota"]
        reasons[kept[sources] | protected] = _CODE["overflow"]
    reasons[matrix.positions[~valid]] = _CODE["invalid"]
    reasons[selection.picked] = _CODE["selected"]
    entered = selection.positions[: selection.kept]
    reasons[entered] = torch.where(protected[entered], _CODE["protected"], _CODE["kept"]).to(torch.uint8)
    return Audit(reasons, scores, losses)


def _scores(matrix: CandidateMatrix, sources: Tensor, selection: Selection, config: SelectionConfig) -> Tensor:
    """Score each row of the matrix: ``[s]`` float32; nan if it was compared with nothing."""
    found = torch.full((len(matrix.positions),), torch.nan)
    valid, picked = matrix.valid, torch.isin(matrix.positions, selection.picked)
    groups = sources[matrix.positions]
    for group in groups.unique():
        own = ((groups == group) & valid).nonzero().flatten()
        rows = matrix.rows[own]
        if config.ranking == "systematic":
            found[own] = along_the_mean(rows).float()
        elif picked[own].any():
            found[own] = nearest(rows, rows[picked[own]], config.metric).float()
    return found
