from __future__ import annotations

import json
import re
import shutil
import time

import peft
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.families import base_model, batch_of, fill

from colm_scale.base import BASE_MODEL
from colm_scale.config import LoraConfig, ModelConfig
from colm_scale.data.hub import hub_answers
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters, check_adapter, check_trained_further
from colm_scale.modeling.load import check_model, check_vocabulary, context_length, load_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
BLOCK_LINEARS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} | {
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}


def tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<end>", "<pad>", "one", "two"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


@pytest.fixture
def folder(tmp_path):
    """A small Llama in float32 with a tokenizer that has no padding token."""
    base_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer(eos_token="<end>").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def named(folder, **options) -> ModelConfig:
    return ModelConfig(name=str(folder), **options)


def loaded(folder, dtype=torch.float32):
    return load_model(named(folder), dtype, CPU)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(match: str):
    return pytest.raises(UserError, match=match)


# The base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_are_those_of_the_folder_frozen_and_in_the_wanted_type(folder, dtype):
    state = torch.get_rng_state()
    model = loaded(folder, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    expected = base_model("llama").state_dict()
    assert {name: t.to(dtype).tolist() for name, t in expected.items()} == {
        name: t.tolist() for name, t in model.state_dict().items()
    }
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, False)}


def test_a_tied_output_embedding_is_not_missing(tmp_path):
    base_model("qwen2").save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_attention_that_caps_its_scores_is_not_sdpa_which_would_leave_the_cap_out(tmp_path):
    base_model("gemma2").save_pretrained(tmp_path)
    assert loaded(tmp_path).config._attn_implementation == "eager"


@pytest.mark.parametrize(("wanted", "found"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention(folder, wanted, found):
    model = load_model(named(folder, attention=wanted), torch.float32, CPU)
    assert model.config._attn_implementation == found


def test_without_a_name_the_packaged_model_is_meant():
    assert check_model(ModelConfig()).to_dict() == check_model(named(BASE_MODEL)).to_dict()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (transformers.BertModel, transformers.BertConfig),
        (transformers.BertForMaskedLM, transformers.BertConfig),
        (transformers.LlamaForSequenceClassification, transformers.LlamaConfig),
    ],
)
def test_other_kinds_of_model_are_refused_from_their_configuration_alone(tmp_path, model_class, config):
    config(architectures=[model_class.__name__]).save_pretrained(tmp_path)
    with refused(f"is not a causal language model, it is a {model_class.__name__}$"):
        check_model(named(tmp_path))


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    with refused("is not a causal language model, it is a T5Config$"):
        check_model(named(tmp_path))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tried = r"cannot load a model \(there is no such folder, and the hub id was tried: "
    with refused(rf"^--model\.name some-org/no-such-model: {tried}"):
        check_model(ModelConfig(name="some-org/no-such-model"))
    with refused(rf"^--model\.name {re.escape(str(tmp_path / 'a' / 'b'))}: {tried}"):
        check_model(named(tmp_path / "a" / "b"))


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    hub_answers.cache_clear()
    with pytest.raises(UserError, match=r"^--model.name org/none: cannot load a model \(there is no such folder"):
        check_model(ModelConfig(name="org/none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"^--lora.adapter org/none: no adapter can be read there"):
        check_adapter(LoraConfig(adapter="org/none"))
    hub_answers.cache_clear()


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no such type"}'])
def test_a_folder_without_a_readable_configuration(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with refused(rf"^--model\.name {re.escape(str(tmp_path))}: cannot load a model \(the folder was tried: ") as error:
        check_model(named(tmp_path))
    assert "\n" not in str(error.value)


def test_code_that_a_model_brings_along_is_not_run_unasked(tmp_path):
    configuration = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    with refused(r"brings its own code, which is run only with --model\.trust_remote_code true"):
        check_model(named(tmp_path))


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with refused(r": 1 weights that its config\.json asks for .* the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit_json(folder / "config.json", intermediate_size=40)  # three matrices in each of two blocks
    with refused(r": 6 weights that its config\.json .* the first is model\.layers\.0\.mlp\.down_proj\.weight"):
        loaded(folder)


def test_weights_that_cannot_be_read(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with refused(r"cannot load a model \(the folder was tried: .*header"):
        loaded(folder)
    weights.unlink()
    with refused(r"cannot load a model \(the folder was tried: .*no file named model\.safetensors"):
        loaded(folder)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.LlamaConfig(max_position_embeddings=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=131_072), 2048),
        (transformers.GPT2Config(n_positions=1024), 1024),
        (transformers.MptConfig(max_seq_len=512), 512),
        (transformers.BloomConfig(), 2048),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 128}), 128),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, transformers.PretrainedConfig) else str(value),
)
def test_context_length(config, length):
    assert context_length(config) == length


# The tokenizer


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(folder):
    found = load_tokenizer(named(folder))
    assert found.pad_token_id == found.eos_token_id == 1
    assert len(found) == 5
    assert found("one two").input_ids == [3, 4]


def test_a_tokenizers_own_padding_token_stays(tmp_path):
    base_model("llama").config.save_pretrained(tmp_path)
    tokenizer(eos_token="<end>", pad_token="<pad>").save_pretrained(tmp_path)
    assert load_tokenizer(named(tmp_path)).pad_token_id == 2


def test_a_folder_without_a_tokenizer(tmp_path):
    base_model("llama").config.save_pretrained(tmp_path)
    with refused(r"cannot load a tokenizer \(the folder was tried: ") as error:
        load_tokenizer(named(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(folder):
    model, found = check_model(named(folder)), load_tokenizer(named(folder))
    check_vocabulary(found, model)
    found.add_tokens([f"<{number}>" for number in range(94)])
    expected = r"the tokenizer has ids up to 98 \('<93>'\), but the model's embedding has 97 rows: 2 tokens have none"
    with refused(expected):
        check_vocabulary(found, model)


def test_an_adapters_folder_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with refused(r"is the folder of an adapter.*\(org/base\).*--lora\.adapter"):
        check_model(named(tmp_path))


# The adapters


def adapter_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_adapters(folder, dtype):
    state = torch.get_rng_state()
    model = add_adapters(loaded(folder, dtype), LoraConfig(rank=3, alpha=6.0, dropout=0.25), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    layers = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_B")}
    assert layers == {f"model.layers.{block}.{name}" for block in range(2) for name in BLOCK_LINEARS}
    v_proj = model.get_base_model().model.layers[1].self_attn.v_proj
    assert v_proj.scaling == {"default": 2.0}
    assert v_proj.lora_dropout["default"].p == 0.25
    adapters = adapter_state(model)
    assert all("lora_" in name and p.dtype == torch.float32 and 3 in p.shape for name, p in adapters.items())
    assert all((p == 0).all() == ("lora_B" in name) for name, p in adapters.items())
    assert {p.dtype for name, p in model.named_parameters() if name not in adapters} == {dtype}
    assert all(module.training for module in model.modules())


def test_the_scale_of_rslora(folder):
    adapted = add_adapters(loaded(folder), LoraConfig(rank=4, alpha=8, use_rslora=True), 0)
    scales = {module.scaling["default"] for module in adapted.modules() if hasattr(module, "lora_A")}
    assert scales == {4.0}
    assert adapted.peft_config["default"].use_rslora


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"modules_to_save": ["lm_head"]}, "whole layers (modules_to_save: ['lm_head'])"),
        ({"bias": "lora_only"}, "biases (bias: lora_only)"),
        ({"trainable_token_indices": [1]}, "embeddings of tokens (trainable_token_indices: [1])"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "an embedding (base_model.model.model.embed_tokens.lora_embedding_A)",
        ),
    ],
)
def test_an_adapter_that_trains_more_than_matrices_is_refused(folder, tmp_path, more, what):
    made = peft.get_peft_model(loaded(folder), peft.LoraConfig(**{"target_modules": ["q_proj"], **more}))
    made.save_pretrained(tmp_path / "adapter")
    config = LoraConfig(adapter=str(tmp_path / "adapter"))
    check_adapter(config)  # it can be merged, which is the way out
    with refused(rf"also (trains|adapts) {re.escape(what)}, and only LoRA matrices .* colm-scale merge"):
        check_trained_further(config)


def test_an_adapter_with_other_ranks_in_some_layers_comes_back(folder, tmp_path):
    pattern = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}}
    made = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **pattern))
    fill((weight for weight in made.parameters() if weight.requires_grad), "ranks")
    made.save_pretrained(tmp_path / "adapter")
    found = add_adapters(loaded(folder), LoraConfig(adapter=str(tmp_path / "adapter")), 0)
    rows = torch.arange(6)[None]
    assert torch.equal(found(rows).logits, made(rows).logits)


def test_the_seed_alone_decides_how_adapters_begin(folder):
    first, again, other = (adapter_state(add_adapters(loaded(folder), LoraConfig(), seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("family", ["phi3", "opt", "gemma2"])
def test_every_linear_layer_of_the_blocks_gets_an_adapter_but_not_the_head(family):
    base = base_model(family)
    head = base.get_output_embeddings()
    expected = {name for name, module in base.named_modules() if type(module) is torch.nn.Linear and module is not head}
    model = add_adapters(base, LoraConfig(), seed=0)
    assert {n for n, module in model.get_base_model().named_modules() if hasattr(module, "lora_B")} == expected


def test_targets_by_name(folder):
    model = add_adapters(loaded(folder), LoraConfig(targets=["v_proj", "layers.0.mlp.up_proj"]), seed=0)
    assert {n for n, module in model.get_base_model().named_modules() if hasattr(module, "lora_B")} == {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        (["value"], ["value"]),
        (["v_proj", "w_proj"], ["w_proj"]),
        (["roj"], ["roj"]),
        (["input_layernorm"], ["input_layernorm"]),
        ([], []),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_the_layers(folder, targets, unknown):
    with refused(r"the linear layers of the blocks are: mlp\.down_proj, .*self_attn\.v_proj$") as error:
        add_adapters(loaded(folder), LoraConfig(targets=targets), seed=0)
    assert str(error.value).startswith(f"--lora.targets {targets}: no linear layer is called {unknown};")


def test_an_adapter_comes_back_from_its_folder(folder, tmp_path):
    model = add_adapters(loaded(folder), LoraConfig(rank=3, targets=["v_proj", "up_proj"]), seed=0)
    fill((p for p in model.parameters() if p.requires_grad), "trained")
    model.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter").eval()
    state = torch.get_rng_state()
    config = LoraConfig(adapter=str(tmp_path / "adapter"), rank=99, targets=["q_proj"])
    check_adapter(config)
    again = add_adapters(loaded(folder), config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    trained, reloaded = adapter_state(model), adapter_state(again)
    assert trained.keys() == reloaded.keys()
    assert all(torch.equal(trained[name], reloaded[name]) for name in trained)
    ids = batch_of([6]).input_ids
    assert torch.equal(again.eval()(ids).logits, plain(ids).logits)


def test_an_adapter_of_a_bfloat16_base_is_float32(folder, tmp_path):
    model = add_adapters(loaded(folder), LoraConfig(), seed=0)
    model.save_pretrained(tmp_path / "adapter")
    again = add_adapters(loaded(folder, torch.bfloat16), LoraConfig(adapter=str(tmp_path / "adapter")), seed=0)
    trained = adapter_state(again)
    assert len(trained) == len(adapter_state(model))
    assert {p.dtype for p in trained.values()} == {torch.float32}


def saved_adapter(path, model, config: peft.PeftConfig) -> LoraConfig:
    peft.get_peft_model(model, config).save_pretrained(path)
    return LoraConfig(adapter=str(path))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DoRA", peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True)),
        ("IA3", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_before_any_weight_is_read(tmp_path, kind, config):
    config = saved_adapter(tmp_path, base_model("llama"), config)
    (tmp_path / "adapter_model.safetensors").unlink()
    with refused(rf"^--lora\.adapter {re.escape(str(tmp_path))} is of type {kind}, but must be plain LoRA$"):
        check_adapter(config)


@pytest.mark.parametrize(
    ("family", "options", "targets", "reason"),
    [
        ("llama", {"num_hidden_layers": 3}, ["v_proj"], r"the model has no layer for .*layers\.2\.self_attn\.v_proj"),
        ("llama", {"num_hidden_layers": 1}, ["v_proj"], r"the adapter lacks .*layers\.1\.self_attn\.v_proj"),
        ("opt", {}, ["v_proj"], r"the model has no layer for .*decoder\.layers\.0"),
        ("opt", {}, ["fc1"], "fc1"),
        ("llama", {"intermediate_size": 40}, ["up_proj"], r"size mismatch for .*up_proj"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, family, options, targets, reason):
    other = base_model(family, **options)
    config = saved_adapter(tmp_path, other, peft.LoraConfig(r=2, target_modules=targets))
    with refused(rf"^--lora\.adapter {re.escape(str(tmp_path))} does not fit this model: .*{reason}") as error:
        add_adapters(base_model("llama"), config, seed=0)
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_there_or_cannot_be_read(tmp_path):
    with refused(r"no adapter can be read there"):
        check_adapter(LoraConfig(adapter=str(tmp_path / "none")))
    config = saved_adapter(tmp_path / "whole", base_model("llama"), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    weights = tmp_path / "whole" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with refused(r"its weights cannot be read \(.*header"):
        add_adapters(base_model("llama"), config, seed=0)
    shutil.copy(tmp_path / "whole" / "adapter_config.json", tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text("{")
    with refused(r"no adapter can be read there"):
        check_adapter(LoraConfig(adapter=str(tmp_path)))


# Together


def test_what_is_loaded_can_be_sketched(folder):
    """The probe is found before the adapters are there, under the name that it has afterwards."""
    base = loaded(folder)
    probe = find_probe(base)
    module = ExampleLoss(add_adapters(base, LoraConfig(rank=3), seed=0))
    tap, batch = Tap(module, probe), batch_of([6, 4])
    losses, delta, a = tap.factors(batch)
    # B is zero at the start, so the adapters change nothing yet, but their gradient is there.
    reference = base_model("llama").eval()
    expected = ExampleLoss(reference)(batch)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert (delta.transpose(1, 2) @ a).flatten(1).norm(dim=1).min() > 1e-3
