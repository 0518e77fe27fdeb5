"""Traced memory is that of a real run of the same code; what is reckoned is reckoned right."""

from __future__ import annotations

import dataclasses
import functools
import gc

import pytest
import torch
from support.families import base_model, batch_of
from support.zoo import ZOO

from colm_scale.config import FsdpConfig, LoraConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.config.commands import PlanConfig
from colm_scale.engines.base import trainable
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import find_probe
from colm_scale.plan.fake import FakeModel, Growth, Section, fake_model, tried
from colm_scale.plan.memory import Batches, EngineMemory, engine_memory, in_training, peaks
from colm_scale.plan.plan import arranged, make_plan
from colm_scale.plan.show import shown
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.sketch import last_layer
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
SLOW = pytest.mark.slow
LENGTHS = (31, 24, 24, 17)
OPTIONS = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 200}


def config_of(**options) -> RunConfig:
    train = {"activation_checkpointing": False, **options.pop("train", {})}
    selection = {"candidates": 16, "budget": 8, **options.pop("selection", {})}
    return RunConfig(
        lora=LoraConfig(rank=4),
        train=TrainConfig(micro_batch_tokens=128, **train),
        selection=SelectionConfig(**selection),
        **options,
    )


@functools.cache
def known(family: str):
    of = base_model(family, **OPTIONS).config
    return of, tried(config_of(), of)


def fake_of(config: RunConfig, family: str = "llama") -> FakeModel:
    return fake_model(config, *known(family))


def real_growth(config: RunConfig, family: str) -> dict[str, int]:
    """By how much live bytes grow in a real model of the same configuration."""
    base = base_model(family, getattr(torch, config.train.dtype), **OPTIONS).requires_grad_(False)
    use_packing(base, config.train.packing, CPU)
    probe = find_probe(base)
    if config.train.activation_checkpointing:
        keep_block_inputs_only(base)
    module = ExampleLoss(add_adapters(base, config.lora, 0))
    tap, batch = Tap(module, probe), batch_of(list(LENGTHS), prompt=12, packed=module.packs)
    module(batch)  # looks at the logits, once
    found = {}
    for phase, run in (
        ("sketch", lambda: last_layer.sketch(tap, batch, torch.arange(len(LENGTHS)))),
        ("train", lambda: module(batch).sum().backward()),
    ):
        module.zero_grad(set_to_none=True)
        gc.collect()
        with LiveBytes([*module.parameters(), *module.buffers()]) as live:
            before = live.now
            run()
            found[phase] = live.peak - before
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=SLOW) for name in ("phi3", "opt", "bloom"))])
def test_traced_growth_is_real_growth(family, dtype, checkpointing):
    config = config_of(train={"activation_checkpointing": checkpointing, "dtype": dtype, "forward_reuse": "off"})
    expected = real_growth(config, family)
    fake = fake_of(config, family)
    found = peaks(config, {}, fake, 1, Batches([LENGTHS], [LENGTHS]), label_share=0.5)
    for phase, real in expected.items():
        assert found.phases[phase] - found.engine.resident == pytest.approx(real, rel=0.03)


def test_nothing_of_the_model_is_allocated():
    fake = fake_of(config_of())
    assert all(isinstance(weight, torch._subclasses.FakeTensor) for weight in fake.module.parameters())
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in fake.module.named_parameters())


@SLOW
def test_the_sketch_holds_more_with_every_micro_batch():
    config = config_of()
    one, three = (
        peaks(config, {}, fake_of(config), 1, Batches([LENGTHS] * count, [LENGTHS])).phases["sketch"]
        for count in (1, 3)
    )
    assert three > one
    config = config_of(selection={"estimator": "zeroth_order"})
    one, three = (
        peaks(config, {}, fake_of(config), 1, Batches([LENGTHS] * count, [LENGTHS])).phases["sketch"]
        for count in (1, 3)
    )
    assert three == one  # a number each


@SLOW
def test_like_micro_batches_are_not_traced_again_and_again():
    config, lengths = config_of(), [(31, 24), (20, 20), (31, 24), (31, 24), (31, 24)]
    found = peaks(config, {}, fake_of(config), 1, Batches(lengths, lengths)).phases
    order = [(31, 24), (20, 20), (31, 24)]
    few = peaks(config, {}, fake_of(config), 1, Batches(order, order)).phases
    assert found["train"] == few["train"]
    # What a micro-batch leaves behind is the same for each of its kind: four of them leave as much as two and two.
    one, two = (
        peaks(config, {}, fake_of(config), 1, Batches([(31, 24)] * count, order)).phases["sketch"] for count in (1, 2)
    )
    assert found["sketch"] == few["sketch"] + 2 * (two - one)


def test_forward_reuse_keeps_what_goes_into_each_block():
    checkpointed = config_of(train={"activation_checkpointing": True, "forward_reuse": "off"})
    reusing = config_of(train={"activation_checkpointing": True})
    offloaded = config_of(train={"activation_checkpointing": True, "forward_reuse": "cpu"})
    bounded = config_of(
        train={"activation_checkpointing": True, "forward_reuse": "device", "forward_reuse_gib": 1000 / 2**30}
    )
    plain, kept, on_cpu, few = (
        peaks(config, {}, fake_of(config), 1, Batches([LENGTHS] * 2, [LENGTHS])).phases
        for config in (checkpointed, reusing, offloaded, bounded)
    )
    each = OPTIONS["num_hidden_layers"] * 64 * 4 * sum(LENGTHS)
    assert kept["sketch"] - plain["sketch"] == 2 * each
    assert kept["train"] == plain["train"]  # one micro-batch, which checkpointing holds too
    assert on_cpu == plain
    assert few["sketch"] - plain["sketch"] == 1000
    two = Batches([LENGTHS] * 2, [LENGTHS, LENGTHS[:1]])
    without, with_held = (peaks(c, {}, fake_of(c), 1, two).phases["train"] for c in (checkpointed, reusing))
    assert with_held - without == OPTIONS["num_hidden_layers"] * 64 * 4 * LENGTHS[0]


def test_what_engines_hold():
    config = config_of()
    fake = fake_of(config)
    adapters = sum(weight.numel() for weight in trainable(fake.module).values())
    whole = sum(weight.numel() * weight.element_size() for weight in fake.module.parameters())
    alone, ddp = (engine_memory(config.train, {}, fake, ranks) for ranks in (1, 2))
    assert alone.resident == whole + 8 * adapters
    assert ddp.resident == alone.resident + 4 * adapters
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    two = engine_memory(config.train, zero, fake, 2)
    assert two.resident == whole + 4 * adapters + 3 * 4 * adapters // 2
    assert two.reducing == 4000 + 4 * adapters // 2
    zero["zero_optimization"] |= {"overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    offloaded = engine_memory(config.train, zero, fake, 2)
    assert offloaded.reducing == 8000 + 4 * adapters // 2
    assert offloaded.resident == whole + 4 * adapters
    zero = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}}
    zero["zero_optimization"]["stage3_prefetch_bucket_size"] = 1000
    three = engine_memory(config.train, zero, fake, 4)
    assert three.weights == pytest.approx(whole / 4, abs=4)
    assert three.buffers == 4000
    assert max(whole // 20, 1) < three.gathered < whole
    sgd = dataclasses.replace(config, train=dataclasses.replace(config.train, optimizer="sgd", learning_rate=1.0))
    assert engine_memory(sgd.train, {}, fake, 1).optimizer == 4 * adapters


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_is_traced_as_it_shards(offload):
    config = config_of(engine="fsdp", fsdp=FsdpConfig(cpu_offload=offload), train={"activation_checkpointing": True})
    whole = sum(weight.numel() * weight.element_size() for weight in fake_of(config).module.parameters())
    two, eight = (peaks(config, {}, fake_of(config), ranks, Batches([LENGTHS], [LENGTHS])) for ranks in (2, 8))
    assert not torch.distributed.is_initialized()
    if offload:
        assert two.engine.resident == 0
        return
    assert two.engine.weights == pytest.approx(whole / 2, rel=0.02)
    assert eight.engine.weights == pytest.approx(whole / 8, rel=0.05)
    assert two.phases["train"] - two.engine.resident > whole / 8  # a block is gathered


def test_batches_are_those_of_a_run():
    config, plan = config_of(), PlanConfig(world_size=2, tokens=20)
    found = arranged(config, plan, packed=True)
    assert sum(map(len, found.sketched)) == 8
    assert sum(map(len, found.trained)) == 4
    assert all(sum(lengths) <= 128 for lengths in (*found.sketched, *found.trained))
    assert arranged(config_of(selection={"method": "stratified"}), plan, packed=True).sketched == ()
    full = arranged(config_of(selection={"method": "full"}), plan, packed=True)
    assert sum(map(len, full.trained)) == 8


@SLOW
def test_a_plan_says_what_fits():
    of, plan = base_model("llama", **OPTIONS).config, PlanConfig(world_size=2, tokens=20, memory_gib=1.1, tflops=0.1)
    found = make_plan(config_of(), plan, of)
    room = (1.1 * 0.95 - 1) * 2**30
    most = found.largest["micro_batch_tokens"]
    fits = arranged(dataclasses.replace(config_of(), selection=SelectionConfig(candidates=9999, budget=9998)), plan,
                    packed=True)
    assert fits.trained
    for tokens, inside in ((most, True), (2 * most, False)):
        lengths = [(20,) * (tokens // 20)]
        again = peaks(config_of(), {}, fake_of(config_of()), 2, Batches(lengths, lengths))
        assert (again.step <= 1.02 * room) == inside
    assert found.floor_seconds == (found.forward_flops + found.training_flops) / 1e11
    text = shown(found)
    for part in ("8 of 16 candidates (colm)", "on 2 rank(s) under DDP", "train", "micro_batch_tokens"):
        assert part in text


@SLOW
def test_weights_are_sent_once_for_each_gathering():
    of, plan = base_model("llama", **OPTIONS | {"num_hidden_layers": 1}).config, PlanConfig(world_size=4, tokens=20)
    sharded = make_plan(config_of(engine="fsdp"), plan, of)
    gathers = len(sharded.batches.sketched) + 2 * len(sharded.batches.trained)
    assert sharded.exchanged["weights"] == int(0.75 * sharded.sizes.frozen_bytes * gathers)
    two = base_model("llama", **OPTIONS | {"num_hidden_layers": 2}).config
    one_probe, three = (
        make_plan(config_of(engine="fsdp", selection={"estimator": "zeroth_order", "num_probes": k}), plan, two)
        for k in (1, 3)
    )
    block = three.sizes.frozen_bytes - sharded.sizes.frozen_bytes
    assert three.sizes.tail_bytes == three.sizes.frozen_bytes - block == sharded.sizes.frozen_bytes
    again = 2 * len(three.batches.sketched) * three.sizes.tail_bytes
    assert three.exchanged["weights"] - one_probe.exchanged["weights"] == pytest.approx(0.75 * again, abs=1)
    assert "weights" not in make_plan(config_of(), plan, of).exchanged
    assert make_plan(config_of(), PlanConfig(), of).exchanged == {}


@SLOW
def test_bytes_of_the_selection_are_those_of_the_estimators():
    of = base_model("llama", **OPTIONS | {"num_hidden_layers": 1}).config
    plan = PlanConfig(world_size=2, tokens=20, sources=3)
    d, h, rows, rest = 4 * 64 // 2, 64, 16, 16 * 8 + 40
    ways = {
        (("columns", h),): 4 * rows * (h + 2) + 16 * d,
        (("columns", h), ("compression", "columns")): (
            4 * rows * (h + 2) + 4 * 3 * 2 * d // 2 + 8 * 3 * 2 * min(h, d // 2) + 16 * d
        ),
        (("estimator", "zeroth_order"), ("num_probes", 3)): 4 * rows * 4,
        (("estimator", "length"),): 0,
        (("method", "stratified"),): 0,
    }
    for options, expected in ways.items():
        found = make_plan(config_of(selection=dict(options)), plan, of)
        assert found.exchanged["selection"] == expected + rest, options
    assert found.sizes.probe == 0


def test_wrong_numbers_are_told():
    with pytest.raises(UserError, match=r"--plan\.world_size is 0, but must be at least 1"):
        PlanConfig(world_size=0)
    with pytest.raises(UserError, match=r"--plan\.label_share"):
        PlanConfig(label_share=0)


def test_loading_holds_the_shards_and_the_largest_part():
    options = {**OPTIONS, "vocab_size": 2000}  # the embedding is the largest part
    of = base_model("llama", torch.bfloat16, **options).config
    config = config_of(engine="fsdp", train={"dtype": "bfloat16", "forward_reuse": "off"})
    embedding = 2000 * 64 * 2
    found = make_plan(config, PlanConfig(world_size=4, tokens=20), of)
    assert found.peaks.phases["load"] == found.peaks.engine.weights + embedding
    assert found.host == {"while loading": embedding, "between steps": 0}
    offloading = dataclasses.replace(config, fsdp=FsdpConfig(cpu_offload=True))
    offloaded = make_plan(offloading, PlanConfig(world_size=4, tokens=20), of)
    assert offloaded.peaks.phases["load"] == embedding
    adapters = found.peaks.engine.optimizer // 2
    assert offloaded.host["between steps"] == found.peaks.engine.weights + 2 * adapters
    assert offloaded.host["while loading"] == offloaded.host["between steps"] + embedding
    for line in ("load", "host memory of a rank while loading", "(4 ranks: "):
        assert line in shown(found)


def test_an_unsharded_model_is_loaded_tensor_by_tensor():
    of = base_model("llama", **OPTIONS).config
    found = make_plan(config_of(), PlanConfig(world_size=2, tokens=20), of)
    assert found.peaks.phases["load"] == found.peaks.engine.weights
    assert found.host["while loading"] == 200 * 64 * 4


def test_zero3_gathers_ahead_and_more_with_checkpointing():
    config = config_of(train={"forward_reuse": "off"})
    checkpointing = config_of(train={"forward_reuse": "off", "activation_checkpointing": True})
    fake = fake_of(config)
    whole = sum(weight.numel() for weight in fake.module.parameters())
    sizes = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}
    small = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 100, **sizes}}
    large = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 10**9, **sizes}}
    block = sum(weight.numel() for weight in fake.blocks[0].parameters())
    assert engine_memory(config.train, small, fake, 2).gathered == 4 * (block + 100)
    assert engine_memory(config.train, large, fake, 2).gathered == 4 * whole
    blocks = len(fake.blocks) * block
    plain, more = (engine_memory(c.train, small, fake, 2) for c in (config, checkpointing))
    assert (plain.in_flight, more.in_flight, plain.kept) == (0, 4 * blocks, 4 * whole)
    small["zero_optimization"]["stage3_max_live_parameters"] = 1000
    bounded = engine_memory(checkpointing.train, small, fake, 2)
    assert (bounded.in_flight, bounded.kept) == (4000, 4000)
    one, two = (peaks(config, small, fake, 2, Batches([], [LENGTHS] * n)).phases["train"] for n in (1, 2))
    small["zero_optimization"]["stage3_max_live_parameters"] = 10**9
    kept = peaks(config, small, fake, 2, Batches([], [LENGTHS] * 2)).phases["train"]
    assert kept - two == 4 * (whole - block - 100)
    assert two >= one


def test_memory_to_reduce_gradients_is_needed_from_the_first_gradient_on():
    memory = EngineMemory(0, 0, 0, 30, 10, False, in_flight=0, kept=17)
    head = {Section(1, "forward", 0, 1): 50, Section(1, "after", 0, 1): 100, Section(1, "backward", 0, 1): 60}
    one = Growth(head, [0])
    assert in_training(memory, one, Batches([], [LENGTHS])) == 100
    assert in_training(dataclasses.replace(memory, reducing=41), one, Batches([], [LENGTHS])) == 101
    assert in_training(dataclasses.replace(memory, in_flight=31), one, Batches([], [LENGTHS])) == 100 + 21
    two = Growth({**head, Section(2, "after", 0, 1): 100}, [0, 0])
    assert in_training(memory, two, Batches([], [LENGTHS] * 2)) == 100 + 30 + 7


@SLOW
def test_experts_in_float32_are_planned():
    of = base_model("qwen3_moe", num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2).config
    found = make_plan(config_of(), PlanConfig(tokens=20), of)
    assert found.peaks.phases["train"] > found.peaks.engine.weights


def test_weights_in_4_bits_are_planned_as_they_are_packed():
    """Half a byte for each number of a block's layers, and a byte for each 64; in whole bfloat16 numbers."""
    pytest.importorskip("bitsandbytes")
    config = config_of(model=ModelConfig(quantize="nf4"), engine="fsdp", train={"dtype": "bfloat16"})
    fake = fake_of(config)
    layers = [64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 160, 64 * 160, 64 * 160]
    packed = 3 * sum(numbers // 2 + numbers // 64 for numbers in layers)
    others = 2 * (2 * 200 * 64 + 7 * 64) + 4 * sum(weight.numel() for weight in trainable(fake.module).values())
    assert sum(weight.nbytes for weight in fake.module.parameters()) == packed + others
    two = peaks(config, {}, fake, 2, Batches([LENGTHS], [LENGTHS]))
    assert two.engine.weights == pytest.approx((packed + others) / 2, rel=0.02)
    assert two.phases["train"] > two.phases["optimizer"]


@pytest.mark.parametrize("family", ["qwen3_next", pytest.param("bamba", marks=SLOW), pytest.param("jamba", marks=SLOW)])
def test_hybrids_that_begin_with_a_block_without_attention_are_planned(family):
    of = base_model(family, **ZOO[family].options).config
    found = make_plan(config_of(train={"packing": "off"}), PlanConfig(tokens=20), of)
    assert found.peaks.phases["train"] > found.peaks.engine.weights
    assert make_plan(config_of(), PlanConfig(tokens=20), of).peaks == found.peaks, "packing is tried on every kind"
