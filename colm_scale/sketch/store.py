"""Sketches from earlier steps, for sketch reuse.

The rows have been gathered before they are stored, so the store is equal on every rank without an exchange.

    e  entries, at most     c  numbers per candidate, those that `Estimator.exchange` returns
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import last_of_each

_NOBODY = torch.iinfo(torch.int64).min
"""The id of an empty entry."""


class SketchStore:
    """The last `e` rows by example: a ring buffer on the CPU, `4 c + 16` bytes per entry plus an index.

    Args:
        reuse: Steps for which a row is valid: a row from step t can be used until step `t + reuse`.
        entries: Number of rows. With `reuse` times the candidates of a step, or the number of examples if that is
            smaller, no valid row is overwritten.
    """

    def __init__(self, reuse: int, entries: int):
        self._reuse = reuse
        self._ids = torch.full((entries,), _NOBODY, dtype=torch.int64)
        self._steps = torch.zeros(entries, dtype=torch.int64)
        self._rows = torch.zeros(entries, 0)
        self._sorted, self._order = self._ids.sort()
        self._next = 0

    @property
    def entries(self) -> int:
        return len(self._ids)

    def find(self, ids: Tensor, step: int) -> Tensor:
        """``[n]`` int64 place of each example's row, -1 if there is none or it is not valid in ``step``."""
        places = self._places(ids)
        return torch.where((places >= 0) & (step - self._steps[places] <= self._reuse), places, -1)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """``[k, c]`` float32 rows, and the ``[k]`` int64 steps they were made in, at ``[k]`` places."""
        return self._rows[places], self._steps[places]

    def add(self, ids: Tensor, steps: Tensor, rows: Tensor) -> None:
        """Add rows ``[k, c]`` of examples ``[k]``, made in steps ``[k]``, the oldest first. The last row of an example
        replaces its others."""
        last = last_of_each(ids)
        ids, steps, rows = ids[last], steps[last], rows[last]
        if self._rows.shape[1] != rows.shape[1]:
            self._rows = torch.zeros(len(self._ids), rows.shape[1])
        places = (self._next + torch.arange(len(ids))) % len(self._ids)
        replaced = self._places(ids)
        self._ids[replaced[replaced >= 0]] = _NOBODY
        self._ids[places], self._steps[places], self._rows[places] = ids, steps, rows
        self._sorted, self._order = self._ids.sort()
        self._next = (self._next + len(ids)) % len(self._ids)

    def state(self, step: int) -> dict[str, Tensor]:
        """The rows valid after ``step``, as the arguments of `add`."""
        places = ((self._ids != _NOBODY) & (self._steps > step - self._reuse)).nonzero().flatten()
        places = places[self._steps[places].argsort(stable=True)]
        return {"ids": self._ids[places], "steps": self._steps[places], "rows": self._rows[places]}

    def _places(self, ids: Tensor) -> Tensor:
        """``[n]`` int64 place of each example's row, -1 if there is none."""
        places = self._order[torch.searchsorted(self._sorted, ids).clamp(max=self.entries - 1)]
        return torch.where(self._ids[places] == ids, places, -1)


class NoSketchStore(SketchStore):
    """Stores nothing, for a run without sketch reuse."""

    def __init__(self) -> None:
        super().__init__(reuse=0, entries=0)

    def state(self, step: int) -> dict[str, Tensor]:
        return {}
