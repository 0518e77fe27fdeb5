"""Greedy facility location: medoids that stand for all candidates of a source (DESIGN 2.3, step 5).

The value of a set of picks is the sum over candidates of the similarity to the most similar pick. Similarities are
first rounded to whole multiples of one tiny unit, held in float64: then every sum is exact, gains can be updated
instead of recomputed, ties are real ties, and the picks depend on no order of addition, device or number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK_ROWS = 1024


def greedy(similarity: Tensor, k: int) -> Tensor:
    """The picks of `greedy_with_gains`."""
    return greedy_with_gains(similarity, k)[0]


def greedy_with_gains(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pick ``k`` candidates, each the one that raises the value most; the lowest index wins ties.

    A pick changes the gains of the others only through the candidates it now covers better, so the ``k`` picks cost
    about ``n^2 ln k`` operations rather than ``n^2 k``.

    Args:
        similarity: ``[n, n]``, symmetric; may be negative.
        k: At most n.

    Returns:
        int64 ``[k]`` in the order of picking, and float64 ``[k]`` by how much each raised the value, which never grows.
        The first counts from the smallest similarity.
    """
    worth, unit = _whole_numbers(similarity)
    covered = worth.new_zeros(len(worth))
    gains = worth.sum(0)
    picks, raised = [], worth.new_empty(k)
    for number in range(k):
        pick = int(gains.argmax())
        picks.append(pick)
        raised[number] = gains[pick]
        for better in (worth[pick] > covered).nonzero().flatten().split(_BLOCK_ROWS):
            old, new = covered[better], worth[pick, better]
            gains -= worth[better].clamp_(old.unsqueeze(1), new.unsqueeze(1)).sum(0) - old.sum()
            covered[better] = new
        gains[pick] = -1  # below the gain of any candidate that is left, which is 0 or more
    return torch.tensor(picks, dtype=torch.int64, device=similarity.device), raised * unit


def objective(similarity: Tensor, picks: Tensor) -> float:
    """The facility-location value of one or more ``picks`` ``[k]``."""
    return float(similarity[:, picks].double().amax(1).sum())


def cluster_sizes(similarity: Tensor, picks: Tensor) -> Tensor:
    """How many candidates each pick stands for, itself included: int64 ``[k]``, 1 or more, of sum n.

    A candidate belongs to the pick it is most similar to, the earlier one if two are equally similar.
    """
    owner = similarity[:, picks].argmax(1)
    owner[picks] = torch.arange(len(picks), device=picks.device)
    return torch.bincount(owner, minlength=len(picks))


def _whole_numbers(similarity: Tensor) -> tuple[Tensor, float]:
    """Shifted to 0 or more, in whole multiples of a power of two: the sum of n of which float64 holds exactly.

    The shift adds the same to every candidate's value with anything picked, so it changes no choice.

    Returns:
        float64 ``[n, n]`` whole numbers, and the unit they count.
    """
    shifted = similarity.to(torch.float64, copy=True).sub_(similarity.min())
    _, exponent = math.frexp(float(shifted.max()))
    unit = 2.0 ** (exponent + len(similarity).bit_length() - 52)
    return shifted.div_(unit).round_(), unit
