"""What FSDP2 gathers at a time, and what a rank holds of it."""

from __future__ import annotations

import pytest
from support.families import FAMILIES, adapted_model

from colm_scale.engines.fsdp import units
from colm_scale.engines.tensors import held_bytes
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import decoder_blocks


def flat(unit) -> list:
    return unit if isinstance(unit, list) else [unit]


@pytest.mark.parametrize("family", FAMILIES)
def test_units_cover_every_weight_once(family):
    """A weight belongs to the first unit that has it, as `fully_shard` takes them, and to no other."""
    model = ExampleLoss(adapted_model(family)).causal_model
    *inner, last = units(model)
    assert last is model
    assert inner[: len(decoder_blocks(model)[1])] == list(decoder_blocks(model)[1])
    owners = [{id(weight) for module in flat(unit) for weight in module.parameters()} for unit in inner]
    assert sum(map(len, owners)) == len(set.union(*owners)), "two units would shard the same weight"
    assert set.union(*owners) == {id(weight) for weight in model.parameters()}


def test_tied_weights_are_one_unit():
    tied, untied = (ExampleLoss(adapted_model(family)).causal_model for family in ("gemma", "llama"))
    together = [unit for unit in units(tied) if isinstance(unit, list) and len(unit) > 1]
    assert together == [[tied.get_input_embeddings(), tied.get_output_embeddings()]]
    assert not any(isinstance(unit, list) and len(unit) > 1 for unit in units(untied))


def test_bytes_held_count_tied_weights_once():
    model = adapted_model("gemma")
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight
    assert held_bytes(model) == sum(4 * weight.numel() for weight in model.parameters())
