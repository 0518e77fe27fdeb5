"""Models that also see or hear, of which text needs a part: Gemma 3, Qwen-VL, Mistral Small 3, Llama 4 and others.

Their towers and projectors are left out as soon as such a model is built, before any weight is read. What is left is
still a model of the checkpoint's own class: positions, masks and scales are those of the whole model, and so are the
names of its layers, by which an adapter fits the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from colm_scale.errors import UserError
from colm_scale.modeling.weights import META

_EMBEDS_TEXT = ("Gemma3nMultimodalEmbedder",)
"""Classes of parts that embed tokens of text as well."""
_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


class NotLoaded(nn.Module):
    """Stands for a part that text never runs.

    Attributes:
        total_bytes: Size of the weights that are not loaded, in the type of the model.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.total_bytes = sum(weight.numel() * weight.element_size() for weight in part.parameters())

    def forward(self, *_: object, **__: object) -> None:
        raise UserError("this model runs a part on text that is not loaded for text; use a model of text alone")


def sees_or_hears(config: PretrainedConfig) -> bool:
    """Whether a checkpoint is of a class with more than a language model, whose tokens it continues."""
    text = config.get_text_config()
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING or text is config or text.is_encoder_decoder:
        return False
    named = getattr(config, "architectures", None) or []
    return _class(config).__name__ in named or (not named and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING)


def whole_class(config: PretrainedConfig) -> type[PreTrainedModel] | type[AutoModelForCausalLM]:
    """Return the class of a checkpoint, with all its parts."""
    return _class(config) if sees_or_hears(config) else AutoModelForCausalLM


def text_class(config: PretrainedConfig) -> type[PreTrainedModel] | type[AutoModelForCausalLM]:
    """Return the class of a checkpoint whose models leave out what text never runs."""
    return _leaving_out(_class(config)) if sees_or_hears(config) else AutoModelForCausalLM


def without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model on the meta device, without what text never runs."""
    model: PreTrainedModel
    with META:
        if sees_or_hears(config):
            model = _leaving_out(_class(config))._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _class(config: PretrainedConfig) -> type[PreTrainedModel]:
    found = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    assert isinstance(found, type)
    assert issubclass(found, PreTrainedModel)
    return found


def _leaving_out(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of the same name, since transformers and peft go by names."""

    def init(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        whole.__init__(model, *args, **kwargs)
        ignored = {rf"^{re.escape(path)}\." for path in leave_out(model)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    if whole not in _CLASSES:
        _CLASSES[whole] = type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})
    return _CLASSES[whole]


def leave_out(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Take what text never runs out of a model: all beside the decoder, and the modules it is in, but the head.

    Returns:
        The parts, by path, for `put_back`.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder)
    left_out: dict[str, nn.Module] = {}
    owner: nn.Module = model
    above = ""
    for name in path.split("."):
        for other, part in [*owner.named_children()]:
            beside = other != name and part is not head and type(part).__name__ not in _EMBEDS_TEXT
            if beside and next(part.parameters(), None) is not None:
                left_out[f"{above}{other}"] = part
        owner, above = owner.get_submodule(name), f"{above}{name}."
    put_back(model, {path: NotLoaded(part) for path, part in left_out.items()})
    return left_out


def put_back(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Put parts into a model, by path."""
    for path, part in parts.items():
        model.set_submodule(path, part)


def not_loaded(model: nn.Module) -> dict[str, NotLoaded]:
    """The parts that are not loaded, by their names."""
    found = ((path, part) for path, part in model.named_modules() if isinstance(part, NotLoaded))
    return {path.rsplit(".", 1)[-1]: part for path, part in found}


def not_loaded_line(model: nn.Module) -> str:
    """Name the parts that are not loaded, and what they would take; empty if there are none."""
    parts = not_loaded(model)
    total = sum(part.total_bytes for part in parts.values())
    return f"{', '.join(parts)}: not loaded, text never runs them ({total / 1e6:,.0f} MB)" if parts else ""


def within(names: Iterable[str]) -> str:
    """A regular expression of the paths of the named parts, and of all modules in them; empty if there are none."""
    every = "|".join(map(re.escape, names))
    return rf"(?:.*\.)?(?:{every})(?:\..*)?" if every else ""
