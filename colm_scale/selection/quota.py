"""How the budget is shared out over sources before anything is ranked (DESIGN 2.3, steps 1 and 2)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.errors import UserError
from colm_scale.records import Quota


def kept_sources(sizes: Tensor, names: Sequence[str], chosen: Sequence[str] | None) -> Tensor:
    """Which sources enter the coreset with all their candidates.

    Args:
        sizes: ``[Q]`` training examples of each source.
        names: ``[Q]`` their names.
        chosen: Names of the sources to keep; none of them for ``[]``. By default those with fewer examples than the
            average source.

    Returns:
        ``[Q]`` bool.

    Raises:
        UserError: A chosen name is no source of the training data.
    """
    if chosen is None:
        return sizes * len(sizes) < sizes.sum()
    for name in chosen:
        if name not in names:
            (closest,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise UserError(
                f"--selection.kept_sources names {name!r}, which is no source of the training data; did you mean "
                f"{closest!r}? The sources are: {', '.join(names)}"
            )
    return torch.tensor([name in chosen for name in names], dtype=torch.bool)


def allocate(sources: Tensor, kept: Tensor, budget: int, generator: torch.Generator) -> Quota:
    """Share out the budget of one step.

    Candidates of kept sources all enter; if they alone exceed the budget, a uniform subset of them does. What is left
    goes to the other sources in proportion to their candidates, rounded down, and then one more to each of those with
    the smallest quota (the lowest id among equals) until the sum is met.

    Args:
        sources: ``[n]`` source of each candidate.
        kept: ``[Q]`` bool.
        budget: Size of the coreset; at ``n`` or more all candidates enter.
        generator: Draws the subset; rank-equal.
    """
    positions = kept[sources].nonzero().flatten()
    overflow = max(0, len(positions) - budget)
    if overflow:
        positions = positions[torch.randperm(len(positions), generator=generator)[:budget]].sort().values
    others = torch.bincount(sources, minlength=len(kept)).masked_fill(kept, 0)
    total = int(others.sum())
    left = min(budget - len(positions), total)
    quota = others * left // max(total, 1)
    return Quota(positions, _top_up(quota, others, left - int(quota.sum())), overflow)


def reallocate(per_source: Tensor, available: Tensor) -> Tensor:
    """Quotas that can be met, when some candidates cannot be selected after all.

    Args:
        per_source: ``[Q]`` quotas.
        available: ``[Q]`` candidates that can be selected.

    Returns:
        ``[Q]`` quotas of the same sum, the shortfall of one source given one by one to the others with the smallest
        quota; of a smaller sum only if that takes all that is available.
    """
    quota = torch.minimum(per_source, available)
    return _top_up(quota, available, int(per_source.sum() - quota.sum()))


def _top_up(quota: Tensor, available: Tensor, missing: int) -> Tensor:
    """``quota`` with ``missing`` more, one at a time to each of the smallest that can take it."""
    quota = quota.clone()
    while missing and (spare := quota < available).any():
        smallest_first = quota.argsort(stable=True)
        receivers = smallest_first[spare[smallest_first]][:missing]
        quota[receivers] += 1
        missing -= len(receivers)
    return quota
