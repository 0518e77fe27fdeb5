"""The rankings: which of a source's candidates fill its quota. One function each, by the name of the option.

A ranking of the user's (`colm_scale.config.user_functions`) has the same signature. Each ranks one source at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.user_functions import is_own, load_own
from colm_scale.errors import TrainingError
from colm_scale.selection.ranking import line, partition
from colm_scale.selection.ranking.facility import cluster_sizes, greedy
from colm_scale.selection.ranking.matching import match_by_swaps
from colm_scale.selection.ranking.similarity import similarities
from colm_scale.selection.ranking.systematic import systematic


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates of one source that compete for places.

    Attributes:
        rows: ``[m, h]`` sketches, on the device that is to do the work.
        losses: ``[m]`` losses, on the same device.
        count: How many to pick, k: at least one, and fewer than there are.
        stands_for: The weight of a pick, unless the ranking says otherwise.
        config: The metric, and what the weights are to be.
        draw: For a ranking that draws; equal on every rank.
    """

    rows: Tensor
    losses: Tensor
    count: int
    stands_for: float
    config: SelectionConfig
    draw: torch.Generator


Picks = tuple[Tensor, Tensor | None]
"""``[k]`` rows of a `Ranked`, in the order of picking, and ``[k]`` what each counts for, on the CPU. None: each counts
for `Ranked.stands_for`."""


def rank(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """``[k]`` picks and ``[k]`` their weights, on the CPU, by ``ranked.config.ranking``.

    Raises:
        TrainingError: A ranking of the user's returns no ``k`` different rows.
    """
    name = ranked.config.ranking
    if is_own(name):
        picks, weights = _checked(load_own("selection.ranking", name, parameters=1)(ranked), ranked)
    else:
        picks, weights = RANKINGS[name](ranked)
    return picks, torch.full((len(picks),), ranked.stands_for, dtype=torch.float64) if weights is None else weights


def _checked(found: Picks, ranked: Ranked) -> Picks:
    """What a ranking of the user's returned, if it is as it must be."""
    picks, weights = found
    picks = torch.as_tensor(picks, dtype=torch.int64, device="cpu")
    within = bool(((picks >= 0) & (picks < len(ranked.rows))).all())
    if picks.shape != (ranked.count,) or not within or len(picks.unique()) < len(picks):
        raise TrainingError(
            f"--selection.ranking {ranked.config.ranking} returned picks {picks.tolist()}, but was to return "
            f"{ranked.count} different rows of {len(ranked.rows)}"
        )
    if weights is None:
        return picks, None
    weights = torch.as_tensor(weights, device="cpu")
    if weights.shape != picks.shape or not (weights.isfinite().all() and (weights > 0).all()):
        raise TrainingError(
            f"--selection.ranking {ranked.config.ranking} returned weights {weights.tolist()}, but was to return "
            f"None, or a positive number for each of {ranked.count} picks"
        )
    return picks, weights


def _facility(ranked: Ranked) -> Picks:
    picks, sizes = _medoids(ranked)
    return picks, sizes if ranked.config.weights == "cluster" else None


def _matching(ranked: Ranked) -> Picks:
    return match_by_swaps(ranked.rows, ranked.count), None


def _systematic(ranked: Ranked) -> Picks:
    return systematic(along_the_mean(ranked.rows), ranked.count, ranked.draw), None


RANKINGS: dict[str, Callable[[Ranked], Picks]] = {
    "facility": _facility,
    "matching": _matching,
    "systematic": _systematic,
}


def along_the_mean(rows: Tensor) -> Tensor:
    """``[m]`` one number for each of the ``rows`` ``[m, h]``: its product with their mean, or its only entry."""
    rows = rows.double().cpu()
    return rows.flatten() if rows.shape[1] == 1 else (rows * rows.mean(0)).sum(1)


def _medoids(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """``[k]`` medoids and how many rows each stands for, on the CPU.

    Counting costs a large source as much as picking, so where weights do not count its counts may be 1.
    """
    rows, k, config = ranked.rows, ranked.count, ranked.config
    metric = config.metric
    if rows.shape[1] == 1 and metric != "cosine":
        return line.medoids_on_line(rows[:, 0], k)
    if len(rows) > partition.LARGEST_GROUP:
        picks = partition.partitioned_greedy(rows, k, metric, partition.LARGEST_GROUP)
        counted = config.weights == "cluster"
        counts = partition.cluster_sizes(rows, picks, metric) if counted else torch.ones_like(picks)
        return picks.cpu(), counts.cpu()
    # Where few directions make the rows, many candidates lie between two others in every column, and medoids tie. In
    # float64 the distances between float32 rows show such ties, instead of deciding them by their own rounding.
    similarity = similarities(rows.double(), metric)
    picks = greedy(similarity, k)
    return picks.cpu(), cluster_sizes(similarity, picks).cpu()
