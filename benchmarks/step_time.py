"""The product's step compared with its floors, interleaved in one process: step, bare floor, estimator floor.

python benchmarks/step_time.py                                          all models, one rank
python -m torch.distributed.run --nproc_per_node 2 benchmarks/step_time.py --models built-in
python benchmarks/step_time.py --models Phi-2 --cut 1 -- --train.dtype bfloat16         in full, on a GPU
python benchmarks/step_time.py -- --data.train FILE --train.packing off
python benchmarks/step_time.py --compile --models Phi-2 --arms last_layer stratified
python benchmarks/step_time.py --noise --models built-in --arms last_layer stratified --rounds 20

The bare floor is a forward of the sketched examples, then forward, backward and optimizer of the coreset, on the step's
own tokens; the estimator floor adds only the estimator's work to that forward. Published models have random weights and
are reduced: widths and vocabulary divided by --cut, --blocks blocks. Options after -- go to the product. Rows are
appended to benchmarks/results/step_time.jsonl; --label names a change. --compile compares steps with and without
--train.compile true, in turn; --noise measures the share of a step that the noise scale costs, on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import models
import rows
import runs
import torch
import transformers

from colm_scale.config import ModelConfig
from colm_scale.config import command_line as arguments
from colm_scale.distributed.connect import connect
from colm_scale.distributed.group import Group
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.modeling.load import load_tokenizer
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.run import assemble as assembly
from colm_scale.run.inputs import read_inputs
from colm_scale.run.prepare import resolve
from colm_scale.sketch import zeroth_order
from colm_scale.sketch.tap import Tap
from colm_scale.step import measure as measurement

BUILT_IN = "built-in"
CHECKPOINTED = ("--train.activation_checkpointing", "true", "--train.forward_reuse", "off")
ARMS = {
    "last_layer": (),
    "paper": ("--selection.preset", "paper"),
    "stratified": ("--selection.method", "stratified"),
    "full": ("--selection.method", "full"),
    "last_layer, checkpointed": CHECKPOINTED,
    "last_layer, forward reuse": ("--train.activation_checkpointing", "true", "--train.forward_reuse", "device"),
}
QUIET = ("--train.threads", "1", "--profile.display", "off", "--selection.candidates", "64", "--selection.budget", "32")
RATE = 1e-3
WARM_UP = 5
"""Steps in which code is compiled for new shapes."""


def prepare(options: list[str], group: Group) -> tuple:
    """A run's step, and the estimator's work on a micro-batch beyond a bare forward."""
    config = resolve(arguments.parse(options))
    inputs = read_inputs(config, group)
    module, weights, tap = assembly.build_model(config, loading_device(config, inputs.ds_config, group), group)
    engine = make_engine(config, inputs.ds_config, module, group, weights)
    spans = Spans(group.device, memory_meter(group), lambda _: None)
    step = assembly.build_step(config, inputs, engine, tap, spans, group)
    return step, branches(config, tap, group), module, runs.digest(config.data.train)


def branches(config, tap: Tap | None, group: Group) -> Callable | None:
    """The estimator's work on a micro-batch, including the forward."""
    selection = config.selection
    if tap is None or selection.estimator == "length":
        return None
    if selection.estimator == "last_layer":
        return tap.factors
    z = zeroth_order.probes(config.train.seed, selection.num_probes, tap.size, group.device)
    return lambda batch: zeroth_order.directional_derivatives(tap, batch, z, zeroth_order.PERTURBATION)


def measure(options: list[str], group: Group, rounds: int) -> dict[str, object]:
    """Medians and spreads of a step's seconds and of their ratios to both floors."""
    step, sketch, module, digest = prepare(options, group)
    found, phases, padding = defaultdict(list), defaultdict(list), defaultdict(list)
    tokens = imbalance = 0
    for number in range(1, rounds + 2):
        group.barrier()
        started = time.perf_counter()
        report, work = step(number, RATE)
        taken = time.perf_counter() - started
        bare = step.bare_floor_seconds(work)
        estimator = bare if sketch is None else step.bare_floor_seconds(work, sketch)
        if number == 1:  # warms up
            continue
        found["seconds"].append(taken)
        found["over_bare"].append(taken / bare)
        found["over_estimator"].append(taken / estimator)
        for values, of_step in ((phases, report.seconds), (padding, report.padding_share)):
            for name, value in of_step.items():
                values[name].append(value)
        tokens = int(report.candidates.lengths.sum())
        imbalance = max(imbalance, report.imbalance)
    return {
        "blocks": module.causal_model.config.num_hidden_layers,
        "parameters": module.causal_model.num_parameters(),
        "data": digest,
        "tokens_of_candidates": tokens,
        **{name: runs.quantiles(values) for name, values in found.items()},
        "phases": {name: runs.quantiles(values)["p50"] for name, values in phases.items()},
        "padding_share": {name: sum(values) / len(values) for name, values in padding.items()},
        "largest_imbalance": imbalance,
    }


def measure_compiled(options: list[str], group: Group, rounds: int) -> dict[str, object]:
    """Seconds of steps with compiled blocks relative to the same steps without, in turn."""
    torch._dynamo.reset()
    plain, _, module, digest = prepare(options, group)
    compiled, *_ = prepare([*options, "--train.compile", "true"], group)
    seconds, ratios, differ, first = [], [], 0.0, 0.0
    for number in range(1, rounds + WARM_UP + 1):
        taken, losses = [], []
        for step in (plain, compiled):
            started = time.perf_counter()
            losses.append(step(number, RATE)[0].loss)
            taken.append(time.perf_counter() - started)
        differ = max(differ, abs(losses[0] - losses[1]) / abs(losses[0]))
        if number <= WARM_UP:
            first += taken[1]
            continue
        seconds.append(taken[0])
        ratios.append(taken[1] / taken[0])
    return {
        "blocks": module.causal_model.config.num_hidden_layers,
        "parameters": module.causal_model.num_parameters(),
        "data": digest,
        "seconds": runs.quantiles(seconds),
        "compiled_over_plain": runs.quantiles(ratios),
        "warm_up_steps": WARM_UP,
        "warm_up_seconds": first,
        "largest_relative_loss_difference": differ,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def measure_noise(options: list[str], group: Group, rounds: int) -> dict[str, object]:
    """CPU seconds of a step, and the share of them that reads the gradients' noise."""
    step, _, module, digest = prepare(options, group)
    meter, spent = step.train.noise, [0.0]

    def timed(function: Callable) -> Callable:
        def call(*args, **keywords):
            started = time.process_time()
            found = function(*args, **keywords)
            spent[0] += time.process_time() - started
            return found

        return call

    for name in ("begin", "_keep", "joined", "gathered"):
        setattr(meter, name, timed(getattr(meter, name)))
    seconds, shares = [], []
    with mock.patch.object(measurement, "gradient_noise", timed(measurement.gradient_noise)):
        for number in range(1, rounds + 2):
            spent[0], started = 0.0, time.process_time()
            step(number, RATE)
            seconds.append(time.process_time() - started)
            shares.append(spent[0] / seconds[-1])
    return {
        "blocks": module.causal_model.config.num_hidden_layers,
        "parameters": module.causal_model.num_parameters(),
        "data": digest,
        "seconds": runs.quantiles(seconds[1:]),  # the first warms up
        "noise_over_step": runs.quantiles(shares[1:]),
    }


def noise_table() -> str:
    """Cost of measuring the noise of the gradient."""
    lines = ["| model | arm | CPU s per step | of it for the noise (p20 to p80) |", "|---|---|---:|---:|"]
    found = {(row["model"], row["arm"]): row for row in rows.read("step_time") if "noise_over_step" in row}
    for row in found.values():
        name = row["model"] if row["cut"] == 1 else f"{row['model']} / {row['cut']}"
        share = row["noise_over_step"]
        lines.append(
            f"| {name}, {row['blocks']} blocks | {row['arm']} | {row['seconds']['p50']:.2f} | {share['p50']:.2%} "
            f"({share['p20']:.2%} to {share['p80']:.2%}) |"
        )
    return "\n".join(lines)


def compiled_table() -> str:
    """Effect of compiling the blocks."""
    lines = [
        "| model | arm | micro-batches | s per step | compiled / plain (p20 to p80) | warm-up, s | graphs | breaks |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    found = {(row["model"], row["arm"], str(row["options"])): row for row in rows.read("step_time") if "graphs" in row}
    for row in found.values():
        name = row["model"] if row["cut"] == 1 else f"{row['model']} / {row['cut']}"
        lines.append(
            f"| {name}, {row['blocks']} blocks | {row['arm']} | {'padded' if 'off' in row['options'] else 'packed'} | "
            f"{row['seconds']['p50']:.2f} | {_ratio(row['compiled_over_plain'])} | {row['warm_up_seconds']:.0f} | "
            f"{row['graphs']} | {row['graph_breaks']} |"
        )
    return "\n".join(lines)


def last_rows() -> list[dict]:
    """The last measurement of each."""
    found = {}
    for row in rows.read("step_time"):
        if "over_bare" not in row:
            continue
        found[row["model"], row["ranks"], row["label"], "--ds_config" in row["options"], row["arm"]] = row
    return list(found.values())


def table() -> str:
    """One row per model, ranks and arm."""
    lines = [
        "| model | ranks | arm | s per step | step / bare floor (p20 to p80) | step / estimator floor |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in last_rows():
        if row["label"]:
            continue
        name = row["model"] if row["cut"] == 1 else f"{row['model']} / {row['cut']}"
        ranks = f"{row['ranks']}, ZeRO-2" if "--ds_config" in row["options"] else row["ranks"]
        lines.append(
            f"| {name}, {row['blocks']} blocks, {row['parameters'] / 1e6:.0f} M | {ranks} | {row['arm']} | "
            f"{row['seconds']['p50']:.2f} | {_ratio(row['over_bare'])} | {_ratio(row['over_estimator'])} |"
        )
    return "\n".join(lines)


def changes() -> str:
    """Phases of the built-in base on one rank, with and without optional parts."""
    phases = ("sample", "sketch", "gather", "select", "learn", "route", "train", "optimizer", "report", "step")
    lines = [
        f"| arm | micro-batches | padding: sketch, train | {' | '.join(phases)} |",
        "|---|---|---:|" + "---:|" * len(phases),
    ]
    for row in last_rows():
        if row["model"] != BUILT_IN or row["ranks"] > 1:
            continue
        padding = ", ".join(f"{row['padding_share'].get(phase, 0):.1%}" for phase in ("sketch", "train"))
        cells = " | ".join(f"{1000 * row['phases'].get(phase, 0):.0f}" for phase in phases)
        lines.append(f"| {row['arm']} | {row['label'] or 'packed'} | {padding} | {cells} |")
    return "\n".join(lines)


def _ratio(of: dict[str, float]) -> str:
    return f"{of['p50']:.2f} ({of['p20']:.2f} to {of['p80']:.2f})"


TABLES = {"step time": table, "phases": changes, "compiled": compiled_table, "noise cost": noise_table}


@contextmanager
def named(name: str, cut: int, blocks: int) -> Iterator[tuple[str, ...]]:
    """Options of a model; each rank writes a published one to a temporary folder of its own."""
    if name == BUILT_IN:
        yield ()
        return
    config = models.CONFIGS[name] if cut == 1 else models.cut_down(models.CONFIGS[name], cut, blocks)
    with tempfile.TemporaryDirectory() as folder:
        models.write(config, Path(folder), load_tokenizer(ModelConfig()))
        yield "--model.name", folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(BUILT_IN, *models.CONFIGS), default=[BUILT_IN, *models.CONFIGS])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cut", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compare compiled and plain blocks")
    parser.add_argument("--noise", action="store_true", help="measure the cost of the noise scale")
    parser.add_argument("--label", default="", help="name of a change, for comparisons between rows")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    group = connect()
    for name in given.models:
        with named(name, given.cut, given.blocks) as model:
            for arm in given.arms:
                measured = measure_compiled if given.compile else measure_noise if given.noise else measure
                found = measured([*QUIET, *model, *ARMS[arm], *options], group, given.rounds)
                if not group.is_first:
                    continue
                row = {"benchmark": "step_time", "model": name, "cut": given.cut if model else 1, "arm": arm}
                row |= {"ranks": group.world_size, "rounds": given.rounds, "label": given.label, "options": options}
                rows.append("step_time", row | found | {"environment": rows.here()})
                ratios = " ".join(f"{key} {value['p50']:.3f}" for key, value in found.items() if "over" in key)
                print(f"{name:20} {arm:28} {found['seconds']['p50']:.3f} s, {ratios}", flush=True)
    group.barrier()
    os._exit(0)  # like the product: gloo's threads may wait for a rank that has exited


if __name__ == "__main__":
    main()
