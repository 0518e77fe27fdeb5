"""The compared columns: for each source, the h with the largest mean update (docs/method.md, Gather).

Sums are in fixed point. Integer addition does not depend on order, so the columns depend neither on the distribution
of rows over ranks nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 16.0
"""Bound to which entries of an update are clamped. With Adam's usual betas they stay below 4."""


def to_fixed(u: Tensor, count: int) -> Tensor:
    """Convert ``u`` to int32, in the finest power-of-two unit in which ``count`` numbers add up without overflow."""
    one = 2.0 ** (27 - count.bit_length())  # count * LARGEST * one < 2**31
    return (u.clamp(-LARGEST, LARGEST) * one).round().to(torch.int32)


def source_sums(u: Tensor, groups: Tensor, num_groups: int, count: int) -> Tensor:
    """Sum the updates of each source in fixed point.

    Args:
        u: ``[s, d]`` finite updates.
        groups: ``[s]`` 0..G-1, the source of each row.
        num_groups: G.
        count: Rows over all calls and ranks whose results are added; sets the unit.

    Returns:
        int32 ``[G, d]``.
    """
    sums = torch.zeros(num_groups, u.shape[1], dtype=torch.int32, device=u.device)
    return sums.index_add_(0, groups, to_fixed(u, count))


def power_of_two(exponent: Tensor) -> Tensor:
    """Compute ``2 ** exponent`` exactly, float64, for whole numbers from -1022 to 1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def top_columns(sums: Tensor, h: int) -> Tensor:
    """Find the ``h`` columns with the largest absolute sum for each source; the lowest column wins ties.

    Args:
        sums: int32 ``[G, d]``.

    Returns:
        int64 ``[G, min(h, d)]``, ascending.
    """
    return _best(sums, torch.arange(sums.shape[1], device=sums.device).expand(sums.shape), h)


def merge_proposals(values: Tensor, columns: Tensor, h: int) -> Tensor:
    """Find `top_columns` of the whole from the best columns of each part's owner.

    Args:
        values: int32 ``[W, G, k]`` sums of the columns proposed by each of W owners, k at least h or all it owns.
        columns: int64 ``[W, G, k]`` their indices in the whole.

    Returns:
        int64 ``[G, min(h, W * k)]``, ascending.
    """
    return _best(values.transpose(0, 1).flatten(1), columns.transpose(0, 1).flatten(1), h)


def _best(values: Tensor, columns: Tensor, h: int) -> Tensor:
    # One distinct key per column: the larger |value| wins, and the lower column among equals.
    keys = (values.abs().long() << 31) - columns
    best = keys.topk(min(h, keys.shape[1])).indices
    return columns.gather(1, best).sort().values
