"""How the budget is shared out over the sources that are not kept, where it is not in proportion to their candidates.

| ``--selection.shares`` | a source's share is in proportion to |
|---|---|
| equal | 1 |
| a number | its training examples to the power of that number (Lample and Conneau, 2019, section 3.1) |
| ratios | what the user gives it; with 0 it gets no quota |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.config.shares import Shares
from colm_scale.errors import UserError
from colm_scale.selection.quota import check_names

_GRID = 1e6
"""Shares of examples are rounded to a millionth, so that the last bit of an estimate moves no example."""


def source_shares(shares: Shares, names: Sequence[str], sizes: Tensor) -> Tensor | None:
    """``[Q]`` float64, not negative: what the quotas are to be in proportion to; None: the candidates of the step.

    Args:
        names, sizes: ``[Q]`` of the sources, and their training examples.
    """
    match shares:
        case "proportional":
            return None
        case "equal":
            return torch.ones(len(sizes), dtype=torch.float64)
        case dict():
            return torch.tensor([shares.get(name, 0.0) for name in names], dtype=torch.float64)
        case float():
            return sizes.clamp(min=1).double() ** shares
    raise ValueError(f"the file {shares} has not been read")


def check_shares(config: SelectionConfig, names: Sequence[str], kept: Tensor, *, refreshed: bool) -> None:
    """Check that a user's ratios are those of the training data.

    Args:
        names, kept: ``[Q]`` of the sources, and whether each is kept.
        refreshed: Whether kept sources can be others later in the run.

    Raises:
        UserError: A name is no source, or a source that may need a ratio has none.
    """
    if not isinstance(config.shares, dict) or config.method not in ("colm", "stratified"):
        return
    check_names("selection.shares", [*config.shares], names)
    pairs = zip(names, kept.tolist())
    missing = [name for name, is_kept in pairs if name not in config.shares and (refreshed or not is_kept)]
    if missing:
        raise UserError(
            f"--selection.shares gives no number for {', '.join(missing)}: add one for each, or 0 where a source is to "
            f"have no quota"
        )


def shares_facts(config: SelectionConfig, names: Sequence[str], sizes: Tensor, kept: Tensor) -> list[str]:
    """Lines about the mixture printed before the run, if it is not that of the candidates.

    Args:
        names, sizes, kept: ``[Q]`` of each source.
    """
    wanted = source_shares(config.shares, names, sizes)
    if wanted is None or config.method not in ("colm", "stratified") or kept.all():
        return []
    wanted = wanted.masked_fill(kept, 0)
    parts = zip(names, (wanted / wanted.sum()).tolist())
    aim = f"the same of all {int((~kept).sum())} that are not kept"
    if config.shares != "equal":
        aim = ", ".join(f"{name} {part:.1%}" for name, part in parts if part > 0)
    given = "as given" if isinstance(config.shares, dict) else config.shares
    mixture = "of the candidates, by the weights" if config.weights == "unbiased" else "so shared out"
    facts = [f"shares {given}, at least 1 of each source: {aim}", f"the mixture that is trained is that {mixture}"]
    without = [name for name, none in zip(names, ((wanted == 0) & ~kept).tolist()) if none]
    if without:
        facts.append(f"warning: --selection.shares gives 0, and so no quota, to {', '.join(without)}")
    return facts


def quotas(shares: Tensor, available: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """Quotas in proportion to shares, as far as there are candidates.

    Every source with a share gets one first, or, where the budget is too small for that, all have the same chance. What
    a source cannot use goes to the others in proportion to their shares. A fraction of an example is given out by lot,
    so that over the steps each source gets its share (Pareto sampling; Rosen, 1997).

    Args:
        shares: ``[Q]``, not negative; a source with 0 gets nothing, even if the others cannot use all.
        available: ``[Q]`` candidates.
        total: Sum of the quotas, unless that is more than there is; at most all candidates.
        generator: Draws the lots; rank-equal.

    Returns:
        int64 ``[Q]``.
    """
    available = available.masked_fill(shares == 0, 0)
    total, least = min(total, int(available.sum())), available.clamp(max=1)
    if total <= least.sum():
        aims = _fill(torch.ones_like(shares), torch.zeros_like(least), least, total)
    else:
        aims = _fill(shares, least, available, total)
    aims = (aims * _GRID).round() / _GRID
    quota = aims.long()
    chance, lots = aims - quota, torch.rand(len(shares), dtype=torch.float64, generator=generator)
    order = (lots / (1 - lots) * (1 - chance) / chance).argsort()  # without a fraction: infinity, the last
    quota[order[: total - int(quota.sum())]] += 1
    return quota


def _fill(shares: Tensor, least: Tensor, most: Tensor, total: int) -> Tensor:
    """``[Q]`` one level times the shares, but within ``least`` and ``most``: the level at which the sum is ``total``.

    The sum is linear in the level between those at which some source reaches a bound.
    """
    shares = (shares / shares.max()).nan_to_num(1.0).clamp(min=1e-9)  # infinite ones are alike
    bends = torch.cat([least / shares, most / shares]).sort().values
    sums = (bends.unsqueeze(1) * shares).clamp(least, most).sum(1)
    after = int(torch.searchsorted(sums, float(total)).clamp(1, len(sums) - 1))
    low, high = bends[after - 1], bends[after]
    rise = sums[after] - sums[after - 1]
    level = low + (high - low) * (total - sums[after - 1]) / rise if rise else low
    return (level * shares).clamp(least, most)
