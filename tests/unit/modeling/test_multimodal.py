"""Text adapters of models that see or hear: what is loaded, what is left out, and that the whole model takes them."""

from __future__ import annotations

import pytest
import safetensors
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from support.families import base_model, batch_of, fill, labels_of
from support.multimodal import FAMILIES, NOT_LOADED
from transformers import AutoModelForImageTextToText, modeling_utils

from colm_scale.config import LoraConfig, ModelConfig
from colm_scale.errors import UserError
from colm_scale.modeling import weights
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import load_model, weights_of
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.multimodal import not_loaded, not_loaded_line
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks, find_probe
from colm_scale.modeling.weights import META

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family, the folder of a whole model in several files."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        base_model(family).save_pretrained(made[family], max_shard_size="30KB")
    return made


def in_text(folder, device: torch.device = CPU):
    config = ModelConfig(name=str(folder))
    model = load_model(config, torch.float32, device)
    return model, weights_of(model, config, CPU)


def of_whole(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_text_runs_computes_what_the_whole_model_computes(folders, family):
    model, _ = in_text(folders[family])
    batch = batch_of([9, 5, 7])
    assert torch.equal(logits(model, batch), logits(of_whole(folders[family]), batch))
    assert tuple(not_loaded(model)) == NOT_LOADED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_the_whole_model_in_plain_peft_the_same_loss(folders, family, tmp_path, recwarn):
    model, _ = in_text(folders[family])
    adapted = add_adapters(model, LoraConfig(rank=2), seed=0).eval()
    fill((p for p in adapted.parameters() if p.requires_grad), "trained")
    adapted.save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(of_whole(folders[family]), str(tmp_path))
    batch = batch_of([9, 5, 7])
    labels = labels_of(batch)
    expected, found = (logits(m, batch) for m in (adapted, whole))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(of_whole(folders[family]), batch))
    losses = ExampleLoss(whole)(batch)
    by_hand = [
        torch.nn.functional.cross_entropy(row[:-1], label[1:], ignore_index=-100) for row, label in zip(found, labels)
    ]
    assert torch.allclose(losses, torch.stack(by_hand))
    towers = [n for n, m in whole.named_modules() if hasattr(m, "lora_A") and set(n.split(".")) & {*NOT_LOADED[family]}]
    assert not towers
    assert not [str(w.message) for w in recwarn if "peft" in str(w.filename)]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_from_files_are_those_of_the_loaded_model(folders, family):
    model, weights = in_text(folders[family], META)
    for module in [*model.modules()][::-1]:
        weights.fill(module)
    expected, _ = in_text(folders[family])
    found = dict(model.state_dict())
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    batch = batch_of([9, 5, 7])
    assert torch.equal(logits(model, batch), logits(expected, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_is_in_the_language_model_and_packed_rows_are_tried(folders, family):
    model, _ = in_text(folders[family])
    tried = use_packing(model, "auto", CPU)
    # Llama 4 attends in chunks, and a linear attention goes on from example to example.
    assert bool(tried.padded_because) == (family in ("llama4", "qwen3_5"))
    path, _ = decoder_blocks(model)
    assert find_probe(model).layer == f"{path}.1.self_attn.v_proj"
    assert not set(path.split(".")) & {*NOT_LOADED[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_whole_model_and_leave_no_trace(folders, family):
    model, _ = in_text(folders[family])
    prompts, batch = batch_of([6, 6]), batch_of([9, 5, 7])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = logits(model, batch)
    answers = [
        m.eval().generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **options)
        for m in (model, of_whole(folders[family]))
    ]
    assert torch.equal(*answers)
    assert torch.equal(logits(model, batch), before)  # Qwen's keep offsets of positions


def test_an_adapter_of_the_whole_model_is_trained_further(folders, tmp_path):
    model, _ = in_text(folders["gemma3"])
    first = add_adapters(model, LoraConfig(rank=2), seed=0)
    fill((p for p in first.parameters() if p.requires_grad), "trained")
    first.save_pretrained(tmp_path)
    again, _ = in_text(folders["gemma3"])
    further = add_adapters(again, LoraConfig(adapter=str(tmp_path)), seed=1)
    batch = batch_of([9, 5, 7])
    assert torch.equal(logits(further, batch), logits(first, batch))
    assert further.peft_config["default"].exclude_modules == first.peft_config["default"].exclude_modules


def test_an_adapter_of_the_tower_is_refused(folders, tmp_path):
    whole = get_peft_model(of_whole(folders["gemma3"]), PeftConfig(r=2, target_modules=["q_proj"]))
    whole.save_pretrained(tmp_path)
    model, _ = in_text(folders["gemma3"])
    with pytest.raises(UserError, match="also adapts vision_tower, multi_modal_projector, which text never runs"):
        add_adapters(model, LoraConfig(adapter=str(tmp_path)), seed=0)


def test_no_byte_of_the_tower_is_read(folders, monkeypatch):
    read = []
    opened = safetensors.safe_open

    class Opened:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, key):
            return Slice(key, self.file.get_slice(key))

    class Slice:
        def __init__(self, key, slice_):
            self.key, self.slice = key, slice_

        def __getattr__(self, name):
            return getattr(self.slice, name)

        def __getitem__(self, index):
            read.append(self.key)
            return self.slice[index]

    monkeypatch.setattr(modeling_utils, "safe_open", Opened)
    monkeypatch.setattr(weights, "safe_open", Opened)
    in_text(folders["gemma3"])
    assert len(read) > 20
    assert not [key for key in read if "vision_tower" in key or "projector" in key]
    of_one_process = sorted(read)
    read.clear()
    model, of_files = in_text(folders["gemma3"], META)
    of_files.fill(model)
    assert sorted({*read}) == sorted({*of_one_process})


def test_its_size_is_printed(folders):
    model, _ = in_text(folders["gemma3"])
    whole = of_whole(folders["gemma3"]).model
    towers = [*whole.vision_tower.parameters(), *whole.multi_modal_projector.parameters()]
    parts = not_loaded(model)
    assert sum(part.total_bytes for part in parts.values()) == sum(4 * weight.numel() for weight in towers)
    parts["vision_tower"].total_bytes = 412_000_000 - parts["multi_modal_projector"].total_bytes
    assert not_loaded_line(model) == (
        "vision_tower, multi_modal_projector: not loaded, text never runs them (412 MB)"
    )
    assert not not_loaded_line(base_model("llama"))


def test_one_that_needs_its_tower_on_text_is_refused(tmp_path):
    base_model("qwen2_audio").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a Qwen2AudioForConditionalGeneration does not run on text alone .*of text"):
        load_model(ModelConfig(name=str(tmp_path)), torch.float32, CPU)
