"""Examples into one padded micro-batch on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from colm_scale.data.examples import Examples
from colm_scale.records import Batch

IGNORED = -100
"""Label of a token without loss."""


def collate(examples: Examples, indices: Tensor, positions: Tensor, pad_id: int, device: torch.device) -> Batch:
    """A micro-batch, padded on the right to its longest example.

    Args:
        indices: ``[B]`` the examples, at least one.
        positions: ``[B]`` their positions among the candidates; empty for a batch that only keeps the ranks in step.
    """
    rows = [examples.example(index) for index in indices.tolist()]
    tokens = [row.long() for row, _ in rows]
    labels = [row.masked_fill(~labelled, IGNORED) for row, (_, labelled) in zip(tokens, rows)]
    mask = [torch.ones_like(row) for row in tokens]
    return Batch(
        input_ids=pad_sequence(tokens, batch_first=True, padding_value=pad_id).to(device),
        attention_mask=pad_sequence(mask, batch_first=True).to(device),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
        positions=positions,
    )
