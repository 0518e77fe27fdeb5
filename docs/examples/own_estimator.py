"""An estimator of your own: candidates are compared by their hidden states rather than their gradients.

    colm-scale train --selection.estimator docs/examples/own_estimator.py:mean_hidden_state --selection.metric cosine

It costs one forward of the candidates, as much as comparing losses (loss_estimator.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import Batch, long_tensor, on_device
from colm_scale.sketch.tap import Tap


def mean_hidden_state(tap: Tap, batch: Batch) -> Tensor:
    """``[B, 1 + width]``: the loss of each example, and the mean of the last block's output over its tokens.

    Other measurements: ``tap.factors(batch)``, exact gradients of the probe tensor; ``tap.branched_losses(batch,
    changes)``, losses under changes of it. Every rank makes the same number of calls, so a sharded model works too.
    """
    seen: list[Tensor] = []

    def read(_block: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = tap.block.register_forward_hook(read)
    try:
        losses = tap.bare_losses(batch)
    finally:
        handle.remove()
    hidden = batch.by_example(seen[0]).float()  # [B, longest, width], packed or padded
    lengths = on_device(long_tensor(batch.lengths), hidden.device)  # without waiting for the device
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)
    means = (hidden * real.unsqueeze(2)).sum(1) / lengths.unsqueeze(1)
    return torch.cat([losses.unsqueeze(1), means], dim=1)
