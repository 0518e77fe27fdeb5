"""Cost of each estimator relative to a bare forward of the same micro-batches, in one process.

python benchmarks/estimator_cost.py                          the built-in base, and 24 random blocks, twice as wide
python benchmarks/estimator_cost.py --model NAME_OR_FOLDER   another model

Uses float32 on the CPU. In each round, a bare forward and then all estimators process the same candidates of the
built-in mixture, so that other load on the machine affects all alike. Rows are appended to
benchmarks/results/estimator_cost.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import rows
import torch
from arms import LOSS, REMOVED
from runs import quantiles
from transformers import LlamaConfig, LlamaForCausalLM

from colm_scale.config import LoraConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.data.batching import collate
from colm_scale.distributed.group import Group
from colm_scale.estimators.make import make_estimator
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import load_model
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.randomness import global_draws
from colm_scale.records import Batch, Candidates, Quota, Selection, long_tensor
from colm_scale.run.inputs import Inputs, read_inputs
from colm_scale.sketch.plan import plan_sketch
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)
CANDIDATES = 32
MICRO_BATCH_TOKENS = 1024
BLOCKS, WIDTH = 24, 256
CUT_DOWN = f"{BLOCKS} random blocks"
ARMS: dict[str, dict | None] = {
    "`zeroth_order`, K = 1": {"estimator": "zeroth_order"},
    "`zeroth_order`, K = 16": {"estimator": "zeroth_order", "num_probes": 16},
    "`zeroth_order`, K = 1, exact": REMOVED,
    "`last_layer`, columns": {"compression": "columns"},
    "`last_layer`, countsketch": {"compression": "countsketch"},
    "`last_layer`, kronecker": REMOVED,
    "`last_layer`, 2 blocks": REMOVED,
    "`loss`": {"estimator": LOSS},
    "`length`": {"estimator": "length"},
}


def cut_down(vocabulary: int) -> LlamaForCausalLM:
    """An untrained narrow Llama with as many blocks as models with a billion parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    with global_draws(CPU, 0, "estimator cost"):
        return LlamaForCausalLM(config).requires_grad_(False)


def make_tap(base: torch.nn.Module) -> Tap:
    """Add adapters to a base model and tap its V probe."""
    probe = find_probe(base)
    return Tap(ExampleLoss(add_adapters(base, LoraConfig(), seed=0)), probe)


def sketching(tap: Tap, options: dict, candidates: Candidates, inputs: Inputs) -> Callable[[], None]:
    """An estimator's work in one step: sketch and exchange of all candidates, half of each source to be picked."""
    estimator = make_estimator(tap, SelectionConfig(**options), TrainConfig(), GROUP)
    counts = torch.bincount(candidates.sources, minlength=len(inputs.sizes))
    quota = Quota(long_tensor([]), (counts + 1) // 2)
    plan = plan_sketch(candidates, quota, 1, MICRO_BATCH_TOKENS, estimator.known(candidates))
    batches = batches_of(plan.shares[0], candidates, inputs)
    selection = Selection(plan.positions, torch.ones(len(plan.positions)))

    def sketch() -> None:
        estimator.sketch(plan, batches)
        estimator.gather()
        estimator.learn(selection)

    return sketch


def batches_of(share: tuple[tuple[int, ...], ...], candidates: Candidates, inputs: Inputs) -> list[Batch]:
    """The micro-batches of a plan."""
    examples, pad = inputs.sampler.examples, inputs.tokenizer.pad_token_id
    return [collate(examples, candidates.indices[list(p)], long_tensor(p), pad, CPU) for p in share]


def measure(name: str, base: torch.nn.Module, inputs: Inputs, rounds: int) -> list[dict]:
    """Measure every estimator; one row each."""
    candidates, tap = inputs.sampler(1), make_tap(base)
    work = {arm: sketching(tap, of, candidates, inputs) for arm, of in ARMS.items() if of is not REMOVED}
    plan = plan_sketch(candidates, Quota(long_tensor([]), torch.ones_like(inputs.sizes)), 1, MICRO_BATCH_TOKENS)
    bare = batches_of(plan.shares[0], candidates, inputs)
    work = {"bare": lambda: [tap.bare_losses(batch) for batch in bare], **work}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in work}
    for run in range(rounds + 1):
        for arm, once in work.items():
            started, computed = time.perf_counter(), time.process_time()
            once()
            if run:  # the first call also allocates
                seconds[arm].append((time.perf_counter() - started, time.process_time() - computed))
    bare_seconds = torch.tensor(seconds["bare"], dtype=torch.float64)
    facts = {
        "benchmark": "estimator_cost",
        "model": name,
        "blocks": base.config.get_text_config().num_hidden_layers,
        "parameters": sum(p.numel() for p in base.parameters() if not p.requires_grad),
        "candidates": len(candidates),
        "tokens": int(candidates.lengths.sum()),
        "micro_batches": len(bare),
        "rounds": rounds,
        "bare_cpu_seconds": float(bare_seconds[:, 1].median()),
    }
    found = []
    for arm in filter(work.__contains__, ARMS):
        ratios = torch.tensor(seconds[arm], dtype=torch.float64) / bare_seconds
        elapsed, cpu = map(quantiles, ratios.T.tolist())
        found.append(facts | {"estimator": arm, "ratio": elapsed, "cpu_ratio": cpu})
    return found


def table() -> str:
    """One row per estimator, one column per model; the last measurement of each."""
    last = {(row["model"], row["estimator"]): row for row in rows.read("estimator_cost")}
    models = {model: row for (model, _), row in last.items()}
    headings = [f"{model}: {row['blocks']} blocks, {row['parameters'] / 1e6:,.1f} M" for model, row in models.items()]
    lines = [f"| estimator | {' | '.join(headings)} |", "|---|" + "---:|" * len(models)]
    for arm in ARMS:
        cells = [cell(last[model, arm]["cpu_ratio"]) if (model, arm) in last else "-" for model in models]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(ratio: dict[str, float]) -> str:
    """Median and spread."""
    return f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


TABLES = {"estimator cost": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder, instead of the two")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = RunConfig(model=ModelConfig(name=given.model), selection=SelectionConfig(candidates=CANDIDATES, budget=16))
    inputs = read_inputs(config, GROUP)
    models = {Path(given.model).name if given.model else "built-in base": load_model(config.model, torch.float32, CPU)}
    if not given.model:
        models[CUT_DOWN] = cut_down(len(inputs.tokenizer))
    for name, base in models.items():
        for row in measure(name, base, inputs, given.rounds):
            rows.append("estimator_cost", row | {"environment": rows.here()})
            print(row, flush=True)


if __name__ == "__main__":
    main()
