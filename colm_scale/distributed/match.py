"""Inner products of gradients over all adapters and ranks, for comparing what different examples would train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.records import Batch
from colm_scale.sketch.adapters import AdapterTap


def gradient_products(tap: AdapterTap, batches: Sequence[Batch], weights: Tensor, group: Group, scale: float) -> Tensor:
    """Inner products of the gradients of ``m`` weighted sums of the candidates' losses. All ranks call it together.

    One forward and backward of each micro-batch; a rank holds ``m`` gradients of all adapters for as long. Weights,
    gradients and optimizer are not touched, whatever the engine.

    Args:
        batches: This rank's micro-batches, as many as on every other rank; an empty one only keeps the ranks in step.
        weights: ``[m, n]``.
        scale: The engine's loss scale.

    Returns:
        ``[m, m]`` float64 on the CPU, times the square of ``scale``.
    """
    weights = weights.to(group.device)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        count = len(batch.positions)
        own = weights[:, batch.positions] if count else weights.new_zeros(len(weights), 1)
        for name, of_batch in tap.gradients(batch, own, scale).items():
            sums[name] = sums[name].add_(of_batch) if name in sums else of_batch
    products = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=group.device)
    for name in filter(sums.__contains__, tap.matrices):
        whole = group.all_reduce(sums.pop(name), "match").flatten(1).double()
        products += whole @ whole.T
    return products.cpu()
