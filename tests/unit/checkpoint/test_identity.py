from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.families import base_model, with_adapters
from torch import nn

from colm_scale.checkpoint.identity import check_same_run, config_facts, model_digest
from colm_scale.config import (
    DataConfig,
    EvalConfig,
    FsdpConfig,
    LoraConfig,
    ModelConfig,
    ProfileConfig,
    RunConfig,
    SelectionConfig,
    TrackConfig,
    TrainConfig,
)
from colm_scale.errors import UserError
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss

WHERE = Path("runs/a/checkpoints/step-00000020")


def identity(config: RunConfig, data: str = "d", model: str = "m") -> dict:
    return {"config": config_facts(config), "data": data, "model": model}


def stored(config: RunConfig) -> dict:
    return json.loads(json.dumps(identity(config)))


# The base model


def test_the_digest_is_the_base_models_whatever_is_around_it():
    digest = model_digest(base_model("llama").requires_grad_(False))
    assert model_digest(with_adapters(base_model("llama"))) == digest
    assert model_digest(with_adapters(base_model("llama"), r=2, target_modules=["q_proj"])) == digest
    assert model_digest(ExampleLoss(with_adapters(base_model("llama")))) == digest
    assert model_digest(nn.Sequential(ExampleLoss(with_adapters(base_model("llama"))))) == digest


@pytest.fixture(scope="module")
def frozen() -> nn.Module:
    return base_model("qwen2").requires_grad_(False)  # its head is tied to its embeddings


def test_training_the_adapters_leaves_it_alone():
    model = with_adapters(base_model("llama"))
    before = model_digest(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert model_digest(model) == before


def test_what_says_where_a_model_came_from_and_how_it_is_run_does_not_count():
    digest = model_digest(base_model("llama").requires_grad_(False))
    model = base_model("llama", attn_implementation="eager", use_cache=False).requires_grad_(False)
    model.config._name_or_path = "somewhere/else"
    model.config.transformers_version = "0.0.0"
    model.config.dtype = torch.bfloat16  # of the configuration; the parameters' own counts
    keep_block_inputs_only(model)
    assert model_digest(model) == digest


def test_every_parameter_counts(frozen):
    before = model_digest(frozen)
    for _, parameter in frozen.named_parameters():
        first = parameter.data.view(-1)[:1]
        kept = first.clone()
        first.add_(1)
        assert model_digest(frozen) != before
        first.copy_(kept)
    assert model_digest(frozen) == before


def test_its_configuration_counts():
    """Neither of these changes a parameter."""
    digests = {
        model_digest(base_model("llama", **options).requires_grad_(False))
        for options in ({}, {"rms_norm_eps": 1e-4}, {"hidden_act": "gelu"}, {"rope_theta": 5e5})
    }
    assert len(digests) == 4


def test_names_and_shapes_and_types_count(frozen):
    class Holder(type(frozen)):
        def __init__(self, name: str, tensor: torch.Tensor):
            nn.Module.__init__(self)
            self.config = frozen.config
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    zeros = torch.zeros(4, 6)
    same = [Holder("a", zeros), Holder("a", zeros.clone())]
    others = [Holder("b", zeros)]
    others += [Holder("a", tensor) for tensor in (zeros.view(6, 4), zeros.int(), zeros.bfloat16())]
    assert len({model_digest(model) for model in same}) == 1
    assert len({model_digest(model) for model in same + others}) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (1024,), (1025,), (64, 2, 33)])
def test_any_type_and_size_is_read_as_it_is_in_memory(frozen, dtype, shape):
    """uint8: as a quantised layer holds its weights, packed. Up to 1,024 elements, the last one is read too."""
    zeros, last = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    if zeros.numel() in (1, 1023, 1024):
        last.view(-1)[-1] = 1
    with_these = []
    for tensor in (zeros, last):
        frozen.register_parameter("extra", nn.Parameter(tensor, requires_grad=False))
        with_these.append(model_digest(frozen))
    del frozen.extra
    assert (with_these[0] == with_these[1]) == torch.equal(zeros, last)


def test_a_not_a_number_is_read_bit_by_bit(frozen):
    digests = set()
    for bits in (0x7FC0, 0x7FC1, -0x40):
        parameter = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
        frozen.register_parameter("extra", nn.Parameter(parameter, requires_grad=False))
        digests.add(model_digest(frozen))
    del frozen.extra
    assert len(digests) == 3


def test_a_large_parameter_is_sampled_from_its_start_to_its_end(frozen):
    size = 1_000_003
    stride = 977  # the least that leaves at most 1,024
    digests = []
    for place in (None, 0, stride, 1023 * stride, 1):
        parameter = torch.zeros(size)
        if place is not None:
            parameter[place] = 1
        frozen.register_parameter("extra", nn.Parameter(parameter, requires_grad=False))
        digests.append(model_digest(frozen))
    del frozen.extra
    assert len(set(digests)) == 4
    assert digests[4] == digests[0]  # between two samples


def test_a_transposed_parameter_is_read_in_the_order_of_its_own_shape(frozen):
    matrix = torch.arange(12.0).view(3, 4)
    digests = set()
    for tensor in (matrix.t(), matrix.t().contiguous()):
        frozen.register_parameter("extra", nn.Parameter(tensor, requires_grad=False))
        digests.add(model_digest(frozen))
    del frozen.extra
    assert len(digests) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_count():
    model = base_model("llama", torch.bfloat16).requires_grad_(False)
    assert model_digest(model) == model_digest(model.cuda())


# The options

SAME = {
    "model": ModelConfig(name="x", revision="r", attention="eager", trust_remote_code=True),
    "eval": EvalConfig(every=3),
    "fsdp": FsdpConfig(cpu_offload=True),
    "profile": ProfileConfig(floor_every=0),
    "track": TrackConfig(to=["tensorboard"]),
    "output_dir": "elsewhere",
    "engine": "fsdp",
    "resume": "somewhere",
}
FREE = {
    "train": TrainConfig(threads=3, timeout=5.0, activation_checkpointing=True),
    "data": DataConfig(train=["a.jsonl"], eval=["b.jsonl"], chat_template="t.jinja", sources="c.jsonl"),
}


@pytest.mark.parametrize("section", SAME | FREE)
def test_what_decides_nothing_may_differ(section):
    config = dataclasses.replace(RunConfig(), **{section: (SAME | FREE)[section]})
    assert config != RunConfig()
    check_same_run(stored(RunConfig()), identity(config), WHERE)


def test_which_options_are_compared():
    """A new option of these sections is compared until somebody says why it need not be."""
    expected = {"model.quantize"}
    for section, left_out in {
        "data": {"train", "eval", "chat_template", "sources", "left_out", "now"},
        "selection": {"replay"},
        "sources": set(),
        "lora": {"use_rslora"},
        "train": {*("threads", "timeout", "compile", "activation_checkpointing", "forward_reuse", "forward_reuse_gib")},
    }.items():
        names = {field.name for field in dataclasses.fields(getattr(RunConfig(), section))}
        assert left_out <= names
        expected |= {f"{section}.{name}" for name in names - left_out}
    assert config_facts(RunConfig()).keys() == expected


def test_an_option_that_older_checkpoints_lack_is_compared_where_it_is_used():
    plain, scaled = RunConfig(), RunConfig(lora=LoraConfig(use_rslora=True))
    check_same_run(stored(plain), identity(plain), WHERE)
    with pytest.raises(UserError, match=r"--lora\.use_rslora is true, but the checkpoint was made with no such option"):
        check_same_run(stored(plain), identity(scaled), WHERE)


def test_facts_are_what_json_gives_back():
    facts = config_facts(RunConfig(lora=LoraConfig(targets=["q_proj"])))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["train.betas"] == [0.9, 0.999]
    assert facts["lora.targets"] == ["q_proj"]
    assert facts["train.seed"] == 0


def test_a_run_is_the_same_as_itself():
    config = RunConfig(train=TrainConfig(betas=(0.8, 0.95), learning_rate=1e-3), lora=LoraConfig(alpha=8))
    check_same_run(stored(config), identity(dataclasses.replace(config, lora=LoraConfig(alpha=8.0))), WHERE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": TrainConfig(seed=1)}, "--train.seed is 1, but the checkpoint was made with 0"),
        ({"train": TrainConfig(steps=9)}, "--train.steps is 9, but the checkpoint was made with null"),
        ({"train": TrainConfig(betas=(0.5, 0.999))}, "--train.betas is [0.5, 0.999], but the checkpoint was made with"),
        ({"selection": SelectionConfig(budget=8)}, "--selection.budget is 8, but the checkpoint was made with 32"),
        ({"lora": LoraConfig(adapter="é")}, '--lora.adapter is "é", but the checkpoint was made with null'),
        ({"data": DataConfig(overlong="cut")}, '--data.overlong is "cut", but the checkpoint was made with "drop"'),
    ],
)
def test_an_option_that_differs_is_named_with_both_values(change, said):
    with pytest.raises(UserError) as error:
        check_same_run(stored(RunConfig()), identity(RunConfig(**change)), WHERE)
    assert str(error.value).startswith(f"checkpoint {WHERE} is not one of this run: {said}")
    assert "\n" not in str(error.value)
    assert "--output_dir" in str(error.value)


def test_everything_that_differs_is_named():
    current = identity(RunConfig(train=TrainConfig(seed=1), lora=LoraConfig(rank=4)), data="D", model="M")
    with pytest.raises(UserError) as error:
        check_same_run(stored(RunConfig()), current, WHERE)
    found = str(error.value).removeprefix(f"checkpoint {WHERE} is not one of this run: ").split(". ")[0].split("; ")
    assert [text.split(" is ")[0] for text in found] == [
        "--lora.rank",
        "--train.seed",
        "other training data",
        "other base model",
    ]


@pytest.mark.parametrize(
    "change", [{"train": TrainConfig(dtype="bfloat16")}, {"model": ModelConfig(quantize="nf4")}], ids=["dtype", "nf4"]
)
def test_the_same_weights_in_another_type_are_not_called_another_model(change):
    with pytest.raises(UserError, match=r"dtype|quantize") as error:
        check_same_run(stored(RunConfig()), identity(RunConfig(**change), model="M"), WHERE)
    assert "other base model" not in str(error.value)


def test_an_option_that_only_one_version_knows_is_a_difference():
    before, now = stored(RunConfig()), identity(RunConfig())
    del before["config"]["train.seed"]
    del now["config"]["lora.rank"]
    with pytest.raises(UserError) as error:
        check_same_run(before, now, WHERE)
    assert "--train.seed is 0, but the checkpoint was made with no such option" in str(error.value)
    assert "--lora.rank is no such option, but the checkpoint was made with 16" in str(error.value)
