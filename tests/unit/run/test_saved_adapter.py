"""The folder that a run saves, in plain peft: the keys and the loss that training had, for every kind of adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from support.families import base_model, batch_of, fill, labels_of, part_of
from torch import Tensor

from colm_scale.config import DataConfig, LoraConfig, ModelConfig, RunConfig, SelectionConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.engines.tensors import collect, restore
from colm_scale.modeling.adapters import check_trained_further
from colm_scale.modeling.load import load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import without_dropout
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.run.assemble import build_model
from colm_scale.run.reports import WrittenReports
from colm_scale.run.saved_adapter import name_base, of_run

CPU = torch.device("cpu")
ALONE = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)
BATCH = batch_of([7, 5, 9])
PATTERNS = {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 6}}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, object]] = {
    **{family: {} for family in ("llama", "phi3", "gpt2", "bloom", "opt", "gemma2", "qwen2")},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
KINDS = {
    "rslora": LoraConfig(rank=4, use_rslora=True),
    "dropout": LoraConfig(rank=4, dropout=0.3),
    "some layers": LoraConfig(rank=4, targets=["v_proj", "layers.0.mlp.up_proj"]),
    "head": LoraConfig(rank=4, targets=["v_proj", "lm_head"]),
}


def folder_of(family: str, path: Path) -> Path:
    """A model as users have it, with a tokenizer."""
    base_model(family, **FAMILIES[family]).save_pretrained(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "eos_token": "<end>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


def engine_of(config: RunConfig, purpose: str = "trained") -> TorchEngine:
    """An engine whose adapters are as if trained."""
    module, _, _ = build_model(config, CPU, ALONE)
    fill((weight for weight in module.parameters() if weight.requires_grad), purpose)
    return TorchEngine(module, config.train, ALONE)


def config_of(base: Path, lora: LoraConfig) -> RunConfig:
    return RunConfig(model=ModelConfig(name=str(base)), lora=lora, selection=SelectionConfig(method="random"))


def saved(engine: TorchEngine, config: RunConfig, path: Path) -> Path:
    reports = WrittenReports.__new__(WrittenReports)
    reports._directory, reports._config = RunDirectory(str(path)), config
    reports._tokenizer = of_run(load_tokenizer(config.model), config.data)
    reports.adapter("adapter", engine.module, collect(engine, ALONE)["adapter"])
    return path / "adapter"


def trained_loss(engine: TorchEngine) -> Tensor:
    with torch.no_grad(), without_dropout(engine.module):
        return torch.cat([engine.module(part_of(BATCH, row)) for row in range(3)])


def plain_loss(folder: Path) -> Tensor:
    """The loss that transformers itself computes, with peft's model made of the folder alone."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # which transformers chooses itself, but not in all versions
    parts = [part_of(BATCH, row) for row in range(3)]
    with torch.no_grad():
        return torch.stack([model(input_ids=part.input_ids, labels=labels_of(part)).loss for part in parts])


def check(engine: TorchEngine, folder: Path) -> None:
    """Compare keys both ways, and losses to the last bits; the adapter must matter."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    assert Path(base).is_absolute()
    wanted = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert wanted.keys() == load_file(folder / "adapter_model.safetensors").keys()
    trained = {name.removeprefix("model."): weight for name, weight in collect(engine, ALONE)["adapter"].items()}
    found = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    expected = trained_loss(engine)
    torch.testing.assert_close(plain_loss(folder), expected, rtol=1e-6, atol=0)  # sums in another order
    with loaded.disable_adapter(), torch.no_grad():
        assert not torch.allclose(ExampleLoss(loaded.eval())(BATCH), expected, rtol=1e-2)
    in_folder, in_base = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, base))
    assert in_folder.get_vocab() == in_base.get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_adapters_of_a_family(family, tmp_path):
    config = config_of(folder_of(family, tmp_path / "base"), LoraConfig(rank=4))
    engine = engine_of(config)
    check(engine, saved(engine, config, tmp_path / "run"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_adapters_on_experts(family, tmp_path):
    base = folder_of(family, tmp_path / "base")
    config = config_of(base, LoraConfig(rank=4, targets=["v_proj", "experts"]))
    engine = engine_of(config)
    place = saved(engine, config, tmp_path / "run")
    check(engine, place)
    again = config_of(base, LoraConfig(adapter=str(place)))
    check_trained_further(again.lora)
    module, _, _ = build_model(again, CPU, ALONE)
    assert torch.equal(trained_loss(TorchEngine(module, again.train, ALONE)), trained_loss(engine))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind, tmp_path):
    config = config_of(folder_of("llama", tmp_path / "base"), KINDS[kind])
    engine = engine_of(config)
    check(engine, saved(engine, config, tmp_path / "run"))


def begun(path: Path, family: str, **options: object) -> LoraConfig:
    """An adapter of peft's own to start from."""
    model = peft.get_peft_model(base_model(family, **FAMILIES[family]), peft.LoraConfig(**options))
    fill((weight for weight in model.parameters() if weight.requires_grad), "begun")
    model.save_pretrained(path)
    return LoraConfig(adapter=str(path))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {**PATTERNS, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
        ("llama", {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]}),
        ("phi3", {"r": 4, "target_modules": ["qkv_proj"], "lora_dropout": 0.2}),
        ("mixtral", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_an_adapter_that_was_started_from(family, options, tmp_path):
    base, lora = folder_of(family, tmp_path / "base"), begun(tmp_path / "begun", family, **options)
    config = config_of(base, lora)
    module, _, _ = build_model(config, CPU, ALONE)
    start = TorchEngine(module, config.train, ALONE)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), lora.adapter)
    with torch.no_grad():
        theirs = torch.cat([ExampleLoss(theirs.eval())(part_of(BATCH, row)) for row in range(3)])
    assert torch.equal(trained_loss(start), theirs)
    engine = engine_of(config)
    check(engine, saved(engine, config, tmp_path / "run"))


def test_an_adapter_after_a_resume(tmp_path):
    config = config_of(folder_of("phi3", tmp_path / "base"), LoraConfig(rank=4))
    first, resumed = engine_of(config), engine_of(config, "others")
    restore(resumed, collect(first, ALONE), ALONE)
    assert torch.equal(trained_loss(resumed), trained_loss(first))
    check(resumed, saved(resumed, config, tmp_path / "run"))


def test_the_chat_template_of_the_run_is_in_the_folder(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}!")
    config = config_of(folder_of("llama", tmp_path / "base"), LoraConfig(rank=4))
    config = dataclasses.replace(config, data=DataConfig(train=["x"], chat_template=str(tmp_path / "chat.jinja")))
    place = saved(engine_of(config), config, tmp_path / "run")
    rendered = transformers.AutoTokenizer.from_pretrained(place).apply_chat_template
    assert rendered([{"role": "user", "content": "one"}], tokenize=False) == "one!"


def test_an_adapter_of_a_model_of_the_hub_names_it_with_its_revision(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    name_base(tmp_path, ModelConfig(name="org/base", revision="v1"))
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {"r": 4, "base_model_name_or_path": "org/base", "revision": "v1"}
