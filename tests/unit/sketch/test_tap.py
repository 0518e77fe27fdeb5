from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from support.families import FAMILIES, PROBES, ROWS, adapted_model, base_model, batch_of, part_of, with_adapters

from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.randomness import generator
from colm_scale.sketch.tap import Tap

LENGTHS = [9, 5, 7]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums of at most a few thousand terms of size 1, in another order: about 1e-6 of the largest term."""


def probe_of(family: str) -> Probe:
    return Probe(PROBES[family].split(".self_attn")[0], PROBES[family], torch.tensor(ROWS[family]))


def tap_of(family: str, **options) -> Tap:
    return Tap(ExampleLoss(adapted_model(family, **options)), probe_of(family))


def changes_of(tap: Tap, branches: int) -> torch.Tensor:
    return 0.3 * torch.randn(branches, *tap.shape, generator=generator(0, "changes"))


def example_gradients(tap: Tap, batch) -> torch.Tensor:
    """``[B, d_out, r]`` by one backward pass per example to the weight itself."""
    with torch.enable_grad():
        tap.model.eval()
        gradients = []
        for row in range(len(batch.positions)):
            one = part_of(batch, row)
            loss = tap.model(one.input_ids, one.attention_mask, one.labels).sum()
            gradients.append(torch.autograd.grad(loss, tap.lora_b.weight)[0][tap.rows])
    return torch.stack(gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_equal_a_changed_weight(family):
    tap, batch = tap_of(family), batch_of(LENGTHS)
    changes = changes_of(tap, 4)
    changes[3] = 0
    losses = tap.branched_losses(batch, changes)
    weight = copy.deepcopy(tap.lora_b.weight.data)
    for change, of_branch in zip(changes, losses):
        tap.lora_b.weight.data[tap.rows] += change
        torch.testing.assert_close(of_branch, tap.bare_losses(batch), **ROUNDING)
        tap.lora_b.weight.data.copy_(weight)
    assert (losses[0] - losses[3]).abs().min() > 1e-3  # the change is felt: the comparison is not of constants


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_multiply_to_each_examples_gradient(family):
    tap, batch = tap_of(family), batch_of(LENGTHS)
    losses, delta, a = tap.factors(batch)
    torch.testing.assert_close(losses, tap.bare_losses(batch), **ROUNDING)
    torch.testing.assert_close(delta.transpose(1, 2) @ a, example_gradients(tap, batch), **ROUNDING)
    assert delta.shape == (3, 9, tap.shape[0])
    assert a.shape == (3, 9, tap.rank)
    assert not delta[1, 5:].any()
    assert not delta[2, 7:].any()
