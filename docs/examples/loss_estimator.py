"""An estimator of your own: candidates are compared by their losses, one number each.

    colm-scale train --selection.estimator docs/examples/loss_estimator.py:loss --selection.ranking systematic

It costs one forward of the candidates. With `--selection.ranking top`, it trains on the highest losses.
"""

from __future__ import annotations

from torch import Tensor

from colm_scale.records import Batch
from colm_scale.sketch.tap import Tap


def loss(tap: Tap, batch: Batch) -> Tensor:
    """``[B, 1]``: the loss of each example, which is also the number to compare, as no other follows it."""
    return tap.bare_losses(batch).unsqueeze(1)
