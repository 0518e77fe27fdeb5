"""Why each candidate of a step was trained on or not, and by what it was compared. Nothing here decides anything.

The score is what the ranking goes by, where that is a number of each candidate, and for rankings that look at how
candidates lie to each other, how well the coreset stands for it:

| ranking | score |
|---|---|
| systematic | the product of the sketch with the mean sketch of the source |
| every other | distance, in the metric, to the nearest picked candidate of those it was compared with |

In the last case a picked candidate has 0, and the one that the coreset stands for least the most; the cosine's distance
is 1 minus it.
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
    """A step's candidates, each with its reason, score and loss.

    Args:
        matrix: Without rows where nobody was sketched; then scores and losses are unknown.
        kept: ``[Q]`` bool, the sources that were kept in this step.
    """
    scores, losses = torch.full((2, len(candidates)), torch.nan).unbind()
    valid = matrix.valid.cpu()
    scores[matrix.positions[valid]] = _scores(matrix, candidates.sources, selection, config)[valid]
    if config.estimator != "length":
        losses[matrix.positions] = matrix.losses.float().cpu()
    return Audit(_reasons(candidates, quota, selection, matrix, kept, config), scores, losses)


def _reasons(
    candidates: Candidates,
    quota: Quota,
    selection: Selection,
    matrix: CandidateMatrix,
    kept: Tensor,
    config: SelectionConfig,
) -> Tensor:
    """``[n]`` uint8, of `REASONS`."""
    protected = candidates.protected
    protected = torch.zeros(len(candidates), dtype=torch.bool) if protected is None else protected
    found = torch.full((len(candidates),), _CODE["passed over"], dtype=torch.uint8)
    if config.method in ("colm", "stratified"):
        found[quota.per_source[candidates.sources] == 0] = _CODE["no quota"]
        found[kept[candidates.sources] | protected] = _CODE["overflow"]
    found[matrix.positions[~matrix.valid.cpu()]] = _CODE["invalid"]
    found[selection.picked] = _CODE["selected"]
    entered = selection.positions[: selection.kept]
    found[entered] = torch.where(protected[entered], _CODE["protected"], _CODE["kept"]).to(torch.uint8)
    return found


def _scores(matrix: CandidateMatrix, sources: Tensor, selection: Selection, config: SelectionConfig) -> Tensor:
    """``[s]`` float32, of each row of the matrix; nan where there is nothing that it was compared with."""
    found = torch.full((len(matrix.positions),), torch.nan)
    valid, picked = matrix.valid.cpu(), torch.isin(matrix.positions, selection.picked)
    groups = sources[matrix.positions]
    for group in groups.unique():
        own = ((groups == group) & valid).nonzero().flatten()
        rows = matrix.rows[own.to(matrix.rows.device)]
        if config.ranking == "systematic":
            found[own] = along_the_mean(rows).float()
        elif picked[own].any():
            found[own] = nearest(rows, rows[picked[own].to(rows.device)], config.metric).float().cpu()
    return found
