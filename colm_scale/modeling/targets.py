"""Which layers of a model get adapters, and which have them.

The weights of routed experts are no layers: a mixture stacks them in one three-dimensional parameter per matrix. peft
adds the product of an adapter's matrices to such a parameter in each forward, expert by expert.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from colm_scale.config import EXPERTS
from colm_scale.errors import UserError
from colm_scale.modeling.probe import decoder_blocks, linear_layers

_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp")
"""Names of feed-forward layers in families that have mixtures of experts."""
_READ_BY_MAMBA = ("dt_proj", "out_proj", "x_proj")
"""Layers of Mamba's mixers whose weights its kernels read without calling them: adapters have no effect there, or only
where the kernels do not run."""


def block_layers(model: nn.Module) -> list[str]:
    """List the names, relative to the block, of all linear layers of the decoder blocks."""
    blocks_name, blocks = decoder_blocks(model)
    names = (name for i, block in enumerate(blocks) for name in linear_layers(block, f"{blocks_name}.{i}"))
    return sorted({name.removeprefix(f"{blocks_name}.").split(".", 1)[1] for name in names})


def default_targets(model: PreTrainedModel) -> list[str]:
    """Name the layers that get adapters by default: every linear layer of the blocks.

    In a mixture of experts, those outside the feed-forward layers: neither routed nor shared experts, nor the dense
    layers of blocks without experts, which have the same names. In Mamba's mixers, the first layer alone.
    """
    names = block_layers(model)
    text = model.config.get_text_config()
    if any(getattr(text, key, None) for key in _NUMBER_OF_EXPERTS):
        names = [name for name in names if name.split(".")[0] not in _FEED_FORWARD]
    uncalled = {_in_block(name) for name in _read_by_mamba(model)}
    return [name for name in names if name not in uncalled]


def _read_by_mamba(model: nn.Module) -> set[str]:
    """List the names of the layers of mixers that are read without being called."""
    mixers = (name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D"))
    return {f"{name}.{layer}" for name in mixers for layer in _READ_BY_MAMBA}


def expert_weights(model: nn.Module) -> list[str]:
    """List the names of the weights of routed experts: the stacked matrices of modules called ``experts``."""
    every = model.named_parameters()
    return [name for name, weight in every if is_of_experts(name) and weight.ndim == 3]  # biases have two


def is_of_experts(parameter: str) -> bool:
    """Whether a parameter of this name is directly one of a module called ``experts``."""
    return parameter.split(".")[-2:-1] == [EXPERTS]


def parameters_of(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Name the parameters that get adapters without being a layer's, relative to the block."""
    return sorted({_in_block(name) for name in expert_weights(model)}) if EXPERTS in targets else []


def check_targets(model: PreTrainedModel, targets: Collection[str]) -> None:
    """Check that every target names a linear layer, or the routed experts of a model that has some.

    Raises:
        UserError: One does not, or there are none.
    """
    layers = linear_layers(model, "")
    if EXPERTS in targets and not expert_weights(model):
        raise UserError(
            f"--lora.targets {list(targets)}: {type(model).__name__} has no modules called {EXPERTS} with the weights "
            f"of its routed experts; the linear layers of the blocks are: {', '.join(block_layers(model))}"
        )
    named = [target for target in targets if target != EXPERTS]
    unknown = [target for target in named if not any(name.endswith(f".{target}") for name in layers)]
    if unknown or not targets:
        raise UserError(
            f"--lora.targets {list(targets)}: no linear layer is called {unknown or list(targets)}; "
            f"the linear layers of the blocks are: {', '.join(block_layers(model))}"
        )
    if unheard := sorted({_in_block(name) for name in wanted_layers(model, named) & _read_by_mamba(model)}):
        raise UserError(
            f"--lora.targets {list(targets)}: Mamba's kernels read the weights of {', '.join(unheard)} without calling "
            f"these layers, so adapters would have no effect: leave them out. Those that work are: "
            f"{', '.join(default_targets(model))}"
        )


def wanted_layers(model: nn.Module, targets: Collection[str]) -> set[str]:
    """List the names of the linear layers that targets name by their endings, and of the weights of experts."""
    named = {name[1:] for name in linear_layers(model, "") if any(name.endswith(f".{target}") for target in targets)}
    return named | set(expert_weights(model) if EXPERTS in targets else ())


def adapted_layers(model: nn.Module) -> dict[str, int]:
    """List the names of the layers and weights with adapters, as they were before peft wrapped the model, each with its
    number of experts (0: it is a layer)."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            expert = isinstance(module, ParamWrapper)
            found[f"{name}.{module.parameter_name}" if expert else name] = module.num_experts if expert else 0
    return found


def adapted_line(model: nn.Module) -> str:
    """Describe the adapted layers by kind and count."""
    counts = Counter((_in_block(name), experts) for name, experts in adapted_layers(model).items())
    kinds = (f"{kind} {count}" + f" x {experts} experts" * bool(experts) for (kind, experts), count in counts.items())
    return f"adapters on {counts.total()} layers: {', '.join(sorted(kinds))}"


def _in_block(name: str) -> str:
    """The name of a layer relative to its block."""
    return re.split(r"\.\d+\.", name)[-1]
