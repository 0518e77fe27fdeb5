"""Adapters are where they were asked for, in models of every kind."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import _COMMON, _GROUPED

from colm_scale.config import LoraConfig
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.targets import adapted_layers, adapted_line, default_targets

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    f"linear_{name}": size
    for name, size in {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8}.items()
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ATTENTION = [f"self_attn.{name}_proj" for name in "koqv"]
DEFAULTS: dict[str, tuple[dict[str, object], list[str]]] = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "qwen2_moe": ({**EXPERTS, "shared_expert_intermediate_size": 16}, ATTENTION),
    "qwen3_moe": ({**EXPERTS, "head_dim": 8}, ATTENTION),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, ATTENTION),
    "deepseek_v3": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **LATENT},
        [f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")],
    ),
    "qwen3_next": (
        {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 16, "head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
        [*(f"linear_attn.{name}" for name in ("in_proj_ba", "in_proj_qkvz", "out_proj")), *ATTENTION],
    ),
    "mamba": ({}, ["mixer.dt_proj", "mixer.in_proj", "mixer.x_proj"]),
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


def test_layers_that_peft_refuses_are_one_line():
    with pytest.raises(UserError, match=r"--lora\.targets \['out_proj'\]: peft refuses them: .*Mamba") as caught:
        add_adapters(model_of("mamba"), LoraConfig(targets=["out_proj"]), 0)
    assert "\n" not in str(caught.value)
