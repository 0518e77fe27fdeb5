"""The benchmarks' adapter tap: gradients by hooks are those of autograd, and leave no trace."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from support.families import adapted_model, base_model, batch_of, part_of, with_adapters

from colm_scale.engines.base import trainable
from colm_scale.errors import UserError
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
AdapterTap = runpy.run_path(str(BENCHMARKS / "adapter_tap.py"))["AdapterTap"]
FAMILIES = ("llama", "phi3", "gemma2", "opt", "gpt2", "bloom")
BATCH = batch_of([9, 5, 7])
WEIGHTS = torch.tensor([[1.0, 1.0, 1.0], [0.25, 0.0, 2.0]])


def by_autograd(module: ExampleLoss, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """One backward per weighting."""
    found = []
    for row in weights:
        losses = module(BATCH)
        found.append(torch.autograd.grad((losses * row).sum(), list(trainable(module).values())))
    return {name: torch.stack(own) for name, own in zip(trainable(module), zip(*found))}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        # Sums over tokens in another order, of 24 bits each.
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family):
    module = ExampleLoss(adapted_model(family))
    assert_equal(AdapterTap(module).gradients(BATCH, WEIGHTS), by_autograd(module, WEIGHTS))


def test_the_identity_gives_each_example_s_own_gradient():
    module = ExampleLoss(adapted_model("llama"))
    tap = AdapterTap(module)
    together = tap.gradients(BATCH, torch.eye(3))
    for row in range(3):
        own = tap.gradients(part_of(BATCH, row), torch.ones(1, 1))
        assert_equal({name: together[name][row : row + 1] for name in together}, own)


def test_recomputed_activations_give_the_same():
    base = base_model("llama")
    keep_block_inputs_only(base)
    recomputed, held = ExampleLoss(with_adapters(base)), ExampleLoss(adapted_model("llama"))
    passes = []
    recomputed.causal_model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    found = AdapterTap(recomputed).gradients(BATCH, WEIGHTS)
    assert len(passes) == 2, "once to compute, once more for the backward"
    expected = AdapterTap(held).gradients(BATCH, WEIGHTS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_is_left_behind():
    module = ExampleLoss(adapted_model("llama"))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    state = torch.get_rng_state()
    AdapterTap(module).gradients(BATCH, WEIGHTS)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_hooks for child in module.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_the_scale_multiplies_every_gradient():
    tap = AdapterTap(ExampleLoss(adapted_model("llama")))
    once, more = (tap.gradients(BATCH, WEIGHTS, scale) for scale in (1.0, 1024.0))
    assert all(torch.equal(once[name] * 1024, more[name]) for name in once)


def test_a_model_that_trains_something_else_is_refused():
    model = adapted_model("llama")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"LoRA matrices can be compared, and model\.\S+\.norm\.weight is trained too"):
        AdapterTap(ExampleLoss(model))


def test_gradients_of_a_packed_micro_batch():
    base, packed = base_model("phi3"), batch_of([9, 5, 7], packed=True)
    use_packing(base, "on", torch.device("cpu"))
    expected = AdapterTap(ExampleLoss(adapted_model("phi3"))).gradients(BATCH, torch.eye(3))
    found = AdapterTap(ExampleLoss(with_adapters(base))).gradients(packed, torch.eye(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
