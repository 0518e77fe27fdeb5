"""Models of any size on fake tensors, which have shapes and types but no memory.

Blocks of a kind are alike, so a deep model is traced with few of them, and again with one more of each kind: what one
more adds, all that are left out add (`Depth`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from colm_scale.config import RunConfig
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.multimodal import without_weights
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import (
    Probe,
    copy_of_blocks,
    decoder_blocks,
    find_probe,
    kind_of_each_block,
    of_sample,
    sample_of,
    trial_batch,
)
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
_ENDS = 2
"""First and last blocks that are always traced: what is gathered next to the others differs there."""


@dataclass(frozen=True, slots=True)
class Depth:
    """Blocks that represent those of a whole model.

    Attributes:
        numbers: Their numbers, ascending.
        times: For each, how many blocks of the whole model it stands for, itself included.
        further: A further block of each kind of which some are left out, and how many are.
    """

    numbers: tuple[int, ...]
    times: tuple[int, ...]
    further: tuple[tuple[int, int], ...] = ()

    @classmethod
    def all(cls, numbers: Sequence[int]) -> Depth:
        """Blocks that stand for themselves."""
        return cls(tuple(numbers), (1,) * len(numbers))

    @classmethod
    def of(cls, kinds: Sequence[tuple[object, ...]]) -> Depth:
        """Choose the blocks of a model whose blocks are of these kinds: both ends, first and last of each kind.

        Args:
            kinds: See `kind_of_each_block`. One more block needs as much memory whatever its attention.
        """
        every, sizes = range(len(kinds)), [kind[1:] for kind in kinds]
        places = [[number for number in every if kinds[number] == kind] for kind in {*kinds}]
        chosen = {*every[:_ENDS], *every[-_ENDS:]} | {place for of in places for place in (of[0], of[-1])}
        left_out = {size: [n for n in every if sizes[n] == size and n not in chosen] for size in {*sizes}}
        further = [(of[0], len(of)) for of in left_out.values() if of]
        if len(chosen) + len(further) * (len(chosen) + 1) >= len(kinds):
            return cls.all(every)
        numbers = sorted(chosen)
        first = {size: next(n for n in numbers if sizes[n] == size) for size in left_out}
        times = [1 + len(left_out[sizes[n]]) * (first[sizes[n]] == n) for n in numbers]
        return cls(tuple(numbers), tuple(times), tuple(sorted(further)))


class Section(NamedTuple):
    """A section of a phase.

    Attributes:
        micro_batch: Its number.
        what: What a block has begun or ended: ``forward``, ``after`` it, or ``backward``.
        block: The block's number in the whole model.
        time: How often it has in this micro-batch.
    """

    micro_batch: int
    what: str
    block: int
    time: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Growth of live bytes in a phase.

    Attributes:
        peaks: The largest since the start, by section, in their order.
        left: What each micro-batch leaves behind.
    """

    peaks: dict[Section, int]
    left: list[int]


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A run's adapted model on fake CPU tensors, for any device of the run.

    Attributes:
        mode: Operations on its tensors must run in this mode.
        tap: The tap on its probe, if it sketches.
        padded_because: Reason why its micro-batches are padded, if they are.
        depth: The blocks that it has.
        longer: For each of ``depth.further``, the model with that block too.
        traced: Earlier traces, by phase and micro-batches.
    """

    mode: FakeTensorMode
    module: ExampleLoss
    tap: Tap | None
    padded_because: str | None
    depth: Depth
    longer: tuple[FakeModel, ...] = ()
    traced: dict[tuple[object, ...], Growth] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the model can run."""
        # On fake tensors, torch's product of groups (tokens by expert) takes bfloat16 alone, and a mask has no values.
        grouped = mock.patch.object(torch.nn.functional, "grouped_mm", _of_one_group, create=True)
        masks = mock.patch.object(masking_utils, "is_tracing", return_value=True, create=True)
        with self.mode, grouped, masks:
            yield

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return decoder_blocks(self.module.causal_model)[1]

    @property
    def weights(self) -> list[tuple[nn.Parameter, int]]:
        """Its weights, and how many of the whole model each stands for."""
        inside = {w: times for block, times in zip(self.blocks, self.depth.times) for w in block.parameters()}
        return [(weight, inside.get(weight, 1)) for weight in self.module.parameters()]


@dataclass(frozen=True, slots=True)
class Tried:
    """Results of trying a sample of the model, a block of each kind whose attention has the full width.

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

    def probe_in(self, model: PreTrainedModel) -> Probe | None:
        """The probe in the last block of the whole model."""
        if self.probe is None or self.like is None:
            return None
        return of_sample(self.like.model.causal_model, self.probe, model)


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
    base = without_weights(copy.deepcopy(of), getattr(torch, config.train.dtype))
    base.config._attn_implementation = known.attention
    if config.model.quantize == "nf4":
        from colm_scale.modeling.quantised import make_quantisable

        make_quantisable(base, base.dtype)
    base.requires_grad_(False)
    if config.train.activation_checkpointing:
        keep_block_inputs_only(base)
    kinds = kind_of_each_block(base)
    depth = Depth.of(kinds)
    if depth.further and _runs(few := _with_adapters(config, base, known, depth)):
        longer = [
            _with_adapters(config, base, known, Depth.all(sorted((*depth.numbers, number))))
            for number, _ in depth.further
        ]
        return replace(few, longer=tuple(longer))
    return _with_adapters(config, base, known, Depth.all(range(len(kinds))))


def _with_adapters(config: RunConfig, base: PreTrainedModel, known: Tried, depth: Depth) -> FakeModel:
    """Make the adapted model with some of the blocks of a frozen model on meta tensors."""
    few = copy_of_blocks(base, depth.numbers)
    probe = known.probe_in(few)
    with torch.device("meta"):
        module = ExampleLoss(add_adapters(few, config.lora, config.train.seed))
    module.knows_logits()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _to_fake_tensors(module)
        if config.model.quantize == "nf4":
            from colm_scale.modeling.quantised import pack

            pack(module, CPU, few.dtype)
        tap = Tap(module, probe, like=known.like) if probe else None
    return FakeModel(mode, module, tap, known.padded_because, depth)


def _of_one_group(tokens: Tensor, weights: Tensor, **_: object) -> Tensor:
    """The product of ``[S, i]`` tokens with the first of ``[experts, i, o]``: it needs the memory of that with all."""
    return tokens @ weights[0]


def _runs(fake: FakeModel) -> bool:
    """Whether the model runs with the blocks that it has (some of Gemma 3n's need what others compute)."""
    batch = trial_batch([torch.arange(1, 4)], CPU, packed=fake.module.packs)
    try:
        with fake.running(), torch.no_grad():
            fake.module(batch)
    except Exception:  # a missing key, attribute or argument, each model in its own way
        return False
    return True


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
