"""The state of a run: collected from all ranks and saved, then restored on all ranks.

It does not depend on the number of ranks or on sharding, so a run can resume with another engine and world size. Random
draws are functions of seed and purpose (`colm_scale.randomness`) and the learning rate is a function of the step, so
neither needs a state here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from colm_scale import __version__
from colm_scale.checkpoint.background import Snapshot, Writer
from colm_scale.checkpoint.files import NO_CHECKPOINT, Checkpoint
from colm_scale.checkpoint.identity import check_same_run
from colm_scale.checkpoint.selection_state import SelectionState
from colm_scale.distributed.group import Group
from colm_scale.engines.base import LossScale
from colm_scale.engines.tensors import collect, landing, restore, to_host
from colm_scale.errors import UserError
from colm_scale.records import Json
from colm_scale.reporting.run_directory import finite
from colm_scale.step.step import CoresetStep


class Counters(Protocol):
    """Counts and results of a run so far."""

    def state(self) -> Json: ...

    def load(self, state: Json) -> None: ...


class RunState:
    """Saves and restores the parts of a run that change.

    Args:
        writer: Writes the checkpoints, on rank 0.
        identity: Options and digests that make two runs the same run, see `checkpoint.identity`.
        facts: Saved for people: source table, schedule.
        step: The parts that make the steps: sampler, selection, engine.
        session: What was counted and evaluated.
    """

    def __init__(
        self,
        writer: Writer,
        identity: Mapping[str, object],
        facts: Mapping[str, object],
        step: CoresetStep,
        session: Counters,
        group: Group,
    ):
        self._writer, self._identity, self._facts = writer, identity, facts
        self._sampler, self._engine, self._session, self._group = step.sampler, step.train.engine, session, group
        self._refresh, self._sources = step.refresh, step.select.sources
        self._selection = SelectionState(step.select.sketch.estimator, self._sources, group)

    def save(self, step: int) -> None:
        """Copy the state after a step on rank 0, and begin to write it as a checkpoint. All ranks call it together.

        Raises:
            TrainingError: On rank 0: the checkpoint before could not be written.
        """
        self.wait()
        started = time.perf_counter()
        tensors: dict[str, Mapping[str, Tensor]] = {**collect(self._engine, self._group)}
        if self._group.is_first:
            others = self._selection.tensors(step)
            if clusters := self._refresh.state():
                others["clusters"] = clusters
            for file, named in others.items():
                tensors[file] = {name: to_host(tensor) for name, tensor in named.items()}
            state = finite(self._state(step))
            assert isinstance(state, dict)
            self._writer.begin(Snapshot(step, state, tensors, started, landing(self._group.device)))

    def wait(self) -> None:
        """Wait until the last checkpoint is written. All ranks call it together.

        Raises:
            TrainingError: On rank 0: it could not be.
        """
        with self._group.together():
            self._writer.wait()

    def load(self, found: Checkpoint) -> int:
        """Restore rank 0's checkpoint ``found``; other ranks pass `NO_CHECKPOINT`. All ranks call it together.

        Returns:
            The last step that is done; 0 without a checkpoint.

        Raises:
            UserError: It belongs to another run (on rank 0) or another version.
        """
        with self._group.together():
            if found is not NO_CHECKPOINT:
                check_same_run(found.state["run"], dict(self._identity), found.path)
        plain = {} if found is NO_CHECKPOINT else found.state | {"path": str(found.path)}
        state: Json = self._group.share_json(plain)
        if not state:
            return 0
        try:
            self._put_back(state, found)
        except (KeyError, TypeError) as error:
            version = state.get("written_by", {}).get("colm_scale")
            raise UserError(
                f"checkpoint {state['path']} was written by colm_scale {version}, which saved other things ({error}): "
                f"resume with that version"
            ) from None
        return int(state["step"])

    def _put_back(self, state: Json, found: Checkpoint) -> None:
        restore(self._engine, found.tensors, self._group)
        self._engine.updates = state["updates"]
        self._engine.scale = LossScale(**state["loss_scale"])
        self._selection.put_back(state["moment_steps"], found.tensors)
        self._refresh.load(found.tensors.get("clusters"), self._sources)
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
