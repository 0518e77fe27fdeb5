"""Weights that are read part by part are those of a model that is loaded whole, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, base_model, fill

from colm_scale.checkpoint.identity import model_digest
from colm_scale.config import LoraConfig, ModelConfig
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import load_model, weights_of
from colm_scale.modeling.weights import META, WHOLE

CPU = torch.device("cpu")
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
}
"""The files hold each expert, the model all of a block in one tensor."""


def save(folder, family: str, **options) -> ModelConfig:
    """Save a model in several files."""
    base_model(family, **options).save_pretrained(folder, max_shard_size="30KB")
    return ModelConfig(name=str(folder))


def rewrite(folder, change) -> None:
    """Change the tensors of a model in a single file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def by_parts(config: ModelConfig, dtype: torch.dtype = torch.float32):
    """The model, its weights, and its parts: what is outside the blocks in one, then each block."""
    model = load_model(config, dtype, META)
    return model, weights_of(model, config, CPU)


def fill_by_parts(model, weights) -> None:
    for module in [*model.modules()][::-1]:
        weights.fill(module)


def tensors(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    whole = load_model(config, dtype, CPU)
    model, weights = by_parts(config, dtype)
    fill_by_parts(model, weights)
    expected, found = tensors(whole), tensors(model)
    assert [*found] == [*expected]
    assert {name: (t.dtype, t.device) for name, t in found.items()} == {
        name: (t.dtype, t.device) for name, t in expected.items()
    }
    assert [name for name, t in found.items() if not torch.equal(t, expected[name])] == []
    assert model_digest(model, weights) == model_digest(whole)
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_weights_and_buffers(tmp_path, family, dtype):
    assert_equal(save(tmp_path, family, **MIXTURES.get(family, {})), dtype)


@pytest.mark.parametrize("held", ["embed", "head", "both", "both and different"])
def test_one_weight_for_embedding_and_head(tmp_path, held):
    base_model("qwen2").save_pretrained(tmp_path)

    def change(found):
        embedding = found.pop("model.embed_tokens.weight")
        both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + (held == "both and different")}
        names = {"embed": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}.get(held, [*both])
        return found | {name: both[name] for name in names}

    rewrite(tmp_path, change)
    assert_equal(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keys_without_the_prefix_of_the_decoder(tmp_path, family):
    base_model(family, tie_word_embeddings=True).save_pretrained(tmp_path)
    prefix = {"llama": "model.", "gpt2": "transformer."}[family]
    rewrite(tmp_path, lambda found: {name.removeprefix(prefix): tensor for name, tensor in found.items()})
    assert_equal(ModelConfig(name=str(tmp_path)))


def test_before_a_part_is_filled_nothing_of_it_is_in_memory(tmp_path):
    model, weights = by_parts(save(tmp_path, "llama"))
    weights.fill(model.model.layers[0])
    here = {name for name, weight in model.named_parameters() if not weight.is_meta}
    assert here == {name for name, _ in model.named_parameters() if name.startswith("model.layers.0.")}
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_weight_that_is_missing_is_refused_before_any_is_read(tmp_path):
    base_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: {name: t for name, t in found.items() if "layers.1.mlp.up" not in name})
    with pytest.raises(UserError, match=r"1 weights that .* model.layers.1.mlp.up_proj.weight"):
        by_parts(ModelConfig(name=str(tmp_path)))


def test_files_of_other_names(tmp_path):
    base_model("llama").save_pretrained(tmp_path)
    other = base_model("llama")
    fill(other.parameters(), "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "chosen.safetensors")
    options = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(options | {"transformers_weights": "chosen.safetensors"}))
    assert_equal(ModelConfig(name=str(tmp_path)))
    model = load_model(ModelConfig(name=str(tmp_path)), torch.float32, CPU)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_a_model_whose_files_are_quantised_is_loaded_whole(tmp_path):
    pytest.importorskip("bitsandbytes")
    save(tmp_path / "base", "llama")
    packed = load_model(ModelConfig(name=str(tmp_path / "base"), quantize="nf4"), torch.float32, CPU)
    packed.save_pretrained(tmp_path / "packed")
    config = ModelConfig(name=str(tmp_path / "packed"))
    model = load_model(config, torch.float32, META)
    assert weights_of(model, config, CPU) is WHOLE
    assert tensors(model)["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


def test_a_model_that_has_its_weights_is_left_alone():
    model = load_model(ModelConfig(), torch.float32, CPU)
    assert weights_of(model, ModelConfig(), CPU) is WHOLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_adapters_are_those_of_a_model_with_its_weights(tmp_path, family, dtype):
    config = save(tmp_path / "base", family)
    whole = add_adapters(load_model(config, dtype, CPU), LoraConfig(rank=3), seed=7)
    model, weights = by_parts(config, dtype)
    before = torch.get_rng_state()
    with weights.adding_adapters(new=True):
        adapted = add_adapters(model, LoraConfig(rank=3), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.is_meta for weight in adapted.parameters())
    fill_by_parts(model, weights)
    expected, found = tensors(whole), tensors(adapted)
    assert [*found] == [*expected]
    assert [name for name, t in found.items() if not torch.equal(t, expected[name])] == []
    assert all((t.dtype, t.requires_grad) == (expected[n].dtype, expected[n].requires_grad) for n, t in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_are_trained_further(tmp_path, dtype):
    config, adapter = save(tmp_path / "base", "llama"), LoraConfig(adapter=str(tmp_path / "adapter"))
    trained = add_adapters(load_model(config, torch.float32, CPU), LoraConfig(rank=3), seed=7)
    fill((weight for weight in trained.parameters() if weight.requires_grad), "trained")
    trained.save_pretrained(adapter.adapter)
    whole = tensors(add_adapters(load_model(config, dtype, CPU), adapter, seed=8))
    model, weights = by_parts(config, dtype)
    with weights.adding_adapters(new=False):
        adapted = add_adapters(model, adapter, seed=9)
    found = tensors(adapted)
    assert all(weight.is_meta != weight.requires_grad for weight in adapted.parameters())
    assert all(torch.equal(t, whole[name]) for name, t in found.items() if t.requires_grad)
    fill_by_parts(model, weights)
    assert all(torch.equal(t, whole[name]) for name, t in found.items() if not t.is_meta)
