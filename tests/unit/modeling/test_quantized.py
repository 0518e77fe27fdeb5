"""A base in 4 bits looks like any other: the hooks act on activations. bitsandbytes runs on CPUs too."""

from __future__ import annotations

import pytest
import torch
from support.families import base_model, batch_of

from colm_scale.config import LoraConfig, ModelConfig, TrainConfig
from colm_scale.errors import UserError
from colm_scale.modeling import load
from colm_scale.modeling.load import add_adapters, check_kernels, load_model
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import few_blocks, find_probe
from colm_scale.sketch.precision import float32_tail
from colm_scale.sketch.tap import Tap

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of which every block's weights are multiples of the 64 numbers that share a scale."""
    folder = tmp_path_factory.mktemp("model")
    base_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(folder):
    return load_model(ModelConfig(name=str(folder), quantize="nf4"), torch.float32, CPU)


def test_weights_of_the_blocks_are_packed_two_to_a_byte(quantized):
    kinds = {name: weight.dtype for name, weight in quantized.named_parameters() if "norm" not in name}
    packed = [name for name, dtype in kinds.items() if dtype == torch.uint8]
    assert len(packed) == 2 * 7
    assert {name for name in kinds if name not in packed} == {"model.embed_tokens.weight", "lm_head.weight"}
    projection = quantized.model.layers[0].mlp.gate_proj.weight
    assert projection.numel() == 64 * 128 / 2
    assert not any(weight.requires_grad for weight in quantized.parameters())


def test_its_first_blocks_share_its_packed_weights(quantized):
    first, batch = few_blocks(quantized, [0]).eval(), batch_of([9, 6])
    packed, of_base = (model.get_submodule("model.layers.0.mlp.gate_proj").weight for model in (first, quantized))
    assert packed.dtype == torch.uint8
    assert packed.data_ptr() == of_base.data_ptr()
    logits = first(batch.input_ids).logits
    blocks = [block.register_forward_hook(lambda _, args, __: args[0]) for block in quantized.model.layers[1:]]
    assert torch.equal(quantized.eval()(batch.input_ids).logits, logits)
    for block in blocks:
        block.remove()


def test_the_exact_sketch_is_the_gradient_of_the_quantised_model(quantized):
    probe = find_probe(quantized)
    assert probe.layer == "model.layers.1.self_attn.v_proj"
    module = ExampleLoss(add_adapters(quantized, LoraConfig(rank=4), seed=0))
    tap = Tap(module, probe)
    batch = batch_of([9, 6])
    losses, delta, a = tap.factors(batch)
    found = torch.einsum("bto,btr->bor", delta, a)
    for row in range(2):
        (expected,) = torch.autograd.grad(
            module(batch)[row], tap.lora_b.weight
        )
        # float32 sums over a few tokens, once forwards and once backwards
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert losses.isfinite().all()


@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_packed_weights_are_not_cut_into_shards(sharding):
    with pytest.raises(UserError, match=f"--model.quantize nf4 does not work with {sharding}"):
        check_kernels(ModelConfig(quantize="nf4"), TrainConfig(), sharding)
    check_kernels(ModelConfig(quantize="nf4"), TrainConfig(), None)


def test_without_its_package_it_is_refused(monkeypatch):
    monkeypatch.setattr(load, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"nf4 requires bitsandbytes: pip install 'colm_scale\[quantize\]'"):
        check_kernels(ModelConfig(quantize="nf4"), TrainConfig(), None)


def test_a_float32_tail_gives_4_bit_layers_float32_activations_and_leaves_them_as_they_are(folder):
    base = load_model(ModelConfig(name=str(folder), quantize="nf4"), torch.bfloat16, CPU)
    probe = find_probe(base)
    tap, batch = Tap(ExampleLoss(add_adapters(base, LoraConfig(rank=4), seed=0)), probe), batch_of([9, 6])
    tap.bare_losses(batch)  # bitsandbytes packs its weights anew in its first forward on some CPUs
    projection, types = base.model.layers[1].mlp.down_proj, []
    before = projection.weight.clone()
    projection.register_forward_hook(lambda _module, args, output: types.extend([args[0].dtype, output.dtype]))
    with float32_tail(tap, 1):
        losses = tap.bare_losses(batch)
    assert types == [torch.float32, torch.float32]
    assert torch.equal(projection.weight, before)
    # Two ways to round activations of size 1 to 8 bits in a layer or two.
    torch.testing.assert_close(losses, tap.bare_losses(batch), rtol=0.02, atol=0)
