"""A run from its configuration to its first step: check everything, load, and put the parts together.

Whatever can be wrong with the input is found out in the order of what it costs: options, files, tokens, model.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from colm_scale.checkpoint.identity import check_same_run, config_facts, model_digest
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import Checkpoint, CheckpointFolder
from colm_scale.config import RunConfig, as_yaml
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.engines.base import Engine
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.engines.shards import held_bytes
from colm_scale.modeling.optimizers import default_learning_rate
from colm_scale.profiling.memory import MemoryMeter, memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.records import Json
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.run.assemble import build_model, build_step
from colm_scale.run.banner import resumed_facts, run_facts, written_down
from colm_scale.run.evaluate import HeldOutEvaluator, NoEvaluator
from colm_scale.run.inputs import Inputs, read_inputs
from colm_scale.run.reports import NoReports, WrittenReports
from colm_scale.run.schedule import total_steps
from colm_scale.run.session import Session
from colm_scale.selection.quota import kept_sources
from colm_scale.step.step import CoresetStep

Evaluator = HeldOutEvaluator | NoEvaluator


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that could make its next step.

    Attributes:
        directory: Of the first rank, where nothing is written yet; None elsewhere.
        found: The checkpoint to go on from, if there is one, on the first rank.
        identity: What makes this run this run, see `checkpoint.identity`.
        small: ``[Q]`` bool, the sources that are reported as small.
        steps: Of the whole run.
    """

    config: RunConfig
    group: Group
    watch: Watch
    directory: RunDirectory | None
    found: Checkpoint | None
    identity: dict[str, object]
    inputs: Inputs
    small: Tensor
    engine: Engine
    meter: MemoryMeter
    step: CoresetStep
    evaluator: Evaluator
    steps: int

    def session(self, *, writes: bool = True) -> Session:
        """Its reports; without ``writes`` they go nowhere."""
        reports: WrittenReports | NoReports = NoReports()
        if writes and self.directory is not None:
            reports = WrittenReports(self.config, self.directory, self.inputs, self.small, self.meter)
        return Session(self.engine, self.evaluator, reports, self.group)

    def state(self, session: Session) -> RunState:
        """The parts of it that change."""
        directory, keep = self.directory, self.config.checkpoint.keep
        return RunState(
            folder=None if directory is None else CheckpointFolder(directory.checkpoints, keep),
            identity=self.identity,
            facts=self.written_down(),
            step=self.step,
            session=session,
            group=self.group,
        )

    def facts(self, done: int) -> list[str]:
        """Lines printed before the first step after ``done``."""
        facts = run_facts(self.config, self.inputs, self.engine, self.evaluator, self.group)
        return [*facts, *resumed_facts(self.found, done)]

    def written_down(self) -> dict[str, object]:
        """Facts for ``run.json`` and checkpoints."""
        return written_down(self.config, self.inputs, self.steps)

    def claim(self, done: int) -> None:
        """Write the files that say what runs, once it is known that it can. All ranks call it together."""
        group = self.group
        own_bytes = torch.tensor([held_bytes(self.engine.module)], device=group.device)
        held = group.all_gather(own_bytes, "control").flatten().tolist()
        with group.together():
            if self.directory is not None:
                meter = self.meter
                own = {"device_name": meter.device_name, "memory": meter.label, "weight_bytes_by_rank": held}
                found = environment(group.device, group.world_size, self.engine.name, **own)
                self.directory.create(as_yaml(self.config), found, done, self.written_down())
                if self.config.audit and not self.config.data.streaming:
                    self.directory.examples(self.inputs.sampler.examples)


def resolve(config: RunConfig) -> RunConfig:
    """With presets and defaults that depend on other options written out."""
    train, output_dir = config.train, config.output_dir
    if train.learning_rate is None:
        rate = default_learning_rate(train.optimizer, builtin=config.model.name is None)
        train = dataclasses.replace(train, learning_rate=rate)
    if output_dir is None and config.resume != "none":
        output_dir = str(_run_of(Path(config.resume)))
    return dataclasses.replace(config, train=train, selection=config.selection.resolved(), output_dir=output_dir)


def _run_of(resumed: Path) -> Path:
    """The folder of the run that a checkpoint (or the run itself) is in."""
    return resumed.parent.parent if resumed.absolute().parent.name == "checkpoints" else resumed


def prepare(config: RunConfig, group: Group, watch: Watch) -> Prepared:
    """Everything up to the first step; nothing is written. All ranks call it together."""
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // group.local_world_size))
    directory, found = _open_directory(config, group)
    inputs = read_inputs(config, group)
    identity: Json = {"config": config_facts(config), "data": inputs.digest}
    _check_resumable(found, identity, group)
    module, tap = build_model(config, loading_device(config, inputs.ds_config, group), group)
    identity["model"] = model_digest(module)
    group.agree(identity["model"], "weights of the base model")
    engine = make_engine(config, inputs.ds_config, module, group)
    meter = memory_meter(group.device)
    small = kept_sources(inputs.sizes, inputs.source_names, None)
    evaluator = _evaluator(config, inputs, small, group, watch)
    return Prepared(
        config=config,
        group=group,
        watch=watch,
        directory=directory,
        found=found,
        identity=identity,
        inputs=inputs,
        small=small,
        engine=engine,
        meter=meter,
        step=build_step(config, inputs, engine, tap, Spans(group.device, meter, watch.enter), group),
        evaluator=evaluator,
        steps=total_steps(config, int(inputs.sizes.sum())),
    )


def _open_directory(config: RunConfig, group: Group) -> tuple[RunDirectory | None, Checkpoint | None]:
    """Rank 0's run directory, checked before anything is computed, and the checkpoint to go on from."""
    with group.together():
        if not group.is_first:
            return None, None
        directory = RunDirectory(config.output_dir, resume=config.resume != "none")
        match config.resume:
            case "none":
                return directory, None
            case "auto":
                folder = CheckpointFolder(directory.checkpoints, config.checkpoint.keep)
                return directory, folder.newest(config.checkpoint.fallback)
            case path:
                return directory, CheckpointFolder.read(Path(path))


def _check_resumable(found: Checkpoint | None, identity: dict[str, object], group: Group) -> None:
    """Refuse a checkpoint of other options or other data before models are loaded, whose digests come later."""
    with group.together():
        if found is not None:
            stored = found.state["run"]
            check_same_run(stored, {**stored, **identity}, found.path)


def _evaluator(config: RunConfig, inputs: Inputs, small: Tensor, group: Group, watch: Watch) -> Evaluator:
    if inputs.eval is None:
        return NoEvaluator()
    return HeldOutEvaluator(
        inputs.eval,
        inputs.sizes,
        small,
        inputs.tokenizer,
        config.eval,
        group,
        config.train.micro_batch_tokens,
        config.train.seed,
        watch.enter,
    )
