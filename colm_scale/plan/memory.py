"""Peak memory of a rank by phase, without a run: traced on fake tensors, with formulas for the rest.

Traces run the package's own code on micro-batches: activations, sketches, gradients, and under FSDP2 gathered weights
(the real `fully_shard`, in a fake process group). Memory of DDP and DeepSpeed is computed (`engine_memory`). Not
counted: the CUDA context and NCCL's buffers (0.5 to 1.5 GiB), fragments, and temporaries of fused kernels.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from colm_scale.config import RunConfig, TrainConfig
from colm_scale.data.batching import make_batch
from colm_scale.engines.base import Engine, trainable
from colm_scale.engines.ds_config import zero_stage
from colm_scale.engines.fsdp import FsdpEngine, among_absent_ranks
from colm_scale.engines.tensors import local_tensors
from colm_scale.modeling.causal import input_weight
from colm_scale.plan.fake import CPU, FakeModel
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.records import Batch, Json
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.precision import float32_tail
from colm_scale.step.block_inputs import forward_reuse_store

FLOAT32 = 4
AVERAGES = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
"""An optimizer's averages per number of an adapter (Adafactor has some per row and column only)."""

MicroBatches = Sequence[Sequence[int]]
"""Lengths of the examples of each micro-batch."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The micro-batches of the busiest rank.

    Attributes:
        sketched: Of the candidates; empty if none are forwarded.
        trained: Of the coreset.
    """

    sketched: MicroBatches
    trained: MicroBatches


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on a rank's device that do not depend on its micro-batches.

    Attributes:
        weights: Frozen weights and adapters, or the rank's shards of them.
        optimizer: Averages, and the float32 copies that are trained.
        buffers: Buffers for reducing gradients, allocated for the whole run.
        reducing: Buffers allocated while gradients are reduced.
        gathered: Whole weights that are gathered at a time.
        keeps_gradients: Whether adapters hold whole gradients until the optimizer has run.
    """

    weights: int
    optimizer: int
    buffers: int
    reducing: int
    gathered: int
    keeps_gradients: bool

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return self.weights + self.optimizer + self.buffers


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak bytes of a rank, by phase.

    Attributes:
        engine: The part that does not depend on the micro-batches.
        phases: ``sketch`` (if candidates are forwarded), ``train`` and ``optimizer``.
    """

    engine: EngineMemory
    phases: dict[str, int]

    @property
    def step(self) -> int:
        """The largest peak."""
        return max(self.phases.values())


def engine_memory(train: TrainConfig, ds_config: Json, fake: FakeModel, world_size: int) -> EngineMemory:
    """Compute the memory of an engine other than FSDP2, which is traced.

    DDP: buckets as large as all gradients. ZeRO-1 and 2: a flat copy of the adapters, their float32 partition, its
    averages and its gradient, and one or (with ``overlap_comm``) two buckets of ``reduce_bucket_size`` numbers in the
    backward. ZeRO-3: shards, small weights whole, one such bucket throughout, and the weights gathered around a block.
    """
    module = fake.module
    adapters = sum(weight.numel() for weight in trainable(module).values())
    whole = sum(_bytes(weight) for weight in module.parameters())
    averages = AVERAGES[train.optimizer]
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    if not stage:
        ddp = world_size > 1 and not ds_config
        return EngineMemory(whole, averages * adapters * FLOAT32, ddp * adapters * FLOAT32, 0, 0, True)
    part = -(-adapters // world_size) * FLOAT32
    on_cpu = zero.get("offload_optimizer", {}).get("device") == "cpu"
    optimizer = 0 if on_cpu else part * (1 + averages)
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * FLOAT32
    if stage < 3:
        buckets = 2 if zero.get("overlap_comm") else 1
        return EngineMemory(whole, optimizer + adapters * FLOAT32, 0, buckets * bucket + part, 0, False)
    small = int(zero.get("stage3_param_persistence_threshold", 1e5))
    persistent = sum(_bytes(weight) for weight in module.parameters() if weight.numel() <= small)
    shards = 0 if zero.get("offload_param", {}).get("device") == "cpu" else -(-(whole - persistent) // world_size)
    ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7)) * next(module.parameters()).element_size()
    largest = max(_block_bytes(fake, small))
    gathered = largest + min(ahead, largest)
    return EngineMemory(shards + persistent, optimizer + part, bucket, part, gathered, False)


def peaks(
    config: RunConfig, ds_config: Json, fake: FakeModel, world_size: int, batches: Batches, label_share: float = 0.5
) -> Peaks:
    """Trace the peak bytes of one rank in a step.

    Args:
        fake: The model; under FSDP2 this call shards it.
        label_share: Share of an example, at its end, that carries loss.
    """
    if config.engine != "fsdp":
        memory = engine_memory(config.train, ds_config, fake, world_size)
        there = [*fake.module.parameters(), *fake.module.buffers()]
        trace = _Trace(config, fake, there, label_share, drops_gradients=not memory.keeps_gradients)
        return _peaks(memory, trace, batches, world_size, lambda batch: fake.module(batch).sum().backward())
    with _sharded(config, fake, world_size) as engine:
        memory = _fsdp_memory(config, fake)
        there = [*_shards(fake.module.parameters()), *fake.module.buffers()]
        trace = _Trace(config, fake, there, label_share, drops_gradients=False)

        def train(batch: Batch) -> None:
            engine.backward(engine.forward(batch).sum())

        return _peaks(memory, trace, batches, world_size, train)


def _peaks(
    memory: EngineMemory, trace: _Trace, batches: Batches, world_size: int, train: Callable[[Batch], None]
) -> Peaks:
    """Trace each phase, and add the engine's memory."""
    phases, running = {}, memory.resident + memory.gathered
    if batches.sketched:
        few = _at_most_two_alike(batches.sketched)
        grown, left = trace.sketch(few)
        more = Counter(map(tuple, batches.sketched)) - Counter(few)
        grown += sum(count * left[few.index(alike)] for alike, count in more.items())
        phases["sketch"] = running + grown + trace.held_inputs(batches.sketched)
    grown, _ = trace.train(_at_most_two_alike(batches.trained), train)
    phases["train"] = running + memory.reducing + grown + trace.held_inputs(batches.trained)
    adapters = sum(_bytes(weight) for weight in trainable(trace.fake.module).values())
    share = adapters if memory.keeps_gradients else adapters // world_size
    phases["optimizer"] = memory.resident + 2 * share  # its gradient, and the root of the second average
    return Peaks(memory, phases)


class _Trace:
    """Runs phases on fake tensors; each returns the peak growth of live bytes, and what each micro-batch leaves.

    Args:
        there: Tensors that exist before.
        drops_gradients: The engine copies each gradient into a bucket at once.
    """

    def __init__(
        self,
        config: RunConfig,
        fake: FakeModel,
        there: list[torch.Tensor],
        label_share: float,
        *,
        drops_gradients: bool,
    ):
        self.fake = fake
        self._config, self._there, self._label_share, self._drops = config, there, label_share, drops_gradients

    def sketch(self, micro_batches: MicroBatches) -> tuple[int, list[int]]:
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

    def train(self, micro_batches: MicroBatches, run: Callable[[Batch], None]) -> tuple[int, list[int]]:
        """Run forward and backward of each micro-batch, with gradients."""
        module = self.fake.module
        handles = [_drop_gradient(weight) for weight in trainable(module).values()] if self._drops else []
        try:
            return self._growth("train", run, micro_batches)
        finally:
            for handle in handles:
                handle.remove()
            module.zero_grad(set_to_none=True)

    def held_inputs(self, micro_batches: MicroBatches) -> int:
        """Return the bytes of block inputs that forward reuse holds on the device, up to its bound."""
        if forward_reuse_store(self._config, self.fake.tap) != "device":
            return 0
        model = self.fake.module.causal_model
        hidden: int = model.config.get_text_config().hidden_size
        size = len(self.fake.blocks) * hidden * sum(map(sum, micro_batches)) * input_weight(model).element_size()
        return min(size, int(self._config.train.forward_reuse_gib * 2**30))

    def _growth(self, phase: str, run: Callable[[Batch], None], micro_batches: MicroBatches) -> tuple[int, list[int]]:
        """Trace ``run``, once for each phase and micro-batches of a model."""
        key = (phase, *micro_batches, self._label_share, self._drops)
        if key in self.fake.traced:
            return self.fake.traced[key]
        batches = _batches(micro_batches, self.fake, self._label_share)
        gc.collect()
        with self.fake.mode, LiveBytes(self._there) as live:
            marks = [live.now]
            for batch in batches:
                run(batch)
                marks.append(live.now)
            self.fake.traced[key] = live.peak - marks[0], [after - before for before, after in pairwise(marks)]
        return self.fake.traced[key]


def _drop_gradient(weight: nn.Parameter) -> RemovableHandle:
    """Drop each gradient when it is complete, as engines with buckets do."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handle: RemovableHandle = weight.register_post_accumulate_grad_hook(drop)
    return handle


def _at_most_two_alike(micro_batches: MicroBatches) -> list[tuple[int, ...]]:
    """Return at most two micro-batches of each kind, since further ones grow memory like the second."""
    found: list[tuple[int, ...]] = []
    for lengths in map(tuple, micro_batches):
        if found.count(lengths) < 2:
            found.append(lengths)
    return found


def _batches(micro_batches: MicroBatches, fake: FakeModel, label_share: float) -> list[Batch]:
    found = []
    for lengths in micro_batches:
        rows = [torch.full((length,), 3) for length in lengths]
        marks = [torch.arange(length) >= min(length - 1, int(length * (1 - label_share))) for length in lengths]
        positions = torch.arange(len(lengths))
        found.append(make_batch(rows, marks, positions, 0, CPU, packed=fake.module.packs))
    return found


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _block_bytes(fake: FakeModel, small: int) -> Iterator[int]:
    """Yield the bytes that ZeRO-3 gathers for each block and each weight outside: weights above a size."""
    inside = set()
    for block in fake.blocks:
        inside |= set(block.parameters())
        yield sum(_bytes(weight) for weight in block.parameters() if weight.numel() > small)
    for weight in set(fake.module.parameters()) - inside:
        yield _bytes(weight) * (weight.numel() > small)


def _fsdp_memory(config: RunConfig, fake: FakeModel) -> EngineMemory:
    """Compute the memory of FSDP2 between steps, for a sharded model. Gradients are shards too."""
    adapters = _shards(trainable(fake.module).values())
    weights = sum(map(_bytes, _shards(fake.module.parameters())))
    averages = AVERAGES[config.train.optimizer] * sum(weight.numel() for weight in adapters) * FLOAT32
    if config.fsdp.cpu_offload:
        return EngineMemory(0, 0, 0, 0, 0, False)
    return EngineMemory(weights, averages, 0, 0, 0, False)


def _shards(weights: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [tensor for weight in weights for tensor in local_tensors(weight)]


@contextmanager
def _sharded(config: RunConfig, fake: FakeModel, world_size: int) -> Iterator[Engine]:
    """Make the engine of one rank in a fake process group."""
    with among_absent_ranks(world_size) as (group, mesh):  # outside of the mode, since a mesh has real numbers
        with fake.mode:
            engine = FsdpEngine(fake.module, config.train, config.fsdp, group, mesh)
        yield engine
