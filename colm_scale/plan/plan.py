"""``colm-scale plan``: memory, traffic and FLOP of a run, from its options and the model's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.config.commands import PlanConfig
from colm_scale.config.user_functions import is_own
from colm_scale.engines.choose import checked_ds_config, sharding
from colm_scale.engines.ds_config import zero_stage
from colm_scale.errors import UserError
from colm_scale.modeling.causal import input_weight
from colm_scale.modeling.load import check_model
from colm_scale.plan.fake import FakeModel, fake_model, tried
from colm_scale.plan.memory import AVERAGES, FLOAT32, Batches, EngineMemory, Peaks, tracing
from colm_scale.plan.trace import MicroBatches
from colm_scale.selection.route import deal, form_micro_batches, route
from colm_scale.step.block_inputs import forward_reuse_store

GIB = 2**30
_SPARE = 0.95
"""Share of a GPU's memory that a plan uses; the rest is for fragments."""
_CONTEXT = 1.0
"""GiB of CUDA context and NCCL buffers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the model.

    Attributes:
        frozen, adapters: Parameters.
        probe: Size d of the probe tensor; 0 if nothing is sketched.
        frozen_bytes: Of the whole frozen weights.
        tail_bytes: Of those of the last block and outside the blocks.
    """

    frozen: int
    adapters: int
    probe: int
    frozen_bytes: int
    tail_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `plan.show` prints.

    Attributes:
        peaks: Memory of a rank.
        exchanged: Bytes a rank sends in a step, by purpose.
        forward_flops, training_flops: FLOP of a rank in a step, for the candidates' forward and for training.
        largest: Largest sizes that fit into ``plan.memory_gib``; infinite if memory does not bound them.
        checkpoint_bytes: Size of one checkpoint on disk.
        host: Bytes of a rank on the host, while it loads and between steps. Python and data are not counted.
        padded_because: Reason why micro-batches are padded, if they are.
    """

    config: RunConfig
    plan: PlanConfig
    engine: str
    sizes: Sizes
    batches: Batches
    peaks: Peaks
    exchanged: dict[str, int]
    forward_flops: float
    training_flops: float
    largest: dict[str, float]
    checkpoint_bytes: int
    host: dict[str, int]
    padded_because: str | None

    @property
    def floor_seconds(self) -> float | None:
        """The bare floor of a step at ``plan.tflops``, if that is given."""
        flops = self.forward_flops + self.training_flops
        return flops / (self.plan.tflops * 1e12) if self.plan.tflops else None


def make_plan(
    config: RunConfig, plan: PlanConfig, of: PretrainedConfig | None = None, batches: Batches | None = None
) -> Plan:
    """Plan a run.

    Args:
        of: The model's configuration; read without weights if it is not given.
        batches: Those of a step; by default all examples have the average length and all candidates are sketched.

    Raises:
        UserError: As a run with these options, before it reads weights and data.
    """
    selection = config.selection
    if selection.method == "colm" and is_own(selection.estimator):
        raise UserError(
            f"the memory and traffic of --selection.estimator {selection.estimator} are unknown: plan with an "
            f"estimator of the package, such as last_layer"
        )
    planner = _Planner(config, plan, of or check_model(config.model))
    fake = planner.model()
    sizes = _sizes(fake)
    batches = batches or arranged(config, plan, packed=fake.module.packs)
    forward = _forward_flops(fake, sizes)
    sketched, trained = (sum(map(sum, of_phase)) for of_phase in (batches.sketched, batches.trained))
    # The loss goes back through frozen weights, which have no gradients; adapters are negligible.
    passes = 3 if config.train.activation_checkpointing and not forward_reuse_store(config, fake.tap) else 2
    with planner.tracing(fake) as peaks_of:
        found = peaks_of(batches)
        largest = planner.largest(batches, plan.memory_gib, peaks_of) if plan.memory_gib else {}
    return Plan(
        config=config,
        plan=plan,
        engine=planner.engine,
        sizes=sizes,
        batches=batches,
        peaks=found,
        exchanged=planner.exchanged(sizes, batches),
        forward_flops=forward * sketched,
        training_flops=forward * passes * trained,
        largest=largest,
        checkpoint_bytes=sizes.adapters * FLOAT32 * (1 + AVERAGES[config.train.optimizer]),
        host=planner.host(fake, found.engine),
        padded_because=fake.padded_because,
    )


def arranged(config: RunConfig, plan: PlanConfig, *, packed: bool) -> Batches:
    """Arrange a step whose examples have the average length and whose candidates are all sketched."""
    selection, budget, ranks = config.selection, config.train.micro_batch_tokens, plan.world_size
    n = selection.candidates
    lengths, every = torch.full((n,), plan.tokens), torch.arange(n)
    sketched: tuple[tuple[int, ...], ...] = ()
    if selection.method == "colm" and selection.estimator != "length":
        micro_batches = form_micro_batches(lengths, every, budget, packed=packed, even=True)
        sketched = deal(micro_batches, lengths, ranks, packed=packed)[0]
    chosen = every if selection.method == "full" else every[: selection.budget]
    trained = route(lengths, chosen, ranks, budget, packed=packed).micro_batches[0]
    return Batches(*(tuple((plan.tokens,) * len(members) for members in of if members) for of in (sketched, trained)))


class _Planner:
    """Plans for one configuration and model.

    Args:
        of: The model's configuration.
    """

    def __init__(self, config: RunConfig, plan: PlanConfig, of: PretrainedConfig):
        self._config, self._plan, self._of = config, plan, of
        self._ds_config = checked_ds_config(config, plan.world_size, planned=True)
        self._known = tried(config, of)

    @property
    def engine(self) -> str:
        """Name of the engine, for people."""
        if self._ds_config:
            return f"ZeRO-{zero_stage(self._ds_config)}"
        if self._config.engine == "fsdp":
            return "FSDP2"
        return "DDP" if self._plan.world_size > 1 else "single"

    def model(self) -> FakeModel:
        """Make a new fake model."""
        return fake_model(self._config, self._of, self._known)

    def tracing(self, fake: FakeModel) -> AbstractContextManager[Callable[[Batches], Peaks]]:
        """A context with a function that traces the memory of a rank; FSDP2 shards the model."""
        return tracing(self._config, self._ds_config, fake, self._plan.world_size, self._plan.label_share)

    def host(self, fake: FakeModel, memory: EngineMemory) -> dict[str, int]:
        """Compute the bytes of a rank on the host: a part in the files' type at a time, and what is offloaded."""
        base = [weight for weight in fake.module.parameters() if not weight.requires_grad]
        of_files = getattr(self._of, "dtype", None) or base[0].dtype
        larger = max(1, torch.empty(0, dtype=of_files).element_size() / base[0].element_size())
        part = memory.part or max(map(_bytes, base))
        return {"while loading": memory.host + int(part * larger), "between steps": memory.host}

    def exchanged(self, sizes: Sizes, batches: Batches) -> dict[str, int]:
        """Compute the bytes a rank sends for the selection, see `estimators`, and the engine, with ring algorithms."""
        ranks, selection, fsdp = self._plan.world_size, self._config.selection, self._config.fsdp
        if ranks == 1:
            return {}
        found = {"selection": 16 * selection.budget + 40}
        if batches.sketched:
            rows = ranks * sum(map(len, batches.sketched))
            found["selection"] += _sketch_bytes(selection, self._plan, rows, sizes.probe)
        ring = (ranks - 1) / ranks
        found["gradients"] = int(2 * ring * sizes.adapters * FLOAT32)
        if sharding(self._config, self._ds_config):
            again = 2 if self._config.engine != "fsdp" or fsdp.reshard_after_forward else 1
            gathers = len(batches.sketched) + again * len(batches.trained)
            further = selection.num_probes - 1 if selection.estimator == "zeroth_order" else 0
            tails = further * len(batches.sketched) * sizes.tail_bytes  # see `sketch.tap.BRANCHES`
            found["weights"] = int(ring * (sizes.frozen_bytes * gathers + tails))
        return found

    def largest(
        self, batches: Batches, memory_gib: float, peaks_of: Callable[[Batches], Peaks]
    ) -> dict[str, float]:
        """Find the largest micro-batch, coreset and (with accumulation) candidates that fit into a memory.

        Memory is linear in the tokens, so two traces suffice.
        """
        tokens, ranks = self._plan.tokens, self._plan.world_size
        room = (memory_gib * _SPARE - _CONTEXT) * GIB
        most = max(map(len, (*batches.trained, *batches.sketched)))

        def traced(sketched: MicroBatches, trained: MicroBatches) -> dict[str, int]:
            return peaks_of(Batches(sketched, trained)).phases

        one, two = ((tokens,) * most,), ((tokens,) * (2 * most),)
        small, double = (traced(size if batches.sketched else (), size) for size in (one, two))
        examples = min(
            _at_most(room, small[phase], double[phase], most) for phase in small if double[phase] > small[phase]
        )
        largest: dict[str, float] = {
            "micro_batch_tokens": examples * tokens,
            "coreset, one micro-batch a rank": examples * ranks,
        }
        if batches.sketched:
            twice = traced((*one, *one), one)["sketch"] - small["sketch"]
            more = max(0, int((room - small["sketch"]) // twice) + 1) if twice > 0 else math.inf
            largest["candidates, accumulated"] = more * most * ranks
        return largest


def _sizes(fake: FakeModel) -> Sizes:
    frozen = [(weight, times) for weight, times in fake.weights if not weight.requires_grad]
    below = {weight for block in fake.blocks[:-1] for weight in block.parameters()}
    return Sizes(
        frozen=sum(weight.numel() * times for weight, times in frozen),
        adapters=sum(weight.numel() * times for weight, times in fake.weights if weight.requires_grad),
        probe=fake.tap.size if fake.tap else 0,
        frozen_bytes=sum(_bytes(weight) * times for weight, times in frozen),
        tail_bytes=sum(_bytes(weight) for weight, _ in frozen if weight not in below),
    )


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _forward_flops(fake: FakeModel, sizes: Sizes) -> float:
    """Compute the FLOP per token: two per weight that multiplies, without embeddings and attention's products."""
    return 2.0 * (sizes.frozen + sizes.adapters - input_weight(fake.module.causal_model).numel())


def _sketch_bytes(selection: SelectionConfig, plan: PlanConfig, rows: int, d: int) -> int:
    """Compute the bytes of exchanging ``rows`` sketches, see the table in `estimators`."""
    match selection.estimator, selection.compression:
        case "zeroth_order", _:
            return 4 * rows * (selection.num_probes + 1)
        case "last_layer", "countsketch":
            return 4 * rows * (selection.columns + 2) + 16 * d
        case _:
            owned = -(-d // plan.world_size)
            proposals = 8 * plan.sources * plan.world_size * min(selection.columns, owned)
            sums = 4 * plan.sources * plan.world_size * owned
            return 4 * rows * (selection.columns + 2) + sums + proposals + 16 * d


def _at_most(room: float, small: int, double: int, examples: int) -> int:
    """Count the examples that fit, if ``examples`` need ``small`` bytes and twice as many ``double``."""
    each = (double - small) / examples
    return max(0, int((room - (small - each * examples)) // each))
