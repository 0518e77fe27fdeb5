"""What the selection has learned, as tensors: moments, sketches that still count, kept sources and coverage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from colm_scale.distributed.estimators import Estimator
from colm_scale.distributed.group import Group
from colm_scale.distributed.observer import Observer
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.recent import RecentSources

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file stem and name."""


class SelectionState:
    """Collects and puts back what an estimator (None where the method does not sketch) and an observer know."""

    def __init__(self, estimator: Estimator | None, observer: Observer, group: Group):
        self._estimator, self._observer, self._group = estimator, observer, group

    @property
    def kept(self) -> Tensor:
        """``[Q]`` bool, the sources that are kept in the next step."""
        return self._observer.recent.kept

    @property
    def moment_steps(self) -> int | None:
        """From how many steps the moments have learned."""
        return None if self._estimator is None else self._estimator.moments.step

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """All of it after ``step``; equal on every rank."""
        found = {"sources": self._sources()}
        if self._estimator is not None:
            found["moments"] = self._estimator.moments.tensors()
            if self._estimator.store is not None:
                found["sketches"] = self._estimator.store.state(step)
        return found

    def put_back(self, moment_steps: int | None, saved: Files | None) -> None:
        """Go on from what `tensors` has returned: ``saved`` on the first rank; the others pass None. All ranks call it
        together.

        Raises:
            KeyError: Something is not in it.
        """
        if self._estimator is not None:
            assert moment_steps is not None
            moments = self._estimator.moments
            of_moments = self._shared(moments.tensors(), None if saved is None else saved["moments"])
            self._estimator.moments = moments.with_tensors(of_moments, moment_steps)
            if self._estimator.store is not None:
                self._estimator.store.keep(**self._sketches(None if saved is None else saved["sketches"]))
        of_sources = self._shared(self._sources(), None if saved is None else saved["sources"])
        of_sources = {name: value.cpu() for name, value in of_sources.items()}
        self._observer.recent = RecentSources(kept=of_sources["kept"], seen=of_sources["seen"])
        self._observer.coverage = Coverage(of_sources["owed"])

    def _sources(self) -> dict[str, Tensor]:
        parts = [dataclasses.asdict(part) for part in (self._observer.recent, self._observer.coverage)]
        return {name: value for part in parts for name, value in part.items()}

    def _sketches(self, saved: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The first rank's on every rank; the others pass None."""
        count, columns = self._group.share_json(None if saved is None else [*saved["rows"].shape])
        shapes: dict[str, tuple[int, ...]] = {"ids": (count,), "steps": (count,), "rows": (count, columns)}
        shared = {}
        for name, shape in shapes.items():
            value = torch.zeros(shape, dtype=torch.float32 if name == "rows" else torch.int64)
            if saved is not None:
                value.copy_(saved[name])
            shared[name] = self._group.broadcast(value.to(self._group.device), "control").cpu()
        return shared

    def _shared(self, now: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What the first rank has ``saved``, on every rank's device; the others pass None, and ``now`` gives shapes."""
        shared = {}
        for name, value in now.items():
            value = (value if saved is None else saved[name]).to(self._group.device, value.dtype, copy=True)
            shared[name] = self._group.broadcast(value, "control")
        return shared
