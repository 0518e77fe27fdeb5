"""Preparation of a run, from its configuration to its first step: check, load, and assemble the parts.

Input is checked in the order of cost: options, files, tokens, model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from colm_scale.checkpoint.background import BackgroundWriter, Writer
from colm_scale.checkpoint.files import NO_CHECKPOINT, Checkpoint
from colm_scale.checkpoint.identity import check_same_run, config_facts, model_digest
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import RunConfig
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.engines.base import Engine
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.engines.tensors import held_bytes
from colm_scale.modeling.optimizers import default_learning_rate
from colm_scale.modeling.weights import WHOLE
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans, StartClock
from colm_scale.records import Json
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.run.assemble import build_model, build_step
from colm_scale.run.banner import resumed_lines, run_lines, start_line
from colm_scale.run.evaluate import Evaluator, HeldOut, HeldOutEvaluator, NoEvaluator
from colm_scale.run.inputs import Inputs, read_inputs
from colm_scale.run.reports import Reports, WrittenReports
from colm_scale.run.schedule import total_steps
from colm_scale.run.session import Session
from colm_scale.selection.quota import kept_sources
from colm_scale.step.step import CoresetStep


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready for its next step.

    Attributes:
        writer: Writes the checkpoints, on rank 0.
        found: The checkpoint to resume from, on rank 0.
        reports: Nothing is written yet.
        identity: Options and digests that make two runs the same run, see `checkpoint.identity`.
        steps: Of the whole run.
        clock: Of this rank's start: ``process`` (imports, connecting the ranks), ``data``, ``model``, ``trials``,
            ``engine``, and ``other`` when the run is ready.
    """

    config: RunConfig
    group: Group
    watch: Watch
    writer: Writer
    found: Checkpoint
    reports: Reports
    identity: Json
    inputs: Inputs
    engine: Engine
    step: CoresetStep
    evaluator: Evaluator
    steps: int
    clock: StartClock

    def state(self, session: Session) -> RunState:
        """Collect the parts that change."""
        return RunState(self.writer, self.identity, self.facts(), self.step, session, self.group)

    def lines(self, done: int) -> list[str]:
        """Return the lines printed before the first step after ``done``."""
        lines = run_lines(self.config, self.inputs, self.engine, self.evaluator, self.group)
        lines.append(start_line(self.clock.seconds))
        if why := self.step.train.inputs.absent_because:
            lines.append(f"forward reuse is off: {why}")
        return [*lines, *resumed_lines(self.found, done)]

    def facts(self) -> Json:
        """Return what ``run.json`` and checkpoints say about the run."""
        train = self.config.train
        return {
            "schedule": {"steps": self.steps, "learning_rate": train.learning_rate, "kind": train.schedule},
            "random": {"seed": train.seed, "draws": "functions of seed, purpose and index"},
            "sources": self.inputs.source_table,
            "rows_digest": self.inputs.rows_digest,
        }

    def claim(self, done: int) -> None:
        """Write the files that describe the run, once it is ready. All ranks call it together."""
        own_bytes = torch.tensor([held_bytes(self.engine.module)], device=self.group.device)
        held = self.group.all_gather(own_bytes, "control").flatten().tolist()
        self.clock("other")
        found: Json = {"weight_bytes_by_rank": held, "start_seconds": self.clock.seconds}
        with self.group.together():
            self.reports.claim(self.engine, self.group, found, done, self.facts())


def resolve(config: RunConfig) -> RunConfig:
    """Fill in presets and the defaults that depend on other options."""
    train, output_dir = config.train, config.output_dir
    if train.learning_rate is None:
        rate = default_learning_rate(train.optimizer, builtin=config.model.name is None)
        train = dataclasses.replace(train, learning_rate=rate)
    if output_dir is None and config.resume != "none":
        output_dir = str(_run_of(Path(config.resume)))
    return dataclasses.replace(config, train=train, selection=config.selection.resolved(), output_dir=output_dir)


def _run_of(resumed: Path) -> Path:
    """Return the run directory of a checkpoint, or the directory itself."""
    return resumed.parent.parent if resumed.absolute().parent.name == "checkpoints" else resumed


def prepare(config: RunConfig, group: Group, watch: Watch) -> Prepared:
    """Prepare a run without writing anything. All ranks call it together."""
    torch.set_num_threads(config.train.threads or group.cores)
    clock = StartClock()
    clock("process")
    directory, found = _open_directory(config, group)
    inputs = read_inputs(config, group)
    clock("data")
    identity: Json = {"config": config_facts(config), "data": inputs.digest}
    with group.together():  # models are not loaded yet, so their digests are not compared
        if found is not NO_CHECKPOINT:
            check_same_run(found.state["run"], {**found.state["run"], **identity}, found.path)
    module, weights, tap = build_model(config, loading_device(config, inputs.ds_config, group), group, clock)
    identity["model"] = model_digest(module, weights)
    group.agree(identity["model"], "weights of the base model")
    clock("model")
    engine = make_engine(config, inputs.ds_config, module, group, weights)
    if weights is not WHOLE:  # they were read only now
        identity["model"] = model_digest(module, weights)
        group.agree(identity["model"], "weights of the base model")
    clock("engine")
    meter = memory_meter(group)
    small = kept_sources(inputs.sizes, inputs.source_names, None)
    evaluator: Evaluator = NoEvaluator()
    if inputs.eval is not None:
        held_out = HeldOut(inputs.eval, inputs.sizes, small, inputs.tokenizer)
        evaluator = HeldOutEvaluator(held_out, config.eval, config.train, group, watch.enter, engine.gathered)
    reports: Reports = Reports()
    writer = Writer()
    if directory is not None:
        reports = WrittenReports(config, directory, inputs, small, meter)
        writer = BackgroundWriter(CheckpointFolder(directory.checkpoints, config.checkpoint.keep))
    return Prepared(
        config=config,
        group=group,
        watch=watch,
        writer=writer,
        found=found,
        reports=reports,
        identity=identity,
        inputs=inputs,
        engine=engine,
        step=build_step(config, inputs, engine, tap, Spans(group.device, meter, watch.enter), group),
        evaluator=evaluator,
        steps=total_steps(config, int(inputs.sizes.sum())),
        clock=clock,
    )


def _open_directory(config: RunConfig, group: Group) -> tuple[RunDirectory | None, Checkpoint]:
    """Check rank 0's run directory, and read the checkpoint to resume from."""
    with group.together():
        if not group.is_first:
            return None, NO_CHECKPOINT
        directory = RunDirectory(config.output_dir, resume=config.resume != "none")
        match config.resume:
            case "none":
                return directory, NO_CHECKPOINT
            case "auto":
                folder = CheckpointFolder(directory.checkpoints, config.checkpoint.keep)
                return directory, folder.newest(config.checkpoint.fallback) or NO_CHECKPOINT
            case path:
                return directory, CheckpointFolder.read(Path(path))
