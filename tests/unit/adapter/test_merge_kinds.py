"""Adapters of every kind merge, also those that cannot be trained further, and those of tied embeddings."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from support.families import base_model, fill

from colm_scale.adapter.merge import export
from colm_scale.config.commands import MergeConfig

TOKENS = torch.arange(3, 20)[None]
NAMES = {"gemma2": ("q_proj", "embed_tokens"), "gpt2": ("c_attn", "wte")}
"""A layer of attention and the embedding of models that tie their head to it."""
KINDS: dict[str, tuple[dict[str, object], bool]] = {
    "neither": ({}, True),
    "head": ({"target_modules": ["{layer}", "lm_head"]}, False),
    "embedding": ({"target_modules": ["{layer}", "{embedding}"]}, False),
    "both": ({"target_modules": ["{layer}", "{embedding}", "lm_head"]}, False),
    "whole head": ({"modules_to_save": ["lm_head"]}, False),
    "whole embedding": ({"modules_to_save": ["{embedding}"]}, False),
    "tokens": ({"trainable_token_indices": [3, 4]}, True),
    "biases": ({"bias": "all"}, True),
}
"""Options of peft, and whether the merged model is tied."""


OF_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MIXTURES = {"mixtral": OF_EXPERTS, "gpt_oss": OF_EXPERTS}
"""Models with experts; gpt-oss keeps their weights transposed."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    places = {}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    for family in (*NAMES, *MIXTURES):
        places[family] = tmp_path_factory.mktemp("bases") / family
        base_model(family, **MIXTURES.get(family, {})).save_pretrained(places[family])
        special = {"unk_token": "<unk>", "eos_token": "<end>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(places[family])
    return places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_merged_logits_are_those_of_the_adapter(bases, family, kind, tmp_path):
    options, tied = KINDS[kind]
    layer, embedding = NAMES[family]
    named = {
        key: [name.format(layer=layer, embedding=embedding) if isinstance(name, str) else name for name in value]
        if isinstance(value, list)
        else value
        for key, value in {"target_modules": ["{layer}"], **options}.items()
    }
    check(bases[family], tmp_path, tied=tied, **named)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_merge(bases, family, tmp_path):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    check(bases[family], tmp_path, tied=False, target_modules=["v_proj"], target_parameters=parameters)


def check(base: Path, tmp_path: Path, *, tied: bool, **options: object) -> None:
    """Compare the logits of an adapter of peft's own with those of the merged model as it is loaded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    fill((weight for weight in made.parameters() if weight.requires_grad), "trained")
    made.save_pretrained(tmp_path / "adapter")
    merged = export(MergeConfig(run=str(tmp_path / "adapter"), output=str(tmp_path / "merged")))
    found, report = transformers.AutoModelForCausalLM.from_pretrained(merged.place, output_loading_info=True)
    with torch.no_grad():
        expected, logits = made(TOKENS).logits, found.eval()(TOKENS).logits
        with made.disable_adapter():
            assert not torch.allclose(made(TOKENS).logits, expected, rtol=0.1) or "bias" in options
    # float32: W x + B A x against (W + B A) x.
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
    assert not any(report.values())
    assert found.config.tie_word_embeddings == tied
