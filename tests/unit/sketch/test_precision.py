"""The float32 tail: what runs in which type, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from support.families import BLOCKS, FAMILIES, PROBES, ROWS, adapted_model, base_model, batch_of, with_adapters
from torch import Tensor

from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe
from colm_scale.sketch.precision import float32_tail, without_flash_attention
from colm_scale.sketch.tap import Tap
from colm_scale.sketch.zeroth_order import directional_derivatives, probes

HALF = [torch.bfloat16, torch.float16]
LENGTHS = [9, 5, 7, 12]
EPS = 1e-3


def tap_of(family: str, dtype: torch.dtype, **options) -> Tap:
    probe = Probe(BLOCKS[family], PROBES[family], torch.tensor(ROWS[family]))
    return Tap(ExampleLoss(adapted_model(family, dtype, **options)), probe)


def products(tap: Tap, batch, z: Tensor) -> Tensor:
    """``<G_i, z_k>`` ``[B, K]`` from the factors of the gradients."""
    _, delta, a = tap.factors(batch)
    return (delta.transpose(1, 2) @ a).flatten(1) @ z.T


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_in_half_precision_become_derivatives(family, dtype, record_property):
    """With the default step, beside the exact derivatives of the same weights in float32 throughout."""
    tap, batch = tap_of(family, dtype), batch_of(LENGTHS)
    whole = tap_of(family, dtype)
    whole.model.float()
    z = probes(0, 8, tap.size, torch.device("cpu"))
    exact = products(whole, batch, z)
    errors = [relative_error(directional_derivatives(tap, batch, z, EPS)[1], exact)]
    for blocks in (1, 2):
        with float32_tail(tap, blocks):
            errors.append(relative_error(directional_derivatives(tap, batch, z, EPS)[1], exact))
    record_property("relative errors", errors)
    # Without it a difference of some 1e-3 is rounded to 2^-9 or 2^-12 of activations of size 1. With one block, what
    # enters it is rounded, a few times 2^-9 or 2^-12 of it; with both only the embeddings are, which are stored so.
    # What remains is the rounding of losses of 5 to 2^-22, divided by 2 eps: 1e-4 beside derivatives of 0.1 and more.
    assert errors[0] > (1 if dtype == torch.bfloat16 else 0.15)
    assert errors[1] < (0.15 if dtype == torch.bfloat16 else 0.02)
    assert errors[2] < (0.03 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_base_has_the_same_losses_bit_for_bit(family):
    tap, batch = tap_of(family, torch.float32), batch_of(LENGTHS)
    expected = tap.bare_losses(batch)
    for blocks in (1, 2, 5):
        with float32_tail(tap, blocks):
            assert torch.equal(tap.bare_losses(batch), expected)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_the_last_blocks_the_norm_and_the_head_run_in_float32_and_no_other(blocks):
    tap, batch = Tap(*four_blocks()), batch_of(LENGTHS)
    model, types = tap.model.causal_model, {}
    layers = [(f"{i}.{name}", m) for i, b in enumerate(model.model.layers) for name, m in b.named_modules()]
    layers += [("norm", model.model.norm), ("head", model.lm_head), ("embedding", model.model.embed_tokens)]

    def watch(name: str):
        return lambda _module, _args, output: types.update({name: first(output).dtype})

    for name, layer in layers:
        layer.register_forward_hook(watch(name))
    with float32_tail(tap, blocks):
        tap.bare_losses(batch)
    tail = {name for name, _ in layers if name[0].isdigit() and int(name[0]) >= 4 - blocks} | {"norm", "head"}
    adapters = {name for name in types if ".lora_" in name}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == (tail | adapters) & types.keys()
    assert types["embedding"] == torch.bfloat16
    assert len(tail & types.keys()) > 10 * blocks


def four_blocks():
    model = ExampleLoss(with_adapters(base_model("llama", torch.bfloat16, num_hidden_layers=4)))
    return model, Probe("model.layers.3", "model.layers.3.self_attn.v_proj", torch.tensor(ROWS["llama"]))


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def weights_of(model: ExampleLoss) -> list:
    """What the model's layers have for weights, and how often they are watched."""
    weights = [
        (name, id(weight), weight.dtype, weight._version)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None
    ]
    return [*weights, *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied and not tied to the embedding
def test_nothing_of_it_stays_also_when_the_forward_fails(family):
    tap, batch = tap_of(family, torch.bfloat16), batch_of(LENGTHS)
    before, losses = weights_of(tap.model), tap.bare_losses(batch)
    with float32_tail(tap, 2):
        within = tap.bare_losses(batch)
    assert not torch.equal(within, losses)
    assert weights_of(tap.model) == before
    assert torch.equal(tap.bare_losses(batch), losses)

    def fail(*_):
        raise RuntimeError("within a layer")

    handle = tap.block.mlp.down_proj.base_layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="within a layer"), float32_tail(tap, 2):
        tap.bare_losses(batch)
    handle.remove()
    assert weights_of(tap.model) == before
    assert torch.equal(tap.bare_losses(batch), losses)


def test_one_layer_s_copy_is_alive_at_a_time():
    tap, copies = tap_of("llama", torch.bfloat16), []
    layers = [module for module in tap.model.modules() if module._parameters]

    def count(*_):
        copies.append(sum(weight.dtype == torch.float32 for layer in layers for weight in lent(layer)))

    def lent(layer):
        return [weight for weight in layer._parameters.values() if weight is not None and not weight.requires_grad]

    with float32_tail(tap, 2):
        for layer in layers:
            layer.register_forward_hook(count, prepend=True)  # while it is still lent
        tap.bare_losses(batch_of(LENGTHS))
    assert max(copies) == 1


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_checkpointed_blocks_have_the_same_losses(dtype):
    tap, batch = tap_of("llama", dtype), batch_of(LENGTHS)
    with float32_tail(tap, 2):
        before = tap.bare_losses(batch)
    tap.model.model.enable_input_require_grads()
    tap.model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with float32_tail(tap, 2):
        assert torch.equal(tap.bare_losses(batch), before)


@pytest.mark.parametrize(
    ("chosen", "within"),
    [("flash_attention_2", "sdpa"), ("kernels-community/flash-attn2", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")],
)
def test_flash_attention_is_sdpa_within_and_itself_behind(chosen, within):
    tap = tap_of("llama", torch.bfloat16)
    config = tap.model.causal_model.config
    config._attn_implementation_internal = chosen
    for context in (lambda: without_flash_attention(tap.model), lambda: float32_tail(tap, 2)):
        with context():
            assert tap.block.self_attn.config._attn_implementation == within
        assert config._attn_implementation == chosen
