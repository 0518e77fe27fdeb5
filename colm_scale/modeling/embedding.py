"""Embeddings of examples: the mean of their last hidden states (after the final norm, before the head).

B  examples of a micro-batch        c  numbers of a hidden state
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.data.batching import make_batch
from colm_scale.modeling.causal import CausalModel, base_of
from colm_scale.records import Batch, long_tensor, on_device
from colm_scale.selection.route import form_micro_batches


def mean_states(batch: Batch, hidden: Tensor) -> Tensor:
    """``[B, c]`` float32 mean over each example's own tokens, without padding.

    Args:
        hidden: ``[B, T, c]``, or ``[1, T, c]`` if the batch is packed.
    """
    states = batch.by_example(hidden).float()
    lengths = on_device(long_tensor(batch.lengths), hidden.device).unsqueeze(1)
    real = torch.arange(states.shape[1], device=hidden.device) < lengths
    return (states * real.unsqueeze(2)).sum(1) / lengths


@torch.no_grad()
def embed(model: CausalModel, rows: Sequence[Tensor], token_budget: int) -> Tensor:
    """``[n, c]`` float32 on the CPU, the mean last hidden state of each of ``n`` examples.

    Args:
        model: A causal language model in evaluation mode, with adapters or without.
        rows: Tokens of each example, ``[length]`` int64, at least one each.
        token_budget: Most tokens of one forward, padding included; a longer example has a forward to itself.
    """
    decoder = base_of(model).base_model
    device = next(decoder.parameters()).device
    lengths = long_tensor([len(row) for row in rows])
    found: dict[int, Tensor] = {}
    for positions in map(long_tensor, form_micro_batches(lengths, torch.arange(len(rows)), token_budget)):
        some = [rows[position] for position in positions.tolist()]
        marks = [torch.zeros_like(row, dtype=torch.bool) for row in some]  # no token carries loss
        batch = make_batch(some, marks, positions, 0, device)
        output = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        found |= zip(positions.tolist(), mean_states(batch, output.last_hidden_state).cpu())
    return torch.stack([found[position] for position in range(len(rows))])
