"""Examples into one micro-batch on the device, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colm_scale.data.examples import Examples
from colm_scale.records import Batch, Candidates, MicroBatch, Packing, Targets, long_tensor


def collate(
    examples: Examples, indices: Tensor, positions: Tensor, pad_id: int, device: torch.device, *, packed: bool = False
) -> Batch:
    """A micro-batch of some examples.

    Args:
        indices: ``[B]`` the examples, at least one.
        positions: ``[B]`` their positions among the candidates; empty for a batch that only keeps the ranks in step.
    """
    rows, labelled = zip(*[examples.example(index) for index in indices.tolist()])
    return make_batch([row.long() for row in rows], labelled, positions, pad_id, device, packed=packed)


@dataclass(frozen=True, slots=True)
class Batching:
    """How the examples of a step become micro-batches.

    Attributes:
        pad_id: Token that padding is made of.
        token_budget: Most tokens of a micro-batch, padding included; a longer example forms one of its own.
        packed: Whether examples are put one after the other rather than padded.
        device: Where micro-batches are computed.
    """

    pad_id: int
    token_budget: int
    packed: bool
    device: torch.device

    def share(self, examples: Examples, candidates: Candidates, share: Sequence[tuple[int, ...]]) -> list[Batch]:
        """A rank's micro-batches, tuples of positions; an empty one holds the shortest candidate, at no position."""
        batches = []
        shortest = candidates.indices[candidates.lengths.argmin().view(1)]
        for positions in map(long_tensor, share):
            indices = candidates.indices[positions] if len(positions) else shortest
            batches.append(collate(examples, indices, positions, self.pad_id, self.device, packed=self.packed))
        return batches


def make_batch(
    rows: Sequence[Tensor],
    labelled: Sequence[Tensor],
    positions: Tensor,
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> Batch:
    """A micro-batch of tokens.

    Args:
        rows: Tokens of each example, ``[length]`` int64 on the CPU.
        labelled: ``[length]`` bool, which of them carry loss; an example's first token, which nothing predicts, never
            does.
        positions: As in `collate`.
        packed: All in one row without padding, rather than a row each, padded on the right to the longest.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + (length if packed else longest))
    targets = _targets(rows, labelled, starts)
    move = _Mover(device)
    if not packed:
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        tokens = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
        return Batch(move(tokens), move(mask), move.targets(targets), positions, tuple(lengths))
    within = [torch.arange(length) for length in lengths]
    packing = Packing(
        position_ids=move(torch.cat(within).unsqueeze(0)),
        offsets=move(torch.tensor(starts, dtype=torch.int32)),
        places=move(torch.cat([position + number * longest for number, position in enumerate(within)])),
        longest=longest,
    )
    tokens = move(torch.cat(list(rows)).unsqueeze(0))
    return Batch(tokens, None, move.targets(targets), positions, tuple(lengths), packing)


def _targets(rows: Sequence[Tensor], labelled: Sequence[Tensor], starts: Sequence[int]) -> Targets:
    predicted = [mask[1:].nonzero().flatten() for mask in labelled]  # in terms of the token before
    counts = torch.tensor([len(found) for found in predicted])
    most = max(1, int(counts.max()))
    return Targets(
        rows=torch.cat([found + start for found, start in zip(predicted, starts)]),
        tokens=torch.cat([row[found + 1] for row, found in zip(rows, predicted)]),
        slots=torch.cat([torch.arange(len(found)) + number * most for number, found in enumerate(predicted)]),
        counts=counts,
        most=most,
    )


class _Mover:
    """Copies to the device; from pinned memory, so that the copy is queued and not waited for."""

    def __init__(self, device: torch.device):
        self._device = device

    def __call__(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def targets(self, targets: Targets) -> Targets:
        rows, tokens, slots, counts = map(self, (targets.rows, targets.tokens, targets.slots, targets.counts))
        return Targets(rows, tokens, slots, counts, targets.most)


def weighted(
    batches: Sequence[Batch], shares: Tensor, device: torch.device, reused: int = 0
) -> list[MicroBatch]:
    """Micro-batches to train on.

    Args:
        shares: ``[n]`` what each candidate's loss counts for.
        reused: How many of the first ones start from block inputs that the sketch holds.
    """
    found = []
    for number, batch in enumerate(batches):
        of_batch = shares[batch.positions] if len(batch.positions) else torch.zeros(1)
        found.append(MicroBatch(batch, of_batch.to(device), number < reused))
    return found
