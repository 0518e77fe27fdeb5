"""Adapters: new ones, and those to start from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from colm_scale.config import EXPERTS, LoraConfig
from colm_scale.data.hub import use_cache_without_hub
from colm_scale.errors import UserError, one_line
from colm_scale.modeling.adapter_linear import compute_in_input_type
from colm_scale.modeling.multimodal import not_loaded, within
from colm_scale.modeling.targets import (
    adapted_layers,
    block_layers,
    check_targets,
    default_targets,
    is_of_experts,
    parameters_of,
    wanted_layers,
)
from colm_scale.randomness import global_draws

_TRAINED_WHOLE = {
    "modules_to_save": "whole layers",
    "trainable_token_indices": "embeddings of tokens",
    "bias": "biases",
    "target_parameters": "matrices of weights that are no linear layers",
}
"""What else a LoRA adapter may hold, by the key of its configuration."""
_OF_EMBEDDING = "lora_embedding_"
"""What peft calls the LoRA matrices of an embedding."""
_UNREADABLE = (OSError, ValueError, SafetensorError)
_MERGE_FIRST = "merge it into its base model with colm-scale merge, and start from the result with --model.name"


def check_adapter(config: LoraConfig) -> None:
    """Check that ``config.adapter``, if set, is plain LoRA. Reads no weights.

    Raises:
        UserError: There is no such adapter, it is not plain LoRA, or its weights are in a format that can hold code.
    """
    name = config.adapter
    if name is None:
        return
    use_cache_without_hub(name)
    try:
        found = PeftConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--lora.adapter {name}: no adapter can be read there ({one_line(error)})") from None
    dora = getattr(found, "use_dora", False)
    if dora or found.peft_type != PeftType.LORA:
        kind = "DoRA" if dora else found.peft_type.value
        raise UserError(f"--lora.adapter {name} is of type {kind}, but must be plain LoRA")
    _weights_folder(name)


def check_trained_further(config: LoraConfig) -> None:
    """Check that the adapter of `check_adapter`, if set, has only what can be trained here. Reads no weights.

    Raises:
        UserError: It has more than matrices of linear layers.
    """
    name = config.adapter
    if name is None:
        return
    found = PeftConfig.from_pretrained(name)
    for key, what in _TRAINED_WHOLE.items():
        value = getattr(found, key, None)
        if key == "target_parameters":
            value = [parameter for parameter in value or () if not is_of_experts(parameter)]
        if value and value != "none":
            raise UserError(
                f"--lora.adapter {name} also trains {what} ({key}: {value}), and only LoRA matrices of linear layers "
                f"can be trained further here: {_MERGE_FIRST}"
            )
    try:
        with safe_open(Path(_weights_folder(name)) / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            embedding = next((key for key in file.keys() if _OF_EMBEDDING in key), "")  # noqa: SIM118
    except _UNREADABLE as error:
        raise _cannot_be_read(name, error) from None
    if embedding:
        raise UserError(
            f"--lora.adapter {name} also adapts an embedding ({embedding}), and only LoRA matrices of linear layers "
            f"can be trained further here: {_MERGE_FIRST}"
        )


def _cannot_be_read(name: str, error: Exception) -> UserError:
    return UserError(f"--lora.adapter {name}: its weights cannot be read ({one_line(error)})")


def _weights_folder(name: str) -> str:
    """The folder with an adapter's safetensors file. Without one, peft would unpickle other files."""
    try:
        found = cached_file(name, SAFETENSORS_WEIGHTS_NAME)
    except OSError as error:
        why = "" if Path(name).is_dir() else f" ({one_line(error)})"
        raise UserError(
            f"--lora.adapter {name} has no {SAFETENSORS_WEIGHTS_NAME}, and other formats can hold code, so are not "
            f"read: save it as safetensors{why}"
        ) from None
    assert found is not None  # else cached_file raises
    return str(Path(found).parent)


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Add LoRA adapters in training mode: new ones, equal on every rank, or ``config.adapter``.

    Their weights and gradients are float32, their products in the type of the base.

    Raises:
        UserError: A target names no linear layer, or the adapter is missing, not plain LoRA, or another model's.
    """
    check_adapter(config)
    with global_draws(model.device, seed, "adapters"):
        adapted = _new_adapters(model, config) if config.adapter is None else _load_adapter(model, config.adapter)
        saved = adapted.peft_config[adapted.active_adapter]
        assert isinstance(saved, PeftLoraConfig)
        # The whole model may have layers of the same names in the parts that are not loaded here.
        saved.exclude_modules = saved.exclude_modules or within(not_loaded(model)) or None
        compute_in_input_type(adapted)
        return adapted.train()


def _new_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    targets = default_targets(model) if config.targets is None else config.targets
    check_targets(model, targets)
    wanted = wanted_layers(model, targets)
    configure: Callable[..., PeftLoraConfig] = PeftLoraConfig  # its annotations say that alpha is an int
    peft_config = configure(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=[target for target in targets if target != EXPERTS],
        target_parameters=parameters_of(model, targets) or None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, peft_config)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--lora.targets {targets}: peft refuses them: {one_line(error, lines=2)}") from None
    found = adapted_layers(adapted).keys()
    if found != wanted:  # peft exchanges names of layers that experts have too
        raise UserError(
            f"--lora.targets {targets}: peft would adapt {', '.join(sorted(found - wanted)) or 'nothing'} instead of "
            f"{', '.join(sorted(wanted - found)) or 'nothing'}: name other layers, of "
            f"{', '.join(block_layers(model))}"
        )
    return adapted


def _load_adapter(model: PreTrainedModel, name: str) -> PeftModel:
    folder = _weights_folder(name)
    try:
        read = load_peft_weights(folder, device="cpu").keys()
    except _UNREADABLE as error:
        raise _cannot_be_read(name, error) from None
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--lora.adapter {name} does not fit this model: {one_line(error, lines=2)}") from None
    # peft loads the weights that match and leaves the others random.
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    odd = sorted({*wanted - read, *(key for key in read - wanted if "lora_" in key)})
    parts = not_loaded(model)
    if any(re.fullmatch(within(parts), key) for key in odd):
        raise UserError(
            f"--lora.adapter {name} also adapts {', '.join(parts)}, which text never runs and which is not loaded: "
            "merge it into its base model with peft (PeftModel.merge_and_unload), and start from the result"
        )
    if odd:
        lacks = "the adapter lacks" if odd[0] in wanted else "the model has no layer for"
        raise UserError(f"--lora.adapter {name} does not fit this model: {lacks} {odd[0]}, the first of {len(odd)}")
    return adapted
