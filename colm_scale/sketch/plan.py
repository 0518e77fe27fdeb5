"""Who is sketched, in which micro-batches, on which rank: a pure function of the candidates (DESIGN 2.1).

The micro-batches are formed before they are dealt out, so the shape of every forward, and with it the last bit of every
sketch, does not depend on the number of ranks.
"""

from __future__ import annotations

import torch

from colm_scale.records import Candidates, Quota, SketchPlan
from colm_scale.selection.route import deal, form_micro_batches


def plan_sketch(candidates: Candidates, quota: Quota, world_size: int, token_budget: int) -> SketchPlan:
    """Plan the sketch of one step.

    Candidates that are kept, and those of a source without a quota, are not forwarded: nothing is decided about them.
    A source is *ranked*, and takes part in choosing columns, if its quota is smaller than what it has.
    """
    positions = quota.to_sketch(candidates.sources)
    sources = candidates.sources[positions]
    present, counts = sources.unique(return_counts=True)
    ranked = present[quota.per_source[present] < counts]
    groups = torch.full_like(sources, -1)
    for group, source in enumerate(ranked.tolist()):
        groups[sources == source] = group
    micro_batches = form_micro_batches(candidates.lengths, positions, token_budget)
    return SketchPlan(
        positions=positions,
        groups=groups,
        num_groups=len(ranked),
        shares=deal(micro_batches, candidates.lengths, world_size),
    )
