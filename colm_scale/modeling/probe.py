"""Where the sketch looks: a linear layer of the last decoder block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from colm_scale.errors import UserError
from colm_scale.modeling.roles import ROLES, find_role, listing, width


@dataclass(frozen=True, slots=True)
class Probe:
    """The place where the sketch looks.

    Attributes:
        block: Qualified name of the decoder block.
        layer: Qualified name of the linear layer whose LoRA B matrix is the probe tensor.
        rows: ``[d_out]`` int64 output rows of that layer that belong to the probe (all, unless it is fused).
    """

    block: str
    layer: str
    rows: Tensor


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the ModuleList of like modules that holds most parameters."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, so the last block cannot be found")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def first_blocks(base: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of the first ``count`` blocks of another, with its embeddings, final norm and head, on the same weights.

    What an engine does with the base's parameters (cut them into shards, move them) leaves these as they are, and no
    weight is there twice as long as nothing does.
    """
    name, blocks = decoder_blocks(base)
    # Parameters of its own around the same numbers; 4-bit ones, which no engine cuts, are the same.
    memo: dict[int, object] = {id(p): copy.copy(p) if type(p) is nn.Parameter else p for p in base.parameters()}
    memo |= {id(block): nn.Identity() for block in blocks[count:]}
    model = copy.deepcopy(base, memo)
    copied = model.get_submodule(name)
    assert isinstance(copied, nn.ModuleList)
    del copied[count:]
    return model


def find_probe(model: PreTrainedModel, which: str = "v") -> Probe:
    """Find the probe in the last block of a causal language model that has no adapters yet.

    Args:
        model: The base model, on any device, in any floating-point type.
        which: The user's choice (``--selection.probe``): v, q, k, o or mlp, or a linear layer of the last block by its
            full name, or its end if that is unique.

    Raises:
        UserError: No layer (or more than one) has this role or name; lists the layers that can be named.
    """
    prefix, modules = decoder_blocks(model)
    block = f"{prefix}.{len(modules) - 1}"
    linears = linear_layers(modules[-1], block)
    if which in ROLES:
        with without_dropout(model):
            return Probe(block, *find_role(model, linears, which))
    named = [name for name in linears if name == which or name.endswith("." + which)]
    if len(named) != 1:
        raise UserError(
            f"--selection.probe {which!r} does not name one linear layer of the last block; {listing(linears)}"
        )
    return Probe(block, named[0], torch.arange(width(linears[named[0]])))


def linear_layers(block: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Layers with a two-dimensional weight that peft can adapt, by qualified name."""
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")
    }
