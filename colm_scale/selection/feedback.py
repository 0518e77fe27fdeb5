"""Error feedback: the picks of a step make up for the errors of the picks before it.

The subset with the nearest mean is of the same kind in every step: it passes over long gradients, for instance. What
its mean lacks in every step, training lacks altogether, while the errors of a random draw cancel. Training moves by
the sum of the steps, so that is whose error should be small: the next picks are to bring what earlier ones have
deviated back to zero. This is herding (Welling 2009) over steps instead of within one, and the error feedback of
compressed gradients (Seide et al. 2014; Karimireddy et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.records import CandidateMatrix, Selection

_MEMORY = 0.98
"""Share of the deviations that remains after a step. With 0.9 a pretrained model ended at a higher loss (one seed), and
with 1 the picks of a step are farther from their own mean (benchmarks/README.md)."""


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What the picks have deviated so far. Part of a checkpoint; equal on every rank.

    Attributes:
        deviations: ``[Q, h]`` float64, of each source the sum over the steps of ``w_i (x_i - mean)``, with the row and
            the weight of a pick and the mean row of the candidates; each step leaves 0.98 of it. Without columns:
            nothing is fed back.
    """

    deviations: Tensor

    @classmethod
    def beginning(cls, num_sources: int, columns: int) -> ErrorFeedback:
        """Start with no errors."""
        return cls(torch.zeros(num_sources, columns, dtype=torch.float64))

    def of(self, source: int, columns: int) -> Tensor:
        """``[columns]`` the deviations of one source; zeros if nothing is fed back."""
        return self.deviations[source] if self.deviations.numel() else torch.zeros(columns, dtype=torch.float64)

    def after(self, matrix: CandidateMatrix, sources: Tensor, selection: Selection) -> ErrorFeedback:
        """Account for a step with candidates of these ``sources`` ``[n]``."""
        if not self.deviations.numel():
            return self
        if not len(matrix.positions):
            return ErrorFeedback(_MEMORY * self.deviations)
        weights = torch.zeros(len(sources), dtype=torch.float64)
        weights[selection.picked] = selection.weights[selection.kept :].double()
        of_row = sources[matrix.positions[matrix.valid]]
        rows, weights = matrix.rows[matrix.valid].double(), weights[matrix.positions[matrix.valid]]
        counts = torch.bincount(of_row, minlength=len(self.deviations)).clamp(min=1)
        per_row = torch.bincount(of_row, weights, minlength=len(counts)) / counts
        surplus = weights - per_row[of_row]  # of each row, over the weight that it has in the mean
        return ErrorFeedback(_MEMORY * self.deviations.index_add(0, of_row, surplus.unsqueeze(1) * rows))


NO_FEEDBACK = ErrorFeedback.beginning(0, 0)
"""Of a selection that stands alone."""
