"""Subsets whose mean row matches the mean row of all candidates of a source, found by swaps."""

from __future__ import annotations

import math
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from colm_scale.records import on_device
from colm_scale.selection.mask import power_of_two

LARGEST_PART = 1024
"""Most rows that are compared in pairs (8 MiB); a larger source is matched part by part."""
_MOST_SWEEPS = 20


def products_of_deviations(rows: Tensor, left: Tensor) -> Tensor:
    """Products of the deviations of ``rows`` ``[n, h]`` from their mean, as `whole_numbers`.

    Args:
        left: ``[h]``.

    Returns:
        float64 ``[n, n + 1]``, with each other and with ``left``.
    """
    rows = rows.double()
    deviations = rows - rows.mean(0)
    return whole_numbers(deviations @ torch.cat([deviations, left.unsqueeze(0)]).T)


def match_by_swaps(gram: Tensor, k: int) -> Tensor:
    """Pick ``k`` of n rows so that no single swap brings their mean nearer (L2) to that of all.

    Rows are added one by one, each time the one that brings the mean nearest (herding, Welling 2009). Then each pick in
    turn is swapped for the best other row, until none is (at most 20 times each).

    Args:
        gram: ``[n, n + 1]``, of `products_of_deviations`, on the CPU. The target: picked deviations that add up to
            minus the vector of the last column.

    Returns:
        int64 ``[k]`` ascending; the lowest index wins ties.
    """
    products = gram.numpy()  # whose small operations take a third of torch's time
    n = len(products)
    halves, sums = products.diagonal() / 2, products[:, n].copy()
    added, picks = halves + sums, np.empty(k, np.int64)
    # For the sum s of the picks and a row x: sums has s x, and added (|s + x|^2 - |s|^2) / 2, infinite for picks.
    products = products[:, :n]
    for slot in range(k):
        picks[slot] = pick = added.argmin()
        sums += products[pick]
        added += products[pick]
        added[pick] = math.inf
    exchanged, unchanged = np.empty(n), 0
    for slot in islice(cycle(range(k)), _MOST_SWEEPS * k):
        pick = picks[slot]
        np.subtract(added, products[pick], out=exchanged)
        best = exchanged.argmin()
        unchanged += 1
        if exchanged[best] < sums[pick] - halves[pick]:
            change = products[best] - products[pick]
            sums += change
            added += change
            added[pick], added[best] = halves[pick] + sums[pick], math.inf
            picks[slot], unchanged = best, 0
        if unchanged == k:
            break
    return torch.from_numpy(np.sort(picks))


def match_in_parts(rows: Tensor, k: int, largest: int, left: Tensor) -> Tensor:
    """Match ``rows`` ``[n, h]`` part by part, each making up for the error of those before it.

    A part takes every so many rows, and as many picks. With one part, these are the picks of `match_by_swaps`.

    Args:
        rows: On the device that compares them.
        largest: Most rows of a part.
        left: ``[h]`` the error that the first part makes up for, on the same device.

    Returns:
        int64 ``[k]`` ascending, on the CPU.
    """
    deviations = rows.double()
    deviations = deviations - deviations.mean(0)
    parts, left, picks = -(-len(rows) // largest), left.clone(), []
    for part in range(min(parts, k)):
        own = deviations[part::parts]
        products = whole_numbers(own @ torch.cat([own, left.unsqueeze(0)]).T).cpu()
        picked = match_by_swaps(products, len(range(part, k, parts)))
        left += own[on_device(picked, rows.device)].sum(0)
        picks.append(part + parts * picked)
    return torch.cat(picks).sort().values


def whole_numbers(values: Tensor) -> Tensor:
    """Round ``values`` ``[n, ...]`` float64 to multiples of a power of two, in which sums of 4 n of them are exact.

    Values that differ only by rounding become equal, and every gain is a real one. The largest value sets the unit.
    """
    exponent = torch.frexp(values.abs().max()).exponent
    return (values * power_of_two(50 - exponent - len(values).bit_length())).round_()
