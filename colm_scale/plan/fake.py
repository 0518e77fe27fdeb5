"""A model of any size without its memory: fake tensors, which have shapes and types but no numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from colm_scale.config import RunConfig
from colm_scale.modeling.load import add_adapters, keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import Probe, decoder_blocks, find_probe, in_last_block, sample_of
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class FakeModel:
    """The adapted model of a run on fake CPU tensors, whatever the device it will run on.

    Attributes:
        mode: In which its tensors live; what is done with them is done within it.
        tap: The tap on its probe, if it sketches.
        padded_because: Why its micro-batches are padded, if they are.
        traced: What has been traced on it already, by phase and micro-batches.
    """

    mode: FakeTensorMode
    module: ExampleLoss
    tap: Tap | None
    padded_because: str | None
    traced: dict[tuple[object, ...], tuple[int, list[int]]] = field(default_factory=dict)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return decoder_blocks(self.module.causal_model)[1]


@dataclass(frozen=True, slots=True)
class Tried:
    """What a run finds out about a model by trying, found out on a sample of one block in its full width.

    Attributes:
        attention: What its attention is called, once it is packed where that is wanted and possible.
        padded_because: As in `FakeModel`.
        probe: In the sample's block; None if nothing is sketched.
        like: A tap on it.
    """

    attention: str
    padded_because: str | None
    probe: Probe | None
    like: Tap | None


def tried(config: RunConfig, of: PretrainedConfig) -> Tried:
    """Try a sample of a model with random weights and next to no vocabulary.

    Raises:
        UserError: As from a run: there is no such probe or target, rows are to be packed and cannot be.
    """
    one = sample_of(of)
    padded_because = use_packing(one, config.train.packing, CPU)
    attention = one.config._attn_implementation
    if config.selection.method != "colm":
        return Tried(attention, padded_because, None, None)
    probe = find_probe(one, config.selection.probe)
    like = Tap(ExampleLoss(add_adapters(one, config.lora, config.train.seed)), probe)
    return Tried(attention, padded_because, probe, like)


def fake_model(config: RunConfig, of: PretrainedConfig, known: Tried) -> FakeModel:
    """What `assembly.build_model` builds, from the model's configuration and what a sample has shown.

    Raises:
        UserError: As from a run: its blocks cannot be checkpointed.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(of), dtype=getattr(torch, config.train.dtype))
        base.config._attn_implementation = known.attention
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
        probe = in_last_block(base, known.probe) if known.probe else None
        module = ExampleLoss(add_adapters(base.requires_grad_(False), config.lora, config.train.seed))
    module.knows_logits()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _to_fake_tensors(module)
        tap = Tap(module, probe, like=known.like) if probe else None
    return FakeModel(mode, module, tap, known.padded_because)


def _to_fake_tensors(model: nn.Module) -> None:
    """Put a fake CPU tensor in place of every meta tensor; tied weights stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight not in made:
                fake = torch.empty_like(weight, device="cpu")
                made[weight] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            module._parameters[name] = None if weight is None else made[weight]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")

