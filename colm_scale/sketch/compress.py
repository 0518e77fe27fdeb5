"""A random projection of the gradients to h numbers per example, fixed for the run.

It preserves inner products, and so squared distances, in expectation, with an error of about ``sqrt(2 / h)`` of the
product of the lengths. The draws are keyed by the seed and equal on every rank, and a row depends on its example alone:
it does not matter which rank computes it, and rows from different steps can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments
from colm_scale.sketch.last_layer import Gradients


class CountSketch:
    """Gives each of the d numbers a sign and one of h places, and adds up the numbers at each place.

    Charikar et al. 2002; as feature hashing, Weinberger et al. 2009. With h = d every number has its own place, and
    nothing is lost.

    Args:
        seed: Seed of the run.
        size: Numbers per row, d.
        columns: h; reduced to d if it is larger.
    """

    def __init__(self, seed: int, size: int, columns: int, device: torch.device):
        draw = generator(seed, "count sketch")
        self.columns = min(columns, size)
        signs = torch.randint(2, (size,), generator=draw).float() * 2 - 1
        places = torch.randint(columns, (size,), generator=draw) if columns < size else torch.arange(size)
        self._signs, self._places = signs.to(device), places.to(device)

    def rows(self, gradients: Gradients, moments: Moments) -> Tensor:
        """``[B, h]`` float32: the projected normalised rows, computed a few columns at a time.

        They are added up in float64, where the order of additions (not fixed on a GPU) changes far less than the
        rounding of the result.
        """
        found = torch.zeros(len(gradients.rows), self.columns, dtype=torch.float64, device=self._signs.device)
        for examples, columns, u in gradients.updates(moments):
            places = self._places[columns].expand(u.shape)
            found[examples].scatter_add_(1, places, (u * self._signs[columns]).double())
        return found.float()
