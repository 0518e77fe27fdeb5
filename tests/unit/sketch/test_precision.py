"""The float32 tail: what runs in which type, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.families import BLOCKS, FAMILIES, PROBES, ROWS, adapted_model, base_model, batch_of, with_adapters
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
def test_the_last_blocks_and_the_norm_run_in_float32_and_no_other(blocks):
    """The head computes one row that nobody needs; the loss itself multiplies its weight, see `test_losses`."""
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
    tail = {name for name, _ in layers if name[0].isdigit() and int(name[0]) >= 4 - blocks} | {"norm"}
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


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_changes_nothing_in_the_tail_and_is_on_below_and_behind(family, dtype):
    """A float32 base of two blocks: with both in the tail, the differences are those without autocast."""
    tap, batch = tap_of(family, torch.float32), batch_of(LENGTHS)
    z = probes(0, 8, tap.size, torch.device("cpu"))
    expected = directional_derivatives(tap, batch, z, EPS)
    with torch.autocast("cpu", dtype):
        rounded = directional_derivatives(tap, batch, z, EPS)[1]
        with float32_tail(tap, 2):
            found = directional_derivatives(tap, batch, z, EPS)
        assert torch.is_autocast_enabled("cpu")
        with float32_tail(tap, 1):
            lower = directional_derivatives(tap, batch, z, EPS)[1]
    assert relative_error(rounded, expected[1]) > (1 if dtype == torch.bfloat16 else 0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The lower block rounds its products to 2^-9 or 2^-12, and the derivatives follow in proportion.
    assert 0 < relative_error(lower, expected[1]) < (0.3 if dtype == torch.bfloat16 else 0.02)


def test_autocast_is_off_from_the_first_block_of_the_tail_on_in_each_forward():
    model, probe = four_blocks()
    tap, seen = Tap(model.float(), probe), []
    head = model.causal_model.lm_head
    for layer in (*model.causal_model.model.layers, model.causal_model.model.norm, head):
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16), float32_tail(tap, 2):
        tap.bare_losses(batch_of(LENGTHS))
        tap.bare_losses(batch_of(LENGTHS))
    assert seen == 2 * [True, True, False, False, False, False]


@pytest.mark.parametrize("inner", [False, True])
def test_autocast_is_as_it_was_after_a_forward_that_fails(inner):
    """Also where the model's own call turns autocast on, as accelerate's does."""
    tap, batch = tap_of("llama", torch.float32), batch_of(LENGTHS)
    if inner:
        base = tap.model.causal_model
        base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)

    def fail(*_):
        raise RuntimeError("within a layer")

    tap.block.mlp.down_proj.base_layer.register_forward_pre_hook(fail)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=not inner),
        pytest.raises(RuntimeError, match="within a layer"),
    ):
        with float32_tail(tap, 2):
            tap.bare_losses(batch)
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=not inner):
        with pytest.raises(RuntimeError, match="within a layer"), float32_tail(tap, 2):
            tap.bare_losses(batch)
        assert torch.is_autocast_enabled("cpu") is not inner


def test_a_training_in_the_same_autocast_as_the_sketch_has_its_gradients():
    """Autocast keeps the casts of weights, and those from a sketch have no graph."""
    gradients = []
    for sketches in (False, True):
        tap, batch = tap_of("llama", torch.float32), batch_of(LENGTHS)
        z = probes(0, 1, tap.size, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            if sketches:
                tap.bare_losses(batch)
                with float32_tail(tap, 1):
                    directional_derivatives(tap, batch, z, EPS)
                tap.factors(batch)
            tap.model(batch).sum().backward()
        gradients.append([p.grad for p in tap.model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("alone", [False, True])
def test_the_mixed_precision_of_fsdp2_changes_nothing_in_the_tail(one_rank, alone):
    """As accelerate sets it: weights, inputs and outputs of each unit in bfloat16; with norm and head ``alone`` too.

    The adapters are lent as well: they are in bfloat16 like the base, and the same sketch without shards is known.
    """
    batch = batch_of(LENGTHS)
    whole, tap = tap_of("llama", torch.float32), tap_of("llama", torch.float32)
    for weight in whole.model.parameters():
        rounded = weight.data.bfloat16()
        weight.data = rounded.float() if weight.requires_grad else rounded
    z = probes(0, 8, tap.size, torch.device("cpu"))
    with float32_tail(whole, 2):
        expected = directional_derivatives(whole, batch, z, EPS)
    base, policy = tap.model.causal_model, MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for unit in (*base.model.layers, *([base.model.norm, base.lm_head] if alone else []), base):
        fully_shard(unit, mesh=one_rank, mp_policy=policy)
    rounded = directional_derivatives(tap, batch, z, EPS)[1]
    with float32_tail(tap, 2):
        found = directional_derivatives(tap, batch, z, EPS)
    assert relative_error(rounded, expected[1]) > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
