"""A floor under what is trained of each source: at least this share of its candidates, over any stretch of steps.

A source is owed ``--selection.coverage_floor`` of an example for each of its candidates. What is owed and not trained
on is carried to the next step; what is trained on beyond it is no credit, so a source that had much at first cannot be
starved later. With ``c`` the floor, ``n_t`` a source's candidates of step ``t`` and ``x_t`` those trained on,

    owed_t = max(0, owed_{t-1} + c n_t - x_t)          (the recursion of a queue; Lindley, 1952)
    due_t  = min(n_t, floor(owed_{t-1} + c n_t))       what the step must train on

and over the steps of any stretch ``sum x >= c sum n - owed`` with ``owed`` that at its end, which is below 1 wherever
the budget had room for what was due. An epoch is such a stretch, in which every example is a candidate once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import SelectionConfig

_WHOLE = 1_000_000
"""An example, in the unit of what is owed: whole numbers, so that no rounding adds up."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What each source is owed after a step. A function of candidates and selections; part of a checkpoint.

    Attributes:
        owed: ``[Q]`` int64, millionths of an example.
    """

    owed: Tensor

    @classmethod
    def beginning(cls, num_sources: int) -> Coverage:
        """Before the first step."""
        return cls(torch.zeros(num_sources, dtype=torch.int64))

    def due(self, sources: Tensor, config: SelectionConfig) -> Tensor:
        """``[Q]`` how many of each source a step with candidates of these ``sources`` ``[n]`` must train on."""
        present = torch.bincount(sources, minlength=len(self.owed))
        return torch.minimum((self.owed + _rate(config) * present) // _WHOLE, present)

    def after(self, sources: Tensor, trained: Tensor, config: SelectionConfig) -> Coverage:
        """After a step with candidates of these ``sources`` ``[n]``, of which those at positions ``trained`` were."""
        present, used = (torch.bincount(of, minlength=len(self.owed)) for of in (sources, sources[trained]))
        return Coverage((self.owed + _rate(config) * present - _WHOLE * used).clamp(min=0))

    @property
    def examples_owed(self) -> int:
        """Whole examples that all sources together are owed; 0 as long as the floor holds."""
        return int((self.owed // _WHOLE).sum())


def _rate(config: SelectionConfig) -> int:
    return round(config.coverage_floor * _WHOLE)
