"""The exponential averages that turn a sketch into the update Adam would make of it (DESIGN 2.3, step 3)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Adam's first and second moment of the probe tensor's gradient, as the selection keeps them. Part of a checkpoint.

    Attributes:
        first: ``[d]`` m.
        second: ``[d]`` v.
        step: How many steps have been learned from; the bias correction counts them.
        betas: Decay rates of m and v.
        epsilon: What keeps the division by sqrt(v) finite.
    """

    first: Tensor
    second: Tensor
    step: int
    betas: tuple[float, float]
    epsilon: float

    @classmethod
    def zeros(cls, d: int, betas: tuple[float, float], epsilon: float, device: torch.device | str = "cpu") -> Moments:
        """Before the first step, in float32."""
        return cls(torch.zeros(d, device=device), torch.zeros(d, device=device), 0, betas, epsilon)

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """The update ``u`` that each row's gradient alone would cause.

        Args:
            rows: ``[*, c]`` gradients.
            columns: Which of the d entries the rows' columns are: ``[c]``, or the shape of ``rows`` where each row has
                its own; all of them by default.

        Returns:
            The shape of ``rows``.
        """
        first, second = self._advance(rows, rows.square(), slice(None) if columns is None else columns)
        beta1, beta2 = self.betas
        steps = self.step + 1
        return first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt() + self.epsilon)

    def learn(self, mean: Tensor, mean_square: Tensor) -> Moments:
        """The moments after a step: the mean over its picked (not kept) rows of what each row's own would be.

        Args:
            mean: ``[d]`` mean gradient of the picked rows.
            mean_square: ``[d]`` mean of its entries' squares.
        """
        first, second = self._advance(mean, mean_square, slice(None))
        return dataclasses.replace(self, first=first, second=second, step=self.step + 1)

    def skip(self) -> Moments:
        """The moments after a step that picked nothing: the same, and the bias correction does not count the step.

        The published rule is a mean over picked rows and so says nothing here. A decay towards zero would be a
        gradient that nobody measured.
        """
        return self

    def _advance(self, gradient: Tensor, square: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        first = beta1 * self.first[columns] + (1 - beta1) * gradient
        second = beta2 * self.second[columns] + (1 - beta2) * square
        return first, second
