"""The model families of docs/support.md: what is special in each, and the options of a tiny model of it.

A family is a key of `ZOO`, the ``model_type`` of transformers. Rows of docs/support.jsonl name it.
"""

from __future__ import annotations

from typing import NamedTuple

from support.families import HEAD_DIM, HIDDEN

_MLP = {"intermediate_size": 48}
_GROUPED = {**_MLP, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": HEAD_DIM}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_TWO_OF_FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_SSM = {"mamba_d_ssm": 64}
_WITHOUT_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


class Family(NamedTuple):
    """A row of the table.

    Attributes:
        name: As people say it.
        special: What sets it apart from Llama.
        options: Of its tiny model.
        probe: ``--selection.probe``.
    """

    name: str
    special: str
    options: dict[str, object]
    probe: str = "v"


ZOO: dict[str, Family] = {
    "llama": Family("Llama 2, 3", "grouped queries", {**_GROUPED, **_UNTIED}),
    "mistral": Family("Mistral", "sliding window", {**_GROUPED, **_UNTIED, "sliding_window": 8}),
    "qwen2": Family("Qwen2, Qwen2.5", "biases of Q, K, V; tied embeddings", {**_GROUPED, **_TIED}),
    "qwen3": Family("Qwen3", "norms of Q and K", {**_HEADS, **_TIED}),
    "gemma": Family("Gemma", "scaled, tied embeddings", {**_HEADS, **_TIED}),
    "gemma2": Family(
        "Gemma 2",
        "caps of scores and logits; every second window slides",
        {**_HEADS, **_TIED, **_SLIDING, "query_pre_attn_scalar": HEAD_DIM},
    ),
    "gemma3_text": Family(
        "Gemma 3 (text)",
        "norms of Q and K; two rotary bases; sliding windows",
        {**_HEADS, **_TIED, **_SLIDING, "query_pre_attn_scalar": HEAD_DIM},
    ),
    "phi": Family("Phi-1.5, Phi-2", "parallel blocks; partial rotary", {**_MLP, **_UNTIED}),
    "phi3": Family(
        "Phi-3, Phi-4",
        "fused QKV and MLP; sliding window",
        {**_GROUPED, **_UNTIED, "original_max_position_embeddings": 64, "sliding_window": 8},
    ),
    "opt": Family("OPT", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
    "gpt2": Family(
        "GPT-2",
        "transposed weights; fused QKV; learned positions",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": Family("GPT-NeoX, Pythia", "QKV fused by heads; parallel blocks; partial rotary", {**_MLP, **_UNTIED}),
    "bloom": Family("BLOOM", "alibi; QKV fused by heads", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": Family(
        "Falcon",
        "one head of K and V, fused with Q; parallel blocks",
        {"ffn_hidden_size": 48, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    "stablelm": Family("StableLM", "partial rotary; layer norms", {**_MLP, **_UNTIED, "num_key_value_heads": 4}),
    "starcoder2": Family(
        "StarCoder2",
        "biases; sliding window; tied embeddings",
        {**_GROUPED, **_TIED, "sliding_window": 8, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "cohere2": Family(
        "Command R7B (Cohere 2)",
        "parallel blocks; sliding windows, else no positions; scaled logits",
        {**_GROUPED, **_TIED, **_SLIDING},
    ),
    "olmo2": Family("OLMo 2", "norms after the layers; norms of Q and K", {**_GROUPED, **_UNTIED}),
    "olmo3": Family("OLMo 3", "as OLMo 2; sliding windows", {**_GROUPED, **_UNTIED, **_SLIDING}),
    "granite": Family("Granite 3", "scaled embeddings, residuals, logits", {**_GROUPED, **_TIED}),
    "glm4": Family("GLM-4", "fused gate and up; four norms; partial rotary", {**_HEADS, **_UNTIED}),
    "smollm3": Family("SmolLM3", "some blocks without positions", {**_GROUPED, **_TIED, "no_rope_layers": [1, 0]}),
    "ernie4_5": Family("ERNIE 4.5", "interleaved rotary", {**_HEADS, **_TIED}),
    "hunyuan_v1_dense": Family("Hunyuan", "norms of Q and K after the rotation", {**_HEADS, **_TIED}),
    "seed_oss": Family("Seed-OSS", "biases of Q, K, V; dropout by default", {**_HEADS, **_UNTIED, **_WITHOUT_DROPOUT}),
    "nemotron": Family("Nemotron 4", "squared ReLU; partial rotary", {**_HEADS, **_UNTIED}),
    "exaone4": Family("EXAONE 4", "sliding windows, else no positions; norms after", {**_HEADS, **_UNTIED, **_SLIDING}),
    "mixtral": Family("Mixtral", "experts", {**_GROUPED, **_UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("Qwen3-MoE", "experts", {**_HEADS, **_UNTIED, **_TWO_OF_FOUR, "num_experts": 4}),
    "olmoe": Family(
        "OLMoE", "experts; norms of Q and K", {**_GROUPED, **_UNTIED, "num_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt_oss": Family(
        "gpt-oss",
        "experts with biases; attention sinks; sliding windows",
        {**_HEADS, **_UNTIED, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3, R1",
        "latent attention; a dense block, then routed and shared experts",
        {
            **{**_MLP, **_UNTIED, **_TWO_OF_FOUR, **_LATENT, "num_key_value_heads": 4, "n_routed_experts": 4},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
        },
    ),
    "granitemoe": Family(
        "Granite 3 MoE", "experts", {**_GROUPED, **_TIED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        "gated delta net and gated attention; shared experts",
        {
            **{**_HEADS, **_UNTIED, **_TWO_OF_FOUR, **_LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        "attention and Mamba 2 side by side, so `--selection.probe v_proj`",
        {**_HEADS, **_UNTIED, **_MAMBA, **_SSM},
        "v_proj",
    ),
    "bamba": Family(
        "Bamba",
        "Mamba 2 blocks, and attention in some",
        {**_GROUPED, **_UNTIED, **_MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    ),
    "jamba": Family(
        "Jamba",
        "Mamba blocks; attention in some; experts in some",
        {
            **{**_GROUPED, **_UNTIED, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"num_experts": 4, "num_experts_per_tok": 2},
        },
    ),
    "lfm2": Family("LFM2", "short convolutions; attention in some", {**_GROUPED, **_TIED, **_CONVOLUTION}),
    "mamba2": Family(
        "Mamba 2",
        "recurrent state; no attention, so `--selection.probe in_proj`",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "in_proj",
    ),
    "gemma3": Family("Gemma 3 (4B and larger)", "sees; trained without tower and projector", {}),
    "mistral3": Family("Mistral Small 3", "sees; trained without tower and projector", {}),
    "llama4": Family("Llama 4", "sees; experts in some blocks, whose router returns a pair; chunked attention", {}),
    "qwen2_5_vl": Family("Qwen2.5-VL", "sees; positions in three parts", {}),
    "qwen3_vl": Family("Qwen3-VL", "sees; positions in three parts, interleaved", {}),
    "qwen3_5": Family("Qwen3.5", "sees; gated delta net and attention", {}),
    "idefics3": Family("Idefics 3", "sees; Llama's text part", {}),
}
"""By ``model_type``, in the order of the page."""
