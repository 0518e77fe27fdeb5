"""Peak memory of a rank by phase, without a run: traced on fake tensors, with formulas for the rest.

Traces run the package's own code on micro-batches: activations, sketches, gradients, and under FSDP2 gathered weights
(the real `fully_shard`, in a fake process group). Memory of DDP and DeepSpeed is computed (`engine_memory`). Not
counted: the CUDA context and NCCL's buffers (0.5 to 1.5 GiB), fragments, and temporaries of fused kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from colm_scale.config import RunConfig, TrainConfig
from colm_scale.engines.ds_config import zero_stage
from colm_scale.engines.fsdp import FsdpEngine, among_absent_ranks
from colm_scale.engines.tensors import local_tensors
from colm_scale.plan.fake import Depth, FakeModel, Growth
from colm_scale.plan.trace import MicroBatches, Trace
from colm_scale.records import Json

FLOAT32 = 4
AVERAGES = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
"""An optimizer's averages per number of an adapter (Adafactor has some per row and column only)."""


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
        part: The largest part that is whole while a sharded model is loaded: a block, or a weight outside of them.
        host: Bytes that are kept on the host: offloaded shards, averages and float32 copies.
        in_flight: Whole weights gathered ahead and not used, in training.
        kept: Whole weights that stay gathered from a step's first training micro-batch to the next.
    """

    weights: int
    optimizer: int
    buffers: int
    reducing: int
    gathered: int
    keeps_gradients: bool
    part: int = 0
    host: int = 0
    in_flight: int = 0
    kept: int = 0

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return self.weights + self.optimizer + self.buffers


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak bytes of a rank, by phase.

    Attributes:
        engine: The part that does not depend on the micro-batches.
        phases: ``load``, ``sketch`` (if candidates are forwarded), ``train`` and ``optimizer``.
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
    weights = fake.weights
    adapters = sum(weight.numel() * times for weight, times in weights if weight.requires_grad)
    whole = sum(_bytes(weight) * times for weight, times in weights)
    averages = AVERAGES[train.optimizer]
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    if not stage:
        ddp = world_size > 1 and not ds_config
        return EngineMemory(whole, averages * adapters * FLOAT32, ddp * adapters * FLOAT32, 0, 0, True)
    part = -(-adapters // world_size) * FLOAT32
    on_cpu = zero.get("offload_optimizer", {}).get("device") == "cpu"
    states = part * (1 + averages)
    optimizer, host = (0, states) if on_cpu else (states, 0)
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * FLOAT32
    if stage < 3:
        buckets = 2 if zero.get("overlap_comm") else 1
        reducing = buckets * bucket + part
        return EngineMemory(whole, optimizer + adapters * FLOAT32, 0, reducing, 0, False, host=host)
    small = int(zero.get("stage3_param_persistence_threshold", 1e5))
    persistent = sum(_bytes(weight) * times for weight, times in weights if weight.numel() <= small)
    shards = -(-(whole - persistent) // world_size)
    if zero.get("offload_param", {}).get("device") == "cpu":
        host, shards = host + shards, 0
    whole_part = max(_block_bytes(fake, 0))
    gathered, in_flight, kept = _gathered(train, zero, fake, whole - persistent)
    return EngineMemory(
        *(shards + persistent, optimizer + part, bucket, part, gathered, False),
        part=whole_part,
        host=host,
        in_flight=in_flight,
        kept=kept,
    )


def _gathered(train: TrainConfig, zero: Json, fake: FakeModel, sharded: int) -> tuple[int, int, int]:
    """Compute the whole weights that ZeRO-3 has at a time: gathered, in flight and kept.

    It gathers ahead. What it does not release, because a further micro-batch needs it soon or because activation
    checkpointing runs blocks in another order than it has recorded, has at most ``stage3_max_live_parameters`` numbers.
    """
    itemsize = next(fake.module.parameters()).element_size()
    small = int(zero.get("stage3_param_persistence_threshold", 1e5))
    ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7)) * itemsize
    live = int(zero.get("stage3_max_live_parameters", 1e9)) * itemsize
    blocks = sum(
        _bytes(weight) * times
        for block, times in zip(fake.blocks, fake.depth.times)
        for weight in block.parameters()
        if weight.numel() > small
    )
    gathered = min(sharded, max(_block_bytes(fake, small)) + ahead)
    return gathered, min(blocks, live) * train.activation_checkpointing, min(sharded, live)


def peaks(
    config: RunConfig, ds_config: Json, fake: FakeModel, world_size: int, batches: Batches, label_share: float = 0.5
) -> Peaks:
    """Trace the peak bytes of one rank in a step; see `tracing`."""
    with tracing(config, ds_config, fake, world_size, label_share) as peaks_of:
        return peaks_of(batches)


@contextmanager
def tracing(
    config: RunConfig, ds_config: Json, fake: FakeModel, world_size: int, label_share: float = 0.5
) -> Iterator[Callable[[Batches], Peaks]]:
    """A context with a function that traces the peak bytes of one rank in a step.

    Args:
        fake: The model; under FSDP2 it is sharded, and of no use afterwards.
        label_share: Share of an example, at its end, that carries loss.
    """
    models = (fake, *fake.longer)
    if config.engine != "fsdp":
        memory = engine_memory(config.train, ds_config, fake, world_size)
        drops = not memory.keeps_gradients
        traces = [Trace(config, model, label_share, drops_gradients=drops) for model in models]
        yield partial(_peaks, memory, traces, world_size)
        return
    with among_absent_ranks(world_size) as (group, mesh):  # outside of the mode, since a mesh has real numbers
        traces = []
        for model in models:
            with model.mode:
                engine = FsdpEngine(model.module, config.train, config.fsdp, group, mesh)
            traces.append(Trace(config, model, label_share, engine))
        yield partial(_peaks, _fsdp_memory(config, fake), traces, world_size)


def _peaks(memory: EngineMemory, traces: Sequence[Trace], world_size: int, batches: Batches) -> Peaks:
    """Trace each phase, and add the engine's memory."""
    phases, running, trace = {"load": memory.weights + memory.part}, memory.resident + memory.gathered, traces[0]
    if batches.sketched:
        few = _at_most_two_alike(batches.sketched)
        growth = _of_whole_depth(trace.fake.depth, [trace.sketch(few) for trace in traces])
        more = Counter(map(tuple, batches.sketched)) - Counter(few)
        further = sum(count * growth.left[few.index(alike)] for alike, count in more.items())
        phases["sketch"] = running + max(growth.peaks.values()) + further + trace.held_inputs(batches.sketched)
    few = _at_most_two_alike(batches.trained)
    growth = _of_whole_depth(trace.fake.depth, [trace.train(few) for trace in traces])
    phases["train"] = running + in_training(memory, growth, batches) + trace.held_inputs(batches.trained, further=True)
    adapters = sum(_bytes(weight) * times for weight, times in trace.fake.weights if weight.requires_grad)
    share = adapters if memory.keeps_gradients else adapters // world_size
    phases["optimizer"] = memory.resident + 2 * share  # its gradient, and the root of the second average
    return Peaks(memory, phases)


def in_training(memory: EngineMemory, growth: Growth, batches: Batches) -> int:
    """Return the peak growth in training: from the first gradient on, with the memory to reduce them."""
    stays = memory.in_flight + memory.kept * (len(batches.trained) > 1)
    most, began = 0, False
    for section, peak in growth.peaks.items():
        began = began or section.what == "backward"
        most = max(most, peak + memory.reducing * began)
    return most + max(0, stays - memory.gathered)


def _of_whole_depth(depth: Depth, grown: Sequence[Growth]) -> Growth:
    """Extrapolate from the growth of a few blocks, and with one more of each kind, to the whole model.

    Within a section memory is linear in the number of blocks; the maximum over the sections is not.
    """
    few, *longer = grown
    more = [(found, times) for found, (_, times) in zip(longer, depth.further)]
    peaks = {at: peak + sum(n * (found.peaks[at] - peak) for found, n in more) for at, peak in few.peaks.items()}
    left = [own + sum(n * (found.left[i] - own) for found, n in more) for i, own in enumerate(few.left)]
    return Growth(peaks, left)


def _at_most_two_alike(micro_batches: MicroBatches) -> list[tuple[int, ...]]:
    """Return at most two micro-batches of each kind, since further ones grow memory like the second."""
    found: list[tuple[int, ...]] = []
    for lengths in map(tuple, micro_batches):
        if found.count(lengths) < 2:
            found.append(lengths)
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
    shards = [(weight, tensor, times) for weight, times in fake.weights for tensor in local_tensors(weight)]
    weights = sum(_bytes(tensor) * times for _, tensor, times in shards)
    adapters = sum(tensor.numel() * times for weight, tensor, times in shards if weight.requires_grad)
    averages, part = AVERAGES[config.train.optimizer] * adapters * FLOAT32, max(_block_bytes(fake, 0))
    if config.fsdp.cpu_offload:
        return EngineMemory(0, 0, 0, 0, 0, False, part=part, host=weights + averages)
    return EngineMemory(weights, averages, 0, 0, 0, False, part=part)
