"""Models of any size on fake tensors, which have shapes and types but no memory."""

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
    """A run's adapted model on fake CPU tensors, for any device of the run.

    Attributes:
        mode: Operations on its tensors must run in this mode.
        tap: The tap on its probe, if it sketches.
        padded_because: Reason why its micro-batches are padded, if they are.
        traced: Earlier traces, by phase and micro-batches.
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
    """Results of trying a sample of the model, one block in its full width.

    Attributes:
        attention: Name of its attention, after packing if requested and possible.
        padded_because: As in `FakeModel`.
        probe: In the sample's block; None if nothing is sketched.
        like: A tap on the probe.
    """

    attention: str
    padded_because: str | None
    probe: Probe | None
    like: Tap | None


def tried(config: RunConfig, of: PretrainedConfig) -> Tried:
    """Try a sample of a model, with random weights and a tiny vocabulary.

    Raises:
        UserError: As a run would: a probe or target does not exist, or the model does not support packing.
    """
    one = sample_of(of)
    padded_because = use_packing(one, config.train.packing, CPU).padded_because
    attention = one.config._attn_implementation
    if config.selection.method != "colm":
        return Tried(attention, padded_because, None, None)
    probe = find_probe(one, config.selection.probe)
    like = Tap(ExampleLoss(add_adapters(one, config.lora, config.train.seed)), probe)
    return Tried(attention, padded_because, probe, like)


def fake_model(config: RunConfig, of: PretrainedConfig, known: Tried) -> FakeModel:
    """Build the model of `run.assemble.build_model` from its configuration and the results of a sample.

    Raises:
        UserError: As a run would: its blocks cannot be checkpointed.
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
    """Replace every meta tensor by a fake CPU tensor; tied weights stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if weight not in made:
                fake = torch.empty_like(weight, device="cpu")
                made[weight] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            module._parameters[name] = made[weight]
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
