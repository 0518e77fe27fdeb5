"""The plan of a sketch: candidates, micro-batches and ranks, purely by the candidates (docs/method.md, Sketch).

Micro-batches are formed before they are distributed, so the shape of every forward, and with it the last bit of every
sketch, does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from colm_scale.records import Candidates, Quota, SketchPlan, long_tensor
from colm_scale.selection.route import deal, form_micro_batches, longest_of


def held_inputs(
    plan: SketchPlan, lengths: Tensor, most_tokens: float, size: Callable[[Tensor], Tensor] = torch.as_tensor
) -> tuple[Tensor, list[int]]:
    """Decide which block inputs each rank holds: those of its first micro-batches, within ``most_tokens``.

    Args:
        lengths: ``[n]`` tokens of each candidate; micro-batches count as padded, even if they are packed.
        size: Returns how many of ``most_tokens`` micro-batches take.

    Returns:
        ``[n]`` the rank that holds a candidate's inputs, or -1; the number of micro-batches that each rank holds.
    """
    shares = [[*filter(None, share)] for share in plan.shares]
    micro_batches = [*chain.from_iterable(shares)]
    sizes, ranks = long_tensor([*map(len, micro_batches)]), torch.arange(len(shares))
    rank_of = ranks.repeat_interleave(long_tensor([*map(len, shares)]))
    costs = size(longest_of(lengths, micro_batches) * sizes)
    of_ranks = torch.zeros_like(ranks).index_add_(0, rank_of, costs)
    so_far = costs.cumsum(0) - (of_ranks.cumsum(0) - of_ranks)[rank_of]
    held = so_far <= most_tokens
    found = torch.full_like(lengths, -1)
    members = long_tensor([*chain.from_iterable(micro_batches)])
    found[members] = torch.where(held, rank_of, -1).repeat_interleave(sizes)
    return found, torch.bincount(rank_of[held], minlength=len(shares)).tolist()


def plan_sketch(
    candidates: Candidates,
    quota: Quota,
    world_size: int,
    token_budget: int,
    known: Tensor | None = None,
    packed: bool = False,
) -> SketchPlan:
    """Plan the sketch of one step.

    Kept candidates, and those of a source without a quota, are not compared, so they are not sketched. A source is
    *ranked*, and takes part in the choice of columns, if its quota is smaller than its number of candidates.

    Args:
        known: ``[n]`` bool, candidates that are compared but need no forward; none by default.
        packed: Whether micro-batches are packed rather than padded.
    """
    positions = quota.to_sketch(candidates.sources)
    sources = candidates.sources[positions]
    there = torch.bincount(sources, minlength=len(quota.per_source))
    ranked = (quota.per_source < there)[sources]
    groups = torch.full_like(sources, -1)
    present, groups[ranked] = sources[ranked].unique(return_inverse=True)
    unknown = positions if known is None else positions[~known[positions]]
    micro_batches = form_micro_batches(candidates.lengths, unknown, token_budget, packed=packed, even=True)
    return SketchPlan(
        positions=positions,
        groups=groups,
        num_groups=len(present),
        shares=deal(micro_batches, candidates.lengths, world_size, packed=packed),
    )
