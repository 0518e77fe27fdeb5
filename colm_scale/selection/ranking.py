"""The rankings: which of a source's candidates fill its quota. One function each, by the name of the option.

A ranking of the user's (`colm_scale.config.own`) has the same signature. It ranks one source at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.own import is_own, load_own
from colm_scale.errors import TrainingError
from colm_scale.selection import line, partition
from colm_scale.selection.facility import cluster_sizes, greedy
from colm_scale.selection.matching import match_by_pursuit, match_by_swaps
from colm_scale.selection.matroid import greedy_under_quotas
from colm_scale.selection.sampling import importance, systematic
from colm_scale.selection.similarity import similarities


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates that compete for places: of one source, or with ``config.joint`` of several.

    Attributes:
        rows: ``[m, h]`` sketches, on the device that is to do the work.
        losses: ``[m]`` losses, on the same device.
        groups: ``[m]`` source of each, 0..G-1; on the CPU, as all that follows.
        quotas: ``[G]`` how many of each source to pick: at least one, and fewer than it has.
        stands_for: ``[G]`` what a pick of each source counts for, unless the ranking says otherwise.
        config: The metric, and what the weights are to be.
        draw: Where the ranking is a draw; equal on every rank.
    """

    rows: Tensor
    losses: Tensor
    groups: Tensor
    quotas: Tensor
    stands_for: Tensor
    config: SelectionConfig
    draw: torch.Generator

    @property
    def total(self) -> int:
        """How many to pick, k."""
        return int(self.quotas.sum())


Picks = tuple[Tensor, Tensor | None]
"""``[k]`` rows of a `Ranked`, in the order of picking, and ``[k]`` what each counts for, on the CPU. None: each counts
for what its source's picks stand for."""


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
    return picks, ranked.stands_for[ranked.groups[picks]] if weights is None else weights


def _checked(found: Picks, ranked: Ranked) -> Picks:
    """What a ranking of the user's returned, if it is as it must be."""
    picks, weights = found
    picks = torch.as_tensor(picks, dtype=torch.int64, device="cpu")
    within = bool(((picks >= 0) & (picks < len(ranked.rows))).all())
    if picks.shape != (ranked.total,) or not within or len(picks.unique()) < len(picks):
        raise TrainingError(
            f"--selection.ranking {ranked.config.ranking} returned picks {picks.tolist()}, but was to return "
            f"{ranked.total} different rows of {len(ranked.rows)}"
        )
    if weights is None:
        return picks, None
    weights = torch.as_tensor(weights, device="cpu")
    if weights.shape != picks.shape or not (weights.isfinite().all() and (weights > 0).all()):
        raise TrainingError(
            f"--selection.ranking {ranked.config.ranking} returned weights {weights.tolist()}, but was to return "
            f"None, or a positive number for each of {ranked.total} picks"
        )
    return picks, weights


def _facility(ranked: Ranked) -> Picks:
    picks, sizes = _medoids(ranked)
    return picks, sizes if ranked.config.weights == "cluster" else None


def _matching(ranked: Ranked) -> Picks:
    return match_by_swaps(ranked.rows, ranked.groups, ranked.quotas, ranked.stands_for), None


def _pursuit(ranked: Ranked) -> Picks:
    picks, coefficients = match_by_pursuit(ranked.rows, ranked.groups, ranked.quotas, ranked.stands_for)
    unbiased = ranked.config.weights == "unbiased"
    return picks, coefficients * (len(ranked.rows) / ranked.total) if unbiased else None


def _systematic(ranked: Ranked) -> Picks:
    return systematic(along_the_mean(ranked.rows), ranked.total, ranked.draw), None


def _importance(ranked: Ranked) -> Picks:
    picks, probabilities = importance(ranked.rows.double().norm(dim=1).cpu(), ranked.total, ranked.draw)
    return picks, 1 / probabilities if ranked.config.weights == "unbiased" else None


def _top(ranked: Ranked) -> Picks:
    return ranked.losses.cpu().argsort(descending=True, stable=True)[: ranked.total], None


RANKINGS: dict[str, Callable[[Ranked], Picks]] = {
    "facility": _facility,
    "matching": _matching,
    "pursuit": _pursuit,
    "systematic": _systematic,
    "importance": _importance,
    "top": _top,
}


def along_the_mean(rows: Tensor) -> Tensor:
    """``[m]`` one number for each of the ``rows`` ``[m, h]``: its product with their mean, or its only entry."""
    rows = rows.double().cpu()
    return rows.flatten() if rows.shape[1] == 1 else (rows * rows.mean(0)).sum(1)


def _medoids(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """``[k]`` medoids and how many rows each stands for, on the CPU.

    Counting costs a large source as much as picking, so where weights do not count its counts may be 1.
    """
    rows, quotas, config = ranked.rows, ranked.quotas, ranked.config
    k, alone, metric = ranked.total, len(quotas) == 1, config.metric
    if alone and rows.shape[1] == 1 and metric != "cosine":
        return line.medoids_on_line(rows[:, 0], k)
    if alone and len(rows) > config.largest_group:
        picks = partition.partitioned_greedy(rows, k, metric, config.largest_group)
        counted = config.weights == "cluster"
        counts = partition.cluster_sizes(rows, picks, metric) if counted else torch.ones_like(picks)
        return picks.cpu(), counts.cpu()
    # Where few directions make the rows, many candidates lie between two others in every column, and medoids tie. In
    # float64 the distances between float32 rows show such ties, instead of deciding them by their own rounding.
    similarity = similarities(rows.double(), metric)
    picks = greedy(similarity, k) if alone else greedy_under_quotas(similarity, ranked.groups, quotas)
    return picks.cpu(), cluster_sizes(similarity, picks.to(similarity.device)).cpu()
