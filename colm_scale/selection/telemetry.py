"""Telemetry of a selection: how near the coreset's mean is to the candidates', compared with a random draw.

Nothing here decides anything. The draw picks as many of each source as the selection did, uniformly among those that it
could have picked, and lets each source weigh as much in all: it has the selection's composition, but no ranking.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection
from colm_scale.selection import baselines

_RANKED_ROWS = 256
"""Most rows of a source whose effective rank is taken: they come in random order, and the cost is cubic."""
COMPARED = ("", "_stratified")
"""What is compared with the candidates, as the ends of names: the selection, and its draw with the same quotas."""


def could_be_picked(candidates: Candidates, selection: Selection, matrix: CandidateMatrix) -> Tensor:
    """``[n]`` bool, the candidates that the selection could have picked: not kept and, where sketched, valid."""
    found = torch.full((len(candidates),), len(matrix.positions) == 0)
    found[matrix.positions[matrix.valid.cpu()]] = True
    found[selection.positions[: selection.kept]] = False
    return found


def stratified_like(selection: Selection, sources: Tensor, eligible: Tensor, generator: torch.Generator) -> Selection:
    """A random draw with the selection's quotas: its kept candidates, and as many picks of each source.

    Args:
        sources: ``[n]``.
        eligible: ``[n]`` bool, what could be picked.
        generator: Rank-equal.

    Returns:
        Kept candidates with their weights, and picks with the mean weight that the selection gave their source.
    """
    nobody = int(sources.max()) + 1
    of_picks, weights = sources[selection.picked], selection.weights[selection.kept :].double()
    counts = torch.bincount(of_picks, minlength=nobody + 1)
    quota = Quota(selection.positions[: selection.kept], counts)
    drawn = baselines.stratified(torch.where(eligible, sources, nobody), quota, generator)
    means = torch.bincount(of_picks, weights, minlength=nobody + 1) / counts.clamp(min=1)
    own = [selection.weights[: selection.kept], means[sources[drawn.picked]].float()]
    return dataclasses.replace(drawn, weights=torch.cat(own))


def measure(
    candidates: Candidates, selection: Selection, matrix: CandidateMatrix, draw: Selection
) -> dict[str, float]:
    """`composition` and, where candidates were sketched, `ranking` of one step's selection beside a ``draw``."""
    found = composition(candidates.sources, selection)
    if not len(matrix.positions):
        return found
    eligible = could_be_picked(candidates, selection, matrix)
    return found | ranking(matrix, candidates.sources, eligible, selection, draw)


def composition(sources: Tensor, selection: Selection) -> dict[str, float]:
    """Effective number of sources of the coreset, by weight, and of the candidates."""
    return {
        "effective_sources": effective_number(torch.bincount(sources[selection.positions], selection.weights)),
        "effective_sources_candidates": effective_number(torch.bincount(sources).double()),
    }


def ranking(
    matrix: CandidateMatrix, sources: Tensor, eligible: Tensor, selection: Selection, draw: Selection
) -> dict[str, float]:
    """What ranking has made of the candidate matrix.

    The columns of a source are its own, so everything is taken source by source, and a source counts by its candidates.

    Args:
        sources: ``[n]``.
        eligible: ``[n]`` bool, what could be picked.
        draw: Of `stratified_like`.

    Returns:
        ``rank``, the effective rank of the rows; ``overlap``, the share of picks that the draw has picked too, and
        ``overlap_by_chance``, what that is on average; ``sketch_error`` and ``sketch_cosine``, between the mean of the
        selected rows and of all, and with ``_stratified`` the same of the draw. Only sources that had to be ranked
        count towards rank, error and cosine; without one these are missing.
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
        products += len(valid) ** 2 * (means.double() @ means.double().T).cpu()
        ranks.append(effective_rank(matrix.rows[valid[:_RANKED_ROWS].to(matrix.rows.device)]))
        sizes.append(len(valid))
    if sizes:
        found["rank"] = sum(rank * size for rank, size in zip(ranks, sizes)) / sum(sizes)
    return found | nearness(products)


def nearness(products: Tensor) -> dict[str, float]:
    """How near sketches are to the first of them: relative error ``|v - v0| / |v0|`` and cosine.

    Args:
        products: ``[3, 3]`` float64 inner products of the candidates' mean with those of what `COMPARED` names.

    Returns:
        Nothing if a product is not finite or a vector is zero.
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
    """Exponential of the entropy of the shares of ``counts``: as many equal shares would have it."""
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def effective_rank(rows: Tensor) -> float:
    """Effective number of the singular values of ``rows`` ``[s, h]`` (Roy and Vetterli, 2007); 0 if all are zero."""
    rows = rows.double()
    products = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    return effective_number(values) if values.any() else 0.0
