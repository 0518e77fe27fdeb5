"""What the selection has learned, as tensors: moments, sketches that still count, kept sources and coverage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Estimator
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.kept_sources import RecentSources
from colm_scale.step.source_state import SourceState

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file stem and name."""


class SelectionState:
    """Collects and puts back what the estimator has learned and what is known of the sources."""

    def __init__(self, estimator: Estimator, sources: SourceState, group: Group):
        self._estimator, self._known, self._group = estimator, sources, group

    @property
    def moment_steps(self) -> int:
        """From how many steps the moments have learned."""
        return self._estimator.moments.step

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """All of it after ``step``; equal on every rank."""
        found = {"sources": self._sources(), "moments": self._estimator.moments.tensors()}
        found["sketches"] = self._estimator.store.state(step)
        return {name: tensors for name, tensors in found.items() if tensors}

    def put_back(self, moment_steps: int, saved: Files | None) -> None:
        """Go on from what `tensors` has returned: ``saved`` on the first rank; the others pass None. All ranks call it
        together.

        Raises:
            KeyError: Something is not in it.
        """
        moments = self._estimator.moments
        if moments.tensors():
            of_moments = self._shared(moments.tensors(), None if saved is None else saved["moments"])
            self._estimator.moments = moments.with_tensors(of_moments, moment_steps)
        if self._estimator.store.entries:
            self._estimator.store.add(**self._sketches(None if saved is None else saved["sketches"]))
        of_sources = self._shared(self._sources(), None if saved is None else saved["sources"])
        of_sources = {name: value.cpu() for name, value in of_sources.items()}
        self._known.recent = RecentSources(kept=of_sources["kept"], seen=of_sources["seen"])
        self._known.coverage = Coverage(of_sources["owed"])

    def _sources(self) -> dict[str, Tensor]:
        parts = [dataclasses.asdict(part) for part in (self._known.recent, self._known.coverage)]
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
