"""Rankings that have no place in the package, as user-defined functions: balanced, pursuit, importance, infobatch, top.

colm-scale train --selection.ranking benchmarks/rankings.py:pursuit

Each gets the candidates of one source, and returns the selected rows and their weights, or None for equal weights
(docs/CONTRIBUTING.md). Their results are in docs/negative_results.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from colm_scale.selection.ranking.matching import whole_numbers
from colm_scale.selection.ranking.rank import Ranked

_ROBUST = 0.1
"""Ridge of `balanced`, relative to the mean square of a row: more of it is more like a plain draw."""
_DONE = 1e-7
_RIDGE = 0.5
_ENTRY = 10.0
_LEAST_SHARE = 0.1
_LEAST_SIZE = 0.01


def balanced(ranked: Ranked) -> tuple[Tensor, None]:
    """Draw with equal chances, so without bias, but with a mean row near the source's, by `walked`."""
    rows = ranked.rows.double().cpu()
    gram = rows @ rows.T
    gram.diagonal().add_(_ROBUST * float(gram.diagonal().mean()))
    return walked(gram, ranked.count, ranked.draw), None


def pursuit(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """Select the subset with the mean row nearest to the source's, by `match_by_pursuit`."""
    picks, coefficients = match_by_pursuit(ranked.rows, ranked.count)
    unbiased = ranked.config.weights == "unbiased"
    return picks, coefficients * (len(ranked.rows) / ranked.count) if unbiased else None


def importance(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """Draw with probabilities in proportion to the row norms; unbiased weights are 1 over the probability."""
    picks, probabilities = drawn_by_size(ranked.rows.double().norm(dim=1).cpu(), ranked.count, ranked.draw)
    return picks, 1 / probabilities if ranked.config.weights == "unbiased" else None


def infobatch(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Draw losses below the source's mean half as often, and weight them twice (InfoBatch, Qin et al. 2024).

    The weights of a source's picks are 1 on average, as in every other ranking, so that only the draw differs.
    """
    losses = ranked.losses.cpu()
    sizes = torch.where(losses < losses.mean(), 0.5, 1.0)
    picks, probabilities = drawn_by_size(sizes, ranked.count, ranked.draw)
    return picks, ranked.count / len(losses) / probabilities


def top(ranked: Ranked) -> tuple[Tensor, Tensor | None]:
    """Select the highest losses."""
    return ranked.losses.cpu().argsort(descending=True, stable=True)[: ranked.count], None


def walked(gram: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """Draw k of n rows, each with chance k/n, by the Gram-Schmidt walk (Harshaw et al. 2024, arXiv 1911.03071).

    Every row starts at k/n. Again and again all rows that are not yet at 0 or 1 move along the direction that changes
    the sum of rows least, with no change to k, forwards or backwards by chances that leave the mean where it is, until
    one of them is at 0 or 1. It takes n directions of n equations each, so a source should have a few hundred rows.

    Args:
        gram: ``[n, n]`` float64 products of the rows, with a ridge.

    Returns:
        int64 ``[k]``, ascending.
    """
    place, pivot = gram.new_full((len(gram),), k / len(gram)), -1
    while len(moving := ((place > _DONE) & (place < 1 - _DONE)).nonzero().flatten()) > 1:
        if pivot not in moving:
            pivot = int(moving[torch.randint(len(moving), (), generator=draw)])
        others = moving[moving != pivot]
        equations = F.pad(gram[others][:, others], (0, 1, 0, 1), value=1.0)
        equations[-1, -1] = 0.0
        direction = torch.zeros_like(place)
        direction[pivot] = 1.0
        wanted = F.pad(-gram[others, pivot], (0, 1), value=-1.0)
        direction[others] = torch.linalg.solve(equations, wanted)[:-1]
        forwards, backwards = _room(place, direction), _room(place, -direction)
        chance = backwards / (forwards + backwards)
        ahead = float(torch.rand((), generator=draw, dtype=torch.float64)) < chance
        place = place + direction * (forwards if ahead else -backwards)
    return place.topk(k).indices.sort().values


def _room(place: Tensor, direction: Tensor) -> float:
    """How far all can move until the first is at 0 or 1."""
    return float((torch.where(direction > 0, 1 - place, place) / direction.abs()).nan_to_num(nan=math.inf).min())


def match_by_pursuit(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Match the mean of ``rows`` ``[n, h]`` by orthogonal matching pursuit (GradMatch, Killamsetty et al. 2021).

    Each pick is the row with the largest product with the residual of the target. The picks are then fitted again by
    non-negative least squares with GradMatch's ridge of 0.5 (here relative to the mean square of a row). Since the
    weights of a step are relative, the coefficients should add up to 1: every row and the target get one more entry,
    equal in all and ten times as large as a row. Without it, large rows that point the same way are picked, and none to
    balance them.

    Returns:
        int64 ``[k]`` in the order of picking; the lowest index wins ties.
        float64 ``[k]`` coefficients, scaled to a mean of 1. They are first raised to at least 0.1, since training on a
        pick with weight 0 would be useless.
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
    """The ``w >= 0`` that minimises ``|target - sum_i w_i x_i|^2 + ridge |w|^2``, for rows that are added one by one.

    By active sets (Lawson and Hanson 1974): the positive coefficients solve their own equations. The inverse of these
    is updated when a coefficient enters or leaves the set.

    Attributes:
        picks: Rows added so far.
        coefficients: float64 ``[k]`` w.
        left: float64 ``[n]`` products of all rows with the residual of the target.
    """

    def __init__(self, gram: Tensor, products: Tensor, ridge: float):
        """Initialise from the products of the rows with each other ``[n, n]`` and with the target ``[n]``, float64."""
        self.picks: list[int] = []
        self.coefficients, self.left = gram.new_zeros(0), products
        self._gram, self._products, self._ridge = gram, products, ridge
        self._inverse = gram.new_zeros(0, 0)  # zero in rows and columns of inactive coefficients

    def add(self, pick: int) -> None:
        """Add a row."""
        self.picks.append(pick)
        w, inverse = F.pad(self.coefficients, (0, 1)), F.pad(self._inverse, (0, 1, 0, 1))
        rows, wanted = self._gram[self.picks], self._products[self.picks]
        equations = rows[:, self.picks]
        equations.diagonal().add_(self._ridge)
        noise = 1e-12 * float(wanted.abs().max())
        for _ in range(3 * len(w)):  # the usual bound, since rounding could make a coefficient alternate forever
            above = w > 0
            downhill = (wanted - equations @ w).masked_fill(above, -math.inf)
            joining = int(downhill.argmax())
            if downhill[joining] <= noise:
                break
            above[joining] = True
            inverse = _joined(inverse, equations[joining], joining)
            while (falling := (above & (inverse @ wanted <= 0)).nonzero().flatten()).numel():
                # Step towards the solution until a coefficient reaches 0 and leaves the set.
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
    """Add an equation to the inverse."""
    solved = inverse @ equation
    gap = equation[at] - solved @ equation
    solved[at] = -1
    return inverse + solved.outer(solved) / gap


def _left(inverse: Tensor, at: int) -> Tensor:
    """Remove an equation from the inverse."""
    column = inverse[at]
    rest = inverse - column.outer(column) / column[at]
    rest[at], rest[:, at] = 0, 0
    return rest


def drawn_by_size(sizes: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw candidates without replacement with their `inclusion` probabilities (systematic, in random order).

    Args:
        sizes: ``[n]`` not negative.
        k: At least 1, at most n.
        generator: Rank-equal; draws the order and the start.

    Returns:
        int64 ``[k]`` ascending, and float64 ``[k]`` inclusion probabilities.
    """
    probabilities = inclusion(sizes, k)
    certain = probabilities == 1
    order = torch.randperm(len(sizes), generator=generator)
    order = order[~certain[order]]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    drawn = k - int(certain.sum())
    ends = probabilities[order].cumsum(0)  # the last is `drawn` up to rounding
    at = torch.searchsorted(ends, start + torch.arange(drawn), right=True).clamp(max=len(order) - 1)
    picks = torch.cat([certain.nonzero().flatten(), order[at]]).sort().values
    return picks, probabilities[picks]


def inclusion(sizes: Tensor, k: int) -> Tensor:
    """Inclusion probabilities, float64 ``[n]`` with sum k, in proportion to size where that does not exceed 1.

    Sizes are raised to a hundredth of the mean, so that an uninformative sketch does not rule a candidate out and no
    weight exceeds a hundred times the average.
    """
    sizes = sizes.double()
    sizes = sizes.clamp(min=_LEAST_SIZE * float(sizes.mean())) if sizes.any() else torch.ones_like(sizes)
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = k - int(certain.sum())
        share = (sizes * left / sizes[~certain].sum()).masked_fill(certain, 1)
        # Almost 1 becomes 1, since rounding could hit an interval of that length twice, or never.
        above = ~certain & (share > 1 - 1e-9)
        if not above.any():
            return share
        certain |= above
