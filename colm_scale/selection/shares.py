"""Shares of the budget for the sources that are not kept, other than in proportion to their candidates.

| ``--selection.shares`` | a source's share is in proportion to |
|---|---|
| equal | 1 |
| a number | its training examples to the power of that number (Lample and Conneau, 2019, section 3.1) |
| ratios | the user's number for it; with 0 it gets no quota |
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
"""Fractions of examples are rounded to a millionth, so that the last bit of an estimate changes no quota."""


def source_shares(shares: Shares, names: Sequence[str], sizes: Tensor) -> Tensor | None:
    """Return the shares ``[Q]`` of the sources, float64 and not negative; None: in proportion to the candidates.

    Args:
        names, sizes: ``[Q]`` names of the sources, and their training examples.
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
    """Check the user's ratios against the sources of the training data.

    Args:
        names, kept: ``[Q]`` names of the sources, and whether each is kept.
        refreshed: Whether the kept sources may change during the run.

    Raises:
        UserError: A name is not a source, or a source that may need a ratio has none.
    """
    if not isinstance(config.shares, dict) or config.method not in ("colm", "stratified"):
        return
    check_names("selection.shares", [*config.shares], names)
    pairs = zip(names, kept.tolist())
    missing = [name for name, is_kept in pairs if name not in config.shares and (refreshed or not is_kept)]
    if missing:
        raise UserError(
            f"--selection.shares gives no number for {', '.join(missing)}: add one for each, 0 for no quota"
        )


def shares_facts(config: SelectionConfig, names: Sequence[str], sizes: Tensor, kept: Tensor) -> list[str]:
    """Describe the trained mixture in lines for the banner, unless it is that of the candidates.

    Args:
        names, sizes, kept: ``[Q]`` names of the sources, their training examples, and whether each is kept.
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
    """Divide ``total`` in proportion to shares, within the available candidates.

    Every source with a share first gets one candidate; if the budget is too small for that, all have the same chance.
    Quota that a source cannot use goes to the others in proportion to their shares. Fractions of an example are drawn
    by lot, so that over many steps each source gets its share (Pareto sampling; Rosen, 1997).

    Args:
        shares: ``[Q]``, not negative; a source with 0 gets nothing, even if the others cannot use all.
        available: ``[Q]`` candidates.
        total: Sum of the quotas; reduced to the available candidates if there are fewer.
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
    order = (lots / (1 - lots) * (1 - chance) / chance).argsort()  # infinity, the last, without a fraction
    quota[order[: total - int(quota.sum())]] += 1
    return quota


def _fill(shares: Tensor, least: Tensor, most: Tensor, total: int) -> Tensor:
    """Scale the shares ``[Q]``, clamped to ``least`` and ``most``, to the level at which their sum is ``total``.

    Between the levels at which a source reaches a bound, the sum is linear in the level.
    """
    shares = (shares / shares.max()).nan_to_num(1.0).clamp(min=1e-9)  # infinite shares are equal
    bends = torch.cat([least / shares, most / shares]).sort().values
    sums = (bends.unsqueeze(1) * shares).clamp(least, most).sum(1)
    after = int(torch.searchsorted(sums, float(total)).clamp(1, len(sums) - 1))
    low, high = bends[after - 1], bends[after]
    rise = sums[after] - sums[after - 1]
    level = low + (high - low) * (total - sums[after - 1]) / rise if rise else low
    return (level * shares).clamp(least, most)
