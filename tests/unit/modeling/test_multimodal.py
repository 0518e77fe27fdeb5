"""Text adapters of models that see or hear: what is loaded, what is left out, and that the whole model takes them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from support.families import base_model, batch_of, fill, labels_of
from support.multimodal import FAMILIES, NOT_LOADED
from transformers import AutoModelForImageTextToText

from colm_scale.config import LoraConfig, ModelConfig
from colm_scale.modeling.load import add_adapters, load_model, weights_of
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.multimodal import not_loaded
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import find_probe
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
def test_probe_and_packing(folders, family):
    model, _ = in_text(folders[family])
    tried = use_packing(model, "auto", CPU)
    probe = find_probe(model)
    print(family, tried, probe.layer)
