"""Subsets whose mean row is the candidates' mean row: by swaps, and by orthogonal matching pursuit.

Both see the rows through their scalar products only. Candidates of several groups can be matched together: each group
fills its own quota, and what one of them cannot match, another can make up for.

Shapes: ``rows`` ``[n, h]`` of ``G`` groups, ``groups`` ``[n]`` 0..G-1, and, per group, ``quotas`` ``[G]`` picks (at
most what it has) that count for ``weights`` ``[G]`` each. What is matched is the mean of the groups' mean rows, each
counting for the weight of its picks; with one group, or picks that stand for all candidates of theirs, it is the mean
of all rows. All but the rows are on the CPU, and so are the picks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.selection.exact import whole_numbers
from colm_scale.selection.matroid import Room

_MOST_SWEEPS = 20
_RIDGE = 0.5
_ENTRY = 10.0
_LEAST_SHARE = 0.1


def match_by_swaps(rows: Tensor, groups: Tensor, quotas: Tensor, weights: Tensor) -> Tensor:
    """Picks whose weighted mean comes no nearer (L2) to the target by any exchange of one of them within its group.

    They are built one by one, each the one that leads nearest (herding, Welling 2009). Then each in turn is exchanged
    for the best of its group, while any is (at most 20 times round).

    Returns:
        int64 ``[k]`` ascending; the lowest index wins ties.
    """
    rows, of_row = rows.double(), groups.to(rows.device)
    deviations = (rows - _means(rows, of_row, len(quotas))[of_row]) * weights.to(rows)[of_row].unsqueeze(1)
    gram = whole_numbers(deviations @ deviations.T).cpu()  # the target is where the picked deviations add up to 0
    own, sums = gram.diagonal(), gram.new_zeros(len(gram))
    room, picks = Room(groups, quotas), []
    for _ in range(int(quotas.sum())):
        pick = int((own + 2 * sums).where(room.open, math.inf).argmin())
        picks.append(pick)
        room.take(pick)
        sums += gram[pick]

    # barred[g, j] is infinite unless j can take the place of a pick of group g.
    outside = groups != torch.arange(len(quotas)).unsqueeze(1)
    barred = gram.new_zeros(outside.shape).masked_fill_(outside, math.inf)
    barred[:, picks] = math.inf
    of_slot = groups[picks].tolist()
    for _ in range(_MOST_SWEEPS):
        before = list(picks)
        for slot, pick in enumerate(before):
            # |s - x_i + x_j|^2 for the sum s of the picks, the pick i and every j, less what is the same for all j.
            squares, others = own + 2 * (sums - gram[pick]), barred[of_slot[slot]]
            best = int((squares + others).argmin())
            if squares[best] < squares[pick]:
                sums += gram[best] - gram[pick]
                others[pick], others[best] = 0, math.inf
                picks[slot] = best
        if picks == before:
            break
    return torch.tensor(picks).sort().values


def match_by_pursuit(rows: Tensor, groups: Tensor, quotas: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of the target (GradMatch, Killamsetty et al. 2021; several groups: PartitionSel).

    Each pick is the row with the largest product with what the picks so far leave of the target. They are then fitted
    anew: non-negative coefficients of least squares, with GradMatch's ridge of 0.5 (here of the mean square of a row).
    The weights of a step are relative, so the coefficients should add up to 1: every row, and the target, has one more
    entry for that, the same in all and ten times as long as a row. Without it large rows that point the same way are
    picked, and none to balance them.

    Returns:
        int64 ``[k]`` in the order of picking; the lowest index wins ties.
        float64 ``[k]`` the coefficients, scaled to a mean of 1; one below 0.1 is 0.1 before that, for a pick that
        counts for nothing would be trained in vain.
    """
    rows, of_row = rows.double(), groups.to(rows.device)
    shares = quotas * weights.double()
    target = (shares / shares.sum()).to(rows.device) @ _means(rows, of_row, len(quotas))
    gram, products = (rows @ rows.T).cpu(), (rows @ target).cpu()
    square = float(gram.diagonal().mean()) or 1.0
    entry = _ENTRY**2 * square
    fit, room = NonNegativeFit(gram + entry, products + entry, _RIDGE * square), Room(groups, quotas)
    for _ in range(int(quotas.sum())):
        pick = int(whole_numbers(fit.left).where(room.open, -math.inf).argmax())
        room.take(pick)
        fit.add(pick)
    relative = (fit.coefficients / fit.coefficients.mean()).clamp(min=_LEAST_SHARE)
    return torch.tensor(fit.picks), relative / relative.mean()


class NonNegativeFit:
    """The ``w >= 0`` with the smallest ``|target - sum_i w_i x_i|^2 + ridge |w|^2``, for rows that come one by one.

    By active sets (Lawson and Hanson 1974): the coefficients above 0 solve their own equations alone. The inverse of
    these is kept, and updated when a coefficient joins or leaves them.

    Attributes:
        picks: The rows that have come.
        coefficients: float64 ``[k]`` w.
        left: float64 ``[n]`` products of all rows with what the fit leaves of the target.
    """

    def __init__(self, gram: Tensor, products: Tensor, ridge: float):
        """From the products of the rows with each other ``[n, n]`` and with the target ``[n]``, float64."""
        self.picks: list[int] = []
        self.coefficients, self.left = gram.new_zeros(0), products
        self._gram, self._products, self._ridge = gram, products, ridge
        self._inverse = gram.new_zeros(0, 0)  # zero in the rows and columns of the coefficients that are 0

    def add(self, pick: int) -> None:
        """One more row."""
        self.picks.append(pick)
        w, inverse = F.pad(self.coefficients, (0, 1)), F.pad(self._inverse, (0, 1, 0, 1))
        rows, wanted = self._gram[self.picks], self._products[self.picks]
        equations = rows[:, self.picks]
        equations.diagonal().add_(self._ridge)
        noise = 1e-12 * float(wanted.abs().max())
        for _ in range(3 * len(w)):  # the customary bound: rounding could let one coefficient join and leave for ever
            above = w > 0
            downhill = (wanted - equations @ w).masked_fill(above, -math.inf)
            joining = int(downhill.argmax())
            if downhill[joining] <= noise:
                break
            above[joining] = True
            inverse = _joined(inverse, equations[joining], joining)
            while (falling := (above & (inverse @ wanted <= 0)).nonzero().flatten()).numel():
                # As far towards the solution as all stay above 0: there one falls to it, and leaves.
                towards = inverse @ wanted - w
                steps = w[falling] / -towards[falling]
                leaving = int(falling[steps.argmin()])
                w = w + steps.min() * towards
                w[leaving], above[leaving] = 0, False
                inverse = _left(inverse, leaving)
            w = inverse @ wanted
        self.coefficients, self._inverse = w, inverse
        self.left = self._products - w @ rows


def _joined(inverse: Tensor, equation: Tensor, at: int) -> Tensor:
    """The inverse with one more equation."""
    solved = inverse @ equation
    gap = equation[at] - solved @ equation
    solved[at] = -1
    return inverse + solved.outer(solved) / gap


def _left(inverse: Tensor, at: int) -> Tensor:
    """The inverse with one equation less."""
    column = inverse[at]
    rest = inverse - column.outer(column) / column[at]
    rest[at], rest[:, at] = 0, 0
    return rest


def _means(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """``[G, h]`` mean row of each group."""
    sums = rows.new_zeros(num_groups, rows.shape[1]).index_add_(0, groups, rows)
    return sums / torch.bincount(groups, minlength=num_groups).unsqueeze(1)
