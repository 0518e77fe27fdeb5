"""Collation of examples into micro-batches on the device, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colm_scale.data.examples import Examples
from colm_scale.records import Batch, Candidates, MicroBatch, Packing, Shares, Targets, long_tensor, on_device


def collate(
    examples: Examples, indices: Tensor, positions: Tensor, pad_id: int, device: torch.device, *, packed: bool = False
) -> Batch:
    """Collate the examples at some indices.

    Args:
        indices: ``[B]``, at least one.
        positions: ``[B]`` positions among the candidates; empty for a batch that only keeps the ranks in step.
    """
    rows, labelled = zip(*[examples.example(index) for index in indices.tolist()])
    return make_batch([row.long() for row in rows], labelled, positions, pad_id, device, packed=packed)


@dataclass(frozen=True, slots=True)
class Batching:
    """Settings for collating the examples of a step.

    Attributes:
        pad_id: Padding token.
        token_budget: Most tokens of a micro-batch, including padding; a longer example gets a micro-batch to itself.
        packed: Concatenate examples into one row instead of padding them.
        device: Device of the micro-batches.
    """

    pad_id: int
    token_budget: int
    packed: bool
    device: torch.device

    def share(self, examples: Examples, candidates: Candidates, shares: Shares, rank: int) -> list[Batch]:
        """Collate a rank's share, tuples of positions; for an empty one, the shortest candidate of any share without a
        position.

        A candidate in no share may have been left out for a loss that is not finite, of which no weight makes zero.
        """
        batches = []
        for positions in map(long_tensor, shares[rank]):
            taken = positions if len(positions) else _shortest(candidates.lengths, shares)
            indices = candidates.indices[taken]
            batches.append(collate(examples, indices, positions, self.pad_id, self.device, packed=self.packed))
        return batches


def _shortest(lengths: Tensor, shares: Shares) -> Tensor:
    """``[1]`` position of the shortest candidate in any share, the first of equal ones."""
    shared = long_tensor([*chain.from_iterable(chain.from_iterable(shares))]).sort().values
    return shared[lengths[shared].argmin().view(1)]


def make_batch(
    rows: Sequence[Tensor],
    labelled: Sequence[Tensor],
    positions: Tensor,
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> Batch:
    """Collate tokens.

    Args:
        rows: Tokens of each example, ``[length]`` int64 on the CPU.
        labelled: ``[length]`` bool, tokens that carry loss; never the first, which is not predicted.
        positions: As in `collate`.
        packed: Put all examples into one row without padding, instead of one row each, padded on the right.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + (length if packed else longest))
    move = partial(on_device, device=device)
    targets = _targets(rows, labelled, starts, move)
    if not packed:
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        tokens = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
        return Batch(move(tokens), move(mask), targets, positions, tuple(lengths))
    within = [torch.arange(length) for length in lengths]
    packing = Packing(
        position_ids=move(torch.cat(within).unsqueeze(0)),
        offsets=move(torch.tensor(starts, dtype=torch.int32)),
        places=move(torch.cat([position + number * longest for number, position in enumerate(within)])),
        longest=longest,
    )
    tokens = move(torch.cat(list(rows)).unsqueeze(0))
    return Batch(tokens, None, targets, positions, tuple(lengths), packing)


def _targets(
    rows: Sequence[Tensor], labelled: Sequence[Tensor], starts: Sequence[int], move: Callable[[Tensor], Tensor]
) -> Targets:
    predicted = [mask[1:].nonzero().flatten() for mask in labelled]  # places of the tokens before the labels
    counts = torch.tensor([len(found) for found in predicted])
    most = max(1, int(counts.max()))
    return Targets(
        rows=move(torch.cat([found + start for found, start in zip(predicted, starts)])),
        tokens=move(torch.cat([row[found + 1] for row, found in zip(rows, predicted)])),
        slots=move(torch.cat([torch.arange(len(found)) + number * most for number, found in enumerate(predicted)])),
        counts=move(counts),
        most=most,
    )


def weighted(batches: Sequence[Batch], shares: Tensor, device: torch.device, reused: int) -> list[MicroBatch]:
    """Attach the weights of the losses to micro-batches.

    Args:
        shares: ``[n]`` factor of each candidate's loss.
        reused: Number of micro-batches, the first ones, that start from held block inputs.
    """
    found = []
    for number, batch in enumerate(batches):
        of_batch = shares[batch.positions] if len(batch.positions) else torch.zeros(1)
        found.append(MicroBatch(batch, on_device(of_batch, device), number < reused))
    return found
