"""Tiny causal language models of many architectures, with random weights that depend only on the family.

Every model has 2 blocks, a hidden size of 32, 4 heads of 8 and a vocabulary of 97 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from colm_scale.data.batching import make_batch
from colm_scale.randomness import generator
from colm_scale.records import Batch
from support import multimodal

HIDDEN = 32
HEAD_DIM = 8
VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE = {"intermediate_size": 48, "tie_word_embeddings": False}
_GROUPED = {**_LLAMA_LIKE, "num_key_value_heads": 2}
_HEADS = {"head_dim": HEAD_DIM}

_OPTIONS: dict[str, dict] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": {**_GROUPED, **_HEADS},
    "phi": {"intermediate_size": 48},
    "phi3": {**_GROUPED, "original_max_position_embeddings": 64},
    "stablelm": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "gemma": {**_GROUPED, **_HEADS, "tie_word_embeddings": True},
    "gemma2": {**_GROUPED, **_HEADS, "tie_word_embeddings": True, "query_pre_attn_scalar": HEAD_DIM},
    # Galactica's; smooth, since finite differences are compared.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "activation_function": "gelu", "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # transposed weights, one layer for Q, K and V
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},  # Q, K and V head by head; positions by alibi
}
FAMILIES = tuple(_OPTIONS)

BLOCKS: dict[str, str] = {
    **dict.fromkeys(FAMILIES, "model.layers.1"),
    "opt": "model.decoder.layers.1",
    **dict.fromkeys(("gpt2", "bloom"), "transformer.h.1"),
}
"""The last block."""
_V_LAYERS = {"phi3": "self_attn.qkv_proj", "gpt2": "attn.c_attn", "bloom": "self_attention.query_key_value"}
PROBES: dict[str, str] = {f: f"{BLOCKS[f]}.{_V_LAYERS.get(f, 'self_attn.v_proj')}" for f in FAMILIES}
"""The layer that contains V in the last block."""
ROWS: dict[str, Sequence[int]] = {
    **dict.fromkeys(FAMILIES, range(2 * HEAD_DIM)),
    **dict.fromkeys(("phi", "stablelm", "opt"), range(HIDDEN)),
    "phi3": range(HIDDEN + 2 * HEAD_DIM, HIDDEN + 4 * HEAD_DIM),  # after 4 heads of queries and 2 of keys
    "gpt2": range(2 * HIDDEN, 3 * HIDDEN),
    "bloom": [row for row in range(3 * HIDDEN) if row // HEAD_DIM % 3 == 2],
}
"""The output rows of V in that layer."""


def base_model(family: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A model without adapters, in training mode."""
    options = {**_COMMON, **_OPTIONS.get(family, _GROUPED), **options}
    sees = family in multimodal.EVERY
    make = transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM
    config = multimodal.config_of(family, **options) if sees else transformers.AutoConfig.for_model(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the vectors that some draw, such as the decays of recurrent layers
        model = make.from_config(config)
    fill(model.parameters(), family)
    return model.to(dtype).train()


def adapted_model(family: str, dtype: torch.dtype = torch.float32, lora_dropout: float = 0.0, **options) -> nn.Module:
    """The model with float32 adapters of rank 4 on every linear layer, all matrices nonzero."""
    return with_adapters(base_model(family, dtype, **options), lora_dropout=lora_dropout)


def with_adapters(model: nn.Module, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    fill((p for p in adapted.parameters() if p.requires_grad), "adapters")
    return adapted


def fill(parameters, purpose: str) -> None:
    """Fill matrices with normal numbers of size 1 / sqrt(inputs); perturb vectors slightly."""
    drawn = generator(0, purpose)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=drawn)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def batch_of(
    lengths: list[int], prompt: int = 2, width: int | None = None, seed: int = 0, *, packed: bool = False
) -> Batch:
    """Examples of these lengths without loss on the first ``prompt`` tokens, packed or right padded."""
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator(seed, "row", i)) for i, n in enumerate(lengths)]
    batch = batch_of_rows(rows, [torch.arange(n) >= prompt for n in lengths], packed=packed)
    if width is None or packed:
        return batch
    more = width - batch.input_ids.shape[1]
    rows = batch.targets.rows + batch.targets.rows // batch.input_ids.shape[1] * more
    return dataclasses.replace(
        batch,
        input_ids=nn.functional.pad(batch.input_ids, (0, more)),
        attention_mask=nn.functional.pad(batch.attention_mask, (0, more)),
        targets=dataclasses.replace(batch.targets, rows=rows),
    )


def batch_of_rows(
    rows: Sequence[Tensor], labelled: Sequence[Tensor] | None = None, positions: Tensor | None = None, **options
) -> Batch:
    """A batch of examples with these tokens; by default, all carry loss."""
    labelled = [torch.ones_like(row, dtype=torch.bool) for row in rows] if labelled is None else labelled
    positions = torch.arange(len(rows)) if positions is None else positions
    return make_batch(rows, labelled, positions, 0, torch.device("cpu"), **options)


def labels_of(batch: Batch) -> Tensor:
    """Labels of a padded batch: the token itself where it carries loss, else -100."""
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.targets.rows + 1] = batch.targets.tokens
    return labels


def examples_of(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and loss mask of each example of a padded batch."""
    lengths, labels = batch.attention_mask.sum(1).tolist(), labels_of(batch)
    rows = [row[:length] for row, length in zip(batch.input_ids, lengths)]
    return rows, [row[:length] != -100 for row, length in zip(labels, lengths)]


def some_of(batch: Batch, chosen: Sequence[int], *, packed: bool = False) -> Batch:
    """Some examples of a padded batch, padded to their longest or packed."""
    rows, labelled = examples_of(batch)
    of_chosen = ([x[i] for i in chosen] for x in (rows, labelled))
    return batch_of_rows(*of_chosen, batch.positions[torch.as_tensor(chosen, dtype=torch.int64)], packed=packed)


def unlabelled(batch: Batch, *without: int) -> Batch:
    """A padded batch with some or all examples without loss."""
    rows, labelled = examples_of(batch)
    marks = [mark & (bool(without) and i not in without) for i, mark in enumerate(labelled)]
    return batch_of_rows(rows, marks, batch.positions)


def part_of(batch: Batch, row: int) -> Batch:
    """One example of a padded batch, without padding."""
    return some_of(batch, [row])
