"""How many from which source, where it is not in proportion to the candidates: shares, and quotas that meet them.

| allocation | a source's share is in proportion to |
|---|---|
| equal | 1 |
| temperature | its training examples to the power of an exponent (Lample and Conneau, 2019, section 3.1) |
| excess_loss | exp(rate x excess loss); DoReMi (Xie et al., 2023, algorithm 1) |

The last is published as weights that every step multiplies by the exponential of a gain. With a memory of finite length
that product is the exponential of the gain's running average, which is what is used here: no weight can run away, and
nothing is kept but the averages. It starts from equal weights, as published. What DoReMi takes from a reference model,
the loss that is to be expected of a source, is taken from the run: the source's first loss, times what the average
source has left of its own. A source below that is not done, so the excess is not clipped at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.selection.statistics import SourceStatistics

RATE = 3.0
"""An excess of a third multiplies a source's share by e."""
_GRID = 1e6
"""Shares of examples are rounded to a millionth, so that the last bit of an estimate moves no example."""


def shares(
    config: SelectionConfig, sizes: Tensor | None, present: Tensor, statistics: SourceStatistics | None
) -> Tensor:
    """``[Q]`` float64, not negative: what the quotas are to be in proportion to.

    Args:
        config: An allocation other than ``proportional`` and ``none``.
        sizes: ``[Q]`` training examples of each source. Needed by temperature.
        present: ``[Q]`` its candidates in this step; how many sources there are, where nothing else tells.
        statistics: Needed by excess_loss, which goes by it.
    """
    match config.allocation:
        case "equal":
            return torch.ones(len(present), dtype=torch.float64)
        case "temperature":
            assert sizes is not None
            return sizes.double() ** config.allocation_exponent
        case "excess_loss":
            assert statistics is not None
            return torch.softmax(RATE * statistics.excess, 0)
        case other:
            raise ValueError(f"the allocation {other} has no shares")


def allocation_facts(config: SelectionConfig, names: Sequence[str], sizes: Tensor, kept: Tensor) -> list[str]:
    """What is to be said about the mixture before the run, if it is not that of the candidates.

    Args:
        names, sizes, kept: ``[Q]`` of each source.
    """
    if config.method not in ("colm", "stratified") or config.allocation in ("proportional", "none") or kept.all():
        return []
    match config.allocation:
        case "equal":
            aim = f"the same of all {int((~kept).sum())} that are not kept"
        case "temperature":
            wanted = shares(config, sizes, sizes, None).masked_fill(kept, 0)
            parts = zip(names, (wanted / wanted.sum()).tolist(), kept.tolist())
            aim = ", ".join(f"{name} {part:.1%}" for name, part, is_kept in parts if not is_kept)
        case _:
            aim = "by what training shows of each; the last table has what it came to"
    mixture = "of the candidates, by the weights" if config.weights == "unbiased" else "so allocated"
    return [
        f"allocation {config.allocation}, at least {config.allocation_floor} of each source: {aim}",
        f"the mixture that is trained is that {mixture}",
    ]


def quotas(shares: Tensor, available: Tensor, total: int, floor: int, generator: torch.Generator) -> Tensor:
    """Quotas in proportion to shares, as far as there are candidates.

    Every source gets its floor first, or, where the budget is too small for that, all get the same. What a source
    cannot use goes to the others in proportion to their shares. A fraction of an example is given out by lot, so that
    over the steps each source gets its share (Pareto sampling; Rosen, 1997).

    Args:
        shares: ``[Q]``, not negative.
        available: ``[Q]`` candidates.
        total: Sum of the quotas, at most all candidates.
        floor: Fewest of a source, or all that it has.
        generator: Draws the lots; rank-equal.

    Returns:
        int64 ``[Q]``.
    """
    least = available.clamp(max=floor)
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
    shares = (shares / shares.max()).nan_to_num(1.0).clamp(min=1e-9)  # all alike where none has any
    bends = torch.cat([least / shares, most / shares]).sort().values
    sums = (bends.unsqueeze(1) * shares).clamp(least, most).sum(1)
    after = int(torch.searchsorted(sums, float(total)).clamp(1, len(sums) - 1))
    low, high = bends[after - 1], bends[after]
    rise = sums[after] - sums[after - 1]
    level = low + (high - low) * (total - sums[after - 1]) / rise if rise else low
    return (level * shares).clamp(least, most)
