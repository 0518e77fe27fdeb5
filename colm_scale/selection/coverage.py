"""The coverage floor: the share of each source's candidates that is trained on, over any stretch of steps.

A source is owed ``--selection.coverage_floor`` of an example for each of its candidates. A shortfall is carried to the
next step. A surplus gives no credit, so a source that had much at first cannot be starved later. With ``c`` the floor,
``n_t`` a source's candidates in step ``t`` and ``x_t`` those trained on,

    owed_t = max(0, owed_{t-1} + c n_t - x_t)          (the recursion of a queue; Lindley, 1952)
    due_t  = min(n_t, floor(owed_{t-1} + c n_t))       examples that the step must train on

and over any stretch of steps ``sum x >= c sum n - owed``, with ``owed`` taken at its end; it is below 1 if the budget
had room for all that was due. An epoch is such a stretch, with every example a candidate once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig

_WHOLE = 1_000_000
"""One example in the integer unit of `Coverage.owed`; integers accumulate no rounding."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Examples owed to each source after a step. Part of a checkpoint.

    Attributes:
        owed: ``[Q]`` int64, millionths of an example.
    """

    owed: Tensor

    @classmethod
    def beginning(cls, num_sources: int) -> Coverage:
        """Start with nothing owed."""
        return cls(torch.zeros(num_sources, dtype=torch.int64))

    def due(self, sources: Tensor, config: SelectionConfig) -> Tensor:
        """Count the candidates ``[Q]`` of each source that a step with these ``sources`` ``[n]`` must train on."""
        present = torch.bincount(sources, minlength=len(self.owed))
        return torch.minimum((self.owed + _rate(config) * present) // _WHOLE, present)

    def after(self, sources: Tensor, trained: Tensor, config: SelectionConfig) -> Coverage:
        """Update for a step with candidates of these ``sources`` ``[n]`` that trained on the positions ``trained``."""
        present, used = (torch.bincount(of, minlength=len(self.owed)) for of in (sources, sources[trained]))
        return Coverage((self.owed + _rate(config) * present - _WHOLE * used).clamp(min=0))

    @property
    def examples_owed(self) -> int:
        """Whole examples owed to all sources together; 0 as long as the floor holds."""
        return int((self.owed // _WHOLE).sum())


def _rate(config: SelectionConfig) -> int:
    return round(config.coverage_floor * _WHOLE)
