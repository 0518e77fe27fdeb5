"""The parts of a run, put together: the model with what looks into it, and the step."""

from __future__ import annotations

import torch

from colm_scale.config import RunConfig
from colm_scale.distributed.engine import Engine
from colm_scale.distributed.estimators import Estimator, make_estimator
from colm_scale.distributed.follow import make_follower
from colm_scale.distributed.group import Group
from colm_scale.distributed.observer import Observer
from colm_scale.distributed.reuse import reusing
from colm_scale.inputs import Inputs
from colm_scale.modeling.compiling import check_compiler, compile_blocks
from colm_scale.modeling.load import add_adapters, keep_block_inputs_only, load_model
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks, find_probe
from colm_scale.modeling.replay import BlockInputs
from colm_scale.profiling.spans import Spans
from colm_scale.selection.allocation import source_shares
from colm_scale.selection.rule import SelectionRule
from colm_scale.sketch.precision import FLOAT32_BLOCKS
from colm_scale.sketch.tap import Tap
from colm_scale.step import CoresetStep


def build_model(config: RunConfig, device: torch.device, group: Group) -> tuple[ExampleLoss, Tap | None]:
    """The adapted model on ``device``, and the tap on its probe where the method sketches.

    Micro-batches are packed where that is wanted and the model takes them so, see `ExampleLoss.padded_because`.
    """
    with group.together():
        if config.train.compile:
            check_compiler(group.device)
        prefers_flash = config.train.packing == "off"  # else torch's own flash kernel, which takes packed rows
        base = load_model(config.model, getattr(torch, config.train.dtype), device, prefers_flash=prefers_flash)
        padded_because = use_packing(base, config.train.packing, group.device)
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
        probe = find_probe(base, config.selection.probe) if config.selection.method == "colm" else None
        module = ExampleLoss(add_adapters(base, config.lora, config.train.seed))
        module.padded_because = padded_because
        return module, None if probe is None else Tap(module, probe)


def build_step(
    config: RunConfig, inputs: Inputs, engine: Engine, tap: Tap | None, spans: Spans, group: Group
) -> CoresetStep:
    """One step's parts, put together."""
    reuse = config.train.forward_reuse
    if config.train.compile:
        alike = None if tap is None else _alike(config, tap)
        compile_blocks(decoder_blocks(engine.module.causal_model)[1][:alike])
    estimator: Estimator | None = None
    block_inputs: BlockInputs | None = None
    if config.selection.method == "colm":
        assert tap is not None
        if reuse != "off":
            block_inputs = BlockInputs(tap.model, _alike(config, tap), reuse)
        estimator = make_estimator(tap, config.selection, config.train, group)
        estimator = reusing(estimator, config.selection, int(inputs.sizes.sum()))
    return CoresetStep(
        config=config,
        sampler=inputs.sampler,
        rule=SelectionRule(
            config.selection,
            inputs.kept,
            config.train.seed,
            source_shares(config.selection.shares, inputs.source_names, inputs.sizes),
            inputs.record,
        ),
        estimator=estimator,
        observer=Observer(inputs.kept, config),
        engine=engine,
        group=group,
        spans=spans,
        pad_id=inputs.tokenizer.pad_token_id,
        inputs=block_inputs,
        follower=make_follower(config, engine.module, inputs.source_names, inputs.sizes, inputs.kept, group),
    )


def _alike(config: RunConfig, tap: Tap) -> int:
    """How many of the first blocks the sketch runs as training does."""
    blocks = list(decoder_blocks(tap.model.causal_model)[1])
    alike = blocks.index(tap.block)
    if config.selection.estimator == "zeroth_order":
        alike = min(alike, max(0, len(blocks) - FLOAT32_BLOCKS))
    return alike
