"""Assembly of a run: the model with its tap, and the step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from colm_scale.config import EXPERTS, RunConfig
from colm_scale.data.batching import Batching
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Engine
from colm_scale.errors import UserError
from colm_scale.estimators.make import make_estimator
from colm_scale.estimators.reuse import reusing
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.compiling import check_compiler, compile_blocks
from colm_scale.modeling.load import keep_block_inputs_only, load_model, weights_of
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import check_flash, use_packing
from colm_scale.modeling.probe import Probe, decoder_blocks, find_probe, in_last_block, last_block_alone
from colm_scale.modeling.targets import adapted_layers
from colm_scale.modeling.weights import Weights
from colm_scale.profiling.spans import Spans
from colm_scale.run.inputs import Inputs
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.shares import source_shares
from colm_scale.sketch.tap import Tap
from colm_scale.step.block_inputs import blocks_alike, make_block_inputs
from colm_scale.step.measure import Measurement
from colm_scale.step.select import SelectionStage
from colm_scale.step.sketch import EstimatorStage, SketchStage
from colm_scale.step.source_refresh import ReclusteredSources, SeenStates, SourceRefresh
from colm_scale.step.source_state import SourceState
from colm_scale.step.step import CoresetStep
from colm_scale.step.train import TrainingStage


def build_model(
    config: RunConfig, device: torch.device, group: Group, ended: Callable[[str], None] = lambda _: None
) -> tuple[ExampleLoss, Weights, Tap | None]:
    """Load the adapted model on ``device``, its weights, and the tap on its probe if the method sketches.

    Micro-batches are packed if requested and supported by the model, see `ExampleLoss.padded_because`.

    Args:
        ended: Called at the end of each part: ``model``, which loads it, and ``trials``, which try it out.
    """
    with group.together():
        if config.train.compile:
            check_compiler(group.device)
        prefers_flash = config.train.packing == "off"  # otherwise torch's flash kernel, which takes packed rows
        base = load_model(config.model, getattr(torch, config.train.dtype), device, prefers_flash=prefers_flash)
        weights = weights_of(base, config.model, group.device)
        ended("model")
        flash_fails = check_flash(base, config.model.attention, group.device)
        tried = use_packing(base, config.train.packing, group.device)
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
        probe = find_probe(base, config.selection.probe) if config.selection.sketches else None
        with weights.adding_adapters(new=config.lora.adapter is None):
            module = ExampleLoss(add_adapters(base, config.lora, config.train.seed))
        _check_experts(config, module)
        module.padded_because, module.sdpa_because = tried.padded_because, flash_fails or tried.sdpa_because
        tap = _tap(module, probe) if probe else None
        ended("trials")
        return module, weights, tap


def _check_experts(config: RunConfig, module: ExampleLoss) -> None:
    """Check that the run can train adapters on experts, if there are some. Their weights are changed in each forward.

    Raises:
        UserError: It would compile them, or compare losses that they round.
    """
    if not any(adapted_layers(module.model).values()):
        return
    if config.train.compile:
        raise UserError(f"--train.compile true cannot compile adapters on {EXPERTS}: leave it out")
    if config.selection.sketches and config.selection.estimator == "zeroth_order" and config.train.dtype != "float32":
        raise UserError(
            f"--selection.estimator zeroth_order compares losses that adapters on {EXPERTS} round in "
            f"{config.train.dtype}: use --selection.estimator last_layer, or --train.dtype float32"
        )


def _tap(module: ExampleLoss, probe: Probe) -> Tap:
    """Make the tap; what it must try out runs through the last block alone."""
    alone = ExampleLoss(last_block_alone(module.causal_model))
    like = Tap(alone, in_last_block(alone.causal_model, probe))
    module.computes_logits_like(alone)
    return Tap(module, probe, like)


def build_step(
    config: RunConfig, inputs: Inputs, engine: Engine, tap: Tap | None, spans: Spans, group: Group
) -> CoresetStep:
    """Assemble the parts of a step."""
    train, module = config.train, engine.module
    if train.compile:
        compile_blocks(decoder_blocks(module.causal_model)[1][: blocks_alike(config, tap) if tap else None])
    batching = batching_of(config, inputs, module, group)
    shares = source_shares(config.selection.shares, inputs.source_names, inputs.sizes)
    rule = SelectionRule(config.selection, inputs.kept, train.seed, shares, inputs.record)
    refresh = SourceRefresh()
    if config.reclusters:
        seen = SeenStates(module, train.seed, group)
        table = inputs.source_names, inputs.sizes, inputs.kept
        refresh = ReclusteredSources(seen, *table, config.selection, config.sources.refresh_every)
    held = make_block_inputs(config, tap, group)
    sketch = SketchStage(group.world_size)
    if tap:
        estimator = make_estimator(tap, config.selection, train, group)
        estimator = reusing(estimator, config.selection, int(inputs.sizes.sum()))
        sketch = EstimatorStage(estimator, batching, held, refresh, group, spans)
    refresh_every = 0 if config.reclusters else config.sources.refresh_every
    columns = config.selection.feedback_columns(tap.size) if tap else 0
    sources = SourceState(inputs.kept, shares, config.selection, refresh_every, columns)
    return CoresetStep(
        sampler=inputs.sampler,
        refresh=refresh,
        select=SelectionStage(rule, sketch, sources, group, spans),
        train=TrainingStage(engine, batching, held, refresh, train, group),
        measure=Measurement(group, spans, train.seed, packed=module.packs, audits=config.audit),
        spans=spans,
    )


def batching_of(config: RunConfig, inputs: Inputs, module: ExampleLoss, group: Group) -> Batching:
    """Make the batching of a run's examples."""
    pad_id: int = inputs.tokenizer.pad_token_id
    return Batching(pad_id, config.train.micro_batch_tokens, module.packs, group.device)
