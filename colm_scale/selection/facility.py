"""Greedy facility location: medoids that stand for all candidates of a source (DESIGN 2.3, step 5).

The value of a set of picks is the sum over candidates of the similarity to the most similar pick. Similarities are
first rounded to whole multiples of one tiny unit, held in float64: then every sum is exact, gains can be updated
instead of recomputed, ties are real ties, and the picks depend on no order of addition, device or number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def greedy(similarity: Tensor, k: int) -> Tensor:
    """Pick ``k`` candidates, each the one that raises the value most; the lowest index wins ties.

    A pick changes the gains of the others only through the candidates it now covers better, so the ``k`` picks cost
    about ``n^2 ln k`` operations rather than ``n^2 k``.

    Args:
        similarity: ``[n, n]``, symmetric; may be negative.
        k: At most n.

    Returns:
        int64 ``[k]`` in the order of picking.
    """
    worth = _whole_numbers(similarity)
    covered = worth.new_zeros(len(worth))
    gains = worth.sum(0)
    picks = []
    for _ in range(k):
        pick = int(gains.argmax())
        picks.append(pick)
        better = (worth[pick] > covered).nonzero().flatten()
        old, new = covered[better], worth[pick, better]
        gains -= worth[better].clamp(old.unsqueeze(1), new.unsqueeze(1)).sum(0) - old.sum()
        covered[better] = new
        gains[pick] = -1  # below the gain of any candidate that is left, which is 0 or more
    return torch.tensor(picks, dtype=torch.int64, device=similarity.device)


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


def _whole_numbers(similarity: Tensor) -> Tensor:
    """Shifted to 0 or more and scaled by a power of two to whole numbers, the sum of n of which float64 holds exactly.

    The shift adds the same to every candidate's value with anything picked, so it changes no choice.
    """
    shifted = similarity.double()
    shifted = shifted - shifted.min()
    _, exponent = math.frexp(float(shifted.max()))
    return (shifted * 2.0 ** (52 - len(similarity).bit_length() - exponent)).round()
