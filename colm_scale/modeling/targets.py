"""Which layers of a model get adapters, and which have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from colm_scale.errors import UserError
from colm_scale.modeling.probe import decoder_blocks, linear_layers

_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of feed-forward layers in families that have mixtures of experts."""
_READ_BY_MAMBA = "out_proj"
"""A layer that peft refuses in these types of models: Mamba's kernels read its weight without calling it."""


def block_layers(model: nn.Module) -> list[str]:
    """List the names, relative to the block, of all linear layers of the decoder blocks."""
    blocks_name, blocks = decoder_blocks(model)
    names = (name for i, block in enumerate(blocks) for name in linear_layers(block, f"{blocks_name}.{i}"))
    return sorted({name.removeprefix(f"{blocks_name}.").split(".", 1)[1] for name in names})


def default_targets(model: PreTrainedModel) -> list[str]:
    """Name the layers that get adapters by default: every linear layer of the blocks.

    In a mixture of experts, those outside the feed-forward layers: neither routed nor shared experts, nor the dense
    layers of blocks without experts, which have the same names. In a model with Mamba layers, not their output layers.
    """
    names = block_layers(model)
    text = model.config.get_text_config()
    if any(getattr(text, key, None) for key in _NUMBER_OF_EXPERTS):
        names = [name for name in names if name.split(".")[0] not in _FEED_FORWARD]
    if text.model_type in _MAMBA:
        names = [name for name in names if name.rsplit(".", 1)[-1] != _READ_BY_MAMBA]
    return names


def check_targets(model: nn.Module, targets: Collection[str]) -> None:
    """Check that every target names a linear layer.

    Raises:
        UserError: One does not, or there are none.
    """
    layers = linear_layers(model, "")
    unknown = [target for target in targets if not any(name.endswith(f".{target}") for name in layers)]
    if unknown or not targets:
        raise UserError(
            f"--lora.targets {list(targets)}: no linear layer is called {unknown or list(targets)}; "
            f"the linear layers of the blocks are: {', '.join(block_layers(model))}"
        )


def wanted_layers(model: nn.Module, targets: Collection[str]) -> set[str]:
    """List the names of the linear layers that targets name by their endings."""
    return {name[1:] for name in linear_layers(model, "") if any(name.endswith(f".{target}") for target in targets)}


def adapted_layers(model: nn.Module) -> set[str]:
    """List the names of the modules with adapters, as they were before peft wrapped the model."""
    names = (name for name, module in model.named_modules() if hasattr(module, "lora_A"))
    return {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names}


def adapted_line(model: nn.Module) -> str:
    """Describe the adapted layers by kind and count."""
    counts = Counter(re.split(r"\.\d+\.", name)[-1] for name in adapted_layers(model))
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    return f"adapters on {counts.total()} layers: {kinds}"
