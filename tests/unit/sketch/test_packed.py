"""The sketches of packed micro-batches are those of padded ones."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, base_model, batch_of, some_of, with_adapters

from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import find_probe
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.precision import float32_tail
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
LENGTHS = [9, 4, 7]
PADDED, PACKED = batch_of(LENGTHS), batch_of(LENGTHS, packed=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FINITE = {"rtol": 5e-3, "atol": 5e-3}
"""A difference of losses around 5, each rounded to 5e-7, over a step of 2e-3."""


def taps(family: str, **options) -> tuple[Tap, Tap]:
    """The same model twice: one that pads, one that packs."""
    made = []
    for packing in ("off", "on"):
        base = base_model(family, **options)
        use_packing(base, packing, CPU)
        probe = find_probe(base)
        made.append(Tap(ExampleLoss(with_adapters(base)), probe))
    return made[0], made[1]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gemma2", "bloom")])
def test_gradients_of_the_probe(family):
    padded, packed = taps(family)
    rows = torch.arange(3)
    expected = last_layer.sketch(padded, PADDED, rows)
    found = last_layer.sketch(packed, PACKED, rows)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1].largest, expected[1].largest, **CLOSE)
    pairs = zip(found[1].blocks(), expected[1].blocks(), strict=True)
    for (_, block), (_, wanted) in pairs:
        torch.testing.assert_close(block, wanted, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "phi3", "stablelm", "opt", "gpt2"])
def test_differences_along_directions(family):
    padded, packed = taps(family)
    z = zeroth_order.probes(0, 2, padded.size, CPU)
    expected = zeroth_order.directional_derivatives(padded, PADDED, z, 1e-3)
    found = zeroth_order.directional_derivatives(packed, PACKED, z, 1e-3)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1], expected[1], **FINITE)


def test_a_tail_in_float32():
    padded, packed = taps("llama", dtype=torch.bfloat16)
    z = zeroth_order.probes(0, 2, padded.size, CPU)
    found = []
    for tap, batch in ((padded, PADDED), (packed, PACKED)):
        with float32_tail(tap, 2):
            found.append(zeroth_order.directional_derivatives(tap, batch, z, 1e-3)[1])
    torch.testing.assert_close(found[1], found[0], **FINITE)


def test_a_micro_batch_of_one_and_as_many_branches_as_tokens():
    padded, packed = taps("llama")
    one, z = some_of(PADDED, [1]), zeroth_order.probes(0, 2, padded.size, CPU)
    _, expected = zeroth_order.directional_derivatives(padded, one, z, 1e-3)
    _, found = zeroth_order.directional_derivatives(packed, some_of(PADDED, [1], packed=True), z, 1e-3)
    torch.testing.assert_close(found, expected, **FINITE)
