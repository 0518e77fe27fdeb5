"""``colm-scale plan`` as users call it."""

from __future__ import annotations

import json

import pytest
from support.commands import ROOT


def test_the_built_in_model_under_zero2(forked, tmp_path):
    options = ["--ds_config", str(ROOT / "ds_configs/zero2.json"), "--plan.world_size", "4", "--plan.memory_gib", "2"]
    said = forked.run("plan", options, tmp_path / "log").succeeded().stdout
    for words in ("32 of 64 candidates (colm)", "on 4 rank(s) under ZeRO-2", "sketch", "train", "optimizer"):
        assert words in said
    assert "fits into 2 GiB: micro_batch_tokens" in said


def test_a_configuration_without_weights_is_enough(forked, tmp_path):
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128}
    facts |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps(facts), "utf-8")
    options = ["--model.name", str(tmp_path), "--engine", "fsdp", "--plan.world_size", "8", "--train.dtype", "bfloat16"]
    said = forked.run("plan", options, tmp_path / "log").succeeded().stdout
    assert "on 8 rank(s) under FSDP2" in said
    assert "bytes a rank sends per step: weights" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plan.world_sise", "2"], ["unknown option --plan.world_sise", "--plan.world_size"]),
        (["--plan.world_size", "two"], ["--plan.world_size is 'two'", "a whole number"]),
        (["--plan.world_size", "0"], ["--plan.world_size is 0", "at least 1"]),
        (["--plan.world_size", "3"], ["--selection.candidates is 64", "3 ranks cannot share evenly"]),
        (["--model.name", "nowhere/at-all"], ["--model.name nowhere/at-all"]),
        (["--ds_config", "missing.json"], ["--ds_config missing.json"]),
        (["--selection.probe", "zz"], ["--selection.probe 'zz'"]),
    ],
)
def test_wrong_input_is_one_line(options, words, forked, tmp_path):
    outcome = forked.run("plan", options, tmp_path / "log")
    assert outcome.code == 2
    assert len(outcome.errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.errors[0]
