"""What a run would lose if it were killed: collected from all ranks and saved, and given back to them.

Nothing of it depends on how many ranks there are or on what shards the model, so a run can go on under another engine
and world size. What a run draws at random is a function of its seed and of what it is drawn for
(`colm_scale.randomness`), and the learning rate is a function of the step: neither has a state beyond the numbers
written down here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from colm_scale import __version__
from colm_scale.checkpoint.identity import check_same_run
from colm_scale.checkpoint.selection_state import SelectionState
from colm_scale.checkpoint.store import Checkpoint, CheckpointFolder
from colm_scale.distributed.group import Group
from colm_scale.engines.base import LossScale, collect, restore
from colm_scale.errors import UserError
from colm_scale.records import Json
from colm_scale.reporting.run_directory import finite
from colm_scale.step.step import CoresetStep


class Counters(Protocol):
    """What a run has counted and found so far."""

    def state(self) -> Json: ...

    def load(self, state: Json) -> None: ...


class RunState:
    """The parts of a run that change, and the folder that keeps them.

    Args:
        folder: On the first rank; None elsewhere, or if the run keeps no checkpoints.
        identity: What makes this run this run, see `checkpoint.identity`.
        facts: Written down for people: source table, schedule.
        step: The parts that make the steps: sampler, selection, engine.
        session: What was counted and evaluated.
    """

    def __init__(
        self,
        folder: CheckpointFolder | None,
        identity: Mapping[str, object],
        facts: Mapping[str, object],
        step: CoresetStep,
        session: Counters,
        group: Group,
    ):
        self._folder, self._identity, self._facts = folder, identity, facts
        self._sampler, self._engine, self._session, self._group = step.sampler, step.train.engine, session, group
        self._refresh, self._sources = step.refresh, step.select.sources
        self._selection = SelectionState(step.select.sketch.estimator, self._sources, group)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step. All ranks call it together.

        Raises:
            TrainingError: On the first rank: it cannot be written.
        """
        tensors = collect(self._engine, keep=self._group.is_first) | self._selection.tensors(step)
        if clusters := self._refresh.state():
            tensors["clusters"] = clusters
        with self._group.together():
            if self._folder is not None:
                state = finite(self._state(step))
                assert isinstance(state, dict)
                self._folder.write(step, state, tensors)

    def load(self, found: Checkpoint | None) -> int:
        """Put back what ``found``, on the first rank, holds. All ranks call it together.

        Returns:
            The step after which the run goes on; 0 without a checkpoint.

        Raises:
            UserError: It is another run's (on the first rank), or another version's.
        """
        with self._group.together():
            if found is not None:
                check_same_run(found.state["run"], dict(self._identity), found.path)
        state: Json | None = self._group.share_json(None if found is None else found.state | {"path": str(found.path)})
        if state is None:
            return 0
        try:
            self._put_back(state, found)
        except (KeyError, TypeError) as error:
            version = state.get("written_by", {}).get("colm_scale")
            raise UserError(
                f"checkpoint {state['path']} was written by colm_scale {version}, which kept other things ({error}): "
                f"go on with that version"
            ) from None
        return int(state["step"])

    def _put_back(self, state: Json, found: Checkpoint | None) -> None:
        restore(self._engine, {} if found is None else found.tensors, self._group)
        self._engine.updates = state["updates"]
        self._engine.scale = LossScale(**state["loss_scale"])
        self._selection.put_back(state["moment_steps"], None if found is None else found.tensors)
        self._refresh.load(None if found is None else found.tensors.get("clusters"), self._sources)
        self._sampler.load(state["sampler"])
        self._session.load(state["session"])

    def _state(self, step: int) -> Json:
        return {
            "step": step,
            "run": dict(self._identity),
            "updates": self._engine.updates,
            "loss_scale": dataclasses.asdict(self._engine.scale),
            "moment_steps": self._selection.moment_steps,
            "sampler": self._sampler.state(),
            "session": self._session.state(),
            **self._facts,
            "written_by": {
                "colm_scale": __version__,
                "torch": torch.__version__,
                "engine": self._engine.name,
                "ranks": self._group.world_size,
            },
        }
