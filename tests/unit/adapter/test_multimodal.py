"""Merging a text adapter into a model that sees: the whole model comes out, its towers as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import multimodal
from support.families import base_model, fill
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from colm_scale.adapter.merge import export
from colm_scale.base import BASE_MODEL
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import EvalConfig, LoraConfig, ModelConfig, RunConfig, as_yaml
from colm_scale.config.commands import MergeConfig
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import load_model, load_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43).view(2, 20)
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
FAMILIES = [family for family in ("gemma3", "llama4", "qwen3_5") if family in multimodal.FAMILIES]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Path:
    """A model with its processor's files, one of them an older one with the chat template."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    base_model(request.param, vocab_size=len(tokenizer)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"size": 16}')
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def run(base) -> Path:
    """A run with an adapter and a checkpoint of it."""
    path = base / "run"
    model = add_adapters(load_model(ModelConfig(name=str(base)), torch.float32, CPU), LoraConfig(rank=4), 0).eval()
    fill((weight for weight in model.parameters() if weight.requires_grad), "trained")
    model.save_pretrained(path / "adapter")
    weights = {f"model.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    CheckpointFolder(path / "checkpoints", 2).write(7, {"step": 7}, {"adapter": weights})
    config = RunConfig(
        model=ModelConfig(name=str(base)), lora=LoraConfig(rank=4), eval=EvalConfig(every=0), output_dir=str(path)
    )
    (path / "config.yaml").write_text(as_yaml(config), "utf-8")
    return path


def whole(path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("what", ["adapter", "checkpoints/step-00000007"])
def test_the_merged_model_is_whole(base, run, tmp_path, what):
    merged = export(MergeConfig(run=str(run / what), output=str(tmp_path / "merged")))
    # Changed by a unit in the last place each, the weights of the recurrent Qwen3.5 move its logits by up to 6e-4 of
    # the largest, those of the others by 4e-6.
    recurrent = "linear_attention" in (AutoConfig.from_pretrained(base).get_text_config().layer_types or [])
    rounding = (1e-3 if recurrent else 1e-5) * merged.largest
    assert merged.difference <= rounding
    before, after = whole(base), whole(merged.place)
    expected = logits(PeftModel.from_pretrained(whole(base), str(run / "adapter")))
    assert torch.allclose(logits(after), expected, atol=rounding)
    same = {name for name, weight in after.named_parameters() if torch.equal(weight, before.get_parameter(name))}
    changed = {name for name, _ in after.named_parameters()} - same
    assert all(set(name.split(".")) & {"self_attn", "mlp", "linear_attn", "feed_forward"} for name in changed)
    assert any("vision" in name or "visual" in name for name in same)
    assert not any("vision" in name or "visual" in name for name in changed)
    assert json.loads((merged.place / "preprocessor_config.json").read_text()) == {"size": 16}
    assert (merged.place / "chat_template.jinja").read_text() == TEMPLATE
    assert not (merged.place / "chat_template.json").exists()


def test_the_tokenizer_has_the_template_of_the_processor(base):
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"
