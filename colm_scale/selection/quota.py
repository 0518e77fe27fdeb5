"""Kept sources and quotas: the budget of a step, divided before anything is ranked (docs/method.md, Select)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.errors import UserError
from colm_scale.records import Candidates, Quota


def kept_sources(sizes: Tensor, names: Sequence[str], chosen: float | Sequence[str] | None) -> Tensor:
    """Find the sources that enter the coreset with all their candidates.

    Args:
        sizes: ``[Q]`` training examples of each source.
        names: ``[Q]`` their names.
        chosen: Names of the sources to keep. A number: this share of the sources, rounded down, the smallest ones (the
            lowest index among equals). None: those with fewer examples than the average source (the paper's).

    Returns:
        ``[Q]`` bool.

    Raises:
        UserError: A chosen name is not a source of the training data.
    """
    if chosen is None:
        return sizes * len(sizes) < sizes.sum()
    if isinstance(chosen, (int, float)):
        kept = torch.zeros(len(sizes), dtype=torch.bool)
        count = int(chosen * len(sizes) + 1e-9)  # 0.29 * 100 is 29, but less in binary
        kept[sizes.argsort(stable=True)[:count]] = True
        return kept
    check_names("selection.kept_sources", chosen, names)
    return torch.tensor([name in chosen for name in names], dtype=torch.bool)


def check_names(option: str, chosen: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a ``chosen`` name of an option that is not one of the sources ``names`` of the training data."""
    for name in chosen:
        if name not in names:
            (closest,) = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise UserError(
                f"--{option} names {name!r}, but the training data has no such source; did you mean {closest!r}? "
                f"The sources are: {', '.join(names)}"
            )


@dataclass(frozen=True, slots=True)
class RecentSources:
    """Kept sources of a mixture that drifts: those that are small among recent candidates. Part of a checkpoint.

    Attributes:
        kept: ``[Q]`` bool.
        seen: ``[Q]`` candidates of each source since the kept ones were chosen.
    """

    kept: Tensor
    seen: Tensor

    @classmethod
    def beginning(cls, kept: Tensor) -> RecentSources:
        """Start with these kept sources and no candidates seen."""
        return cls(kept, torch.zeros(len(kept), dtype=torch.int64))

    def after(self, sources: Tensor) -> RecentSources:
        """Count a step with candidates of these ``sources`` ``[n]``."""
        return RecentSources(self.kept, self.seen + torch.bincount(sources, minlength=len(self.kept)))

    def refreshed(self, share: float | None) -> RecentSources:
        """Choose the kept sources again among those seen since, by the rule of `kept_sources`."""
        kept, present = torch.zeros_like(self.kept), self.seen > 0
        kept[present] = kept_sources(self.seen[present], (), share)
        return RecentSources.beginning(kept)


Share = Callable[[Tensor, int], Tensor]
"""Maps the ``[Q]`` candidates that are not kept, and the largest sum of the quotas, to ``[Q]`` quotas."""


def proportional(available: Tensor, total: int) -> Tensor:
    """Divide in proportion to the candidates, the paper's `Share`.

    Quotas are rounded down; then the smallest (the lowest index among equals) get one more each until the sum is met.
    """
    quota = available * total // max(int(available.sum()), 1)
    return _top_up(quota, available, total - int(quota.sum()))


def allocate(
    candidates: Candidates,
    kept: Tensor,
    budget: int,
    generator: torch.Generator,
    share: Share = proportional,
    due: Tensor | int = 0,
) -> Quota:
    """Divide the budget of one step.

    Protected candidates enter first, then the due ones of every source, then those of kept sources; if not all of a
    kind fit, a random subset of them enters. The rest of the budget goes to the other sources, in which protected
    candidates that did not fit are ranked like any other.

    Args:
        kept: ``[Q]`` bool.
        budget: Size of the coreset; at ``n`` or more all candidates enter.
        generator: Draws the subset; rank-equal.
        share: Divides the rest.
        due: ``[Q]`` fewest of each source, at most its candidates. If the budget is too small for all, every source
            gets the same number, or its due if that is less.
    """
    sources, protected = candidates.sources, candidates.protected_mask
    of_kept = kept[sources]
    wanted = int((of_kept | protected).sum())
    entering, nothing = of_kept.new_zeros(len(sources)), torch.zeros(len(kept), dtype=torch.int64)
    entering[_fitting(protected.nonzero().flatten(), sources, budget, generator, nothing)] = True
    entered = int(entering.sum())
    missing = (due - torch.bincount(sources[entering], minlength=len(kept))).clamp(min=0)
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
    """Estimate the share of the kept and protected candidates that enter: 1 if the average step has room for them.

    Args:
        sizes: ``[Q]`` training examples of each source.
        kept: ``[Q]`` bool.
        protected: ``[Q]`` protected examples of each source.
        n: Candidates of a step.
        budget: Size of the coreset.
        floor: Share of the other candidates that is due.
    """
    wanted = n * int(torch.where(kept, sizes, protected).sum()) / int(sizes.sum())
    room = budget - floor * (n - wanted)
    return min(1.0, room / wanted) if wanted else 1.0


def reallocate(per_source: Tensor, available: Tensor) -> Tensor:
    """Adjust quotas when some candidates cannot be selected.

    Args:
        per_source: ``[Q]`` quotas.
        available: ``[Q]`` candidates that can be selected.

    Returns:
        ``[Q]`` quotas of the same sum, with the shortfall given one by one to the other sources with the smallest
        quota; of a smaller sum only if all available candidates are taken.
    """
    quota = torch.minimum(per_source, available)
    return _top_up(quota, available, int(per_source.sum() - quota.sum()))


def at_least(quota: Tensor, least: Tensor) -> Tensor:
    """Raise quotas ``[Q]`` to ``least`` without changing their sum.

    The difference is taken one by one from those furthest above their least (the lowest index among equals).

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
    """Return ``positions``, or draw ``room`` of them with at least ``least`` ``[Q]`` of each source.

    The generator is only used if a draw is needed.
    """
    if len(positions) <= room:
        return positions
    drawn = positions[torch.randperm(len(positions), generator=generator)]
    by_source = [drawn[sources[drawn] == source][:count] for source, count in enumerate(least.tolist())]
    first = torch.cat(by_source)
    return torch.cat([first, drawn[~torch.isin(drawn, first)]])[:room]


def _top_up(quota: Tensor, available: Tensor, missing: int) -> Tensor:
    """Add ``missing`` to ``quota``, one at a time to each of the smallest that have candidates left."""
    quota = quota.clone()
    while missing and (spare := quota < available).any():
        smallest_first = quota.argsort(stable=True)
        receivers = smallest_first[spare[smallest_first]][:missing]
        quota[receivers] += 1
        missing -= len(receivers)
    return quota
