from __future__ import annotations

import pytest
import torch
from support.families import base_model, with_adapters

from colm_scale.config import LoraConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.errors import UserError
from colm_scale.modeling.forward_reuse import BlockInputs, HeldBlockInputs
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.sketch.tap import Tap
from colm_scale.step.block_inputs import make_block_inputs

GROUP = Group(0, 1, 0, 1, torch.device("cpu"))
WHY_NOT = {
    "method stratified has none": {"selection": SelectionConfig(method="stratified")},
    "estimator length has none": {"selection": SelectionConfig(estimator="length")},
    "--lora.dropout is 0.1": {"lora": LoraConfig(dropout=0.1)},
}


def config_of(*, reuse: str = "auto", checkpointing: bool = True, **options) -> RunConfig:
    return RunConfig(train=TrainConfig(forward_reuse=reuse, activation_checkpointing=checkpointing), **options)


def tap_of(**options) -> Tap:
    base = base_model("llama", **options)
    probe = find_probe(base)
    return Tap(ExampleLoss(with_adapters(base)), probe)


@pytest.mark.parametrize("reuse", ["auto", "device", "cpu"])
def test_inputs_are_held_wherever_blocks_are_checkpointed(reuse):
    held = make_block_inputs(config_of(reuse=reuse), tap_of(), GROUP)
    assert isinstance(held, HeldBlockInputs)
    assert not held.absent_because


@pytest.mark.parametrize(("reuse", "checkpointing"), [("off", True), ("auto", False)])
def test_where_none_are_asked_for_nothing_is_said(reuse, checkpointing):
    held = make_block_inputs(config_of(reuse=reuse, checkpointing=checkpointing), tap_of(), GROUP)
    assert type(held) is BlockInputs
    assert not held.absent_because


@pytest.mark.parametrize("why", WHY_NOT)
def test_options_that_exclude_reuse_are_named_or_refused(why):
    tap = tap_of() if why.startswith("--lora") else None
    held = make_block_inputs(config_of(**WHY_NOT[why]), tap, GROUP)
    assert type(held) is BlockInputs
    assert held.absent_because.endswith(why)
    for reuse in ("device", "cpu"):
        with pytest.raises(UserError, match=f"--train.forward_reuse {reuse}: .*{why}; leave it out"):
            config_of(reuse=reuse, **WHY_NOT[why])


@pytest.mark.parametrize(
    ("options", "estimator", "why"),
    [
        ({"attention_dropout": 0.1}, "last_layer", "this one has dropout in attention_dropout"),
        ({}, "zeroth_order", "every block of this model runs otherwise in the sketch"),  # of two blocks
    ],
)
def test_models_that_exclude_reuse_are_named_or_refused(options, estimator, why):
    selection, tap = SelectionConfig(estimator=estimator), tap_of(**options)
    held = make_block_inputs(config_of(selection=selection), tap, GROUP)
    assert type(held) is BlockInputs
    assert why in held.absent_because
    with pytest.raises(UserError, match=f"--train.forward_reuse device: .*{why}"):
        make_block_inputs(config_of(reuse="device", selection=selection), tap, GROUP)


def test_without_checkpointing_a_request_is_refused():
    with pytest.raises(UserError, match=r"--train.forward_reuse cpu: it requires activation checkpointing"):
        config_of(reuse="cpu", checkpointing=False)
