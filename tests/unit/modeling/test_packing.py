from __future__ import annotations

import re

import pytest
import torch
from support.families import FAMILIES, adapted_model, base_model, batch_of, with_adapters
from support.zoo import ZOO
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from colm_scale.errors import UserError
from colm_scale.modeling import attention
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import Tried, check_flash, use_packing
from colm_scale.modeling.probe import copy_of_blocks, kinds_of_blocks
from colm_scale.records import Batch
from colm_scale.sketch.precision import without_flash_attention

CPU = torch.device("cpu")
LENGTHS = [9, 4, 7]
SHARES = torch.tensor([0.5, 0.2, 0.3])
PACKS = [family for family in FAMILIES if family not in ("gemma2", "bloom")]
"""These two have an attention of their own: capped, and with positions as a bias."""


def packing_model(family: str, **options) -> ExampleLoss:
    base = base_model(family, **options)
    assert use_packing(base, "on", CPU) == Tried()
    return ExampleLoss(with_adapters(base))


def losses_and_gradients(module: ExampleLoss, batch: Batch) -> list[torch.Tensor]:
    losses = module(batch)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [losses.detach(), *torch.autograd.grad((losses * SHARES).sum(), trained)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", PACKS)
def test_packed_examples_have_the_losses_and_gradients_of_padded_ones(family, checkpointing):
    expected = losses_and_gradients(ExampleLoss(adapted_model(family)), batch_of(LENGTHS))
    module = packing_model(family)
    assert module.packs
    if checkpointing:
        keep_block_inputs_only(module.causal_model)
    found = losses_and_gradients(module, batch_of(LENGTHS, packed=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = losses_and_gradients(module, batch_of(LENGTHS))  # padded ones are taken as before
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [3, 8, 9, 64])
@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_is_kept(family, window):
    expected = ExampleLoss(adapted_model(family, sliding_window=window))(batch_of(LENGTHS))
    found = packing_model(family, sliding_window=window)(batch_of(LENGTHS, packed=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if window == 3:
        wide = ExampleLoss(adapted_model(family, sliding_window=64))(batch_of(LENGTHS))
        assert not torch.allclose(wide, expected, rtol=1e-3)


@pytest.mark.parametrize("window", [3, 4096])
def test_a_sliding_window_that_only_the_masks_know_is_found_out(window):
    model = base_model("phimoe", num_local_experts=4, sliding_window=window)
    assert use_packing(model, "auto", CPU) == Tried("PhimoeForCausalLM computes something else with packed rows")
    assert model.config.sliding_window == window
    assert use_packing(base_model("phimoe", num_local_experts=4, sliding_window=None), "auto", CPU) == Tried()


def test_examples_of_one_length_are_not_laid_apart(monkeypatch):
    module, lengths = packing_model("llama"), [5, 5, 5]
    expected = ExampleLoss(adapted_model("llama"))(batch_of(lengths))
    monkeypatch.setattr(torch, "searchsorted", lambda *_, **__: pytest.fail("places were looked for"))
    torch.testing.assert_close(module(batch_of(lengths, packed=True)), expected, rtol=1e-5, atol=1e-6)


def test_generation_is_as_before():
    plain, packs = base_model("llama").eval(), base_model("llama").eval()
    assert use_packing(packs, "auto", CPU) == Tried()
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), packs.generate(ids, **options))


def test_a_model_that_cannot_keeps_its_attention_and_says_why():
    model = base_model("llama")

    def refuse(_module, _args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise ValueError("positions are mine to make")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    reason = "LlamaForCausalLM does not take packed rows (ValueError: positions are mine to make)"
    assert use_packing(model, "auto", CPU) == Tried(reason)
    assert not ExampleLoss(model).packs
    with pytest.raises(UserError, match=re.escape(f"--train.packing on: {reason}; leave it out")):
        use_packing(model, "on", CPU)


def test_packing_that_is_not_wanted_is_not_tried():
    model = base_model("llama")
    assert use_packing(model, "off", CPU) == Tried("--train.packing off")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_another_attention_is_left_alone(family):
    model = base_model(family, attn_implementation="eager")  # their own choice, Gemma-2's since transformers 5.21
    assert use_packing(model, "auto", CPU) == Tried("attention eager takes no packed rows")
    assert not ExampleLoss(model).packs


def test_attention_in_chunks_stays_padded():
    model = base_model("llama", attention_chunk_size=8)
    reason = "LlamaForCausalLM attends within chunks, which packed rows do not keep apart"
    assert use_packing(model, "auto", CPU) == Tried(reason)
    assert not ExampleLoss(model).packs


def test_a_model_whose_examples_see_each_other_is_found_out():
    # As a layer that mixes neighbouring tokens does: convolutions and recurrences of hybrid models.
    def leak(_module, args, output):
        return output + 1e-3 * output.roll(1, dims=1)

    model = base_model("llama")
    for block in model.model.layers:
        block.mlp.register_forward_hook(leak)
    assert use_packing(model, "auto", CPU) == Tried("in packed rows, the examples of LlamaForCausalLM see each other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_experts_that_round_otherwise_beside_other_examples_are_packed(family, dtype):
    experts = {"mixtral": "num_local_experts", "olmoe": "num_experts"}[family]
    assert use_packing(base_model(family, dtype, num_experts_per_tok=2, **{experts: 4}), "auto", CPU) == Tried()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_over_borders_are_found_out_even_if_their_effect_is_below_half_precision(dtype):
    model = base_model("lfm2", dtype, layer_types=["conv", "full_attention"])
    expected = "in packed rows, the examples of Lfm2ForCausalLM see each other"
    assert use_packing(model, "auto", CPU).padded_because == expected


def test_absolute_positions_that_do_not_restart_are_found_out():
    model = base_model("gpt2")
    places = model.transformer.wpe
    places.register_forward_pre_hook(lambda _module, args: (torch.arange(args[0].shape[-1])[None],))
    assert use_packing(model, "auto", CPU) == Tried("GPT2LMHeadModel computes something else with packed rows")


class Kernel:
    """Stands for the flash kernel, the outermost call: each sequence by plain attention."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(attention, "varlen_attn", self)
        monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)

    def __call__(self, q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        self.calls += 1
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert cu_seq_q.dtype == torch.int32
        assert cu_seq_q[0] == 0
        assert cu_seq_q[-1] == len(q) == len(k) == len(v)
        assert q.shape == k.shape == v.shape
        assert max_q == max_k == cu_seq_q.diff().max()
        back, ahead = window_size
        assert ahead == 0
        found = []
        for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
            tokens = torch.arange(end - start)
            behind = tokens.unsqueeze(1) - tokens
            mask = (behind >= 0) & ((behind <= back) | (back == -1))
            of_example = (x[start:end].transpose(0, 1) for x in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(*of_example, attn_mask=mask, scale=scale)
            found.append(out.transpose(0, 1))
        return torch.cat(found)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("phi", {}), ("mistral", {"sliding_window": 3})])
def test_the_flash_kernel_gets_what_it_takes(monkeypatch, family, options):
    expected = losses_and_gradients(ExampleLoss(adapted_model(family, **options)), batch_of(LENGTHS))
    kernel = Kernel(monkeypatch)
    module = packing_model(family, **options)
    found = losses_and_gradients(module, batch_of(LENGTHS, packed=True))
    assert kernel.calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def replaced(monkeypatch, kernel, model: nn.Module) -> str:
    """Why the kernel is not used, if packed rows run without it."""
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    padded_because, sdpa_because = use_packing(model, "auto", CPU)
    assert padded_because == ""
    assert model.config._attn_implementation == PACKED_SDPA
    assert sdpa_because.endswith("; another version of torch may not")
    return sdpa_because.removesuffix("; another version of torch may not")


def test_a_kernel_that_fails_is_replaced(monkeypatch):
    because = replaced(monkeypatch, attention.varlen_attn, base_model("llama"))  # which does not run on a CPU
    assert because.startswith("LlamaForCausalLM does not take packed rows (NotImplementedError: ")
    assert "\n" not in because


def test_a_kernel_without_an_argument_is_found_out(monkeypatch):
    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, is_causal=False, scale=None):
        raise AssertionError("it was not given its arguments")

    because = replaced(monkeypatch, kernel, base_model("llama"))
    assert "(TypeError: " in because
    assert "unexpected keyword argument 'window_size'" in because


class Lacks(torch.autograd.Function):
    """Returns what it is given, and fails in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise TypeError("backward() got an unexpected keyword argument 'window_size_left'")


def test_a_kernel_whose_backward_lacks_an_argument_is_found_out(monkeypatch):
    kernel = Kernel(monkeypatch)
    because = replaced(monkeypatch, lambda *args, **options: Lacks.apply(kernel(*args, **options)), base_model("llama"))
    assert "(TypeError: backward() got an unexpected keyword argument 'window_size_left')" in because


def test_a_kernel_with_another_gradient_is_found_out(monkeypatch):
    kernel = Kernel(monkeypatch)
    because = replaced(
        monkeypatch, lambda q, k, *args, **options: kernel(q, k.detach(), *args, **options), base_model("llama")
    )
    assert because == "LlamaForCausalLM computes something else with packed rows"


def mixed_model() -> nn.Module:
    """A model whose last but one block has a sliding window of 3 tokens."""
    kinds = ["full_attention"] * 3 + ["sliding_attention", "full_attention"]
    return base_model("qwen2", num_hidden_layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=3)


def test_blocks_of_every_kind_are_tried(monkeypatch):
    kernel = Kernel(monkeypatch)

    def without_windows(*args, window_size, **options):
        assert window_size[0] == -1, "no windows"
        return kernel(*args, window_size=window_size, **options)

    assert "(AssertionError: no windows" in replaced(monkeypatch, without_windows, mixed_model())


def test_a_model_of_several_kinds_of_blocks_packs(monkeypatch):
    expected = losses_and_gradients(ExampleLoss(with_adapters(mixed_model())), batch_of(LENGTHS))
    kernel, base = Kernel(monkeypatch), mixed_model()
    assert kinds_of_blocks(base) == [0, 1, 3]
    assert use_packing(base, "on", CPU) == Tried()
    assert base.config.layer_types.index("sliding_attention") == 3
    found = losses_and_gradients(ExampleLoss(with_adapters(base)), batch_of(LENGTHS, packed=True))
    assert kernel.calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_with_other_layers_are_of_another_kind():
    model = base_model("llama", num_hidden_layers=4)
    model.model.layers[2].mlp = nn.Linear(32, 32)
    assert kinds_of_blocks(model) == [0, 1, 2]


def flash_model(monkeypatch, kernel) -> nn.Module:
    """A model that was loaded with flash-attn, for which ``kernel`` stands."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", kernel)
    model = base_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    return model


def flash(module, query, key, value, attention_mask, **_):
    attend = nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


def old_flash(*args, **options):
    return Lacks.apply(flash(*args, **options)[0]), None


def test_flash_attention_that_fails_is_left_out(monkeypatch):
    model = flash_model(monkeypatch, old_flash)
    assert check_flash(model, "auto", CPU) == (
        "LlamaForCausalLM fails with flash_attention_2 (TypeError: backward() got an unexpected keyword argument "
        "'window_size_left'); another version of flash-attn may not"
    )
    assert model.config._attn_implementation == "sdpa"
    assert check_flash(model, "auto", CPU) == ""


@pytest.mark.parametrize("padded", [True, False])
def test_flash_attention_is_tried_with_and_without_padding(monkeypatch, padded):
    def kernel(module, query, key, value, attention_mask, **options):
        assert (attention_mask is None) is padded, "not this one"
        return flash(module, query, key, value, attention_mask, **options)

    assert "not this one" in check_flash(flash_model(monkeypatch, kernel), "auto", CPU)


def test_flash_attention_that_was_asked_for_and_fails_is_an_error(monkeypatch):
    model = flash_model(monkeypatch, old_flash)
    with pytest.raises(UserError, match=r"--model.attention flash_attention_2: .* use sdpa, or another version"):
        check_flash(model, "flash_attention_2", CPU)


def test_flash_attention_that_runs_is_kept(monkeypatch):
    model = flash_model(monkeypatch, flash)
    assert check_flash(model, "auto", CPU) == ""
    assert model.config._attn_implementation == "flash_attention_2"


def test_without_flash_attention_rows_stay_packed(monkeypatch):
    module, batch = packing_model("llama"), batch_of(LENGTHS, packed=True)
    expected = module(batch)
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: pytest.fail("flash attention was asked for"))
    with without_flash_attention(module):
        assert torch.equal(module(batch), expected)
    assert module.causal_model.config._attn_implementation == PACKED


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "jamba"])
def test_blocks_whose_types_the_configuration_computes_are_tried_out_too(family):
    """Jamba's blocks are of two classes besides, so its list is one of several types."""
    model = base_model(family, **ZOO[family].options)
    reason = use_packing(model, "auto", CPU).padded_because
    assert reason == f"in packed rows, the examples of {type(model).__name__} see each other"


def test_a_copy_of_blocks_computes_with_their_own_types():
    """Bamba's second block is one of attention, wherever it stands."""
    model = base_model("bamba", **ZOO["bamba"].options)
    alone = copy_of_blocks(model, [1])
    assert alone.config.layer_types == ["full_attention", "linear_attention"]
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    assert type(alone.model.layers[0]) is type(model.model.layers[1])
