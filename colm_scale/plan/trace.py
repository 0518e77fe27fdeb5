"""Growth of memory in the phases of a step, traced on fake tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from colm_scale.config import RunConfig
from colm_scale.data.batching import make_batch
from colm_scale.engines.base import Engine, trainable
from colm_scale.engines.tensors import local_tensors
from colm_scale.modeling.causal import hooked, input_weight
from colm_scale.plan.fake import CPU, FakeModel, Growth, Section
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.records import Batch
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.precision import float32_tail
from colm_scale.step.block_inputs import blocks_alike, forward_reuse_store

MicroBatches = Sequence[Sequence[int]]
"""Lengths of the examples of each micro-batch."""


class Trace:
    """Runs phases on fake tensors.

    Args:
        engine: That has sharded the model, if it is sharded.
        drops_gradients: The engine copies each gradient into a bucket at once.
    """

    def __init__(
        self,
        config: RunConfig,
        fake: FakeModel,
        label_share: float,
        engine: Engine | None = None,
        *,
        drops_gradients: bool = False,
    ):
        self.fake, self._engine = fake, engine
        self._config, self._label_share, self._drops = config, label_share, drops_gradients

    def sketch(self, micro_batches: MicroBatches) -> Growth:
        """Sketch the micro-batches in sequence, holding the sketch of each."""
        tap, selection = self.fake.tap, self._config.selection
        assert tap is not None
        held: list[object] = []
        with self.fake.mode:
            z = torch.empty(selection.num_probes if selection.estimator == "zeroth_order" else 0, tap.size)

        def run(batch: Batch) -> None:
            match selection.estimator:
                case "last_layer":
                    held.append(last_layer.sketch(tap, batch, torch.arange(len(batch.lengths)))[-1])
                case "zeroth_order":
                    half = self._config.train.dtype != "float32"
                    with float32_tail(tap) if half else nullcontext():
                        zeroth_order.directional_derivatives(tap, batch, z, zeroth_order.PERTURBATION)

        return self._growth("sketch", run, micro_batches)

    def train(self, micro_batches: MicroBatches) -> Growth:
        """Run forward and backward of each micro-batch, with gradients."""
        module, engine = self.fake.module, self._engine

        def run(batch: Batch) -> None:
            if engine:
                engine.backward(engine.forward(batch).sum())
            else:
                module(batch).sum().backward()

        handles = [_drop_gradient(weight) for weight in trainable(module).values()] if self._drops else []
        with hooked(*handles):
            growth = self._growth("train", run, micro_batches)
        module.zero_grad(set_to_none=True)
        return growth

    def held_inputs(self, micro_batches: MicroBatches, *, further: bool = False) -> int:
        """Return the bytes of block inputs that forward reuse holds on the device, up to its bound.

        Args:
            further: Leave out those of the largest micro-batch, which its trace holds for activation checkpointing.
        """
        if forward_reuse_store(self._config, self.fake.tap) != "device" or self.fake.tap is None:
            return 0
        model, blocks = self.fake.module.causal_model, sum(self.fake.depth.times)
        live = blocks_alike(self._config, self.fake.tap) - len(self.fake.blocks) + blocks
        hidden: int = model.config.get_text_config().hidden_size
        each = (live + 1) * hidden * input_weight(model).element_size()
        packed = self.fake.module.packs
        tokens = [sum(lengths) if packed else len(lengths) * max(lengths) for lengths in micro_batches]
        held = min(each * sum(tokens), int(self._config.train.forward_reuse_gib * 2**30))
        return max(0, held - each * max(tokens) * further)

    def _growth(self, phase: str, run: Callable[[Batch], None], micro_batches: MicroBatches) -> Growth:
        """Trace ``run``, once for each phase and micro-batches of a model."""
        key = (phase, *micro_batches, self._label_share, self._drops)
        if key not in self.fake.traced:
            batches = _batches(micro_batches, self.fake, self._label_share)
            shards = (tensor for weight in self.fake.module.parameters() for tensor in local_tensors(weight))
            there = [*shards, *self.fake.module.buffers()]
            with self.fake.running(), LiveBytes(there) as live:
                sections = _Sections(self.fake, live)
                for batch in batches:
                    run(batch)
                    sections.next()
            self.fake.traced[key] = sections.growth()
        return self.fake.traced[key]


class _Sections:
    """Divides a phase into sections, which begin where a block begins or ends, in forward and backward.

    A longer model has the same sections, and more.
    """

    def __init__(self, fake: FakeModel, live: LiveBytes):
        self._live, self._start = live, live.now
        self._peaks: dict[Section, int] = {}
        self._seen: Counter[tuple[int, str, int]] = Counter()
        self._section = Section(0, "start", 0, 1)
        self._ends = [live.now]
        self._handles = []
        for number, block in zip(fake.depth.numbers, fake.blocks):
            self._handles.append(block.register_forward_pre_hook(partial(self._enter, number)))
            self._handles.append(block.register_forward_hook(partial(self._leave, number)))

    def next(self) -> None:
        """End a micro-batch."""
        self._begin("micro-batch", 0)
        self._ends.append(self._live.now)

    def growth(self) -> Growth:
        """Return the growth of all micro-batches, and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        return Growth(self._peaks, [after - before for before, after in pairwise(self._ends)])

    def _begin(self, what: str, number: int) -> None:
        self._peaks[self._section] = self._live.peak - self._start
        self._live.restart()
        section = (len(self._ends), what, number)
        self._seen[section] += 1
        self._section = Section(*section, self._seen[section])

    def _enter(self, number: int, *_: object) -> None:
        self._begin("forward", number)

    def _leave(self, number: int, _block: nn.Module, _args: object, output: object) -> None:
        self._begin("after", number)
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._begin("backward", number))


def _drop_gradient(weight: nn.Parameter) -> RemovableHandle:
    """Drop each gradient when it is complete, as engines with buckets do."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handle: RemovableHandle = weight.register_post_accumulate_grad_hook(drop)
    return handle


def _batches(micro_batches: MicroBatches, fake: FakeModel, label_share: float) -> list[Batch]:
    found = []
    for lengths in micro_batches:
        rows = [torch.full((length,), 3) for length in lengths]
        marks = [torch.arange(length) >= min(length - 1, int(length * (1 - label_share))) for length in lengths]
        positions = torch.arange(len(lengths))
        found.append(make_batch(rows, marks, positions, 0, CPU, packed=fake.module.packs))
    return found
