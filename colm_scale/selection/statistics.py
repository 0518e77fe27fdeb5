"""What a run knows of each source from the examples that it has trained on: estimates that follow the training.

Only selected examples are seen. A uniform draw within the source (`stratified`) shows what the source is like; a
ranking that favours some examples shows those, unless its weights make up for it: an example counts for its weight
relative to the others that were selected of its source (the estimate of Hajek, 1971).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.records import Selection

MEMORY = 20
"""Steps over which an estimate reaches back."""
PRIOR = 4.0
"""A source's estimate begins at the average source's, which counts for so many examples: one that is seen rarely is not
left to noise, and is drawn back to the average while it is not seen."""
FIRST = 16
"""So many first examples of a source tell with what loss it began."""


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """Sums over the examples seen of each source, in float64 on the CPU. Part of a checkpoint.

    Attributes:
        recent: ``[Q, 2]`` number and losses; what a step has added fades by ``1 / MEMORY`` with each later one. The
            number is the bias correction of the averages.
        first: ``[Q, 2]`` number and losses of about the first `FIRST` examples.
    """

    recent: Tensor
    first: Tensor

    @classmethod
    def zeros(cls, num_sources: int) -> SourceStatistics:
        """Before the first step."""
        return cls(*(torch.zeros(num_sources, 2, dtype=torch.float64) for _ in range(2)))

    def learn(self, seen: Tensor) -> SourceStatistics:
        """After a step whose selected examples add up to ``seen``, columns as in ``recent``."""
        wanted = (FIRST - self.first[:, 0]).clamp(min=0)
        taken = (wanted / seen[:, 0]).clamp(max=1).nan_to_num(0)  # the share of this step's examples
        return SourceStatistics(
            recent=self.recent * (1 - 1 / MEMORY) + seen, first=self.first + seen * taken.unsqueeze(1)
        )

    @property
    def excess(self) -> Tensor:
        """``[Q]`` how much more of its first loss a source still has than the average source (0.5: half as much again;
        at least -1)."""
        counts, began = self.recent[:, 0], self.first[:, 1] / self.first[:, 0]
        left = _shrunk((self.recent[:, 1] / began).nan_to_num(0.0, posinf=0.0), counts)
        return (left / left.mean() - 1).nan_to_num(0.0)


def _shrunk(sums: Tensor, counts: Tensor) -> Tensor:
    """Means ``[Q]`` from sums over so many examples of each source, after `PRIOR` examples like the average one."""
    average = (sums.sum() / counts.sum()).nan_to_num(0.0)
    return (sums + PRIOR * average) / (counts + PRIOR)


def observation_weights(selection: Selection, sources: Tensor) -> Tensor:
    """``[n]`` float64: what each candidate counts for as an example of its source; 1 on average over the source's
    selected ones, 0 for a candidate that is not selected.

    Args:
        sources: ``[n]`` source of each candidate.
    """
    weights = torch.zeros(len(sources), dtype=torch.float64)
    weights[selection.positions] = selection.weights.double()
    selected = torch.bincount(sources[selection.positions], minlength=int(sources.max()) + 1)
    return weights * (selected / torch.bincount(sources, weights).clamp(min=1e-300))[sources]
