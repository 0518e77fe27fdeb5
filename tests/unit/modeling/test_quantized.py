"""A base in 4 bits looks like any other: the hooks act on activations. bitsandbytes runs on CPUs too."""

from __future__ import annotations

import pytest
import torch
from support.families import base_model, batch_of
from torch import nn

from colm_scale.checkpoint.identity import model_digest
from colm_scale.config import LoraConfig, ModelConfig, TrainConfig
from colm_scale.engines.base import trainable
from colm_scale.errors import UserError
from colm_scale.modeling import load
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import check_kernels, load_model, weights_of
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import few_blocks, find_probe
from colm_scale.modeling.weights import META
from colm_scale.randomness import generator
from colm_scale.sketch.precision import float32_tail
from colm_scale.sketch.tap import Tap

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from colm_scale.modeling.quantised import PackedLinear

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of which every block's weights are multiples of the 64 numbers that share a scale."""
    folder = tmp_path_factory.mktemp("model")
    base_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(folder):
    return whole_model(folder)


def whole_model(folder, dtype=torch.float32):
    """As one process loads it, with bitsandbytes' own layers."""
    return load_model(ModelConfig(name=str(folder), quantize="nf4"), dtype, CPU)


def packed_model(folder, dtype=torch.float32):
    """As an engine that shards fills it, before it cuts, with adapters; its weights, and its probe."""
    config = ModelConfig(name=str(folder), quantize="nf4")
    model = load_model(config, dtype, META)
    weights, probe = weights_of(model, config, CPU), find_probe(model)
    with weights.adding_adapters(new=True):
        adapted = add_adapters(model, LORA, seed=0)
    for module in [*adapted.modules()][::-1]:
        weights.fill(module)
    return adapted, weights, probe


def in_4_bits(model) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def packed_layer(inputs: int, outputs: int, storage: torch.dtype = torch.float32) -> PackedLinear:
    layer = PackedLinear(inputs, outputs, bias=False, compute_dtype=torch.float32)
    layer.source_cls = nn.Linear
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator(0, "layer")), requires_grad=False)
    layer.pack(CPU, storage)
    return layer


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
        (expected,) = torch.autograd.grad(module(batch)[row], tap.lora_b.weight)
        # float32 sums over a few tokens, once forwards and once backwards
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert losses.isfinite().all()


def test_after_an_evaluation_it_computes_and_differentiates_as_before(folder):
    """bitsandbytes would change to products in bfloat16 without gradients, on CPUs that have them."""
    layer = whole_model(folder).model.layers[0].mlp.down_proj
    x = torch.randn(5, 128, generator=generator(0, "x"), requires_grad=True)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(layer.eval()(x.detach()), output)
    again = layer.train()(x)
    assert torch.equal(again, output)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], gradient)


# In the form that can be cut into shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_packed_weights_are_those_of_one_process(tmp_path, family, dtype):
    """gpt2 has its weights transposed, some of them square; phi and gpt2 have biases."""
    base_model(family).save_pretrained(tmp_path)
    whole, (packed, weights, _) = add_adapters(whole_model(tmp_path, dtype), LORA, 0), packed_model(tmp_path, dtype)
    expected, found = in_4_bits(whole), in_4_bits(packed)
    assert [*found] == [*expected]
    for name, layer in found.items():
        codes, state = layer.unpacked()
        assert torch.equal(codes, expected[name].weight)
        weight = dequantize_4bit(expected[name].weight, expected[name].weight.quant_state)
        assert torch.equal(dequantize_4bit(codes, state), weight)
        assert layer.weight.dtype == dtype
    batch = batch_of([9, 6])
    assert torch.equal(packed(batch.input_ids).logits, whole(batch.input_ids).logits)
    assert model_digest(packed, weights) == model_digest(whole)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (10, 6), (6, 1), (2, 3)])
def test_any_size_is_packed_into_whole_numbers(inputs, outputs, storage):
    """A code has 4 bits, and a scale of 8 bits is for 64 of them."""
    layer = packed_layer(inputs, outputs, storage)
    used = -(-inputs * outputs // 2) + -(-inputs * outputs // 64)
    assert used <= layer.weight.nbytes < used + storage.itemsize
    assert layer.weight.dtype == storage
    codes, state = layer.unpacked()
    assert codes.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr(), "a view"
    weight = dequantize_4bit(codes, state)
    assert weight.shape == (outputs, inputs)
    x = torch.randn(5, inputs, generator=generator(0, "x"), requires_grad=True)
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], weight.sum(0).expand(5, -1))


def test_the_graph_holds_no_weight():
    """An engine takes it away after the forward, and gathers it again for the backward."""
    layer, other = packed_layer(64, 48), packed_layer(64, 48)
    other.weight.data = torch.roll(other.weight.data, 1)
    x = torch.ones(1, 64, requires_grad=True)
    output = layer(x)
    layer.weight.data = other.weight.data
    expected = dequantize_4bit(*other.unpacked()).sum(0)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0][0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_those_of_one_process(folder, dtype):
    expected, found = (
        trainable(model)
        for model in (add_adapters(whole_model(folder, dtype), LORA, 0), packed_model(folder, dtype)[0])
    )
    assert [*found] == [*expected]
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_without_its_package_it_is_refused(monkeypatch):
    monkeypatch.setattr(load, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"nf4 requires bitsandbytes: pip install 'colm_scale\[quantize\]'"):
        check_kernels(ModelConfig(quantize="nf4"), TrainConfig())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_float32_tail_gives_4_bit_layers_float32_activations_and_leaves_them_as_they_are(folder, sharded):
    if sharded:
        adapted, _, probe = packed_model(folder, torch.bfloat16)
    else:
        base = whole_model(folder, torch.bfloat16)
        probe, adapted = find_probe(base), add_adapters(base, LORA, seed=0)
    tap, batch = Tap(ExampleLoss(adapted), probe), batch_of([9, 6])
    projection, types = adapted.get_base_model().model.layers[1].mlp.down_proj.base_layer, []
    before = projection.weight.clone()
    projection.register_forward_hook(lambda _module, args, output: types.extend([args[0].dtype, output.dtype]))
    with float32_tail(tap, 1):
        losses = tap.bare_losses(batch)
    assert types == [torch.float32, torch.float32]
    assert torch.equal(projection.weight.view(torch.uint8), before.view(torch.uint8))  # some are not a number
    # Two ways to round activations of size 1 to 8 bits in a layer or two.
    torch.testing.assert_close(losses, tap.bare_losses(batch), rtol=0.02, atol=0)
