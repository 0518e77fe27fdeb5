"""A deep model is traced with few of its blocks: the same answer as with all of them."""

from __future__ import annotations

import pytest
import torch
from support.families import base_model

from colm_scale.config import LoraConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.config.commands import PlanConfig
from colm_scale.plan.fake import Depth, fake_model, tried
from colm_scale.plan.memory import Batches, peaks
from colm_scale.plan.plan import make_plan
from colm_scale.sketch.tap import Tap

SLOW = pytest.mark.slow


def test_both_ends_and_one_more_stand_for_a_uniform_model():
    depth = Depth.of([("", "a")] * 32)
    assert depth.numbers == (0, 1, 30, 31)
    assert depth.times == (29, 1, 1, 1)
    assert depth.further == ((2, 28),)


def test_first_and_last_of_each_kind_are_traced():
    depth = Depth.of([("linear", "a"), ("linear", "a"), ("linear", "a"), ("full", "b")] * 10)
    assert depth.numbers == (0, 1, 3, 38, 39)
    assert depth.times == (28, 1, 9, 1, 1)
    assert depth.further == ((2, 27), (7, 8))


def test_blocks_that_differ_in_their_attention_need_the_same():
    depth = Depth.of([("slide", "a"), ("slide", "a"), ("full", "a")] * 10)
    assert depth.numbers == (0, 1, 2, 28, 29)
    assert depth.times == (26, 1, 1, 1, 1)
    assert depth.further == ((3, 25),)


@pytest.mark.parametrize("kinds", ["a", "ab", "aaaaaaaaa", "abcdefghij", "aabbccddaabbccdd"])
def test_a_shallow_or_motley_model_is_traced_whole(kinds):
    assert Depth.of([("", kind) for kind in kinds]) == Depth.all(range(len(kinds)))


def planned(config: RunConfig, of, ranks: int):
    return make_plan(config, PlanConfig(world_size=ranks, tokens=24, memory_gib=1.2), of)


def test_peaks_are_those_of_all_blocks(monkeypatch):
    of = base_model("llama", num_hidden_layers=10).config
    config = RunConfig(lora=LoraConfig(rank=4), train=TrainConfig(forward_reuse="off"))
    known, batches = tried(config, of), Batches([(24, 20)], [(24, 20)])
    fake = fake_model(config, of, known)
    assert len(fake.blocks) == 4
    short = peaks(config, {}, fake, 1, batches)
    monkeypatch.setattr(Depth, "of", lambda kinds: Depth.all(range(len(kinds))))
    fake = fake_model(config, of, known)
    assert len(fake.blocks) == 10
    assert short == peaks(config, {}, fake, 1, batches)


@SLOW
@pytest.mark.parametrize(
    ("family", "engine", "options"),
    [
        ("llama", "auto", {}),
        ("llama", "fsdp", {"activation_checkpointing": True}),
        ("llama", "auto", {"dtype": "bfloat16", "packing": "off"}),
        ("gemma2", "fsdp", {}),
        ("qwen3_moe", "auto", {"activation_checkpointing": True, "forward_reuse": "off"}),
    ],
)
@pytest.mark.parametrize("estimator", ["last_layer", "zeroth_order"])
def test_the_plan_is_that_of_all_blocks(family, engine, options, estimator, monkeypatch):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    more = moe if family == "qwen3_moe" else {}
    of = base_model(family, num_hidden_layers=16 if family == "gemma2" else 12, **more).config
    config = RunConfig(
        engine=engine,
        lora=LoraConfig(rank=4),
        train=TrainConfig(micro_batch_tokens=96, **options),
        selection=SelectionConfig(candidates=16, budget=8, estimator=estimator),
    )
    short = planned(config, of, 2)
    assert len(fake_model(config, of, tried(config, of)).blocks) < of.num_hidden_layers
    monkeypatch.setattr(Depth, "of", lambda kinds: Depth.all(range(len(kinds))))
    whole = planned(config, of, 2)
    assert short.peaks == whole.peaks
    assert short.sizes == whole.sizes
    assert short.largest == whole.largest


def test_a_probe_in_the_mlp_has_the_width_of_the_model():
    of = base_model("llama", intermediate_size=160).config
    config = RunConfig(lora=LoraConfig(rank=4), selection=SelectionConfig(probe="up_proj"))
    known = tried(config, of)
    assert isinstance(known.like, Tap)
    assert known.like.lora_b.out_features < 160
    probe = known.probe_in(fake_model(config, of, known).module.causal_model)
    assert torch.equal(probe.rows, torch.arange(160))
