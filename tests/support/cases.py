"""The cases of the tests of several ranks: what `support.worker` trains, and how.

    V  vocabulary, 128      N  examples, 96      Q  sources, 5 (the three small ones are kept)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from colm_scale.config import SelectionConfig

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = ROOT / "ds_configs"
LOSS = f"{ROOT / 'docs' / 'examples' / 'loss_estimator.py'}:loss"
RANKINGS = ROOT / "benchmarks" / "rankings.py"
SIZES = (44, 30, 14, 5, 3)
CPU = torch.device("cpu")
PAD, VOCABULARY, BLOCKS = 0, 128, 4
RANK, D_OUT = 64, 32
D = RANK * D_OUT
"""Size of the probe tensor, much larger than any other tensor of a micro-batch."""
EPSILON = 1e-3 * (327_680 / D) ** 0.5
"""Step length of the paper on Phi-2, whose probe tensor has 327,680 numbers (the length of z grows with their
root). With a shorter step, rounding of the two losses decides between candidates, and selected ids soon differ."""
RATE = 1e-3
OVERFLOWING = 2.0**40
POISON = 2
"""A token that no example has."""
STEPS = 6
REUSE_STEPS = 9
"""Two epochs of four steps, and the start of a third."""
FLOOR_AFTER = 3
END = 7
"""A token that ends some answers."""
ROOMS = {"room for all": 2**60, "no room": 0}
"""Free bytes of a device."""


@dataclass(frozen=True)
class Case:
    """A run: method of selection and number of steps."""

    selection: SelectionConfig
    steps: int = STEPS
    train: dict = field(default_factory=dict)
    floor: bool = False
    floor_at_first: bool = True
    break_after: int | None = None
    """Save after this step, and resume from the checkpoint with new objects."""
    perturbation: float = EPSILON
    scaled_inputs: float = 1.0
    """Factor of the held block inputs, for a forward reuse that is wrong."""
    reuse_checked: bool = True
    refresh_sources: int = 0
    refresh_kept: int = 0
    overflowing: tuple[int, ...] = ()
    """Steps that begin with a loss scale far too large for float16."""
    counted: bool = False
    """Whether to count the collectives of each micro-batch."""
    poisoned: bool = False
    """Whether the loss of the shortest examples is not a number."""
    model: dict = field(default_factory=dict)
    """Options of the model."""
    generate_after: int | None = None
    """Generate answers after this step."""
    from_files: bool = False
    """Whether an engine that shards reads the weights from files, part by part."""
    quantize: str = "none"
    """As the option, for weights from files."""
    targets: list[str] | None = None
    """As the option."""


def _selection(**options) -> SelectionConfig:
    return SelectionConfig(**{"candidates": 24, "budget": 12, "columns": 64, **options})


MEDOIDS = {"ranking": "facility", "weights": "cluster"}
EXPERTS = {"num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": {"family": "mixtral", "num_local_experts": 8, **EXPERTS},
    "qwen3_moe": {"family": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, **EXPERTS},
}
"""Mixtures with so many experts that few micro-batches send tokens to all of them."""
ON_EXPERTS = ["o_proj", "v_proj", "experts"]
SEEING = {family: {"family": family} for family in ("gemma3", "qwen2_5_vl")}
"""Models that see."""
REUSED = {"activation_checkpointing": True, "forward_reuse": "device"}
CASES = {
    **{
        f"{name}{trained}{files}": Case(
            _selection(), 2, {"micro_batch_tokens": 8}, model=options, from_files=bool(files), targets=targets
        )
        for name, options in MIXTURES.items()
        for files in ("", "_files")
        for trained, targets in (("", None), ("_trained", ON_EXPERTS))
    },
    **{f"{name}_files": Case(_selection(), 2, model=options, from_files=True) for name, options in SEEING.items()},
    "experts_reused": Case(_selection(), 2, REUSED, model=MIXTURES["qwen3_moe"], targets=ON_EXPERTS),
    "experts_resumed": Case(_selection(), 3, model=MIXTURES["mixtral"], targets=ON_EXPERTS, break_after=1),
    "experts_unbroken": Case(_selection(), 3, model=MIXTURES["mixtral"], targets=ON_EXPERTS),
    "last_layer": Case(_selection()),
    "columns": Case(_selection(compression="columns")),
    "last_layer_with_floor": Case(_selection(), floor=True),
    # As in a run. Before the first step, DDP would order its buckets in the floor, and four ranks add differently.
    "last_layer_with_floor_later": Case(_selection(), floor=True, floor_at_first=False),
    "zeroth_order_1": Case(_selection(estimator="zeroth_order")),
    "zeroth_order_3": Case(_selection(estimator="zeroth_order", num_probes=3)),
    "stratified": Case(_selection(method="stratified")),
    "random": Case(_selection(method="random")),
    "full": Case(_selection(method="full")),
    "cluster": Case(_selection(**MEDOIDS), steps=1),
    "token": Case(_selection(**MEDOIDS), steps=1, train={"loss": "token"}),
    "clipped": Case(_selection(), steps=3, train={"max_grad_norm": 0.02}),
    "not_clipped": Case(_selection(), steps=3, train={"max_grad_norm": 0.0}),
    "checkpointed": Case(_selection(), steps=2, train={"activation_checkpointing": True}),
    "padded": Case(_selection(), train={"packing": "off"}),
    "plain": Case(_selection(), 3, {"activation_checkpointing": True}),
    "compiled": Case(_selection(), 3, {"activation_checkpointing": True, "compile": True}),
    "compiled_padded": Case(_selection(), 3, {"packing": "off", "compile": True}),
    "compiled_forward_reused": Case(
        _selection(), 3, {"activation_checkpointing": True, "forward_reuse": "device", "compile": True}
    ),
    "compiled_stratified": Case(_selection(method="stratified"), 3, {"compile": True}),
    "stratified_3": Case(_selection(method="stratified"), 3),
    **{
        f"{what}{name}": Case(
            _selection(**options), 3, {"activation_checkpointing": True, "forward_reuse": where, **train}
        )
        for what, where in (("forward_reused", "device"), ("not_forward_reused", "off"))
        for name, options, train in (
            ("", {}, {}),
            ("_branched", {"estimator": "zeroth_order", "num_probes": 2}, {}),
            ("_padded", {}, {"packing": "off"}),
        )
    },
    "forward_reused_offloaded": Case(_selection(), 3, {"activation_checkpointing": True, "forward_reuse": "cpu"}),
    # Enough for two micro-batches.
    "forward_reused_bounded": Case(
        _selection(),
        3,
        {"activation_checkpointing": True, "forward_reuse": "device", "forward_reuse_gib": 2 * 96 * 4 * 32 * 4 / 2**30},
    ),
    "forward_reused_unchecked": Case(
        _selection(), 3, {"activation_checkpointing": True, "forward_reuse": "device"}, reuse_checked=False
    ),
    "forward_reused_wrongly": Case(
        _selection(), 1, {"activation_checkpointing": True, "forward_reuse": "device"}, scaled_inputs=0.5
    ),
    "broken": Case(_selection(), break_after=3),
    "reclustered": Case(_selection(), refresh_sources=2),
    "reclustered_broken": Case(_selection(), refresh_sources=2, break_after=3),
    "reclustered_broken_after": Case(_selection(), refresh_sources=2, break_after=4),
    "reclustered_branched": Case(_selection(estimator="zeroth_order", num_probes=2), 4, refresh_sources=2),
    "reclustered_stratified": Case(_selection(method="stratified"), 4, refresh_sources=2),
    "reclustered_forward_reused": Case(
        _selection(), 4, {"activation_checkpointing": True, "forward_reuse": "device"}, refresh_sources=2
    ),
    **{name: Case(_selection(), 3, {"optimizer": name}) for name in ("sgd", "lion", "adafactor", "muon")},
    **{
        f"{name}_broken": Case(_selection(), 3, {"optimizer": name}, break_after=1)
        for name in ("sgd", "lion", "adafactor", "muon")
    },
    "shared": Case(_selection(method="stratified", shares={"a": 5, "b": 1, "c": 2, "d": 0, "e": 1}, kept_sources=[])),
    "shared_ranked": Case(_selection(shares=0.5, kept_sources=[])),
    "refreshed": Case(_selection(kept_sources=0.4), refresh_kept=2),
    "refreshed_broken": Case(_selection(kept_sources=0.4), refresh_kept=2, break_after=3),
    "covered": Case(_selection(coverage_floor=0.45, kept_sources=[])),
    "covered_broken": Case(_selection(coverage_floor=0.45, kept_sources=[]), break_after=3),
    "loss": Case(_selection(estimator=LOSS, ranking="facility"), 3),
    "loss_broken": Case(_selection(estimator=LOSS, ranking="facility"), 3, break_after=1),
    "length": Case(_selection(estimator="length", ranking="facility"), 3),
    "length_broken": Case(_selection(estimator="length", ranking="facility"), 3, break_after=1),
    "reused_1": Case(_selection(estimator="zeroth_order", reuse=3), REUSE_STEPS),
    **{
        f"reused_3{broken}": Case(
            _selection(estimator="zeroth_order", num_probes=3, reuse=99),
            REUSE_STEPS,
            break_after=6 if broken else None,
        )
        for broken in ("", "_broken")
    },
    **{
        f"reused_sketch{broken}": Case(
            _selection(compression="countsketch", reuse=3), REUSE_STEPS, break_after=6 if broken else None
        )
        for broken in ("", "_broken")
    },
    "countsketch": Case(_selection(compression="countsketch", **MEDOIDS), 3),
    "countsketch_broken": Case(_selection(compression="countsketch", **MEDOIDS), 3, break_after=1),
    "probe_k": Case(_selection(probe="k", **MEDOIDS), 3),
    "probe_mlp": Case(_selection(estimator="zeroth_order", num_probes=2, probe="mlp"), 3),
    "generating": Case(_selection(), 2, generate_after=1),
    "tied": Case(_selection(), 1, model={"tie_word_embeddings": True}),
    "tied_files": Case(_selection(), 1, model={"tie_word_embeddings": True}, from_files=True),
    "cluster_files": Case(_selection(**MEDOIDS), 1, from_files=True),
    "tail_files": Case(
        _selection(estimator="zeroth_order", num_probes=2),
        1,
        {"dtype": "bfloat16"},
        perturbation=1e-3,
        from_files=True,
    ),
    **{
        f"nf4{name}": Case(_selection(**options), **{"steps": 4, "from_files": True, "quantize": "nf4", **others})
        for name, options, others in (
            ("", {}, {}),
            ("_zeroth_order", {"estimator": "zeroth_order", "num_probes": 2}, {}),
            ("_broken", {}, {"break_after": 2}),
            ("_generating", {}, {"steps": 2, "generate_after": 1}),
            (
                "_forward_reused",
                {},
                {"steps": 2, "train": REUSED},
            ),
            ("_tail", {"estimator": "zeroth_order"}, {"steps": 1, "train": {"dtype": "bfloat16"}}),
        )
    },
    "tail": Case(_selection(estimator="zeroth_order", num_probes=2), 1, {"dtype": "bfloat16"}, perturbation=1e-3),
    "ranked_facility": Case(_selection(**MEDOIDS), 2),
    "ranked_matching": Case(_selection(ranking="matching"), 2),
    "ranked_systematic": Case(_selection(ranking="systematic", weights="unbiased"), 2),
    "ranked_pursuit": Case(_selection(ranking=f"{RANKINGS}:pursuit", weights="unbiased"), 2),
    "ranked_importance": Case(_selection(ranking=f"{RANKINGS}:importance", weights="unbiased"), 2),
    "ranked_top": Case(_selection(ranking=f"{RANKINGS}:top"), 2),
    "bfloat16": Case(_selection(), steps=5, train={"dtype": "bfloat16"}, floor=True),
    "float16": Case(_selection(), steps=5, train={"dtype": "float16"}, floor=True),
    "counted": Case(_selection(method="stratified"), 2, {"micro_batch_tokens": 32}, counted=True),
    "overflowing": Case(_selection(), 4, {"dtype": "float16"}, overflowing=(1, 3)),
    # Five examples are micro-batches of their own, too few for two ranks with three each.
    "poisoned": Case(_selection(candidates=24, budget=5, kept_sources=[]), 3, {"micro_batch_tokens": 1}, poisoned=True),
    "floored": Case(
        _selection(estimator="zeroth_order", reuse=3),
        4,
        {"activation_checkpointing": True, "forward_reuse": "device", "dtype": "float16"},
        floor=True,
        refresh_sources=2,
    ),
    # Every example is a micro-batch, and three are too few for four ranks.
    "starved": Case(_selection(**MEDOIDS, candidates=8, budget=3, kept_sources=[]), 1, {"micro_batch_tokens": 1}),
}
