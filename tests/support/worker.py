"""One rank of a tiny run for the tests of several ranks: the product's own step, with results written to a file.

Every case trains the same random model on the same random examples, so that ranks, world sizes and engines can be
compared. `launch` starts the ranks like a launcher; each writes ``rank<R>.pt``, a nested dict of plain values.

    V  vocabulary, 128      N  examples, 96      Q  sources, 5 (the three small ones are kept)
"""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from colm_scale.checkpoint.background import BackgroundWriter, Writer
from colm_scale.checkpoint.files import NO_CHECKPOINT
from colm_scale.checkpoint.identity import model_digest
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import (
    DataConfig,
    EvalConfig,
    FsdpConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    SelectionConfig,
    SourcesConfig,
    TrainConfig,
)
from colm_scale.data.batching import Batching, weighted
from colm_scale.data.examples import Examples
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.exchange import share_selection
from colm_scale.distributed.group import Group, PeerFailed
from colm_scale.engines import tensors
from colm_scale.engines.base import WEIGHT, Engine, trainable
from colm_scale.engines.choose import make_engine, sharding
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.engines.tensors import collect, held_bytes, local_tensors
from colm_scale.errors import TrainingError, UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.forward_reuse import HeldBlockInputs
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks, find_probe
from colm_scale.modeling.weights import META, WHOLE, Weights
from colm_scale.profiling import memory
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans, over_ranks
from colm_scale.randomness import generator
from colm_scale.records import Candidates, Selection, long_tensor
from colm_scale.run import evaluate
from colm_scale.run.assemble import build_model, build_step
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator
from colm_scale.run.inputs import Inputs
from colm_scale.selection.quota import kept_sources
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.tap import Tap
from colm_scale.step.floor import Work, bare_floor_seconds
from colm_scale.step.preview import preview
from colm_scale.step.reuse_check import ReuseCheck
from colm_scale.step.step import CoresetStep
from support.cases import (
    BLOCKS,
    CASES,
    CPU,
    DS_CONFIGS,
    END,
    FLOOR_AFTER,
    OVERFLOWING,
    PAD,
    POISON,
    RANK,
    RATE,
    ROOMS,
    SIZES,
    VOCABULARY,
    Case,
)
from support.families import base_model
from support.ranks import join, launch_ranks
from support.spies import EngineSpy, EstimatorSpy, FillSpy, WholeOnDevice, whole_weights
from support.state import changed, leaves, random_states


def run_config(case: Case, engine: str = "auto") -> RunConfig:
    """``engine``: ``auto``, ``fsdp``, ``fsdp_offload``, ``fsdp_unsharded``, or the name of a file in ``ds_configs``."""
    train = {"micro_batch_tokens": 96, "learning_rate": RATE, "seed": 5, **case.train}
    return RunConfig(
        model=ModelConfig(quantize=case.quantize),
        selection=case.selection,
        lora=LoraConfig(rank=RANK, alpha=RANK, targets=case.targets),
        train=TrainConfig(**train),
        fsdp=FsdpConfig(
            cpu_offload=engine == "fsdp_offload",
            reshard_after_forward=engine != "fsdp_unsharded",
        ),
        data=DataConfig(train=["given.jsonl"], sources="given.jsonl") if case.refresh_sources else DataConfig(),
        sources=SourcesConfig(refresh_every=case.refresh_sources or case.refresh_kept),
        engine="fsdp" if engine.startswith("fsdp") else "auto",
        ds_config=_ds_config(engine) if engine.startswith("zero") else None,
    )


def _ds_config(name: str) -> str:
    """The shipped file, with thresholds above this small model, so that parameters outside a block are not gathered."""
    given = json.loads((DS_CONFIGS / f"{name}.json").read_text("utf-8"))
    if given["zero_optimization"]["stage"] < 3:
        return str(DS_CONFIGS / f"{name}.json")
    thresholds = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    given["zero_optimization"] |= {f"stage3_{name}": 0 for name in thresholds}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(given, file)
    return file.name


def examples() -> Examples:
    """96 random examples of 6 to 32 tokens."""
    drawn = generator(1, "examples")
    count = sum(SIZES)
    lengths = torch.randint(6, 33, (count,), generator=drawn)
    prompts = (lengths * torch.rand(count, generator=drawn) * 0.8).long() + 1
    offsets = torch.cat([long_tensor([0]), lengths.cumsum(0)])
    return Examples(
        tokens=torch.randint(3, VOCABULARY, (int(offsets[-1]),), generator=drawn).int(),
        labelled=torch.cat([torch.arange(length) >= prompt for length, prompt in zip(lengths, prompts)]),
        offsets=offsets,
        ids=1000 + torch.randperm(count, generator=drawn),
        sources=torch.repeat_interleave(long_tensor(SIZES))[torch.randperm(count, generator=drawn)],
        protected=torch.zeros(count, dtype=torch.bool),
        source_names=("a", "b", "c", "d", "e"),
        dropped={},
        cut={},
    )


def poisoned(data: Examples) -> Examples:
    """With a token whose embedding is not a number in the shortest examples."""
    tokens = data.tokens.clone()
    tokens[data.offsets[:-1][data.lengths <= 9]] = POISON
    return replace(data, tokens=tokens)


def base_of_run(family: str = "llama", **options) -> nn.Module:
    """The model without adapters, equal in every process."""
    options = {"vocab_size": VOCABULARY, "num_key_value_heads": 4, "num_hidden_layers": BLOCKS, **options}
    return base_model(family, **options).requires_grad_(False)


def model_from_files(
    config: RunConfig, folder: Path, group: Group, device: torch.device
) -> tuple[ExampleLoss, FillSpy, Tap | None]:
    """As `model`, from the files in ``folder``: on the CPU, or without weights, which come part by part."""
    config = replace(config, model=replace(config.model, name=str(folder)), train=replace(config.train, seed=0))
    module, weights, tap = build_model(config, device, group)
    return module, FillSpy(weights, module), tap


def model(config: RunConfig | None = None, device: torch.device = CPU, **options) -> tuple[ExampleLoss, Tap]:
    """The model before training and the tap on its probe, equal in every process."""
    base = base_of_run(**options).to(device)
    probe = find_probe(base, "v" if config is None else config.selection.probe)
    if config is not None:
        base.to(getattr(torch, config.train.dtype))
        use_packing(base, config.train.packing, device)
        if config.train.activation_checkpointing:
            keep_block_inputs_only(base)
    lora = config.lora if config else LoraConfig(rank=RANK, alpha=RANK)
    module = ExampleLoss(add_adapters(base, lora, seed=0))
    return module, Tap(module, probe)


def kept(config: SelectionConfig, data: Examples) -> Tensor:
    return kept_sources(data.sizes, data.source_names, config.kept_sources)


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@dataclass
class Parts:
    """Build a run from scratch."""

    module: ExampleLoss
    engine: EngineSpy
    step: CoresetStep
    spy: EstimatorSpy | None
    state: RunState
    held: list[int]
    """Bytes of weights held while the last layer of each block ran."""
    moved: WholeOnDevice | FillSpy
    weights: dict[str, Tensor]
    """Frozen weights and buffers before the engine was made."""


def make_parts(case: Case, engine_name: str, group: Group, folder: Path) -> Parts:
    config = run_config(case, engine_name)
    data = poisoned(examples()) if case.poisoned else examples()
    module, tap = model(config, **case.model)
    if case.poisoned:
        module.causal_model.get_input_embeddings().weight.data[POISON] = torch.nan
    if case.from_files:
        files = Path(group.share_json(f"{folder} model"))
        if group.is_first:
            base_of_run(**case.model).save_pretrained(files, max_shard_size="20KB")
        group.barrier()
        module, _, tap = model_from_files(config, files, group, CPU)
    weights = whole_weights(module)
    ds_config = read_ds_config(config, group.world_size)
    inputs = Inputs(
        tokenizer=SimpleNamespace(pad_token_id=PAD),
        sampler=CandidateSampler(data, case.selection.candidates, config.train.seed),
        source_names=data.source_names,
        sizes=data.sizes,
        kept=kept(case.selection, data),
        protected=data.protected_sizes,
        digest="",
        eval=None,
        ds_config=ds_config,
    )
    held: list[int] = []
    filled: Weights = WHOLE
    if case.from_files and sharding(config, ds_config):
        module, filled, tap = model_from_files(config, files, group, META)
        engine = EngineSpy(make_engine(config, inputs.ds_config, module, group, filled))
        moved = filled
    else:
        with WholeOnDevice(module) as moved:
            engine = EngineSpy(make_engine(config, inputs.ds_config, module, group))
    blocks = [] if config.train.compile else decoder_blocks(module.causal_model)[1]  # hooks change compiled code
    for block in blocks:  # the engine's own hooks, which gather, come first
        layer = getattr(block.mlp, "down_proj", block.self_attn.o_proj).base_layer
        layer.register_forward_pre_hook(lambda *_: held.append(held_bytes(module)))
    sketches = case.selection.method == "colm"
    spans = Spans(group.device, memory_meter(group))
    step = build_step(config, inputs, engine, tap if sketches else None, spans, group)
    spy = None
    if sketches and not config.train.compile:  # it looks at every operation, and nothing is compiled under such a look
        spy = step.select.sketch.estimator = EstimatorSpy(step.select.sketch.estimator, group)
    nothing = SimpleNamespace(state=dict, load=lambda _: None)
    # Save what the spies record.
    estimator = step.select.sketch.estimator if spy is None else spy.inner
    sketch = SimpleNamespace(estimator=estimator)
    select = SimpleNamespace(sketch=sketch, sources=step.select.sources)
    train = SimpleNamespace(engine=engine.inner)
    watched = SimpleNamespace(sampler=inputs.sampler, refresh=step.refresh, select=select, train=train)
    state = RunState(
        writer=BackgroundWriter(CheckpointFolder(folder, keep=1)) if group.is_first else Writer(),
        identity={"config": {}, "data": "", "model": ""},
        facts={},
        step=watched,
        session=nothing,
        group=group,
    )
    return Parts(module, engine, step, spy, state, held, moved, weights)


def run_case(case: Case, engine_name: str, group: Group) -> dict:
    """Train a case on this rank. ``A > B`` starts under one engine and resumes under another."""
    with perturbed(case), _reusing(case):
        try:
            return _run_case(case, engine_name, group)
        except UserError as error:
            return {"refused": str(error)}


def perturbed(case: Case) -> AbstractContextManager:
    """Finite differences of the case's step."""
    return mock.patch.object(zeroth_order, "PERTURBATION", case.perturbation)


@contextmanager
def _reusing(case: Case):
    laid_out, check = HeldBlockInputs._laid_out, ReuseCheck.__call__
    with (
        mock.patch.object(HeldBlockInputs, "_laid_out", lambda *args: laid_out(*args) * case.scaled_inputs),
        mock.patch.object(ReuseCheck, "__call__", check if case.reuse_checked else lambda *_: nullcontext()),
    ):
        yield


def _run_case(case: Case, engine_name: str, group: Group) -> dict:
    first, _, second = engine_name.partition(" > ")
    folder = Path(tempfile.mkdtemp())
    parts = make_parts(case, first, group, folder)
    torch._dynamo.reset()  # so that no case reuses compiled code of another
    graphs = counters["stats"]["unique_graphs"]
    held_at_start = held_bytes(parts.module)
    forwards = []
    parts.module.register_forward_hook(lambda *_: forwards.append(1))
    steps, floor, generated = [], {}, {}
    if case.floor and case.floor_at_first:
        floor["changed_at_first"] = _floor(parts, _drawn_work(parts, case, group), group)["changed"]
        forwards.clear()
    for number in range(1, case.steps + 1):
        if number - 1 == case.break_after:
            parts.state.save(number - 1)
            parts.state.wait()
            parts = make_parts(case, second or first, group, folder)
            newest = CheckpointFolder(folder, 1).newest(fallback=False) if group.is_first else NO_CHECKPOINT
            assert parts.state.load(newest) == number - 1
        module, engine, step, spy = parts.module, parts.engine, parts.step, parts.spy
        engine.counts = case.counted
        engine.collectives.clear()
        if case.overflowing:
            engine.scale.scale = OVERFLOWING if number in case.overflowing else 1024.0
        report, work = step(number, RATE)
        steps.append(_row(report) | {"forwards": len(forwards), "trained_batches": len(work.trained)})
        steps[-1]["sketched_batches"] = len(work.sketched)
        steps[-1]["collectives"] = [dict(counts) for counts in engine.collectives]
        steps[-1]["moment_steps"] = step.select.sketch.estimator.moments.step
        steps[-1]["moments_after"] = tuple(step.select.sketch.estimator.moments.tensors().values())
        steps[-1]["owed"] = step.select.sources.coverage.owed
        steps[-1]["empty_batches"] = sum(not len(micro.batch.positions) for micro in work.trained)
        steps[-1]["sources"] = report.candidates.sources
        drift = step.refresh_sources(number)
        steps[-1]["drift"] = None if drift is None else asdict(drift) | {"seconds": drift.seconds > 0}
        steps[-1]["moved"] = step.refresh.state().get("moved")
        steps[-1]["kept_sources"] = step.select.sources.kept
        if spy is not None:
            steps[-1] |= spy.steps[-1]
        forwards.clear()
        if case.floor and number == FLOOR_AFTER:
            floor |= _floor(parts, work, group) | {"forwards": len(forwards)}
            forwards.clear()
        if number == case.generate_after:
            generated = {room: generate(parts, group, room) for room in ROOMS}
            forwards.clear()
    gradients = engine.gradients[0]
    return {
        "graphs": counters["stats"]["unique_graphs"] - graphs,
        "steps": steps,
        "gradients": gradients,
        "adapters": whole_adapters(engine.inner, group),
        "floor": floor,
        "generated": generated,
        "name": engine.name,
        "moved": (parts.moved.most, parts.moved.total),
        "weights_kept": _same(whole_weights(module), parts.weights),
        **({} if case.quantize == "none" else _quantised(parts)),
        "held": (held_at_start, max(parts.held, default=0), held_bytes(module)),
    }


def whole_adapters(engine: Engine, group: Group) -> dict[str, torch.Tensor]:
    """The trained weights that this rank has whole, or the first has gathered."""
    if not engine.is_sharded:
        found = {name: engine.part(name, WEIGHT) for name in trainable(engine.module)}
        return {name: part.values.view(part.shape).clone() for name, part in found.items()}
    gathered, whole = collect(engine, group)["adapter"], {}
    for name in trainable(engine.module):
        own = torch.zeros(engine.part(name, WEIGHT).shape)
        whole[name] = group.broadcast(gathered.get(name, own), "control")
    return whole


def _floor(parts: Parts, work: Work, group: Group) -> dict:
    """Measure the floor. ``changed`` are the paths of everything that is not as it was before."""
    engine = parts.engine.inner
    engine._begin_state()  # as a checkpoint does, under DDP on the first rank only
    collect(engine, group)
    group.take_traffic()  # as a step does before its floor
    held = {"engine": engine, "step": parts.step}
    before = leaves(held, "run") | random_states()
    seconds = bare_floor_seconds(work, engine, group, 5)
    after = leaves(held, "run") | random_states()
    return {"seconds": seconds, "changed": changed(before, after), "seen": len(before)}


def _drawn_work(parts: Parts, case: Case, group: Group) -> Work:
    """The work of a coreset of the first step's candidates, which need not be its own."""
    config = run_config(case)
    batching = Batching(PAD, config.train.micro_batch_tokens, parts.module.packs, group.device)
    drawn = preview(parts.step, 1, batching, group.world_size)
    batches = batching.share(examples(), drawn.candidates, drawn.routed.micro_batches, group.rank)
    shares = torch.full((len(drawn.candidates),), 1 / len(drawn.drawn))
    return Work(batches, weighted(batches, shares, group.device, 0))


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    pad_token_id, eos_token_id = PAD, END

    def decode(self, tokens: list[int], **_) -> str:
        return " ".join(map(str, tokens))

    def batch_decode(self, rows: Tensor, **_) -> list[str]:
        return [self.decode([token for token in row if token != PAD]) for row in rows.tolist()]


def generate(parts: Parts, group: Group, room: str) -> dict[str, object]:
    """Answer a prompt of each source in at most 2, and in at most 12 tokens; every prompt is a micro-batch.

    Returns:
        By this number: answers by reference, and the collectives that they took. Bytes held while generating.
    """
    data, answers, collectives, held = examples(), {2: {}, 12: {}}, {}, []
    held_out = HeldOut(data, data.sizes, torch.zeros(len(SIZES), dtype=torch.bool), Numbers())
    train = TrainConfig(micro_batch_tokens=8)

    def compared(answer: str, reference: str) -> bool:
        answers[tokens][reference] = answer
        held.append(held_bytes(parts.module))
        return False

    for tokens in answers:
        config, before = EvalConfig(limit=1, generate=1, max_new_tokens=tokens), group.collectives()
        evaluator = HeldOutEvaluator(held_out, config, train, group, gathered=parts.engine.inner.gathered)
        with (
            mock.patch.object(evaluate, "is_correct", compared),
            mock.patch.object(tensors, "free_bytes", return_value=ROOMS[room]),
        ):
            evaluator(parts.module, 0)
        collectives[tokens] = group.collectives() - before
    return {"answers": answers, "collectives": collectives, "held": max(held)}


def _quantised(parts: Parts) -> dict[str, object]:
    """The weights of the layers in 4 bits, as they compute; each parameter's type and size on this rank."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from colm_scale.modeling.quantised import PackedLinear

    layers = {name: layer for name, layer in parts.module.named_modules() if isinstance(layer, Linear4bit)}
    own = {name: local_tensors(layer.weight)[0] for name, layer in layers.items()}
    with parts.engine.inner.gathered():
        weights = {
            name: dequantize_4bit(
                *(layer.unpacked() if isinstance(layer, PackedLinear) else (layer.weight, layer.weight.quant_state))
            )
            for name, layer in layers.items()
        }
    return {
        "digest": model_digest(parts.module, parts.moved if isinstance(parts.moved, FillSpy) else WHOLE),
        "weights": weights,
        "own": {name: (tensor.dtype, tensor.nbytes) for name, tensor in own.items()},
    }


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], values) for name, values in other.items())


def _row(report) -> dict:
    selection = report.selection
    return {
        "candidate_ids": report.candidates.ids,
        "indices": report.candidates.indices,
        "ids": report.candidates.ids[selection.positions],
        "positions": selection.positions,
        "weights": selection.weights,
        "kept": selection.kept,
        "bytes": report.exchanged_bytes,
        "gradient_bytes": report.gradient_bytes,
        "phases": len(report.seconds),
        "kinds": len(report.phase_peak_bytes),
        "loss": report.loss,
        "norm": report.gradient_norm,
        "applied": report.applied,
        "loss_scale": report.loss_scale,
        "telemetry": report.telemetry | report.noise,
        "padding": report.padding_share,
    }


def run_faults(group: Group) -> dict:
    """Results of each rank when the last one fails."""
    last = group.world_size - 1
    odd = group.rank == last
    candidates = Candidates(7, torch.arange(4), torch.arange(4) + odd, torch.zeros(4).long(), torch.ones(4).long())
    selection = Selection(long_tensor([1, 3]), torch.tensor([1.0, 2.5]), kept=1, overflow=3, invalid=4)
    given = selection if group.is_first else None
    found = {}
    with _caught(found, "share_selection"):
        share_selection(given, 3, candidates, group)
    with _caught(found, "agree"):
        group.agree("one" if odd else "other", "training data")
    with _caught(found, "together"), group.together():
        if odd:
            raise UserError("the file is missing")
    with _caught(found, "together_two"), group.together():
        if group.rank > 0:
            raise UserError(f"rank {group.rank} found it")
    found["memory"] = _run_uneven_nvml(group)
    with _caught(found, "agreed"):  # the ranks are still synchronised
        group.agree("same", "training data")
        with group.together():
            pass
        same = Candidates(7, torch.arange(4), torch.arange(4), torch.zeros(4).long(), torch.ones(4).long())
        shared = share_selection(given, 3, same, group)
        found["shared"] = asdict(shared)
    return found


def _run_uneven_nvml(group: Group) -> dict[str, dict[str, tuple[int, ...]]]:
    """Peaks by kind and phase on ranks with a GPU each, if NVML answers on the first alone."""
    gpu = SimpleNamespace(device=torch.device("cuda", 0), any=group.any)
    gauge = SimpleNamespace(label="allocator and NVML", read=lambda: 90) if group.is_first else None
    numbers = {"reset_peak_memory_stats": None, "max_memory_allocated": 10 + group.rank, "memory_reserved": 50}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(memory, "_nvml_gauge", return_value=gauge))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="GPU"))
        for name, value in numbers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        spans = Spans(group.device, memory_meter(gpu))
        with spans("train"):
            pass
        return over_ranks(*spans.finish(), group)[1]


@contextmanager
def _caught(found: dict, what: str):
    try:
        yield
        found[what] = ("nothing", "")
    except (TrainingError, UserError, PeerFailed) as error:
        found[what] = (type(error).__name__, str(error))


def work(rank: int, world_size: int, port: int, jobs: dict[str, tuple[str, str]], folder: str) -> None:
    """Main function of each process."""
    group = join(rank, world_size, port)
    results = {"cases": {name: run_case(CASES[case], engine, group) for name, (engine, case) in jobs.items()}}
    if world_size > 1:
        results["faults"] = run_faults(group)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    group.close()


def launch(world_size: int, jobs: dict[str, tuple[str, str]], folder: Path, timeout_seconds: float = 300) -> list[dict]:
    """Run ``{name: (engine, case)}`` in turn on ``world_size`` new processes; returns the results of each rank."""
    launch_ranks(work, world_size, jobs, folder, timeout_seconds)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
