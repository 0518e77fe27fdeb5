from __future__ import annotations

import re

import pytest
import torch
from support.families import FAMILIES, adapted_model, base_model, batch_of, with_adapters
from torch import nn

from colm_scale.errors import UserError
from colm_scale.modeling import attention
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.records import Batch
from colm_scale.sketch.precision import without_flash_attention

CPU = torch.device("cpu")
LENGTHS = [9, 4, 7]
SHARES = torch.tensor([0.5, 0.2, 0.3])
PACKS = [family for family in FAMILIES if family not in ("gemma2", "bloom")]
"""These two have an attention of their own: capped, and with positions as a bias."""


def packing_model(family: str, **options) -> ExampleLoss:
    base = base_model(family, **options)
    assert use_packing(base, "on", CPU) == ""
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


def test_examples_of_one_length_are_not_laid_apart(monkeypatch):
    module, lengths = packing_model("llama"), [5, 5, 5]
    expected = ExampleLoss(adapted_model("llama"))(batch_of(lengths))
    monkeypatch.setattr(torch, "searchsorted", lambda *_, **__: pytest.fail("places were looked for"))
    torch.testing.assert_close(module(batch_of(lengths, packed=True)), expected, rtol=1e-5, atol=1e-6)


def test_generation_is_as_before():
    plain, packs = base_model("llama").eval(), base_model("llama").eval()
    assert use_packing(packs, "auto", CPU) == ""
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), packs.generate(ids, **options))


def test_a_model_that_cannot_keeps_its_attention_and_says_why():
    model = base_model("llama")

    def refuse(_module, _args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise ValueError("positions are mine to make")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    reason = "LlamaForCausalLM does not take packed rows (ValueError)"
    assert use_packing(model, "auto", CPU) == reason
    assert not ExampleLoss(model).packs
    with pytest.raises(UserError, match=re.escape(f"--train.packing on: {reason}; leave it out")):
        use_packing(model, "on", CPU)


def test_packing_that_is_not_wanted_is_not_tried():
    model = base_model("llama")
    assert use_packing(model, "off", CPU) == "--train.packing off"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_another_attention_is_left_alone(family):
    model = base_model(family, attn_implementation="eager")  # their own choice, Gemma-2's since transformers 5.21
    assert use_packing(model, "auto", CPU) == "attention eager takes no packed rows"
    assert not ExampleLoss(model).packs


def test_attention_in_chunks_stays_padded():
    model = base_model("llama", attention_chunk_size=8)
    reason = "LlamaForCausalLM attends within chunks, which packed rows do not keep apart"
    assert use_packing(model, "auto", CPU) == reason
    assert not ExampleLoss(model).packs


def test_a_model_whose_examples_see_each_other_is_found_out():
    # As a layer that mixes neighbouring tokens does: convolutions and recurrences of hybrid models.
    def leak(_module, args, output):
        return output + 1e-3 * output.roll(1, dims=1)

    model = base_model("llama")
    for block in model.model.layers:
        block.mlp.register_forward_hook(leak)
    assert use_packing(model, "auto", CPU) == "in packed rows, the examples of LlamaForCausalLM see each other"


def test_absolute_positions_that_do_not_restart_are_found_out():
    model = base_model("gpt2")
    places = model.transformer.wpe
    places.register_forward_pre_hook(lambda _module, args: (torch.arange(args[0].shape[-1])[None],))
    assert use_packing(model, "auto", CPU) == "GPT2LMHeadModel computes something else with packed rows"


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


def test_a_kernel_that_fails_is_replaced(monkeypatch):
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)  # and there is none on a CPU
    model = base_model("llama")
    assert use_packing(model, "auto", CPU) == ""
    assert model.config._attn_implementation == PACKED_SDPA


def test_without_flash_attention_rows_stay_packed(monkeypatch):
    module, batch = packing_model("llama"), batch_of(LENGTHS, packed=True)
    expected = module(batch)
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: pytest.fail("flash attention was asked for"))
    with without_flash_attention(module):
        assert torch.equal(module(batch), expected)
    assert module.causal_model.config._attn_implementation == PACKED
