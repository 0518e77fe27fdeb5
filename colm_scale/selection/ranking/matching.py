"""Subsets whose mean row is the mean row of all candidates of a source, by swaps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colm_scale.selection.ranking.exact import whole_numbers

_MOST_SWEEPS = 20


def match_by_swaps(rows: Tensor, k: int) -> Tensor:
    """Pick ``k`` of the ``rows`` ``[n, h]`` so that no exchange of one of them brings their mean nearer (L2) to that of
    all.

    They are built one by one, each the one that leads nearest (herding, Welling 2009). Then each in turn is exchanged
    for the best, while any is (at most 20 times round). The rows are seen through their scalar products only.

    Returns:
        int64 ``[k]`` ascending, on the CPU; the lowest index wins ties.
    """
    rows = rows.double()
    deviations = rows - rows.mean(0)
    gram = whole_numbers(deviations @ deviations.T).cpu()  # the target is where the picked deviations add up to 0
    own, sums = gram.diagonal(), gram.new_zeros(len(gram))
    barred, picks = gram.new_zeros(len(gram)), []  # infinite for what is picked
    for _ in range(k):
        pick = int((own + 2 * sums + barred).argmin())
        picks.append(pick)
        barred[pick] = math.inf
        sums += gram[pick]
    for _ in range(_MOST_SWEEPS):
        before = list(picks)
        for slot, pick in enumerate(before):
            # |s - x_i + x_j|^2 for the sum s of the picks, the pick i and every j, less what is the same for all j.
            squares = own + 2 * (sums - gram[pick])
            best = int((squares + barred).argmin())
            if squares[best] < squares[pick]:
                sums += gram[best] - gram[pick]
                barred[pick], barred[best] = 0, math.inf
                picks[slot] = best
        if picks == before:
            break
    return torch.tensor(picks).sort().values
