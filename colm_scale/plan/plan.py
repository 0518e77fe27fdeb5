"""What a run will need and move, from its options and the model's configuration alone: ``colm-scale plan``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.config.checks import check_even_shares
from colm_scale.config.commands import PlanConfig
from colm_scale.config.user_functions import is_own
from colm_scale.engines.base import trainable
from colm_scale.engines.choose import check_optimizer, sharding
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.errors import UserError
from colm_scale.modeling.causal import input_weight
from colm_scale.modeling.load import check_model
from colm_scale.plan.fake import FakeModel, Tried, fake_model, tried
from colm_scale.plan.memory import FLOAT32, Peaks, averages_of, peaks
from colm_scale.records import Json
from colm_scale.selection.route import deal, form_micro_batches, route

GIB = 2**30
_SPARE = 0.95
"""Share of a GPU's memory that a plan fills; the rest is for fragments."""
_CONTEXT = 1.0
"""GiB of CUDA context and NCCL buffers."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Who computes how much: lengths of the examples of each micro-batch of the busiest rank.

    Attributes:
        sketched: Of the candidates; empty where nothing is forwarded.
        trained: Of what is trained.
    """

    sketched: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model in numbers of numbers.

    Attributes:
        frozen, adapters: Parameters.
        probe: Numbers of the probe tensor, d; 0 where nothing is sketched.
        frozen_bytes: Of the frozen weights, stored once.
    """

    frozen: int
    adapters: int
    probe: int
    frozen_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `planning.show` prints.

    Attributes:
        peaks: Memory of a rank.
        exchanged: Bytes a rank sends in a step, by purpose.
        forward_flops, training_flops: Of a rank in a step: of the candidates' forward, and of the training.
        largest: What fits into ``plan.memory_gib``, by what it is; None: memory does not bound it.
        checkpoint_bytes: On disk, of one checkpoint.
        padded_because: Why micro-batches are padded, if they are.
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
    largest: dict[str, int | None]
    checkpoint_bytes: int
    padded_because: str | None

    @property
    def floor_seconds(self) -> float | None:
        """The bare floor of a step, by the throughput that was given."""
        if self.plan.tflops is None:
            return None
        return (self.forward_flops + self.training_flops) / (self.plan.tflops * 1e12)


def make_plan(
    config: RunConfig, plan: PlanConfig, of: PretrainedConfig | None = None, batches: Batches | None = None
) -> Plan:
    """Plan a run.

    Args:
        of: The model's configuration, if it is in hand; else it is read, without weights.
        batches: Of a step, if they are in hand; else examples are all of the average length and all sketched.

    Raises:
        UserError: As a run with these options, before it has read weights and data.
    """
    check_even_shares(config.selection.candidates, plan.world_size)
    selection = config.selection
    if selection.method == "colm" and is_own(selection.estimator):
        raise UserError(
            f"what --selection.estimator {selection.estimator} holds and exchanges is not known: plan with one of the "
            f"package, last_layer for instance"
        )
    of = of or check_model(config.model)
    ds_config = read_ds_config(config, plan.world_size) if config.ds_config else None
    check_optimizer(config, ds_config)
    known = tried(config, of)
    fake = fake_model(config, of, known)
    sizes = _sizes(fake)
    packed = fake.module.packs
    batches = batches or arranged(config, plan, packed=packed)
    found = _peaks(config, ds_config, fake, plan, batches)
    forward = _forward_flops(fake, sizes)
    sketched, trained = (sum(map(sum, of_phase)) for of_phase in (batches.sketched, batches.trained))
    # The loss goes back through frozen weights, which need no gradient of their own; adapters are next to nothing.
    passes = 3 if config.train.activation_checkpointing and config.train.forward_reuse == "off" else 2
    return Plan(
        config=config,
        plan=plan,
        engine=_engine_name(config, ds_config, plan.world_size),
        sizes=sizes,
        batches=batches,
        peaks=found,
        exchanged=_exchanged(config, ds_config, plan, sizes, batches),
        forward_flops=forward * sketched,
        training_flops=forward * passes * trained,
        largest=_largest(config, ds_config, plan, of, known, batches, plan.memory_gib) if plan.memory_gib else {},
        checkpoint_bytes=sizes.adapters * FLOAT32 * (1 + averages_of(config)),
        padded_because=fake.padded_because,
    )


def arranged(config: RunConfig, plan: PlanConfig, *, packed: bool) -> Batches:
    """The micro-batches of a step whose examples are all of the average length and all sketched."""
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


def _peaks(config: RunConfig, ds_config: Json | None, fake: FakeModel, plan: PlanConfig, batches: Batches) -> Peaks:
    return peaks(config, ds_config, fake, plan.world_size, batches.sketched, batches.trained, plan.label_share)


def _sizes(fake: FakeModel) -> Sizes:
    weights = {*fake.module.parameters()}
    frozen = [weight for weight in weights if not weight.requires_grad]
    return Sizes(
        frozen=sum(weight.numel() for weight in frozen),
        adapters=sum(weight.numel() for weight in trainable(fake.module).values()),
        probe=0 if fake.tap is None else fake.tap.size,
        frozen_bytes=sum(weight.numel() * weight.element_size() for weight in frozen),
    )


def _forward_flops(fake: FakeModel, sizes: Sizes) -> float:
    """Per token: two for each weight that multiplies. Embeddings look up; attention's products are left out."""
    return 2.0 * (sizes.frozen + sizes.adapters - input_weight(fake.module.causal_model).numel())


def _engine_name(config: RunConfig, ds_config: Json | None, world_size: int) -> str:
    if ds_config is not None:
        return f"ZeRO-{ds_config.get('zero_optimization', {}).get('stage', 0)}"
    if config.engine == "fsdp":
        return "FSDP2"
    return "DDP" if world_size > 1 else "single"


def _exchanged(
    config: RunConfig, ds_config: Json | None, plan: PlanConfig, sizes: Sizes, batches: Batches
) -> dict[str, int]:
    """Bytes a rank sends: of the selection as `distributed.estimators` says, and of the engine, rings assumed."""
    ranks, selection = plan.world_size, config.selection
    if ranks == 1:
        return {}
    found = {"selection": 16 * selection.budget + 40}
    if batches.sketched:
        rows = ranks * sum(map(len, batches.sketched))
        found["selection"] += _sketch_bytes(selection, plan, rows, sizes.probe)
    ring = (ranks - 1) / ranks
    found["gradients"] = int(2 * ring * sizes.adapters * FLOAT32)
    if sharding(config, ds_config):
        again = 2 if config.engine != "fsdp" or config.fsdp.reshard_after_forward else 1
        gathers = len(batches.sketched) + again * len(batches.trained)
        found["weights"] = int(ring * sizes.frozen_bytes * gathers)
    return found


def _sketch_bytes(selection: SelectionConfig, plan: PlanConfig, rows: int, d: int) -> int:
    """What exchanging ``rows`` sketches takes, by the table of `distributed.estimators`."""
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


def _largest(
    config: RunConfig,
    ds_config: Json | None,
    plan: PlanConfig,
    of: PretrainedConfig,
    known: Tried,
    batches: Batches,
    memory_gib: float,
) -> dict[str, int | None]:
    """Largest micro-batch, and coreset and candidates without and with accumulation, that fit into the memory given.

    Memory grows with tokens as a straight line, which two traces fix.
    """
    room = (memory_gib * _SPARE - _CONTEXT) * GIB
    most = max(map(len, (*batches.trained, *batches.sketched)))

    def traced(sketched: tuple[tuple[int, ...], ...], trained: tuple[tuple[int, ...], ...]) -> Peaks:
        fake = fake_model(config, of, known)  # FSDP2 shards the one it is given
        return _peaks(config, ds_config, fake, plan, Batches(sketched, trained))

    one, two = ((plan.tokens,) * most,), ((plan.tokens,) * (2 * most),)
    small, double = (traced(size if batches.sketched else (), size) for size in (one, two))
    examples = min(
        _at_most(room, small.phases[phase], double.phases[phase], most)
        for phase in small.phases
        if double.phases[phase] > small.phases[phase]
    )
    largest: dict[str, int | None] = {
        "micro_batch_tokens": examples * plan.tokens,
        "coreset, one micro-batch a rank": examples * plan.world_size,
    }
    if batches.sketched:
        twice = traced((*one, *one), one).phases["sketch"] - small.phases["sketch"]
        more = int((room - small.phases["sketch"]) // twice) if twice > 0 else None
        largest["candidates, accumulated"] = None if more is None else max(0, more + 1) * most * plan.world_size
    return largest


def _at_most(room: float, small: int, double: int, examples: int) -> int:
    """Examples that fit, where ``examples`` and twice as many need ``small`` and ``double`` bytes."""
    each = (double - small) / examples
    return max(0, int((room - (small - each * examples)) // each))
