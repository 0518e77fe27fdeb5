"""The rankings, one for each name of the option: they pick the candidates that fill a source's quota.

A ranking of the package first compares the candidates of every source, on the device, and then picks on the CPU: the
host waits for the device once, whatever the number of sources. The user's own (`colm_scale.config.user_functions`) is
one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.user_functions import is_own, load_own
from colm_scale.errors import TrainingError
from colm_scale.records import CPU, on_device, on_host
from colm_scale.selection.ranking import line, matching, partition
from colm_scale.selection.ranking.facility import cluster_sizes, greedy
from colm_scale.selection.ranking.similarity import similarities


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates of one source that compete for its quota.

    Attributes:
        rows: ``[m, h]`` sketches; on the CPU, or, for a ranking of the user, on the device.
        losses: ``[m]`` losses, on the same device as ``rows``.
        count: Number of picks k, at least 1 and below m.
        stands_for: Weight of a pick unless the ranking returns weights.
        config: The metric and the kind of weights.
        draw: For a ranking that draws; rank-equal.
        left: ``[h]`` float64, what earlier picks have deviated from their candidates (`ErrorFeedback`), for picks of
            this weight; zeros without feedback. On the device of ``rows``.
        device: The device that compares the candidates.
    """

    rows: Tensor
    losses: Tensor
    count: int
    stands_for: float
    config: SelectionConfig
    draw: torch.Generator
    left: Tensor
    device: torch.device = CPU


Picks = tuple[Tensor, Tensor | None]
"""``[k]`` rows of a `Ranked`, in the order of picking, and their ``[k]`` weights, on the CPU. None: all weights are
`Ranked.stands_for`."""


MOST_ON_HOST = 1024
"""Most candidates of a source that are picked on the CPU if another device has compared them: for larger sources, its
rounds on whole rows cost less than the copy."""


def rank(contests: Sequence[Ranked]) -> list[tuple[Tensor, Tensor]]:
    """Return ``[k]`` picks and their ``[k]`` weights for each source, on the CPU, by ``config.ranking``.

    Args:
        contests: The candidates of each source, with the same configuration and device.

    Raises:
        TrainingError: A ranking of the user does not return ``k`` different rows, or returns wrong weights.
    """
    return [_checked(*picks, ranked) for ranked, picks in zip(contests, _picks(contests))]


def _picks(contests: Sequence[Ranked]) -> list[Picks]:
    if not contests:
        return []
    name, device = contests[0].config.ranking, contests[0].device
    if is_own(name):
        own = load_own("selection.ranking", name, parameters=1)
        return [own(_moved(ranked)) for ranked in contests]
    compare, pick = RANKINGS[name]
    compared: Iterable[Tensor] = map(compare, contests)  # one at a time
    if device.type != "cpu":
        compared = on_host([*compared])
    return [pick(ranked, pairs) for ranked, pairs in zip(contests, compared)]


def _moved(ranked: Ranked) -> Ranked:
    rows, losses, left = (on_device(tensor, ranked.device) for tensor in (ranked.rows, ranked.losses, ranked.left))
    return replace(ranked, rows=rows, losses=losses, left=left)


def _checked(picks: Tensor, weights: Tensor | None, ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Add default weights, and check the results of a user's ranking."""
    if weights is None:
        weights = torch.full((ranked.count,), ranked.stands_for, dtype=torch.float64)
    if not is_own(ranked.config.ranking):
        return picks, weights
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


def _nothing(ranked: Ranked) -> Tensor:
    return torch.empty(0, 0, dtype=torch.float64)


def _similarities(ranked: Ranked) -> Tensor:
    """``[m, m]`` similarities; nothing for one number per candidate, and for a source that `_medoids` compares itself.

    If the rows span few directions, many candidates lie between two others in every column, and medoids tie. In float64
    the distances between float32 rows preserve such ties; float32 would break them by rounding.
    """
    most = partition.LARGEST_GROUP if ranked.device.type == "cpu" else MOST_ON_HOST
    if _on_a_line(ranked) or len(ranked.rows) > most:
        return _nothing(ranked)
    return similarities(on_device(ranked.rows, ranked.device).double(), ranked.config.metric)


def _products(ranked: Ranked) -> Tensor:
    """``[m, m + 1]`` products; nothing for a source that `_matching` compares itself."""
    if len(ranked.rows) > matching.LARGEST_PART:
        return _nothing(ranked)
    rows, left = (on_device(tensor, ranked.device) for tensor in (ranked.rows, ranked.left))
    return matching.products_of_deviations(rows, left)


def _facility(ranked: Ranked, pairs: Tensor) -> Picks:
    picks, sizes = _medoids(ranked, pairs)
    return picks, sizes if ranked.config.weights == "cluster" else None


def _matching(ranked: Ranked, pairs: Tensor) -> Picks:
    if len(pairs):
        return matching.match_by_swaps(pairs, ranked.count), None
    rows, left = (on_device(tensor, ranked.device) for tensor in (ranked.rows, ranked.left))
    return matching.match_in_parts(rows, ranked.count, matching.LARGEST_PART, left), None


def _systematic(ranked: Ranked, pairs: Tensor) -> Picks:
    return systematic(along_the_mean(ranked.rows), ranked.count, ranked.draw), None


RANKINGS: dict[str, tuple[Callable[[Ranked], Tensor], Callable[[Ranked, Tensor], Picks]]] = {
    "facility": (_similarities, _facility),
    "matching": (_products, _matching),
    "systematic": (_nothing, _systematic),
}
"""What each compares on the device, float64, and how it picks."""


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
    rows = rows.double()
    return rows.flatten() if rows.shape[1] == 1 else (rows * rows.mean(0)).sum(1)


def _on_a_line(ranked: Ranked) -> bool:
    return ranked.rows.shape[1] == 1 and ranked.config.metric != "cosine"


def _medoids(ranked: Ranked, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[k]`` medoids and the number of rows each represents, on the CPU.

    In a large source, counting costs as much as picking; unless the weights need them, its counts are 1.
    """
    k, config = ranked.count, ranked.config
    if _on_a_line(ranked):
        return line.medoids_on_line(ranked.rows[:, 0], k)
    if len(ranked.rows) > partition.LARGEST_GROUP:
        rows, metric = on_device(ranked.rows, ranked.device), config.metric
        picks = partition.partitioned_greedy(rows, k, metric, partition.LARGEST_GROUP)
        counted = config.weights == "cluster"
        counts = partition.cluster_sizes(rows, picks, metric) if counted else torch.ones_like(picks)
        return picks.cpu(), counts.cpu()
    if not len(similarity):
        similarity = similarities(on_device(ranked.rows, ranked.device).double(), config.metric)
    picks = greedy(similarity, k)
    picks, counts = on_host([picks, cluster_sizes(similarity, picks)])
    return picks, counts
