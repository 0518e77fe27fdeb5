"""A random projection of the gradients, fixed for the run: h numbers of each example, whatever the others are.

Inner products, and with them squared distances, keep their size in expectation, off by about ``sqrt(2 / h)`` of the
product of the lengths. What is drawn is keyed by the seed, so every rank projects alike, and a row depends on its
example alone: it is equal whichever rank makes it, and rows of different steps can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments
from colm_scale.sketch.last_layer import Gradients


class CountSketch:
    """Each of the d numbers gets a sign and one of h places, and what meets at a place is added up.

    Charikar et al. 2002; as a hash of features, Weinberger et al. 2009. With h of d or more every number has a place of
    its own, and nothing is lost.

    Args:
        seed: Of the run; the draws are rank-equal.
        size: Numbers of a row, d.
        columns: h, at most.
    """

    def __init__(self, seed: int, size: int, columns: int, device: torch.device):
        draw = generator(seed, "count sketch")
        self.columns = min(columns, size)
        signs = torch.randint(2, (size,), generator=draw).float() * 2 - 1
        places = torch.randint(columns, (size,), generator=draw) if columns < size else torch.arange(size)
        self._signs, self._places = signs.to(device), places.to(device)

    def rows(self, gradients: Gradients, moments: Moments) -> Tensor:
        """``[B, h]`` float32: the normalised rows, a few columns at a time.

        They are added up in float64: what the order of additions does there (a GPU's is not fixed) is far below the
        rounding of the result.
        """
        found = torch.zeros(len(gradients.rows), self.columns, dtype=torch.float64, device=self._signs.device)
        for examples, columns, u in gradients.updates(moments):
            places = self._places[columns].expand(u.shape)
            found[examples].scatter_add_(1, places, (u * self._signs[columns]).double())
        return found.float()
