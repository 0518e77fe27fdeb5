"""Rankings that did not earn a place in the package, as functions of one's own: pursuit, importance and top.

colm-scale train --selection.ranking benchmarks/rankings.py:pursuit

Each gets the candidates of one source and returns the rows that it picks and what each counts for, or None
(docs/CONTRIBUTING.md). What they were worth is in docs/negative_results.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.selection.ranking.matching import whole_numbers
from colm_scale.selection.ranking.rank import Ranked

_RIDGE = 0.5
_ENTRY = 10.0
_LEAST_SHARE = 0.1
_LEAST_SIZE = 0.01


def pursuit(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """The subset whose mean row is nearest the source's, by `match_by_pursuit`."""
    picks, coefficients = match_by_pursuit(ranked.rows, ranked.count)
    unbiased = ranked.config.weights == "unbiased"
    return picks, coefficients * (len(ranked.rows) / ranked.count) if unbiased else None


def importance(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """A draw with a chance in proportion to the length of the row; unbiased, a pick counts 1 over its chance."""
    picks, probabilities = drawn_by_size(ranked.rows.double().norm(dim=1).cpu(), ranked.count, ranked.draw)
    return picks, 1 / probabilities if ranked.config.weights == "unbiased" else None


def top(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """The highest losses."""
    return ranked.losses.cpu().argsort(descending=True, stable=True)[: ranked.count], None


def match_by_pursuit(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of the mean of ``rows`` ``[n, h]`` (GradMatch, Killamsetty et al. 2021).

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
    rows = rows.double()
    gram, products = (rows @ rows.T).cpu(), (rows @ rows.mean(0)).cpu()
    square = float(gram.diagonal().mean()) or 1.0
    entry = _ENTRY**2 * square
    fit, barred = NonNegativeFit(gram + entry, products + entry, _RIDGE * square), gram.new_zeros(len(gram))
    for _ in range(k):
        pick = int((whole_numbers(fit.left) - barred).argmax())
        barred[pick] = math.inf
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


def drawn_by_size(sizes: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Candidates drawn without replacement, each entering with `inclusion` probability (systematic, in random order).

    Args:
        sizes: ``[n]`` not negative.
        k: At least 1, at most n.
        generator: Rank-equal; draws the order and the start.

    Returns:
        int64 ``[k]`` ascending, and float64 ``[k]`` the probability with which each enters.
    """
    probabilities = inclusion(sizes, k)
    certain = probabilities == 1
    order = torch.randperm(len(sizes), generator=generator)
    order = order[~certain[order]]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    drawn = k - int(certain.sum())
    ends = probabilities[order].cumsum(0)  # the last is `drawn`, but for rounding
    at = torch.searchsorted(ends, start + torch.arange(drawn), right=True).clamp(max=len(order) - 1)
    picks = torch.cat([certain.nonzero().flatten(), order[at]]).sort().values
    return picks, probabilities[picks]


def inclusion(sizes: Tensor, k: int) -> Tensor:
    """Probabilities float64 ``[n]`` of sum k, in proportion to size where that is not above 1.

    A size below a hundredth of the mean counts as that: a sketch that says nothing of a candidate must not rule it out,
    and the weight of none is more than a hundred times the average.
    """
    sizes = sizes.double()
    sizes = sizes.clamp(min=_LEAST_SIZE * float(sizes.mean())) if sizes.any() else torch.ones_like(sizes)
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = k - int(certain.sum())
        share = (sizes * left / sizes[~certain].sum()).masked_fill(certain, 1)
        # Not quite 1 is 1: an interval of that length could be hit twice, or never, by rounding.
        above = ~certain & (share > 1 - 1e-9)
        if not above.any():
            return share
        certain |= above
