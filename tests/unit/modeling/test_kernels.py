"""Attention and checkpointing: what is asked of transformers, and that it changes no result."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import base_model, batch_of

from colm_scale.config import LoraConfig, ModelConfig, TrainConfig
from colm_scale.errors import UserError
from colm_scale.modeling import load
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import check_kernels, keep_block_inputs_only, load_model
from colm_scale.modeling.losses import ExampleLoss

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path) -> ModelConfig:
    base_model("llama").save_pretrained(tmp_path)
    return ModelConfig(name=str(tmp_path))


@pytest.mark.parametrize(
    ("gpu", "dtype", "installed", "wrong"),
    [
        (False, "bfloat16", True, "this is a CPU with --train.dtype bfloat16: use sdpa"),
        (True, "float32", True, "this is a GPU with --train.dtype float32: use sdpa"),
        (True, "float16", False, "neither flash-attn nor kernels is installed"),
        (True, "float16", True, None),
    ],
)
def test_flash_attention_is_asked_for_where_it_can_run(monkeypatch, gpu, dtype, installed, wrong):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(load, "is_kernels_available", lambda: False)
    config, train = ModelConfig(attention="flash_attention_2"), TrainConfig(dtype=dtype)
    if wrong is None:
        check_kernels(config, train)
    else:
        with pytest.raises(UserError, match=wrong):
            check_kernels(config, train)


@pytest.mark.parametrize(
    ("gpu", "dtype", "has_it", "tried"),
    [
        (True, torch.bfloat16, True, ["flash_attention_2"]),
        (True, torch.bfloat16, False, ["flash_attention_2", None]),
        (True, torch.float32, True, [None]),
        (False, torch.bfloat16, True, [None]),
    ],
)
def test_auto_takes_flash_attention_where_it_runs_and_the_model_has_it(monkeypatch, model, gpu, dtype, has_it, tried):
    """Only the outermost call is a fake: no kernel runs here."""
    read, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(name, *, attn_implementation=None, **options):
        asked.append(attn_implementation)
        if attn_implementation and not has_it:
            raise ValueError("this model does not support flash attention")
        return read(name, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(model, dtype, CPU, prefers_flash=True)
    assert asked == tried


def test_checkpointing_of_activations_changes_neither_losses_nor_gradients(model):
    losses, gradients = [], []
    for on in (True, False):
        base = load_model(model, torch.float32, CPU)
        if on:
            keep_block_inputs_only(base)
        module, batch = ExampleLoss(add_adapters(base, LoraConfig(rank=4), seed=0)), batch_of([9, 6])
        recomputed = []
        base.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=recomputed: seen.append(1))
        loss = module(batch).sum()
        forwards = len(recomputed)
        loss.backward()
        assert len(recomputed) - forwards == on, "the block runs again in the backward pass, and only then"
        losses.append(float(loss))
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *gradients))
