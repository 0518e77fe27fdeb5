from __future__ import annotations

import pytest
import torch
from support.families import BLOCKS, PROBES, ROWS, adapted_model, batch_of, part_of

from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.randomness import generator
from colm_scale.sketch.observe import PROJECTED, GradientReader
from colm_scale.sketch.tap import Tap

LENGTHS = [9, 5, 7]
SHARES = torch.tensor([0.5, 0.125, 3.0])
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums of at most a few thousand terms of size 1, in another order: about 1e-6 of the largest term."""


def tap_of(family: str, checkpointed: bool = False) -> Tap:
    model = adapted_model(family)
    if checkpointed:
        keep_block_inputs_only(model.get_base_model())
    return Tap(ExampleLoss(model.train()), Probe(BLOCKS[family], PROBES[family], torch.tensor(ROWS[family])))


def read(tap: Tap, batch, shares: torch.Tensor = SHARES, scale: float = 1.0, reader: GradientReader | None = None):
    """``[B, 1 + p]`` of a training pass."""
    reader = reader or GradientReader(tap, seed=3)
    with reader.reading():
        losses = tap.model(batch.input_ids, batch.attention_mask, batch.labels)
        ((losses * shares).sum() * scale).backward()
        return reader.take()


def gradients_of(tap: Tap, batch) -> torch.Tensor:
    """``[B, d]`` by one backward pass per example to the weights themselves."""
    rows = []
    for row in range(len(batch.positions)):
        one = part_of(batch, row)
        loss = tap.model(one.input_ids, one.attention_mask, one.labels).sum()
        found = torch.autograd.grad(loss, [probe.lora_b.weight for probe in tap.probes])
        rows.append(torch.cat([of[probe.rows].flatten() for of, probe in zip(found, tap.probes)]))
    return torch.stack(rows)


def projection(gradients: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """As it is defined: number j, with a sign of its own, is added to number j mod p."""
    d = gradients.shape[1]
    signs = torch.randint(2, (d,), generator=generator(seed, "observe")) * 2 - 1
    rows = torch.zeros(len(gradients), PROJECTED)
    for j in range(d):
        rows[:, j % PROJECTED] += signs[j] * gradients[:, j]
    return rows


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_rows_are_of_each_examples_own_gradient(family, checkpointed):
    """Not of the share of the step's: with activation checkpointing too, which runs the block a second time."""
    tap, batch = tap_of(family, checkpointed), batch_of(LENGTHS)
    runs = []
    tap.probes[0].lora_b.register_forward_hook(lambda *_: runs.append(1))
    rows = read(tap, batch)
    assert len(runs) == 1 + checkpointed
    expected = gradients_of(tap, batch)
    assert expected.shape[1] == tap.size
    torch.testing.assert_close(rows[:, 0], expected.square().sum(1), **ROUNDING)
    torch.testing.assert_close(rows[:, 1:], projection(expected), **ROUNDING)
    assert (rows[:, 0] > 1e-3).all()


def test_whatever_scales_the_loss_is_undone():
    tap, batch = tap_of("llama"), batch_of(LENGTHS)
    plain = read(tap, batch, torch.ones(3))
    torch.testing.assert_close(read(tap, batch, SHARES, scale=2.0**16), plain, **ROUNDING)


def test_training_is_as_without():
    tap, batch = tap_of("llama"), batch_of(LENGTHS)
    named = {name: p for name, p in tap.model.named_parameters() if p.requires_grad}
    (tap.model(batch.input_ids, batch.attention_mask, batch.labels) * SHARES).sum().backward()
    expected = {name: p.grad.clone() for name, p in named.items()}
    tap.model.zero_grad()
    read(tap, batch)
    assert all(torch.equal(p.grad, expected[name]) for name, p in named.items())
    assert not tap.model._forward_hooks
    assert not tap.probes[0].lora_b._forward_hooks


def test_micro_batches_follow_one_another():
    tap = tap_of("llama")
    reader = GradientReader(tap, seed=3)
    for lengths in ([9, 5, 7], [4, 6, 3], [8, 8, 8]):
        batch = batch_of(lengths)
        rows = read(tap, batch, reader=reader)
        torch.testing.assert_close(rows[:, 0], gradients_of(tap, batch).square().sum(1), **ROUNDING)


def test_several_probes_are_one_gradient():
    model = ExampleLoss(adapted_model("llama").train())
    rows = torch.tensor(ROWS["llama"])
    probes = [Probe(f"model.layers.{i}", f"model.layers.{i}.self_attn.v_proj", rows) for i in range(2)]
    tap, batch = Tap(model, *probes), batch_of(LENGTHS)
    found, expected = read(tap, batch), gradients_of(tap, batch)
    torch.testing.assert_close(found[:, 0], expected.square().sum(1), **ROUNDING)
    torch.testing.assert_close(found[:, 1:], projection(expected), **ROUNDING)


def test_inner_products_are_kept():
    """Standard deviation: 1 / sqrt(p) of the sizes, over 50 seeds."""
    pair = torch.randn(2, 4096, generator=generator(0, "pair"))
    pair[1] += pair[0]
    true = float(pair[0] @ pair[1])
    found = torch.tensor([float(rows[0] @ rows[1]) for rows in (projection_fast(pair, seed) for seed in range(50))])
    size = float(pair[0].norm() * pair[1].norm())
    assert float((found - true).std()) < 1.5 * size / PROJECTED**0.5
    assert abs(float(found.mean()) - true) < 5 * size / PROJECTED**0.5 / 50**0.5


def projection_fast(gradients: torch.Tensor, seed: int) -> torch.Tensor:
    signs = torch.randint(2, (gradients.shape[1],), generator=generator(seed, "observe")) * 2 - 1
    return (gradients * signs).view(len(gradients), -1, PROJECTED).sum(1)
