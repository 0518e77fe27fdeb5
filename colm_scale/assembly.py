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
from colm_scale.modeling.probe import decoder_blocks, find_probes
from colm_scale.modeling.proxy import add_probes, load_proxy
from colm_scale.modeling.replay import BlockInputs
from colm_scale.profiling.spans import Spans
from colm_scale.selection.allocation import source_shares
from colm_scale.selection.rule import SelectionRule
from colm_scale.sketch.adapters import AdapterTap
from colm_scale.sketch.tap import Tap
from colm_scale.step import CoresetStep


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
