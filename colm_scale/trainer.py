"""A run from its configuration to its adapter: check everything, load, evaluate, step, evaluate, save.

Whatever can be wrong with the input is found out in the order of what it costs: options, files, tokens, model.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from colm_scale.assembly import build_model, build_step
from colm_scale.checkpoint.identity import check_same_run, config_facts, model_digest
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import Checkpoint, CheckpointFolder
from colm_scale.config import RunConfig, as_yaml
from colm_scale.distributed.engine import Engine
from colm_scale.distributed.engines import loading_device, make_engine
from colm_scale.distributed.group import Group, PeerFailed, connect
from colm_scale.distributed.shards import held_bytes
from colm_scale.distributed.watch import STOPPED, Watch, peer_is_gone
from colm_scale.errors import TrainingError, UserError
from colm_scale.evaluate import Evaluator
from colm_scale.inputs import Inputs, read_inputs
from colm_scale.modeling.optimizers import default_learning_rate
from colm_scale.profiling.memory import MemoryMeter, memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.records import Json
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.reporting.run_facts import resumed_facts, run_facts, written_down
from colm_scale.schedule import evaluation_period, learning_rate, total_steps
from colm_scale.selection.quota import kept_sources
from colm_scale.session import Session
from colm_scale.step import CoresetStep


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

    directory: RunDirectory | None
    found: Checkpoint | None
    identity: dict[str, object]
    inputs: Inputs
    small: Tensor
    engine: Engine
    meter: MemoryMeter
    step: CoresetStep
    evaluator: Evaluator | None
    steps: int

    def session(self, config: RunConfig, group: Group, *, writes: bool = True) -> Session:
        """Its reports; without ``writes`` they go nowhere."""
        directory = self.directory if writes else None
        return Session(config, directory, self.inputs, self.small, self.engine, self.evaluator, group, self.meter)

    def state(self, config: RunConfig, session: Session, group: Group) -> RunState:
        """What of it changes."""
        directory = self.directory
        return RunState(
            folder=None if directory is None else CheckpointFolder(directory.checkpoints, config.checkpoint.keep),
            identity=self.identity,
            facts=written_down(config, self.inputs, self.steps),
            sampler=self.inputs.sampler,
            engine=self.engine,
            estimator=self.step.estimator,
            observer=self.step.observer,
            session=session,
            group=group,
            follower=self.step.follower,
        )

    def facts(self, config: RunConfig, done: int, group: Group) -> list[str]:
        """What is told before the first step after ``done``."""
        facts = run_facts(config, self.inputs, self.engine, self.evaluator, group)
        return [*facts, *resumed_facts(self.found, done)]


def train(config: RunConfig, group: Group, watch: Watch) -> bool:
    """The job of a run: whether it came to its end, rather than being told to stop."""
    prepared = prepare(config, group, watch)
    with prepared.session(config, group) as session:
        state = prepared.state(config, session, group)
        done = state.load(prepared.found)
        facts = written_down(config, prepared.inputs, prepared.steps)
        _claim(prepared.directory, config, prepared.inputs, facts, prepared.engine, prepared.meter, done, group)
        session.start(prepared.steps, prepared.facts(config, done, group), done)
        return _run_steps(config, done, prepared.steps, prepared.step, state, session, watch, group)


Job = Callable[[RunConfig, Group, Watch], bool]
"""What the ranks of a run do together; whether it came to its end."""


def run(config: RunConfig, job: Job = train) -> int:
    """Do a ``job``, by default that of training, on this rank, and return the process's exit code: 0 done, 143 told to
    stop, and saved.

    Ends the process with 2 (wrong input) or 1 (training failed) otherwise; then one rank says why, and every other rank
    ends too.
    """
    watch = None
    try:
        quieten()
        group = connect()
        watch = Watch(group, config.train.timeout)
        with group.together():
            config = resolve(config)
        completed = job(config, group, watch)
    except BaseException as error:
        _end(error, watch)
    assert watch is not None
    watch.close()
    group.close()
    return 0 if completed else STOPPED


def quieten() -> None:
    """Keep the libraries' remarks to their developers out of the user's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    for library in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


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


def _run_steps(
    config: RunConfig,
    done: int,
    steps: int,
    step: CoresetStep,
    state: RunState,
    session: Session,
    watch: Watch,
    group: Group,
) -> bool:
    """The steps after ``done``, with what happens every so many of them; whether the run came to its end."""
    evaluate_every = evaluation_period(config.eval, steps)
    if not done:
        session.evaluate(0, whole=True)
    for number in range(done + 1, steps + 1):
        watch.begin(number)
        report, work = step(number, learning_rate(config.train, number, steps))
        if _is_due(config.profile.floor_every, number):
            watch.enter("floor")
            report = dataclasses.replace(report, floor=report.seconds["step"] / step.bare_floor_seconds(work))
        session.step(report)
        watch.enter("sources")
        session.drifted(step.follow(number))
        if number == steps or _is_due(evaluate_every, number):
            session.evaluate(number, whole=number == steps)
        stopping = group.any(watch.stop_requested)
        if config.checkpoint.every and (stopping or number == steps or _is_due(config.checkpoint.every, number)):
            watch.enter("checkpoint")
            started = time.perf_counter()
            session.flush()
            state.save(number)
            session.saved(number, time.perf_counter() - started)
        if stopping and number < steps:
            session.stopped(number)
            return False
    session.finish(steps)
    return True


def _is_due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


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


def _claim(
    directory: RunDirectory | None,
    config: RunConfig,
    inputs: Inputs,
    facts: dict[str, object],
    engine: Engine,
    meter: MemoryMeter,
    done: int,
    group: Group,
) -> None:
    """Write the files that say what runs, once it is known that it can."""
    own_bytes = torch.tensor([held_bytes(engine.module)], device=group.device)
    held = group.all_gather(own_bytes, "control").flatten().tolist()
    with group.together():
        if directory is not None:
            own = {"device_name": meter.device_name, "memory": meter.label, "weight_bytes_by_rank": held}
            found = environment(group.device, group.world_size, engine.name, **own)
            directory.create(as_yaml(config), found, done, facts)
            if config.audit and not config.data.streaming:
                directory.examples(inputs.sampler.examples)


def _evaluator(config: RunConfig, inputs: Inputs, small: Tensor, group: Group, watch: Watch) -> Evaluator | None:
    if inputs.eval is None:
        return None
    return Evaluator(
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


def _end(error: BaseException, watch: Watch | None) -> None:
    """Say what went wrong, unless another rank has said it, and end this process without waiting for the others."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    said_elsewhere = isinstance(error, PeerFailed) or (watch is not None and not watch.failed())
    if not said_elsewhere:
        if isinstance(error, (UserError, TrainingError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif watch is not None and peer_is_gone(error):
            print(f"error: {watch.place()}, lost another rank: it was killed, or cut off", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: closing collectives that a peer is still in would wait for it.
    os._exit(code) if watch is None else watch.leave(code)
