"""Random projections of the gradients, fixed for the run: h numbers of each example, whatever the others are.

Inner products, and with them squared distances, keep their size in expectation, off by about ``sqrt(2 / h)`` of the
product of the lengths. What is drawn is keyed by the seed, so every rank projects alike, and a row depends on its
example alone: it is equal whichever rank makes it, and rows of different steps can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.selection.moments import Moments, Shapes
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


class KroneckerSketch:
    """Of each probe the gradient between two small matrices of random signs, ``P delta^T a R``: h1 by h2 numbers.

    It is made of the factors, ``(delta P^T)^T (a R)``, so no d numbers of an example are ever there; as in data
    attribution (LoGra, Choe et al. 2024). A side that would not become shorter is left as it is.

    Args:
        seed: Of the run; the draws are rank-equal.
        shapes: ``(d_out, r)`` of each probe tensor; each gets an equal share of the columns.
        columns: h, at most, but one for each probe.
    """

    def __init__(self, seed: int, shapes: Shapes, columns: int, device: torch.device):
        self._projections: list[tuple[Tensor, Tensor]] = []
        self.columns = 0
        for number, (d_out, r) in enumerate(shapes):
            share = max(1, columns // len(shapes))
            right = min(r, math.isqrt(share))
            left = min(d_out, share // right)
            draw = generator(seed, "kronecker sketch", number)
            self._projections.append((_signs(d_out, left, draw).to(device), _signs(r, right, draw).to(device)))
            self.columns += left * right

    def rows(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[B, h]`` float32.

        Args:
            factors: Of each probe, delta ``[B, T, d_out]`` and a ``[B, T, r]``.
        """
        found = [
            ((delta @ left).transpose(1, 2) @ (a @ right)).flatten(1)
            for (delta, a), (left, right) in zip(factors, self._projections, strict=True)
        ]
        return torch.cat(found, dim=1)


def _signs(size: int, columns: int, draw: torch.Generator) -> Tensor:
    """``[size, columns]`` that keeps inner products in expectation."""
    if columns == size:
        return torch.eye(size)
    signs = torch.randint(2, (size, columns), generator=draw).float() * 2 - 1
    return signs.div(columns**0.5)
