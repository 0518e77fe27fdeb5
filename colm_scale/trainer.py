"""A run from its configuration to its adapter: check everything, load, evaluate, step, evaluate, save.

Whatever can be wrong with the input is found out in the order of what it costs: options, files, tokens, model.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import RunConfig, TrainConfig, as_yaml
from colm_scale.data.builtin import Split
from colm_scale.data.examples import Examples, tokenise
from colm_scale.data.readers import builtin_as_rows, read_rows
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.engine import Engine
from colm_scale.distributed.engines import loading_device, make_engine
from colm_scale.distributed.estimators import Estimator, make_estimator
from colm_scale.distributed.group import Group, PeerFailed, connect
from colm_scale.distributed.watch import Watch
from colm_scale.errors import TrainingError, UserError
from colm_scale.evaluate import Evaluator
from colm_scale.modeling.load import (
    add_adapters,
    check_adapter,
    check_model,
    context_length,
    keep_block_inputs_only,
    load_model,
    load_tokenizer,
)
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.reporting.environment import environment
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule
from colm_scale.session import Session
from colm_scale.sketch.tap import Tap
from colm_scale.step import CoresetStep

_DEFAULT_STEPS = 80
_BUILTIN_LEARNING_RATE, _LEARNING_RATE = 1e-2, 2e-4


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before it loads a model."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples | None
    kept: Tensor
    """``[Q]`` bool."""
    ds_config: dict | None


def run(config: RunConfig) -> None:
    """Run ``config`` on this rank.

    Ends the process with 2 (wrong input) or 1 (training failed) if it cannot be completed; then one rank says why, and
    every other rank ends too.
    """
    watch = None
    try:
        _quieten()
        group = connect()
        watch = Watch(group)
        _train(resolve(config), group)
    except BaseException as error:
        _end(error, watch)
    watch.close()
    group.close()


def _quieten() -> None:
    """Keep the libraries' remarks to their developers out of the user's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def resolve(config: RunConfig) -> RunConfig:
    """With presets and defaults that depend on other options written out."""
    train = config.train
    if train.learning_rate is None:
        rate = _BUILTIN_LEARNING_RATE if config.model.name is None else _LEARNING_RATE
        train = dataclasses.replace(train, learning_rate=rate)
    return dataclasses.replace(config, train=train, selection=config.selection.resolved())


def read_inputs(config: RunConfig, group: Group) -> Inputs:
    """Read and check everything that can be wrong, before a model is loaded.

    Raises:
        UserError: On the rank that found it; see `Group.together`.
    """
    from colm_scale.distributed.zero import read_ds_config

    with group.together():
        n = config.selection.candidates
        if n % group.world_size:
            raise UserError(
                f"--selection.candidates is {n}, which {group.world_size} ranks cannot share evenly: "
                f"give a multiple of {group.world_size}"
            )
        if config.engine == "single" and group.world_size > 1:
            raise UserError(f"--engine single runs one process, but there are {group.world_size}: leave --engine out")
        ds_config = read_ds_config(config, group.world_size) if config.ds_config else None
        context = context_length(check_model(config.model))
        check_adapter(config.lora)
        tokenizer = load_tokenizer(config.model)
        longest = config.data.max_length or context
        train = _read(config, "train", tokenizer, longest)
        CandidateSampler(train, n, config.train.seed)
        kept = kept_sources(train.sizes, train.source_names, config.selection.kept_sources)
        held_out = None
        if config.data.eval or not config.data.train:
            held_out = _read(config, "eval", tokenizer, longest, train.source_names)
    group.agree(train.digest(), "training data")
    return Inputs(tokenizer, train, held_out, kept, ds_config)


def _read(
    config: RunConfig,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    source_names: Sequence[str] | None = None,
) -> Examples:
    specs = getattr(config.data, split)
    rows = read_rows(specs, config.data) if specs else builtin_as_rows(split, config.data)
    return tokenise(rows, tokenizer, config.data, longest, source_names)


def build_model(config: RunConfig, device: torch.device, group: Group) -> tuple[ExampleLoss, Tap | None]:
    """The adapted model on ``device``, and the tap on its probe where the method sketches."""
    with group.together():
        base = load_model(config.model, getattr(torch, config.train.dtype), device)
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
        sketches = config.selection.method == "colm"
        probe = find_probe(base, config.selection.probe) if sketches else None
        module = ExampleLoss(add_adapters(base, config.lora, config.train.seed))
        return module, Tap(module, probe) if sketches else None


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


def _train(config: RunConfig, group: Group) -> None:
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // group.local_world_size))
    directory = _open_directory(config, group)
    inputs = read_inputs(config, group)
    steps = total_steps(config, len(inputs.train))
    module, tap = build_model(config, loading_device(config, inputs.ds_config, group), group)
    engine = make_engine(config, inputs.ds_config, module, group)
    meter = memory_meter(group.device)
    step = build_step(config, inputs, engine, tap, Spans(group.device, meter), group)
    small = kept_sources(inputs.train.sizes, inputs.train.source_names, None)
    evaluator = _evaluator(config, inputs, small, group)
    with group.together():
        if directory is not None:
            facts = {"device_name": meter.device_name, "memory": meter.label}
            directory.create(as_yaml(config), environment(group.device, group.world_size, engine.name, **facts))

    with Session(config, directory, inputs.train, small, engine, evaluator, group, meter) as session:
        session.start(steps, _facts(config, inputs, engine, evaluator, group))
        if tap is not None and config.selection.estimator == "zeroth_order" and config.train.dtype != "float32":
            session.warn(
                f"finite differences of step {config.selection.perturbation:g} are mostly rounding in "
                f"{config.train.dtype}: use --selection.estimator last_layer, or --train.dtype float32"
            )
        session.evaluate(0)
        for number in range(1, steps + 1):
            report, work = step(number, learning_rate(config.train, number, steps))
            if config.profile.floor_every and number % config.profile.floor_every == 0:
                report = dataclasses.replace(report, floor=report.seconds["step"] / step.bare_floor_seconds(work))
            session.step(report)
            if number == steps or (config.eval.every and number % config.eval.every == 0):
                session.evaluate(number)
        session.finish(steps)


def _open_directory(config: RunConfig, group: Group) -> RunDirectory | None:
    """Rank 0's run directory, checked before anything is computed."""
    with group.together():
        return RunDirectory(config.output_dir) if group.is_first else None


def _facts(
    config: RunConfig, inputs: Inputs, engine: Engine, evaluator: Evaluator | None, group: Group
) -> list[str]:
    """What a user wants to know before the first step."""
    train, selection = inputs.train, config.selection
    kept = [name for name, is_kept in zip(train.source_names, inputs.kept.tolist()) if is_kept]
    facts = [
        f"model {config.model.name or 'built-in base'} in {config.train.dtype}, engine {engine.name} on "
        f"{group.world_size} rank(s), {group.device.type}",
        f"{len(train):,} examples of {len(train.source_names)} sources",
        f"method {selection.method}: {selection.budget if selection.method != 'full' else selection.candidates} of "
        f"{selection.candidates} candidates per step",
    ]
    if selection.method in ("colm", "stratified"):
        facts.append(f"kept sources ({len(kept)}): {', '.join(kept) or 'none'}")
    left_out = {"training examples too long, dropped": train.dropped, "training examples too long, cut": train.cut}
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
    config: RunConfig, inputs: Inputs, engine: Engine, tap: Tap | None, spans: Spans, group: Group
) -> CoresetStep:
    """One step's parts, put together."""
    estimator: Estimator | None = None
    if tap is not None:
        estimator = make_estimator(tap, config.selection, config.train, group)
    return CoresetStep(
        config=config,
        examples=inputs.train,
        sampler=CandidateSampler(inputs.train, config.selection.candidates, config.train.seed),
        rule=SelectionRule(config.selection, inputs.kept, config.train.seed),
        estimator=estimator,
        engine=engine,
        group=group,
        spans=spans,
        pad_id=inputs.tokenizer.pad_token_id,
    )


def _evaluator(config: RunConfig, inputs: Inputs, small: Tensor, group: Group) -> Evaluator | None:
    if inputs.eval is None:
        return None
    return Evaluator(
        inputs.eval,
        inputs.train.sizes,
        small,
        inputs.tokenizer,
        config.eval,
        group,
        config.train.micro_batch_tokens,
        config.train.seed,
    )


def _end(error: BaseException, watch: Watch | None) -> None:
    """Say what went wrong, unless another rank has said it, and end this process without waiting for the others."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    said_elsewhere = isinstance(error, PeerFailed) or (watch is not None and not watch.failed(str(error)))
    if not said_elsewhere:
        if isinstance(error, (UserError, TrainingError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: closing collectives that a peer is still in would wait for it
