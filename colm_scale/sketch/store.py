"""What was found out about examples in earlier steps, for the next time that they are candidates.

The store is equal on every rank, for what it keeps has been gathered: it needs no exchange of its own.

    e  entries, at most     c  numbers per candidate, those that `Estimator.exchange` returns
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.records import long_tensor


class SketchStore:
    """The last `e` rows that were computed, by example: a ring in which the newest take the place of the oldest.

    It is on the CPU and holds `4 c + 16` bytes an entry on each rank, besides some hundred of an index. Part of a
    checkpoint.

    Args:
        reuse: Most steps for which a row counts; one that was made in step t can still be used in step `t + reuse`.
        entries: How many rows there is room for. With `reuse` times the candidates of a step, or as many as there are
            examples, none that counts has to give way.
    """

    def __init__(self, reuse: int, entries: int):
        self._reuse = reuse
        self._ids = torch.full((entries,), -1, dtype=torch.int64)
        self._steps = torch.zeros(entries, dtype=torch.int64)
        self._rows = torch.zeros(entries, 0)
        self._places: dict[int, int] = {}
        self._next = 0

    def find(self, ids: Tensor, step: int) -> Tensor:
        """``[n]`` int64 where each example's row is, -1 where there is none that counts in ``step``."""
        places = long_tensor([self._places.get(id_, -1) for id_ in ids.tolist()])
        return torch.where((places >= 0) & (step - self._steps[places] <= self._reuse), places, -1)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """``[k, c]`` float32 rows and ``[k]`` int64 steps in which they were made, at ``[k]`` places."""
        return self._rows[places], self._steps[places]

    def keep(self, ids: Tensor, steps: Tensor, rows: Tensor) -> None:
        """Add the rows ``[k, c]`` of examples ``[k]`` that were made in ``[k]`` steps, the oldest first. Of an example
        with several rows the last one counts."""
        last = long_tensor([*dict(zip(ids.tolist(), range(len(ids)))).values()])
        ids, steps, rows = ids[last], steps[last], rows[last]
        if self._rows.shape[1] != rows.shape[1]:
            self._rows = torch.zeros(len(self._ids), rows.shape[1])
        places = (self._next + torch.arange(len(ids))) % len(self._ids)
        for place, old, new in zip(places.tolist(), self._ids[places].tolist(), ids.tolist()):
            if self._places.get(old) == place:
                del self._places[old]
            self._places[new] = place
        self._ids[places], self._steps[places], self._rows[places] = ids, steps, rows
        self._next = (self._next + len(ids)) % len(self._ids)

    def state(self, step: int) -> dict[str, Tensor]:
        """What counts after ``step``, as `keep` takes it."""
        places = long_tensor([*self._places.values()])
        places = places[self._steps[places] > step - self._reuse]
        places = places[self._steps[places].argsort(stable=True)]
        return {"ids": self._ids[places], "steps": self._steps[places], "rows": self._rows[places]}
