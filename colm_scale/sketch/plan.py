"""Who is sketched, in which micro-batches, on which rank: a pure function of the candidates (DESIGN 2.1).

The micro-batches are formed before they are dealt out, so the shape of every forward, and with it the last bit of every
sketch, does not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import Candidates, Quota, SketchPlan
from colm_scale.selection.route import deal, form_micro_batches


def held_inputs(plan: SketchPlan, lengths: Tensor, most_tokens: float) -> tuple[Tensor, list[int]]:
    """Decide whose block inputs each rank holds: of its first micro-batches, as many as stay within ``most_tokens``.

    Args:
        lengths: ``[n]`` tokens of each candidate; those of a micro-batch are reckoned as padded, packed or not.

    Returns:
        ``[n]`` the rank that holds a candidate's inputs, -1 where none does; how many micro-batches each rank holds.
    """
    found = torch.full_like(lengths, -1)
    counts = []
    for rank, share in enumerate(plan.shares):
        held = count = 0
        for members in filter(len, share):
            held += len(members) * int(lengths[list(members)].max())
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

    Candidates that are kept, and those of a source without a quota, are not forwarded: nothing is decided about them.
    A source is *ranked*, and takes part in choosing columns, if its quota is smaller than what it has.

    Args:
        known: ``[n]`` bool, candidates that are ranked like the others, but need no forward; none by default.
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
