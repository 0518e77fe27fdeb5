"""Typed access to causal language models of transformers and peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

CausalModel = PreTrainedModel | PeftModel
"""A causal language model, or peft's model around one."""
_Module = TypeVar("_Module", bound=nn.Module)


def base_of(model: CausalModel) -> PreTrainedModel:
    """The causal language model itself, with the adapters in its layers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def input_weight(model: PreTrainedModel) -> Tensor:
    """``[vocabulary, hidden]`` weight of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def moved(model: _Module, to: torch.device | torch.dtype) -> _Module:
    """``model.to(to)``, in place (mypy cannot bind the ``to`` of transformers' models)."""
    return model.to(to)


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """A context after which these hooks are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
