"""Exchanges between sketching and training: sketches are gathered, and the selection is broadcast."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.records import Candidates, Selection, SketchPlan, on_device

_HEADER = 5
"""Numbers before the positions: counts of selected, kept, overflowing and invalid, and the digest."""


def gather_rows(local: Tensor, plan: SketchPlan, group: Group, label: str) -> Tensor:
    """Gather ``[rows of this rank, c]`` to ``[s, c]`` on all ranks, in the order of the plan's positions.

    Each rank's share is padded to the largest. Rows that no rank computes are zero; if all are, nothing is exchanged.
    """
    rows, counts = local.new_zeros(len(plan.positions), local.shape[1]), plan.counts
    most = int(counts.max())
    if not most:
        return rows
    padded = local.new_zeros(most, local.shape[1])
    padded[: len(local)] = local
    gathered = group.all_gather(padded, label).flatten(0, 1)
    places = (torch.arange(most) < counts.unsqueeze(1)).flatten().nonzero().flatten()  # those that are not padding
    of_all = plan.rows_of(*range(len(counts)))
    of_all, places = on_device(torch.stack([of_all, places]), local.device)
    return rows.index_copy_(0, of_all, gathered.index_select(0, places))


def share_selection(selection: Selection | None, budget: int, candidates: Candidates, group: Group) -> Selection:
    """Broadcast rank 0's selection: ``16 b + 40`` bytes.

    A digest covers the selection and the candidate ids, which every rank draws itself, so a rank with other data or a
    corrupted message is detected before it trains.

    Args:
        selection: Rank 0's; the other ranks pass None.
        budget: Largest possible number of selected examples; fixes the size of the message.

    Raises:
        TrainingError: On every rank; names the first that disagrees.
    """
    message = torch.zeros(_HEADER + 2 * budget, dtype=torch.int64)
    if selection is not None:
        b = len(selection)
        message[:4] = torch.tensor([b, selection.kept, selection.overflow, selection.invalid])
        message[_HEADER : _HEADER + b] = selection.positions
        message[_HEADER + budget : _HEADER + budget + b] = selection.weights.double().view(torch.int64)
        message[4] = _digest(message, candidates)
    if group.world_size > 1:
        message = group.broadcast(on_device(message, group.device), "broadcast").cpu()
    agrees = group.gathered(int(message[4]) == _digest(message, candidates))
    different = [rank for rank, agreed in enumerate(agrees) if not agreed]
    if different:
        raise TrainingError(
            f"step {candidates.step}: rank {different[0]} does not agree with rank 0 on the candidates or the "
            f"selection; every rank must read the same data with the same configuration"
        )
    b, kept, overflow, invalid = message[:4].tolist()
    return Selection(
        positions=message[_HEADER : _HEADER + b].clone(),
        weights=message[_HEADER + budget : _HEADER + budget + b].clone().view(torch.float64).float(),
        kept=kept,
        overflow=overflow,
        invalid=invalid,
    )


def _digest(message: Tensor, candidates: Candidates) -> int:
    covered = torch.cat([message[:4], message[_HEADER:], candidates.ids, torch.tensor([candidates.step])])
    return int.from_bytes(hashlib.sha256(covered.numpy().tobytes()).digest()[:8], "little", signed=True)
