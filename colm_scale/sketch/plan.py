"""The plan of a sketch: candidates, micro-batches and ranks, a pure function of the candidates (DESIGN 2.1).

Micro-batches are formed before they are distributed, so the shape of every forward, and with it the last bit of every
sketch, does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colm_scale.records import Candidates, Quota, SketchPlan
from colm_scale.selection.route import deal, form_micro_batches


def held_inputs(
    plan: SketchPlan, lengths: Tensor, most_tokens: float, size: Callable[[int], int] = int
) -> tuple[Tensor, list[int]]:
    """Decide which block inputs each rank holds: those of its first micro-batches, within ``most_tokens``.

    Args:
        lengths: ``[n]`` tokens of each candidate; micro-batches count as padded, even if they are packed.
        size: Returns how many of ``most_tokens`` a micro-batch takes.

    Returns:
        ``[n]`` the rank that holds a candidate's inputs, or -1; the number of micro-batches that each rank holds.
    """
    found = torch.full_like(lengths, -1)
    counts = []
    for rank, share in enumerate(plan.shares):
        held = count = 0
        for members in filter(len, share):
            held += size(len(members) * int(lengths[list(members)].max()))
            if held > most_tokens:
                break
            found[list(members)] = rank
            count += 1
        counts.append(count)
    return found, counts


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
