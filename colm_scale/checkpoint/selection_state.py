"""The state of the selection as tensors: moments, sketches for reuse, kept sources, coverage and error feedback."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.estimators.base import Estimator
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.feedback import ErrorFeedback
from colm_scale.selection.quota import RecentSources
from colm_scale.step.source_state import SourceState

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file stem and name."""


class SelectionState:
    """Collects and restores the state of the estimator and of the sources."""

    def __init__(self, estimator: Estimator, sources: SourceState, group: Group):
        self._estimator, self._known, self._group = estimator, sources, group

    @property
    def moment_steps(self) -> int:
        """Number of steps from which the moments have learned."""
        return self._estimator.moments.step

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Return the state after ``step``; equal on every rank."""
        found = {"sources": self._sources(), "moments": self._estimator.moments.tensors()}
        found["sketches"] = self._estimator.store.state(step)
        return {name: tensors for name, tensors in found.items() if tensors}

    def put_back(self, moment_steps: int, saved: Files) -> None:
        """Restore what `tensors` returned. All ranks call it together; only rank 0's ``saved`` counts.

        Raises:
            KeyError: Something is missing.
        """
        moments = self._estimator.moments
        if shapes := moments.tensors():
            self._estimator.moments = moments.with_tensors(self._shared("moments", shapes, saved), moment_steps)
        if self._estimator.store.entries:
            count, columns = self._group.share_json([*saved["sketches"]["rows"].shape] if self._group.is_first else [])
            numbers = torch.zeros(count, dtype=torch.int64)
            shapes = {"ids": numbers, "steps": numbers, "rows": torch.zeros(count, columns)}
            sketches = self._shared("sketches", shapes, saved)
            self._estimator.store.add(**{name: value.cpu() for name, value in sketches.items()})
        of_sources = self._shared("sources", self._sources(), saved)
        of_sources = {name: value.cpu() for name, value in of_sources.items()}
        self._known.recent = RecentSources(kept=of_sources["kept"], seen=of_sources["seen"])
        self._known.coverage = Coverage(of_sources["owed"])
        self._known.feedback = ErrorFeedback(of_sources["deviations"])

    def _sources(self) -> dict[str, Tensor]:
        parts = [dataclasses.asdict(part) for part in (self._known.recent, self._known.coverage, self._known.feedback)]
        return {name: value for part in parts for name, value in part.items()}

    def _shared(self, file: str, shapes: Mapping[str, Tensor], saved: Files) -> dict[str, Tensor]:
        """Return rank 0's tensors of a ``file`` on every rank's device, in the shapes and types of ``shapes``."""
        shared = {}
        for name, like in shapes.items():
            value = saved[file][name] if self._group.is_first else like
            value = value.to(self._group.device, like.dtype, copy=True)
            shared[name] = self._group.broadcast(value, "control")
        return shared
