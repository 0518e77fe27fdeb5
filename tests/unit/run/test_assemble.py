"""What runs between loading a model and its first step."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, adapted_model, base_model, with_adapters

from colm_scale.config.command_line import parse
from colm_scale.distributed.connect import connect
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks, find_probe
from colm_scale.run import assemble
from colm_scale.run.prepare import resolve
from colm_scale.sketch.tap import Tap

OPTIONS = {
    "last_layer": [],
    "zeroth_order": ["--selection.estimator", "zeroth_order"],
    "paper": ["--selection.preset", "paper"],
    "stratified": ["--selection.method", "stratified"],
    "queries": ["--selection.probe", "q"],
    "padded": ["--train.packing", "off"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_forward_of_the_whole_model(options, monkeypatch):
    """Only the last block runs, and the first two in the trial of packing."""
    ran, load_model = [], assemble.load_model

    def spied(*args, **kwargs):
        model = load_model(*args, **kwargs)
        for number, block in enumerate(decoder_blocks(model)[1]):
            block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))  # copies run it too
        return model

    monkeypatch.setattr(assemble, "load_model", spied)
    config = resolve(parse(["--train.threads", "1", *options]))
    parts = []
    module, _, tap = assemble.build_model(config, torch.device("cpu"), connect(), parts.append)
    assert parts == ["model", "trials"]
    blocks = len(decoder_blocks(module.causal_model)[1])
    assert blocks > 3
    assert set(ran) <= {0, 1, blocks - 1}
    assert (blocks - 1 in ran) == (tap is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_alone_takes_the_arguments_that_it_takes_in_the_model(family):
    base = base_model(family)
    probe = find_probe(base)
    module = ExampleLoss(with_adapters(base))
    expected = Tap(ExampleLoss(adapted_model(family)), probe)
    assert assemble._tap(module, probe)._batched == expected._batched
    assert (module._fused, module._post_checked) == (expected.model._fused, expected.model._post_checked)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.compile", "true"], r"^--train\.compile true cannot compile adapters on experts: leave it out$"),
        (
            ["--selection.estimator", "zeroth_order", "--train.dtype", "bfloat16"],
            r"^--selection\.estimator zeroth_order compares .* in bfloat16: use --selection\.estimator last_layer",
        ),
    ],
)
def test_what_adapters_on_experts_exclude_is_refused(options, words):
    experts = {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    module = ExampleLoss(with_adapters(base_model("mixtral", num_local_experts=4), **experts))
    config = resolve(parse(options))
    with pytest.raises(UserError, match=words):
        assemble._check_experts(config, module)
    assemble._check_experts(resolve(parse([])), module)
    assemble._check_experts(config, ExampleLoss(with_adapters(base_model("mixtral"), target_modules=["v_proj"])))
