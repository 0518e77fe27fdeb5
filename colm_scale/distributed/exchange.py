"""What ranks tell each other between the sketch and the training of the coreset: rows up, a selection down."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.records import Candidates, Selection, SketchPlan

_HEADER = 5
"""Numbers before the positions: how many are selected, kept, overflowing and invalid, and the digest."""


def gather_rows(local: Tensor, plan: SketchPlan, group: Group, label: str) -> Tensor:
    """``[rows of this rank, c]`` on each rank -> ``[s, c]`` on all, in the order of the plan's positions.

    Shares may differ in size, so each is padded to the largest: a fixed-size tensor, as collectives want it. A row that
    no rank computes is zero, and if that is so for all, nothing is exchanged.
    """
    rows = local.new_zeros(len(plan.positions), local.shape[1])
    if not plan.most_rows:
        return rows
    padded = local.new_zeros(plan.most_rows, local.shape[1])
    padded[: len(local)] = local
    gathered = group.all_gather(padded, label)
    for rank, share in enumerate(gathered):
        of_rank = plan.rows_of(rank).to(local.device)
        rows[of_rank] = share[: len(of_rank)]
    return rows


def share_selection(selection: Selection | None, budget: int, candidates: Candidates, group: Group) -> Selection:
    """Rank 0's selection on every rank: ``16 b + 40`` bytes.

    The digest covers the selection and the candidate ids, which every rank has drawn for itself, so a rank that read
    other data, or received something else, is found out before it trains on it.

    Args:
        selection: Rank 0's; the other ranks pass None.
        budget: Most examples that can be selected, which fixes the size of the message.

    Raises:
        TrainingError: On every rank, naming the first that disagrees.
    """
    message = torch.zeros(_HEADER + 2 * budget, dtype=torch.int64)
    if selection is not None:
        b = len(selection)
        message[:4] = torch.tensor([b, selection.kept, selection.overflow, selection.invalid])
        message[_HEADER : _HEADER + b] = selection.positions
        message[_HEADER + budget : _HEADER + budget + b] = selection.weights.double().view(torch.int64)
        message[4] = _digest(message, candidates)
    message = group.broadcast(message.to(group.device), "broadcast").cpu()
    agrees = torch.tensor([int(message[4]) == _digest(message, candidates)], dtype=torch.int32, device=group.device)
    different = (group.all_gather(agrees, "control").flatten() == 0).nonzero().flatten().tolist()
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
