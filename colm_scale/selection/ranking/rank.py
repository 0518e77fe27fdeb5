"""The rankings, one function for each name of the option: they pick the candidates that fill a source's quota.

The user's own rankings (`colm_scale.config.user_functions`) have the same signature.
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


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates of one source that compete for its quota.

    Attributes:
        rows: ``[m, h]`` sketches, on the device that does the work.
        losses: ``[m]`` losses, on the same device.
        count: Number of picks k, at least 1 and below m.
        stands_for: Weight of a pick unless the ranking returns weights.
        config: The metric and the kind of weights.
        draw: For a ranking that draws; rank-equal.
    """

    rows: Tensor
    losses: Tensor
    count: int
    stands_for: float
    config: SelectionConfig
    draw: torch.Generator


Picks = tuple[Tensor, Tensor | None]
"""``[k]`` rows of a `Ranked`, in the order of picking, and their ``[k]`` weights, on the CPU. None: all weights are
`Ranked.stands_for`."""


def rank(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Return ``[k]`` picks and their ``[k]`` weights, on the CPU, by ``ranked.config.ranking``.

    Raises:
        TrainingError: A ranking of the user does not return ``k`` different rows, or returns wrong weights.
    """
    name = ranked.config.ranking
    own = is_own(name)
    ranking = load_own("selection.ranking", name, parameters=1) if own else RANKINGS[name]
    picks, weights = ranking(ranked)
    if weights is None:
        weights = torch.full((ranked.count,), ranked.stands_for, dtype=torch.float64)
    return _checked(picks, weights, ranked) if own else (picks, weights)


def _checked(picks: Tensor, weights: Tensor, ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Check the results of a user's ranking."""
    returned = f"--selection.ranking {ranked.config.ranking} returned"
    picks = torch.as_tensor(picks, dtype=torch.int64, device="cpu")
    within = bool(((picks >= 0) & (picks < len(ranked.rows))).all())
    if picks.shape != (ranked.count,) or not within or len(picks.unique()) < len(picks):
        raise TrainingError(
            f"{returned} picks {picks.tolist()}, but must return {ranked.count} different rows of {len(ranked.rows)}"
        )
    weights = torch.as_tensor(weights, device="cpu")
    if weights.shape != picks.shape or not (weights.isfinite().all() and (weights > 0).all()):
        raise TrainingError(
            f"{returned} weights {weights.tolist()}, but must return None or a positive number for each of "
            f"{ranked.count} picks"
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


def systematic(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Take every n/k-th candidate in the order of ``values`` ``[n]``, from a random start: each with probability k/n.

    Args:
        k: At least 1, at most n.
        generator: Rank-equal; draws the start.

    Returns:
        int64 ``[k]`` in ascending order of value; equal values by index.
    """
    n = len(values)
    start = torch.randint(n, (), generator=generator)  # in steps of 1/k, so that the rest is integer arithmetic
    return values.argsort(stable=True)[(start + n * torch.arange(k)) // k]


def along_the_mean(rows: Tensor) -> Tensor:
    """Score each of the ``rows`` ``[m, h]`` by its product with their mean, or by its only entry: ``[m]`` float64."""
    rows = rows.double().cpu()
    return rows.flatten() if rows.shape[1] == 1 else (rows * rows.mean(0)).sum(1)


def _medoids(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Return ``[k]`` medoids and the number of rows each represents, on the CPU.

    In a large source, counting costs as much as picking; unless the weights need them, its counts are 1.
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
    # If the rows span few directions, many candidates lie between two others in every column, and medoids tie. In
    # float64 the distances between float32 rows preserve such ties; float32 would break them by rounding.
    similarity = similarities(rows.double(), metric)
    picks = greedy(similarity, k)
    return picks.cpu(), cluster_sizes(similarity, picks).cpu()
