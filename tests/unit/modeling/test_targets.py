"""Adapters are where they were asked for, in models of every kind."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import _COMMON, _GROUPED

from colm_scale.config import EXPERTS, LoraConfig
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.targets import adapted_layers, adapted_line, default_targets, expert_weights

EXPERTS_OPTIONS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    f"linear_{name}": size
    for name, size in {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8}.items()
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ATTENTION = [f"self_attn.{name}_proj" for name in "koqv"]
DEFAULTS: dict[str, tuple[dict[str, object], list[str]]] = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "qwen2_moe": ({**EXPERTS_OPTIONS, "shared_expert_intermediate_size": 16}, ATTENTION),
    "qwen3_moe": ({**EXPERTS_OPTIONS, "head_dim": 8}, ATTENTION),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, ATTENTION),
    "deepseek_v3": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **LATENT},
        [f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")],
    ),
    "qwen3_next": (
        {**EXPERTS_OPTIONS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16, "head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
        [*(f"linear_attn.{name}" for name in ("in_proj_ba", "in_proj_qkvz", "out_proj")), *ATTENTION],
    ),
    "mamba": ({}, ["mixer.in_proj"]),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, ["mixer.in_proj"]),
    "bamba": (
        {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]},
        [*(f"feed_forward.{name}_proj" for name in ("down", "gate", "up")), "mamba.in_proj", *ATTENTION],
    ),
    "granitemoehybrid": (
        {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2},
        ["mamba.in_proj", *ATTENTION],
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        [*(f"feed_forward.{name}_proj" for name in ("down", "gate", "up")), "mamba.in_proj", *ATTENTION],
    ),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        ["conv.in_proj", "conv.out_proj", *(f"feed_forward.w{number}" for number in (1, 2, 3))]
        + [f"self_attn.{name}" for name in ("k_proj", "out_proj", "q_proj", "v_proj")],
    ),
}


def model_of(family: str) -> transformers.PreTrainedModel:
    options = {**_COMMON, **_GROUPED, **DEFAULTS[family][0]}
    with torch.random.fork_rng(devices=[]):
        config = transformers.AutoConfig.for_model(family, **options)
        return transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_work_and_the_layers_adapted_are_those_asked_for(family):
    model = model_of(family)
    assert default_targets(model) == DEFAULTS[family][1]
    adapted = add_adapters(model, LoraConfig(rank=2), 0)
    kinds = {name.split(".", 3)[-1] for name in adapted_layers(adapted)}
    assert kinds == set(DEFAULTS[family][1])


def test_the_line_says_where_adapters_are():
    adapted = add_adapters(model_of("lfm2"), LoraConfig(rank=2, targets=["in_proj", "w1"]), 0)
    assert adapted_line(adapted) == "adapters on 3 layers: conv.in_proj 1, feed_forward.w1 2"


def test_layers_that_peft_exchanges_are_refused():
    """peft takes names of shared experts for those of routed ones, as models of older versions had them."""
    with pytest.raises(UserError, match=r"peft would adapt .*experts.* instead of .*shared_experts\.down_proj"):
        add_adapters(model_of("deepseek_v3"), LoraConfig(targets=["down_proj"]), 0)


@pytest.mark.parametrize(
    ("family", "layer"), [("mamba", "mixer.dt_proj"), ("mamba2", "mixer.out_proj"), ("bamba", "mamba.out_proj")]
)
def test_layers_that_kernels_read_without_calling_are_refused(family, layer):
    words = rf"read the weights of {layer} without calling .* that work are: .*{layer.split('.')[0]}\.in_proj"
    with pytest.raises(UserError, match=words) as caught:
        add_adapters(model_of(family), LoraConfig(targets=[layer]), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_default_adapter_has_a_gradient(family, mode):
    adapted = getattr(add_adapters(model_of(family), LoraConfig(rank=2), 0), mode)()
    adapted(input_ids=torch.arange(3, 12)[None], use_cache=False).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


STACKED = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
MIXTURES: dict[str, tuple[dict[str, object], list[str]]] = {
    **{family: (DEFAULTS[family][0], STACKED) for family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")},
    **{family: (DEFAULTS[family][0], STACKED) for family in ("deepseek_v3", "qwen3_next")},
    "olmoe": (EXPERTS_OPTIONS, STACKED),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}, STACKED),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, STACKED),
    "granitemoe": ({"num_local_experts": 4}, [f"block_sparse_moe.{name.removeprefix('mlp.')}" for name in STACKED]),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_the_same_weights_in_every_family(family):
    options = {**_COMMON, **_GROUPED, **MIXTURES[family][0]}
    with torch.random.fork_rng(devices=[]):
        config = transformers.AutoConfig.for_model(family, **options)
        model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    weights = expert_weights(model)
    assert sorted({name.split(".", 3)[-1] for name in weights}) == MIXTURES[family][1]
    layer = default_targets(model)[0]
    adapted = add_adapters(model, LoraConfig(rank=2, targets=[layer, EXPERTS]), 0)
    found = adapted_layers(adapted)
    assert {name for name, experts in found.items() if experts} == set(weights)
    assert set(found.values()) == {0, 4}
    sizes = {p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "experts" in name}
    assert min(sizes) >= 2 * 4 * 16  # a rank of 2 for each of 4 experts
    assert f"{MIXTURES[family][1][0]} {len(weights) // 2} x 4 experts" in adapted_line(adapted)


def test_experts_of_a_model_without_any_are_refused_with_its_layers():
    with pytest.raises(UserError, match=r"\['experts'\]: Lfm2ForCausalLM has no modules called experts"):
        add_adapters(model_of("lfm2"), LoraConfig(targets=[EXPERTS]), 0)


def test_dropout_before_experts_is_refused_at_once():
    with pytest.raises(UserError, match=r"--lora\.dropout 0\.1 has no place before adapters on experts"):
        LoraConfig(targets=["v_proj", EXPERTS], dropout=0.1)
