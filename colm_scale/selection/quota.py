"""How the budget is shared out over sources before anything is ranked (DESIGN 2.3, steps 1 and 2)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colm_scale.errors import UserError
from colm_scale.records import Quota


def kept_sources(sizes: Tensor, names: Sequence[str], chosen: float | Sequence[str] | None) -> Tensor:
    """Find the sources that enter the coreset with all their candidates.

    Args:
        sizes: ``[Q]`` training examples of each source.
        names: ``[Q]`` their names.
        chosen: Names of the sources to keep, none of them for ``[]``. A number: this share of the sources, rounded
            down, the smallest (the lowest number among equals). None: those with fewer examples than the average source
            (the paper's).

    Returns:
        ``[Q]`` bool.

    Raises:
        UserError: A chosen name is no source of the training data.
    """
    if chosen is None:
        return sizes * len(sizes) < sizes.sum()
    if isinstance(chosen, (int, float)):
        kept = torch.zeros(len(sizes), dtype=torch.bool)
        kept[sizes.argsort(stable=True)[: _whole(chosen * len(sizes))]] = True
        return kept
    check_names("selection.kept_sources", chosen, names)
    return torch.tensor([name in chosen for name in names], dtype=torch.bool)


def check_names(option: str, chosen: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a name that an option gives, if it is none of the sources ``names`` of the training data."""
    for name in chosen:
        if name not in names:
            (closest,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise UserError(
                f"--{option} names {name!r}, which is no source of the training data; did you mean {closest!r}? "
                f"The sources are: {', '.join(names)}"
            )


Share = Callable[[Tensor, int], Tensor]
"""``[Q]`` quotas from the ``[Q]`` candidates that are not kept, and the most that the quotas may add up to."""


def proportional(available: Tensor, total: int) -> Tensor:
    """Quotas in proportion to candidates, rounded down, and then one more to each of those with the smallest quota (the
    lowest id among equals) until the sum is met: the paper's `Share`."""
    quota = available * total // max(int(available.sum()), 1)
    return _top_up(quota, available, total - int(quota.sum()))


def allocate(
    sources: Tensor,
    kept: Tensor,
    budget: int,
    generator: torch.Generator,
    share: Share = proportional,
    *,
    protected: Tensor | None = None,
    due: Tensor | None = None,
) -> Quota:
    """Share out the budget of one step.

    Protected candidates all enter, then those of kept sources; if there is no room for all of either, a subset of them
    does. What is left goes to the other sources, where protected candidates that did not fit are ranked like any other.
    What is due of any source comes before kept sources, but after what is protected.

    Args:
        sources: ``[n]`` source of each candidate.
        kept: ``[Q]`` bool.
        budget: Size of the coreset; at ``n`` or more all candidates enter.
        generator: Draws the subset; rank-equal.
        share: How what is left is shared out.
        protected: ``[n]`` bool, candidates that enter whatever their source; none by default.
        due: ``[Q]`` fewest of each source, at most its candidates; none by default. If the budget is too small for
            all, every source gets the same, or what it is due if that is less.
    """
    of_kept = kept[sources]
    protected = torch.zeros_like(of_kept) if protected is None else protected
    wanted = int((of_kept | protected).sum())
    entering, nothing = of_kept.new_zeros(len(sources)), torch.zeros(len(kept), dtype=torch.int64)
    entering[_fitting(protected.nonzero().flatten(), sources, budget, generator, nothing)] = True
    entered = int(entering.sum())
    missing = nothing if due is None else (due - torch.bincount(sources[entering], minlength=len(kept))).clamp(min=0)
    missing = _top_up(nothing, missing, budget - entered)
    of_others = missing.masked_fill(kept, 0)
    room = max(budget - int(of_others.sum()) - entered, int(missing[kept].sum()))
    rest = (of_kept & ~protected).nonzero().flatten()
    entering[_fitting(rest, sources, room, generator, missing - of_others)] = True
    others = torch.bincount(sources[~entering], minlength=len(kept)).masked_fill(kept, 0)
    left = min(budget - int(entering.sum()), int(others.sum()))
    per_source = at_least(share(others, left), of_others)
    return Quota(entering.nonzero().flatten(), per_source, overflow=wanted - int(entering.sum()))


def expected_share(
    sizes: Tensor, kept: Tensor, protected: Tensor, n: int, budget: int, floor: float = 0.0
) -> float:
    """How many of the kept and protected candidates enter, over many steps: 1 if there is room for the average step's.

    Args:
        sizes: ``[Q]`` training examples of each source.
        kept: ``[Q]`` bool.
        protected: ``[Q]`` protected examples of each source.
        n: Candidates of a step.
        budget: As in `allocate`.
        floor: Share of the others that is due.
    """
    wanted = n * int(torch.where(kept, sizes, protected).sum()) / int(sizes.sum())
    room = budget - floor * (n - wanted)
    return min(1.0, room / wanted) if wanted else 1.0


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


def at_least(quota: Tensor, least: Tensor) -> Tensor:
    """Quotas ``[Q]`` of the same sum, none below ``least``; as they are if none is.

    What some lack is taken one by one from those that are furthest above their least (the lowest id among equals).

    Args:
        quota: ``[Q]``, of a sum no smaller than that of ``least``.
        least: ``[Q]``, not negative.
    """
    raised = torch.maximum(quota, least)
    for _ in range(int(raised.sum() - quota.sum())):
        raised[(raised - least).argmax()] -= 1
    return raised


def _fitting(
    positions: Tensor, sources: Tensor, room: int, generator: torch.Generator, least: Tensor
) -> Tensor:
    """``positions``, or a draw of ``room`` of them, with at least so many ``[Q]`` of each source; the generator is only
    touched if a draw is needed."""
    if len(positions) <= room:
        return positions
    drawn = positions[torch.randperm(len(positions), generator=generator)]
    first = _first_of_each(drawn, sources, least)
    return torch.cat([first, drawn[~torch.isin(drawn, first)]])[:room]


def _first_of_each(drawn: Tensor, sources: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts`` ``[Q]`` of each source among the positions ``drawn``."""
    return torch.cat([drawn[sources[drawn] == source][:count] for source, count in enumerate(counts.tolist())])


def _whole(number: float) -> int:
    """Rounded down; but 0.29 * 100 is 29, although not in binary."""
    return int(number + 1e-9)


def _top_up(quota: Tensor, available: Tensor, missing: int) -> Tensor:
    """``quota`` with ``missing`` more, one at a time to each of the smallest that can take it."""
    quota = quota.clone()
    while missing and (spare := quota < available).any():
        smallest_first = quota.argsort(stable=True)
        receivers = smallest_first[spare[smallest_first]][:missing]
        quota[receivers] += 1
        missing -= len(receivers)
    return quota
