"""A run from its configuration to its adapter: check everything, load, evaluate, step, evaluate, save.

Whatever can be wrong with the input is found out in the order of what it costs: options, files, tokens, model.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from torch import Tensor

from colm_scale.checkpoint.identity import check_same_run, config_facts, model_digest
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import Checkpoint, CheckpointFolder
from colm_scale.config import RunConfig, TrainConfig, as_yaml
from colm_scale.distributed.engine import Engine
from colm_scale.distributed.engines import loading_device, make_engine
from colm_scale.distributed.estimators import Estimator, make_estimator
from colm_scale.distributed.follow import make_follower
from colm_scale.distributed.group import Group, PeerFailed, connect
from colm_scale.distributed.observer import Observer
from colm_scale.distributed.reuse import reusing
from colm_scale.distributed.shards import held_bytes
from colm_scale.distributed.watch import STOPPED, Watch, peer_is_gone
from colm_scale.errors import TrainingError, UserError
from colm_scale.evaluate import Evaluator
from colm_scale.inputs import Inputs, read_inputs
from colm_scale.modeling.compiling import check_compiler, compile_blocks
from colm_scale.modeling.load import add_adapters, keep_block_inputs_only, load_model
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.optimizers import default_learning_rate
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks, find_probes
from colm_scale.modeling.proxy import add_probes, describe_proxy, load_proxy
from colm_scale.modeling.replay import BlockInputs
from colm_scale.profiling.memory import MemoryMeter, memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.reporting.environment import environment
from colm_scale.reporting.facts import kept_facts, rounding_facts, update_facts
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.reporting.summary import gib
from colm_scale.selection.allocation import allocation_facts
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule
from colm_scale.session import Session
from colm_scale.sketch.adapters import AdapterTap
from colm_scale.sketch.tap import Tap
from colm_scale.step import CoresetStep

_DEFAULT_STEPS = 80


def run(config: RunConfig) -> int:
    """Run ``config`` on this rank, and return the process's exit code: 0 done, 143 told to stop, and saved.

    Ends the process with 2 (wrong input) or 1 (training failed) otherwise; then one rank says why, and every other rank
    ends too.
    """
    watch = None
    try:
        quieten()
        config = resolve(config)
        group = connect()
        watch = Watch(group, config.train.timeout)
        completed = _train(config, group, watch)
    except BaseException as error:
        _end(error, watch)
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


def build_model(
    config: RunConfig, device: torch.device, group: Group
) -> tuple[ExampleLoss, Tap | None, Tap | None]:
    """The adapted model on ``device``, the tap on its probes where it sketches, and that of a proxy where one does.

    Micro-batches are packed where that is wanted and the model takes them so, see `ExampleLoss.padded_because`.
    """
    with group.together():
        if config.train.compile:
            check_compiler(group.device)
        prefers_flash = config.train.packing == "off"  # else torch's own flash kernel, which takes packed rows
        base = load_model(config.model, getattr(torch, config.train.dtype), device, prefers_flash=prefers_flash)
        padded_because = use_packing(base, config.train.packing, group.device)
        sketches = config.selection.method == "colm"
        proxy = load_proxy(config, base, group.device) if sketches else None
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
        tapped = sketches and proxy is None
        probes = find_probes(base, config.selection.probe, config.selection.probe_blocks) if tapped else ()
        module = ExampleLoss(add_adapters(base, config.lora, config.train.seed))
        module.padded_because = padded_because
        tap = Tap(module, *probes) if tapped else None
        if proxy is None:
            return module, tap, None
        if config.selection.proxy is not None:  # the first blocks of the model are made as it is
            use_packing(proxy, config.train.packing, group.device)
        sketching, probes = add_probes(proxy, config)
        return module, tap, Tap(sketching, *probes)


def total_steps(config: RunConfig, examples: int) -> int:
    """Optimizer steps of a run; an epoch shows every example once as a candidate."""
    if config.train.epochs is not None:
        return max(1, math.ceil(config.train.epochs * examples / config.selection.candidates))
    return config.train.steps or _DEFAULT_STEPS


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of a step (from 1): linear warm-up to the peak, then cosine or linear to 0, or constant."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return config.learning_rate * (1 - done)
        case "constant":
            return config.learning_rate


def _train(config: RunConfig, group: Group, watch: Watch) -> bool:
    """Whether the run came to its end, rather than being told to stop."""
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // group.local_world_size))
    directory, found = _open_directory(config, group)
    inputs = read_inputs(config, group)
    identity = {"config": config_facts(config), "data": inputs.digest}
    _check_resumable(found, identity, group)
    module, tap, proxy = build_model(config, loading_device(config, inputs.ds_config, group), group)
    identity |= {"model": model_digest(module), "proxy": None if proxy is None else model_digest(proxy.model)}
    group.agree(identity["model"], "weights of the base model")
    group.agree(str(identity["proxy"]), "weights of the proxy")
    sketched_by = [] if proxy is None else [describe_proxy(config, proxy.model, module)]
    engine = make_engine(config, inputs.ds_config, module, group)
    meter = memory_meter(group.device)
    step = build_step(config, inputs, engine, tap, Spans(group.device, meter, watch.enter), group, proxy)
    small = kept_sources(inputs.sizes, inputs.source_names, None)
    evaluator = _evaluator(config, inputs, small, group, watch)
    steps = total_steps(config, int(inputs.sizes.sum()))

    with Session(config, directory, inputs, small, engine, evaluator, group, meter) as session:
        state = RunState(
            folder=None if directory is None else CheckpointFolder(directory.checkpoints, config.checkpoint.keep),
            identity=identity,
            facts=_written_down(config, inputs, steps),
            sampler=inputs.sampler,
            engine=engine,
            estimator=step.estimator,
            observer=step.observer,
            session=session,
            group=group,
            follower=step.follower,
        )
        done = state.load(found)
        _claim(directory, config, engine, meter, done, group)
        facts = _facts(config, inputs, engine, evaluator, group)
        session.start(steps, [*facts, *sketched_by, *_resumed(found, done)], done)
        return _run_steps(config, done, steps, step, state, session, watch, group)


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
    if not done:
        session.evaluate(0)
    for number in range(done + 1, steps + 1):
        watch.begin(number)
        report, work = step(number, learning_rate(config.train, number, steps))
        if _is_due(config.profile.floor_every, number):
            watch.enter("floor")
            report = dataclasses.replace(report, floor=report.seconds["step"] / step.bare_floor_seconds(work))
        session.step(report)
        watch.enter("sources")
        session.drifted(step.follow(number))
        if number == steps or _is_due(config.eval.every, number):
            session.evaluate(number)
        stopping = group.any(watch.stop_requested)
        if config.checkpoint.every and (stopping or number == steps or _is_due(config.checkpoint.every, number)):
            watch.enter("checkpoint")
            started = time.perf_counter()
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
    directory: RunDirectory | None, config: RunConfig, engine: Engine, meter: MemoryMeter, done: int, group: Group
) -> None:
    """Write the files that say what runs, once it is known that it can."""
    held = torch.tensor([held_bytes(engine.module)], device=group.device)
    held = group.all_gather(held, "control").flatten().tolist()
    with group.together():
        if directory is not None:
            facts = {"device_name": meter.device_name, "memory": meter.label, "weight_bytes_by_rank": held}
            found = environment(group.device, group.world_size, engine.name, **facts)
            directory.create(as_yaml(config), found, done)


def _written_down(config: RunConfig, inputs: Inputs, steps: int) -> dict[str, object]:
    """What a checkpoint says about the run for people to read."""
    table = zip(inputs.source_names, inputs.sizes.tolist(), inputs.kept.tolist())
    return {
        "schedule": {"steps": steps, "learning_rate": config.train.learning_rate, "kind": config.train.schedule},
        "random": {"seed": config.train.seed, "draws": "functions of seed, purpose and index"},
        "sources": [{"name": name, "examples": size, "kept": kept} for name, size, kept in table],
    }


def _resumed(found: Checkpoint | None, done: int) -> list[str]:
    if found is None:
        return []
    passed_over = [f"warning: passed over: {damage}" for damage in found.passed_over]
    return [*passed_over, f"going on after step {done}, from {found.path}"]


def _facts(
    config: RunConfig, inputs: Inputs, engine: Engine, evaluator: Evaluator | None, group: Group
) -> list[str]:
    """What a user wants to know before the first step."""
    selection = config.selection
    attention = engine.module.causal_model.config._attn_implementation
    facts = [
        f"model {config.model.name or 'built-in base'} in {config.train.dtype}, attention {attention}, engine "
        f"{engine.name} on {group.world_size} rank(s), {group.device.type}; {gib(held_bytes(engine.module))} GiB of "
        f"weights on rank 0",
        *([f"micro-batches are padded: {why}"] if (why := engine.module.padded_because) else []),
        f"{int(inputs.sizes.sum()):,} examples of {len(inputs.source_names)} sources",
        f"method {selection.method}: {selection.budget if selection.method != 'full' else selection.candidates} of "
        f"{selection.candidates} candidates per step",
        *kept_facts(selection, inputs.source_names, inputs.sizes, inputs.kept, inputs.protected),
        *update_facts(config),
        *rounding_facts(config),
        *allocation_facts(selection, inputs.source_names, inputs.sizes, inputs.kept),
    ]
    if not config.checkpoint.every:
        facts.append("warning: --checkpoint.every 0: a run that is interrupted is lost")
    left_out = {
        "training examples too long, dropped": inputs.sampler.dropped,
        "training examples too long, cut": inputs.sampler.cut,
    }
    if evaluator is not None:
        left_out |= {
            "held-out examples too long, dropped": inputs.eval.dropped,
            "held-out examples too long, cut": inputs.eval.cut,
            "held-out examples above --eval.limit, not evaluated": evaluator.left_out,
        }
    for what, counts in left_out.items():
        if counts:
            by_source = ", ".join(f"{name} {count}" for name, count in counts.items())
            facts.append(f"{what}: {sum(counts.values())} ({by_source})")
    return facts


def build_step(
    config: RunConfig,
    inputs: Inputs,
    engine: Engine,
    tap: Tap | None,
    spans: Spans,
    group: Group,
    proxy: Tap | None = None,
) -> CoresetStep:
    """One step's parts, put together."""
    reuse = config.train.forward_reuse
    if config.train.compile:
        compile_blocks(decoder_blocks(engine.module.causal_model)[1][: _alike(config, tap)])
    estimator: Estimator | None = None
    if config.selection.method == "colm":
        estimator = make_estimator(proxy or tap, config.selection, config.train, group)
        estimator = reusing(estimator, config.selection, int(inputs.sizes.sum()))
    return CoresetStep(
        config=config,
        sampler=inputs.sampler,
        rule=SelectionRule(config.selection, inputs.kept, config.train.seed, inputs.sizes),
        estimator=estimator,
        observer=Observer(inputs.kept),
        engine=engine,
        group=group,
        spans=spans,
        pad_id=inputs.tokenizer.pad_token_id,
        adapters=AdapterTap(engine.module) if config.profile.match_every else None,
        sketching=engine.module if proxy is None else proxy.model,
        inputs=BlockInputs(tap.model, _alike(config, tap), reuse) if reuse != "off" else None,
        follower=make_follower(config, engine.module, inputs.source_names, inputs.sizes, inputs.kept, group),
    )


def _alike(config: RunConfig, tap: Tap | None) -> int | None:
    """How many of the first blocks the sketch runs as training does; None: all, where the model does not sketch."""
    if tap is None:
        return None
    blocks = list(decoder_blocks(tap.model.causal_model)[1])
    alike = blocks.index(tap.block)
    if config.selection.estimator == "zeroth_order" and config.selection.derivative == "finite":
        alike = min(alike, max(0, len(blocks) - config.selection.float32_blocks))
    return alike


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
