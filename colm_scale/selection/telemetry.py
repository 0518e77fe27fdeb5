"""Telemetry of a selection: how near the coreset's mean is to the candidates', compared with a random draw.

The draw picks the same number of each source as the selection, uniformly among the candidates it could have picked, and
gives each source the same total weight: the composition of the selection, without its ranking.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection
from colm_scale.selection.select import stratified

_RANKED_ROWS = 256
"""Most rows of a source for its effective rank, at cubic cost; rows come in random order."""
COMPARED = ("", "_stratified")
"""Name suffixes of the sets compared with the candidates: the selection, and its draw with the same quotas."""


def could_be_picked(candidates: Candidates, selection: Selection, matrix: CandidateMatrix) -> Tensor:
    """Find the candidates that the selection could have picked, ``[n]`` bool: not kept and, if sketched, valid."""
    found = torch.full((len(candidates),), len(matrix.positions) == 0)
    found[matrix.positions[matrix.valid]] = True
    found[selection.positions[: selection.kept]] = False
    return found


def stratified_like(selection: Selection, sources: Tensor, eligible: Tensor, generator: torch.Generator) -> Selection:
    """Draw at random with the selection's quotas: its kept candidates, and the same number of picks of each source.

    Args:
        sources: ``[n]``.
        eligible: ``[n]`` bool, the candidates that could be picked.
        generator: Rank-equal.

    Returns:
        Kept candidates with their weights, and picks with the selection's mean weight for their source.
    """
    nobody = int(sources.max()) + 1
    of_picks, weights = sources[selection.picked], selection.weights[selection.kept :].double()
    counts = torch.bincount(of_picks, minlength=nobody + 1)
    quota = Quota(selection.positions[: selection.kept], counts)
    drawn = stratified(torch.where(eligible, sources, nobody), quota, generator)
    means = torch.bincount(of_picks, weights, minlength=nobody + 1) / counts.clamp(min=1)
    own = [selection.weights[: selection.kept], means[sources[drawn.picked]].float()]
    return dataclasses.replace(drawn, weights=torch.cat(own))


def measure(
    candidates: Candidates, selection: Selection, matrix: CandidateMatrix, draw: Selection
) -> dict[str, float]:
    """Measure `composition` and, if candidates were sketched, `ranking` of a selection against a ``draw``."""
    found = composition(candidates.sources, selection)
    if not len(matrix.positions):
        return found
    eligible = could_be_picked(candidates, selection, matrix)
    return found | ranking(matrix, candidates.sources, eligible, selection, draw)


def composition(sources: Tensor, selection: Selection) -> dict[str, float]:
    """Compute the effective number of sources of the coreset, by weight, and of the candidates."""
    return {
        "effective_sources": effective_number(torch.bincount(sources[selection.positions], selection.weights)),
        "effective_sources_candidates": effective_number(torch.bincount(sources).double()),
    }


def ranking(
    matrix: CandidateMatrix, sources: Tensor, eligible: Tensor, selection: Selection, draw: Selection
) -> dict[str, float]:
    """Measure the effect of the ranking on the candidate matrix.

    Sources have different columns, so everything is computed source by source, weighted by the number of candidates.

    Args:
        sources: ``[n]``.
        eligible: ``[n]`` bool, the candidates that could be picked.
        draw: The draw of `stratified_like`.

    Returns:
        ``rank``, the effective rank of the rows; ``overlap``, the share of picks that the draw also picked, and
        ``overlap_by_chance``, its average; ``sketch_error`` and ``sketch_cosine`` between the mean of the selected rows
        and of all, and the same with ``_stratified`` for the draw. Only ranked sources count towards rank, error and
        cosine; without one these are missing.
    """
    counted = torch.bincount(sources[selection.picked], minlength=int(sources.max()) + 1).double()
    available = torch.bincount(sources[eligible], minlength=len(counted)).double().clamp(min=1)
    found = {}
    if len(selection.picked):
        found["overlap"] = float(torch.isin(selection.picked, draw.picked).double().mean())
        found["overlap_by_chance"] = float((counted.square() / available).sum() / counted.sum())
    weights = torch.zeros(3, len(sources), dtype=torch.float64)
    weights[0, eligible] = 1
    for row, chosen in enumerate((selection, draw), 1):
        weights[row, chosen.picked] = chosen.weights[chosen.kept :].double()
    weights = weights[:, matrix.positions]
    groups = sources[matrix.positions]
    ranks, sizes, products = [], [], torch.zeros(3, 3, dtype=torch.float64)
    for group in groups.unique():
        own = torch.where((groups == group) & (weights[0] > 0), weights, 0)  # [3, s]
        valid = own[0].nonzero().flatten()
        if not 0 < int((own[1] > 0).sum()) < len(valid):
            continue
        means = (own / own.sum(1, keepdim=True)).to(matrix.rows) @ matrix.rows
        products += len(valid) ** 2 * means.double() @ means.double().T
        ranks.append(effective_rank(matrix.rows[valid[:_RANKED_ROWS]]))
        sizes.append(len(valid))
    if sizes:
        found["rank"] = sum(rank * size for rank, size in zip(ranks, sizes)) / sum(sizes)
    return found | nearness(products)


def nearness(products: Tensor) -> dict[str, float]:
    """Compare mean sketches with the first of them: relative error ``|v - v0| / |v0|`` and cosine.

    Args:
        products: ``[3, 3]`` float64 inner products of the means of the candidates and of the sets in `COMPARED`.

    Returns:
        Empty if a product is not finite or a vector is zero.
    """
    lengths = products.diagonal().sqrt()
    if not products.isfinite().all() or not lengths.all():
        return {}
    errors = (products.diagonal() - 2 * products[0] + products[0, 0]).clamp(min=0).sqrt() / lengths[0]
    cosines = products[0] / (lengths[0] * lengths)
    both = zip(COMPARED, errors[1:].tolist(), cosines[1:].tolist())
    return {
        f"sketch_{what}{end}": value
        for end, error, cosine in both
        for what, value in (("error", error), ("cosine", cosine))
    }


def effective_number(counts: Tensor) -> float:
    """Compute the number of equal shares with the entropy of ``counts``: the exponential of that entropy."""
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def effective_rank(rows: Tensor) -> float:
    """Compute the effective number of singular values of ``rows`` ``[s, h]`` (Roy and Vetterli, 2007); 0 for zeros."""
    rows = rows.double()
    products = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    return effective_number(values) if values.any() else 0.0
