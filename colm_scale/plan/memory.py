"""Peak memory of a rank, phase by phase, before there is a run: traced on fake tensors, and formulas for the rest.

Traced is what the product's own code allocates for a micro-batch: activations, what the sketch holds, gradients, under
FSDP2 also what is gathered (the real `fully_shard`, in a process group that sends nothing). What DDP and DeepSpeed
hold, whose code does not run here, is reckoned (`engine_memory`). Not counted: the CUDA context
and NCCL's buffers (0.5 to 1.5 GiB), fragments, and temporaries of fused kernels.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from colm_scale.config import RunConfig
from colm_scale.data.batching import make_batch
from colm_scale.engines.base import Engine, trainable
from colm_scale.engines.fsdp import FsdpEngine, among_absent_ranks
from colm_scale.engines.shards import local_tensors
from colm_scale.modeling.causal import input_weight
from colm_scale.plan.fake import CPU, FakeModel
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.records import Batch, Json
from colm_scale.sketch import last_layer, zeroth_order
from colm_scale.sketch.precision import float32_tail

FLOAT32 = 4
_AVERAGES = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
"""Numbers that an optimizer keeps of each number of an adapter (Adafactor: of each row and column, next to none)."""

MicroBatches = Sequence[Sequence[int]]
"""Lengths of the examples of each micro-batch."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on the device of a rank that do not depend on its micro-batches.

    Attributes:
        weights: Frozen weights and adapters, or the rank's shards of them.
        optimizer: Averages, and the float32 copies that are trained.
        buffers: What gradients are reduced in, allocated for the whole run.
        reducing: The same, allocated while gradients are reduced.
        gathered: Whole weights that are gathered at a time.
        keeps_gradients: Whether adapters keep whole gradients until the optimizer has run.
    """

    weights: int
    optimizer: int
    buffers: int
    reducing: int
    gathered: int
    keeps_gradients: bool

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights + self.optimizer + self.buffers


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak bytes of a rank, by phase.

    Attributes:
        engine: What of them does not depend on the micro-batches.
        phases: ``sketch``, ``train`` and ``optimizer``; the first only where candidates are forwarded.
    """

    engine: EngineMemory
    phases: dict[str, int]

    @property
    def step(self) -> int:
        """The largest."""
        return max(self.phases.values())


def averages_of(config: RunConfig) -> int:
    """Numbers that the optimizer keeps of each number of an adapter."""
    return _AVERAGES[config.train.optimizer]


def engine_memory(config: RunConfig, ds_config: Json | None, fake: FakeModel, world_size: int) -> EngineMemory:
    """What an engine holds, FSDP2 apart, which is traced.

    DDP: buckets as large as all gradients. ZeRO-1 and 2: the adapters a second time as one row, their float32
    partition, averages of it, its gradient, and one or (with ``overlap_comm``) two buckets of ``reduce_bucket_size``
    numbers in the backward. ZeRO-3: shards, small weights whole, one such bucket throughout, and what is gathered
    around a block.
    """
    module = fake.module
    adapters = sum(weight.numel() for weight in trainable(module).values())
    whole = sum(_bytes(weight) for weight in module.parameters())
    averages = averages_of(config)
    zero = (ds_config or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if not stage:
        ddp = world_size > 1 and ds_config is None
        return EngineMemory(whole, averages * adapters * FLOAT32, ddp * adapters * FLOAT32, 0, 0, True)
    part = -(-adapters // world_size) * FLOAT32
    on_cpu = zero.get("offload_optimizer", {}).get("device") == "cpu"
    optimizer = 0 if on_cpu else part * (1 + averages)
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * FLOAT32
    if stage < 3:
        buckets = 2 if zero.get("overlap_comm") else 1
        return EngineMemory(whole, optimizer + adapters * FLOAT32, 0, buckets * bucket + part, 0, False)
    small = int(zero.get("stage3_param_persistence_threshold", 1e5))
    kept = sum(_bytes(weight) for weight in module.parameters() if weight.numel() <= small)
    shards = 0 if zero.get("offload_param", {}).get("device") == "cpu" else -(-(whole - kept) // world_size)
    ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7)) * next(module.parameters()).element_size()
    largest = max(_block_bytes(fake, small))
    gathered = largest + min(ahead, largest)
    return EngineMemory(shards + kept, optimizer + part, bucket, part, gathered, False)


def peaks(
    config: RunConfig,
    ds_config: Json | None,
    fake: FakeModel,
    world_size: int,
    sketched: MicroBatches,
    trained: MicroBatches,
    label_share: float = 0.5,
) -> Peaks:
    """Peak bytes of one rank in a step.

    Args:
        fake: The model; under FSDP2 it is sharded by this.
        sketched: The rank's micro-batches of the sketch; none if nothing is forwarded.
        trained: Those of the coreset.
        label_share: Which share of an example, at its end, carries loss.
    """
    with ExitStack() as stack:
        engine: Engine | None = None
        if config.engine == "fsdp":
            engine = stack.enter_context(_sharded(config, fake, world_size))
            memory = _fsdp_memory(config, fake)
            there = _shards(fake.module.parameters())
        else:
            memory = engine_memory(config, ds_config, fake, world_size)
            there = [*fake.module.parameters()]
        there += fake.module.buffers()
        trace = _Trace(config, fake, there, memory.keeps_gradients)
        phases = {}
        if sketched:
            few = _at_most_two_alike(sketched)
            grown, held = trace.once("sketch", few, label_share, trace.sketch)
            more = Counter(map(tuple, sketched)) - Counter(few)
            grown += sum(count * held[few.index(alike)] for alike, count in more.items())
            phases["sketch"] = memory.resident + memory.gathered + grown + _kept_inputs(config, fake, sketched)
        train = partial(trace.train, engine=engine)
        grown, _ = trace.once("train", _at_most_two_alike(trained), label_share, train)
        kept = _kept_inputs(config, fake, trained)
        phases["train"] = memory.resident + memory.gathered + memory.reducing + grown + kept
        adapters = sum(_bytes(weight) for weight in trainable(fake.module).values())
        share = adapters if memory.keeps_gradients else adapters // world_size
        phases["optimizer"] = memory.resident + 2 * share  # its gradient, and the root of the second average
    return Peaks(memory, phases)


class _Trace:
    """Runs phases on fake tensors; each returns by how much live bytes grow at most, and what each batch leaves."""

    def __init__(self, config: RunConfig, fake: FakeModel, there: list[torch.Tensor], keeps_gradients: bool):
        self._config, self._fake, self._there, self._keeps = config, fake, there, keeps_gradients

    def once(
        self,
        phase: str,
        micro_batches: list[tuple[int, ...]],
        label_share: float,
        run: Callable[[list[Batch]], tuple[int, list[int]]],
    ) -> tuple[int, list[int]]:
        """What ``run`` returns for a phase; the same model is not traced twice with the same micro-batches."""
        key = (phase, *micro_batches, label_share, self._keeps)
        if key not in self._fake.traced:
            self._fake.traced[key] = run(_batches(micro_batches, self._fake, label_share))
        return self._fake.traced[key]

    def sketch(self, batches: list[Batch]) -> tuple[int, list[int]]:
        """All micro-batches one after the other, what is kept of each included."""
        tap, selection = self._fake.tap, self._config.selection
        assert tap is not None
        held: list[object] = []
        with self._fake.mode:
            z = torch.empty(selection.num_probes if selection.estimator == "zeroth_order" else 0, tap.size)

        def run(batch: Batch) -> None:
            match selection.estimator:
                case "last_layer":
                    held.append(last_layer.sketch(tap, batch, torch.arange(len(batch.lengths)))[-1])
                case "zeroth_order":
                    with float32_tail(tap) if self._half else nullcontext():
                        zeroth_order.directional_derivatives(tap, batch, z, zeroth_order.PERTURBATION)

        return self._growth(run, batches)

    def train(self, batches: list[Batch], engine: Engine | None) -> tuple[int, list[int]]:
        """Forward and backward of each micro-batch, with the gradients as they come."""
        module = self._fake.module
        handles = [] if self._keeps or engine else [_let_go(weight) for weight in trainable(module).values()]

        def run(batch: Batch) -> None:
            if engine is not None:
                engine.backward(engine.forward(batch).sum(), last=True)
            else:
                module(batch).sum().backward()

        try:
            return self._growth(run, batches)
        finally:
            for handle in handles:
                handle.remove()
            module.zero_grad(set_to_none=True)

    @property
    def _half(self) -> bool:
        return self._config.train.dtype != "float32"

    def _growth(self, run: Callable[[Batch], None], batches: list[Batch]) -> tuple[int, list[int]]:
        gc.collect()
        with self._fake.mode, LiveBytes(self._there) as live:
            marks = [live.now]
            for batch in batches:
                run(batch)
                marks.append(live.now)
            return live.peak - marks[0], [after - before for before, after in pairwise(marks)]


def _kept_inputs(config: RunConfig, fake: FakeModel, micro_batches: MicroBatches) -> int:
    """What forward reuse keeps on the device of these: what goes into each block, up to its bound."""
    if config.train.forward_reuse != "device":
        return 0
    model = fake.module.causal_model
    hidden: int = model.config.get_text_config().hidden_size
    size = len(fake.blocks) * hidden * sum(map(sum, micro_batches)) * input_weight(model).element_size()
    return min(size, int(config.train.forward_reuse_gib * 2**30))


def _let_go(weight: nn.Parameter) -> RemovableHandle:
    """As an engine does that copies each gradient into its bucket as it comes."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handle: RemovableHandle = weight.register_post_accumulate_grad_hook(drop)
    return handle


def _at_most_two_alike(micro_batches: MicroBatches) -> list[tuple[int, ...]]:
    """The second of its kind finds what the first has left; a third is like the second."""
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
    """Of each block, and of each weight outside of them, the bytes that ZeRO-3 gathers: those above a size."""
    inside = set()
    for block in fake.blocks:
        inside |= set(block.parameters())
        yield sum(_bytes(weight) for weight in block.parameters() if weight.numel() > small)
    for weight in set(fake.module.parameters()) - inside:
        yield _bytes(weight) * (weight.numel() > small)


def _fsdp_memory(config: RunConfig, fake: FakeModel) -> EngineMemory:
    """What FSDP2 holds between steps; the model is sharded already, and gradients are shards."""
    adapters = _shards(trainable(fake.module).values())
    weights = sum(map(_bytes, _shards(fake.module.parameters())))
    averages = averages_of(config) * sum(weight.numel() for weight in adapters) * FLOAT32
    if config.fsdp.cpu_offload:
        return EngineMemory(0, 0, 0, 0, 0, False)
    return EngineMemory(weights, averages, 0, 0, 0, False)


def _shards(weights: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [tensor for weight in weights for tensor in local_tensors(weight)]


@contextmanager
def _sharded(config: RunConfig, fake: FakeModel, world_size: int) -> Iterator[Engine]:
    """The engine of a rank among others that are not there."""
    with among_absent_ranks(world_size) as (group, mesh):  # a mesh is made of numbers, so outside of the mode
        with fake.mode:
            engine = FsdpEngine(fake.module, config.train, config.fsdp, group, mesh)
        yield engine
