from __future__ import annotations

import pytest
import torch
from support.families import BLOCKS, FAMILIES, HEAD_DIM, HIDDEN, PROBES, ROWS, base_model
from support.zoo import ZOO
from torch import nn

from colm_scale.config import ModelConfig
from colm_scale.errors import UserError
from colm_scale.modeling.load import load_model
from colm_scale.modeling.probe import (
    decoder_blocks,
    find_probe,
    last_block_alone,
    linear_layers,
    sample_of,
    sample_of_model,
    without_dropout,
)
from colm_scale.modeling.roles import find_role


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_of_the_last_block_are_found(family, dtype):
    model = base_model(family, dtype)
    probe = find_probe(model)
    assert probe.layer == PROBES[family]
    assert probe.rows.tolist() == list(ROWS[family])
    assert probe.layer.startswith(probe.block + ".")
    assert probe.block == BLOCKS[family]


FUSED = {"phi3": "self_attn.qkv_proj", "gpt2": "attn.c_attn", "bloom": "self_attention.query_key_value"}
LAYERS = {role: {**dict.fromkeys(FAMILIES, f"self_attn.{role}_proj"), **FUSED} for role in "qk"}
LAYERS["o"] = {
    **dict.fromkeys(FAMILIES, "self_attn.o_proj"),
    "phi": "self_attn.dense",
    "opt": "self_attn.out_proj",
    "gpt2": "attn.c_proj",
    "bloom": "self_attention.dense",
}
LAYERS["mlp"] = {
    **dict.fromkeys(FAMILIES, "mlp.down_proj"),
    "phi": "mlp.fc2",
    "opt": "fc2",
    "gpt2": "mlp.c_proj",
    "bloom": "mlp.dense_4h_to_h",
}
HEAD_BY_HEAD = [row // HEAD_DIM % 3 for row in range(3 * HIDDEN)]
"""Of each output row of BLOOM's fused layer: 0 for a query, 1 for a key, 2 for a value."""
PARTS = {role: dict.fromkeys(FAMILIES, range(HIDDEN)) for role in ("q", "o", "mlp")}
PARTS["k"] = {family: range(len(rows)) for family, rows in ROWS.items()}  # as many keys as values
PARTS["k"] |= {"phi3": range(HIDDEN, HIDDEN + 2 * HEAD_DIM), "gpt2": range(HIDDEN, 2 * HIDDEN)}
for number, role in enumerate("qk"):
    PARTS[role]["bloom"] = [row for row in range(3 * HIDDEN) if HEAD_BY_HEAD[row] == number]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_is_found_in_the_last_block(family, role, dtype):
    probe = find_probe(base_model(family, dtype), role)
    assert probe.block == BLOCKS[family]
    assert probe.layer == f"{probe.block}.{LAYERS[role][family]}"
    assert probe.rows.tolist() == list(PARTS[role][family])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("role", ["v", "q", "k", "o", "mlp"])
def test_every_row_of_a_trained_model_is_found(role, dtype):
    """Some of its heads hardly look at other tokens, and half precision rounds away what they pass on."""
    model = load_model(ModelConfig(), dtype, torch.device("cpu"))
    probe = find_probe(model, role)
    name = "mlp.down_proj" if role == "mlp" else f"self_attn.{role}_proj"
    assert probe.layer == f"{probe.block}.{name}"
    assert len(probe.rows) == model.get_submodule(probe.layer).out_features


def test_an_mlp_without_a_linear_layer_is_refused():
    model = base_model("mixtral")  # its experts are one parameter each
    assert find_probe(model, "o").layer == "model.layers.1.self_attn.o_proj"
    with pytest.raises(UserError, match="cannot identify the last layer of the MLP of MixtralForCausalLM: no layer"):
        find_probe(model, "mlp")


def test_a_second_layer_of_queries_is_refused():
    model = base_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Linear(32, 32))
    with pytest.raises(UserError, match=r"cannot identify the Q projection of .*: 2 layers behave like one.*q_proj\.1"):
        find_probe(model, "q")
    assert find_probe(model, "q_proj.1").layer == "model.layers.1.self_attn.q_proj.1"


def test_finding_leaves_the_model_as_it_was():
    model = base_model("opt", dropout=0.5)
    model.model.decoder.layers[0].eval()  # a mode that differs between modules is put back too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert find_probe(model).layer == PROBES["opt"]  # with dropout it would not be found
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_probe_can_be_named_in_full_or_by_its_end():
    model = base_model("llama")
    for name in ("model.layers.1.mlp.down_proj", "mlp.down_proj", "down_proj"):
        probe = find_probe(model, name)
        assert probe.layer == "model.layers.1.mlp.down_proj"
        assert probe.rows.tolist() == list(range(32))


@pytest.mark.parametrize("name", ["value", "roj", "model.layers.0.self_attn.v_proj", "self_attn"])
def test_a_name_that_is_no_layer_of_the_last_block_is_refused(name):
    listed = r"does not name one.*model\.layers\.1\.self_attn\.v_proj.*mlp\.down_proj"
    with pytest.raises(UserError, match=listed) as error:
        find_probe(base_model("llama"), name)
    assert repr(name) in str(error.value)


def test_a_name_of_two_layers_is_refused():
    model = base_model("llama")
    model.model.layers[1].mlp.v_proj = nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"'v_proj' does not name one linear layer"):
        find_probe(model, "v_proj")
    assert find_probe(model, "self_attn.v_proj").layer == "model.layers.1.self_attn.v_proj"


class NoAttention(nn.Module):
    """In place of attention: tokens that do not see each other."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, hidden_states, **_):
        return self.mix(hidden_states), None


def test_a_model_without_values_is_refused_with_the_candidates():
    model = base_model("llama")
    for block in model.model.layers:
        block.self_attn = NoAttention()
    with pytest.raises(UserError, match=r"no layer behaves like one.*--selection\.probe.*self_attn\.mix.*mlp\.up_proj"):
        find_probe(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Sequential has no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_the_blocks_are_the_largest_list():
    model = base_model("llama")
    model.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    name, blocks = decoder_blocks(model)
    assert name == "model.layers"
    assert len(blocks) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_is_found_without_a_forward_of_the_other_blocks(family):
    model = base_model(family, num_hidden_layers=4)
    blocks = decoder_blocks(model)[1]
    ran = []

    def record(block, *_):
        ran.append({parameter.data_ptr() for parameter in block.parameters()})

    for block in blocks:
        block.register_forward_pre_hook(record)  # copies of the block run it too
    found = find_probe(model)
    assert found.layer.startswith(f"{decoder_blocks(model)[0]}.3.")
    assert ran
    assert all(pointers == {parameter.data_ptr() for parameter in blocks[-1].parameters()} for pointers in ran)


def test_a_last_block_that_needs_an_earlier_one_is_tried_out_in_the_whole_model():
    model, shared = base_model("llama"), {}
    first, last = model.model.layers
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: shared.clear())
    first.register_forward_pre_hook(lambda *_: shared.update(keys=1))
    last.register_forward_pre_hook(lambda *_: shared["keys"] and None)
    assert last_block_alone(model) is model
    assert find_probe(model).layer == PROBES["llama"]


def test_layers_that_reach_no_later_token_are_tried_once():
    model, rows = base_model("llama"), []

    def record(_module, _args, given):
        rows.append(len(given["input_ids"]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    linears = linear_layers(decoder_blocks(model)[1][-1], "model.layers.1")
    with without_dropout(model):
        find_role(model, linears, "v")
    # Once unchanged and once changed in all chunks of each of 7 layers; then K and V, two heads each, in two sizes.
    assert sorted(rows) == [1] * 8 + [2] * 5


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ["LlamaDecoderLayer"]),
        ("qwen3_next", ["linear_attention", "full_attention"]),
        ("lfm2", ["conv", "full_attention"]),
        ("bamba", ["linear_attention", "full_attention"]),
        ("jamba", ["JambaMambaDecoderLayer", "JambaAttentionDecoderLayer"]),
    ],
)
def test_a_sample_has_a_block_of_each_kind_and_the_last_one_at_its_end(family, kinds):
    """Plans and trainers look for the probe there; many hybrids begin with a block that has no attention."""
    config = base_model(family, **ZOO[family].options).config
    sample = sample_of(config)
    blocks = decoder_blocks(sample)[1]
    found = [type(block).__name__ for block in blocks]
    assert kinds in (found, (getattr(sample.config, "layer_types", None) or [])[: len(blocks)])
    assert find_probe(sample).layer.startswith(f"{decoder_blocks(sample)[0]}.{len(kinds) - 1}.")
    of_model = sample_of_model(base_model(family, **ZOO[family].options), "sdpa")
    assert find_probe(of_model).layer == find_probe(sample).layer
