"""Subsets whose mean row matches the mean row of all candidates of a source, found by swaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colm_scale.selection.mask import power_of_two

_MOST_SWEEPS = 20


def products_of_deviations(rows: Tensor) -> Tensor:
    """``[n, n]`` products of the deviations of ``rows`` ``[n, h]`` from their mean, float64, as `whole_numbers`."""
    rows = rows.double()
    deviations = rows - rows.mean(0)
    return whole_numbers(deviations @ deviations.T)


def match_by_swaps(gram: Tensor, k: int) -> Tensor:
    """Pick ``k`` of n rows so that no single swap brings their mean nearer (L2) to that of all.

    Rows are added one by one, each time the one that brings the mean nearest (herding, Welling 2009). Then each pick in
    turn is swapped for the best other row, until a sweep swaps nothing (at most 20 sweeps).

    Args:
        gram: ``[n, n]``, of `products_of_deviations`, on the CPU. The target: picked deviations that add up to 0.

    Returns:
        int64 ``[k]`` ascending; the lowest index wins ties.
    """
    own, sums = gram.diagonal(), gram.new_zeros(len(gram))
    barred, picks = gram.new_zeros(len(gram)), []  # infinite for picks
    for _ in range(k):
        pick = int((own + 2 * sums + barred).argmin())
        picks.append(pick)
        barred[pick] = math.inf
        sums += gram[pick]
    for _ in range(_MOST_SWEEPS):
        before = list(picks)
        for slot, pick in enumerate(before):
            # |s - x_i + x_j|^2 for the sum s of the picks, the pick i and every j, without terms free of j.
            squares = own + 2 * (sums - gram[pick])
            best = int((squares + barred).argmin())
            if squares[best] < squares[pick]:
                sums += gram[best] - gram[pick]
                barred[pick], barred[best] = 0, math.inf
                picks[slot] = best
        if picks == before:
            break
    return torch.tensor(picks).sort().values


def whole_numbers(values: Tensor) -> Tensor:
    """Round ``values`` ``[n, ...]`` float64 to multiples of a power of two, in which sums of 4 n of them are exact.

    Values that differ only by rounding become equal, and every gain is a real one. The largest value sets the unit.
    """
    exponent = torch.frexp(values.abs().max()).exponent
    return (values * power_of_two(50 - exponent - len(values).bit_length())).round_()
