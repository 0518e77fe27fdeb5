"""Peak memory compared with batches 4 times as large: predicted without a GPU, and measured.

python benchmarks/memory.py predict                     published models in full, all engines, all arms
python benchmarks/memory.py measure                     the built-in base on the CPU: live bytes of tensors
python benchmarks/memory.py measure --gpu -- --model.name FOLDER --train.dtype bfloat16   allocator and device

CoLM trains on b of n examples; the other arms train on b, n and 2n = 4b, all on --ranks ranks. Without accumulation, a
rank trains on its share in one micro-batch (CoLM sketches in micro-batches of that size); with it, in micro-batches of
--micro_batch tokens. Rows are appended to benchmarks/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product

import models
import rows
import torch
import transformers

from colm_scale.config import command_line as arguments
from colm_scale.config.commands import PlanConfig
from colm_scale.distributed.connect import connect
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.modeling.load import check_model
from colm_scale.plan.fake import FakeModel, fake_model, tried
from colm_scale.plan.memory import Batches, peaks
from colm_scale.plan.plan import arranged
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.run import assemble as assembly
from colm_scale.run.inputs import read_inputs
from colm_scale.run.prepare import resolve

BUDGET, CANDIDATES = 64, 128
ARMS = {
    "CoLM, b of n": ("colm", CANDIDATES, BUDGET),
    "b": ("full", BUDGET, BUDGET),
    "n": ("full", CANDIDATES, CANDIDATES),
    "2n (4x)": ("full", 2 * CANDIDATES, 2 * CANDIDATES),
}
ENGINES = {
    "DDP": (),
    "ZeRO-2": ("--ds_config", str(rows.ROOT / "ds_configs" / "zero2.json")),
    "ZeRO-3": ("--ds_config", str(rows.ROOT / "ds_configs" / "zero3.json")),
    "FSDP2": ("--engine", "fsdp"),
}
_SAID = 6000
"""Characters to show of what a case that failed has said."""
_ROOM = 1.3
"""Most tokens of a coreset, relative to those of as many average examples."""


def options_of(arm: str) -> list[str]:
    """Options of the product for an arm."""
    method, candidates, budget = ARMS[arm]
    found = ["--selection.method", method, "--selection.candidates", str(candidates)]
    return found if method == "full" else [*found, "--selection.budget", str(budget)]


def predict(names: Sequence[str], ranks: int, tokens: int, accumulated: int, options: list[str]) -> None:
    """Append a row for every model, engine and arm, with and without accumulation and checkpointing."""
    for name in names:
        of = models.CONFIGS[name]
        base = ["--train.dtype", "bfloat16", "--profile.display", "off", *options]
        known = tried(arguments.parse(base), of)
        for checkpointing in (False, True):
            fake = None
            for engine, arm, micro in product(ENGINES, ARMS, (0, accumulated)):
                budget = micro or share_tokens(arm, ranks, tokens)
                given = [*base, *ENGINES[engine], *options_of(arm), "--train.micro_batch_tokens", str(budget)]
                given += ["--train.activation_checkpointing", str(checkpointing).lower()]
                config = resolve(arguments.parse(given))
                if fake is None or engine == "FSDP2":  # shards its argument in place
                    fake = fake_model(arguments.parse([*given, "--selection.method", "colm"]), of, known)
                found = predicted(config, fake, ranks, tokens)
                row = {"benchmark": "memory", "kind": "predicted", "model": name, "engine": engine, "arm": arm}
                row |= {"ranks": ranks, "tokens": tokens, "checkpointing": checkpointing}
                row |= {"accumulated": bool(micro), "micro_batch_tokens": budget, **found}
                rows.append("memory", row | {"environment": rows.here()})
                print(name, engine, arm, checkpointing, bool(micro), f"{found['peak'] / 2**30:.2f} GiB", flush=True)


def share_tokens(arm: str, ranks: int, tokens: int) -> int:
    """Tokens of a rank's share: the micro-batch without accumulation."""
    method, candidates, budget = ARMS[arm]
    return (budget if method == "colm" else candidates) // ranks * tokens


def predicted(config, fake: FakeModel, ranks: int, tokens: int) -> dict[str, object]:
    """Peak bytes by phase, and bytes of the weights among them."""
    ds_config = read_ds_config(config, ranks)
    batches = arranged(config, PlanConfig(world_size=ranks, tokens=tokens), packed=fake.module.packs)
    found = peaks(config, ds_config, fake, ranks, batches)
    return {"phases": found.phases, "peak": found.step, "weights": found.engine.weights}


class LiveMeter:
    """Meter of the live bytes of tensors (`colm_scale.profiling.memory`)."""

    primary, label, device_name = "live", "live bytes of tensors", "cpu"

    def __init__(self, live: LiveBytes):
        self._live = live

    def start(self) -> None:
        self._live.restart()

    def stop(self) -> dict[str, int]:
        return {"live": self._live.peak}


def measure(cases: Sequence[tuple[str, str, bool, bool]], ranks: int, gpu: bool, options: list[str]) -> None:
    """Start the ranks of each case, which measure and predict; a case that fails, for want of memory say, says so."""
    for case in cases:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), __file__, "rank"]
        engine, arm, checkpointing, accumulated = case
        command += ["--engine", engine, "--arm", arm, *(["--gpu"] if gpu else [])]
        command += [*(["--checkpointing"] if checkpointing else []), *(["--accumulated"] if accumulated else [])]
        done = subprocess.run([*command, "--", *options], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{case} failed:\n{done.stderr[-_SAID:]}", flush=True)


def measure_here(engine: str, arm: str, checkpointing: bool, accumulated: bool, gpu: bool, options: list[str]) -> None:
    """Measure on this rank; the first rank appends the row."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    budget = 512 if accumulated else 10**6
    given = [*ENGINES[engine], *options_of(arm), "--train.micro_batch_tokens", str(budget), *options]
    given += ["--train.activation_checkpointing", str(checkpointing).lower(), "--profile.display", "off"]
    config = resolve(arguments.parse(given))
    group = connect()
    inputs = read_inputs(config, group)
    examples = inputs.sampler.examples
    if not accumulated and arm.startswith("CoLM"):  # about the tokens of the longest half
        most = int(_ROOM * float(examples.lengths.double().mean()) * BUDGET / ranks)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_tokens=most))
    held = (getattr(examples, field.name) for field in dataclasses.fields(examples))
    live = LiveBytes(outside=[value for value in held if isinstance(value, torch.Tensor)])
    with live:
        module, weights, tap = assembly.build_model(config, loading_device(config, inputs.ds_config, group), group)
        live.count([*module.parameters(), *module.buffers()])
        made = make_engine(config, inputs.ds_config, module, group, weights)
        meter = memory_meter(group) if gpu else LiveMeter(live)
        spans = Spans(group.device, meter, lambda _: None)
        step = assembly.build_step(config, inputs, made, tap, spans, group)
        for number in (1, 2):  # the first step allocates the optimizer's averages
            gc.collect()
            report, work = step(number, 1e-3)
    if not group.is_first:
        os._exit(0)
    own = {
        kind: {phase: found[phase][0] for phase in ("sketch", "train", "optimizer") if phase in found}
        for kind, found in report.phase_peak_bytes.items()
    }
    sketched = [batch.lengths for batch in work.sketched]
    trained = [micro.batch.lengths for micro in work.trained]
    share = float(examples.labelled.double().mean())
    del step, made, module, tap, work
    group.close()
    of = check_model(config.model)
    fake = fake_model(config, of, tried(config, of))
    guess = peaks(config, inputs.ds_config, fake, ranks, Batches(sketched, trained), share)
    row = {"benchmark": "memory", "kind": "measured", "model": config.model.name or "built-in base", "engine": engine}
    row |= {"arm": arm, "ranks": ranks, "checkpointing": checkpointing, "accumulated": accumulated}
    row |= {"measured": own, "phases": guess.phases, "peak": guess.step, "weights": guess.engine.weights}
    rows.append("memory", row | {"environment": rows.here()})
    kind = "allocator" if gpu else "live"
    peak = max(own[kind].values())
    case = f"{engine} {arm} checkpointing {checkpointing} accumulated {accumulated}"
    print(f"{case}: {guess.step / peak:.3f} of measured")
    sys.stdout.flush()
    os._exit(0)


def predicted_table() -> str:
    """Peaks of every model and engine without accumulation, and CoLM's relative to b and 2n."""
    lines = [
        "| model | engine | checkpointing | weights | CoLM | b | n | 2n (4x) | CoLM / 4x | CoLM / b | accumulated |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found: dict[tuple, dict[tuple, dict]] = {}
    for row in rows.read("memory"):
        if row["kind"] == "predicted":
            case = found.setdefault((row["model"], row["engine"], row["checkpointing"]), {})
            case[row["arm"], row["accumulated"]] = row
    for (model, engine, checkpointing), case in found.items():
        if len(case) < 2 * len(ARMS):
            continue
        peaks_of = [case[arm, False]["peak"] / 2**30 for arm in ARMS]
        colm, b, _, most = peaks_of
        accumulated = [case[arm, True]["peak"] / 2**30 for arm in ARMS]
        weights = case["b", False]["weights"] / 2**30
        cells = " | ".join(f"{peak:.1f}" for peak in peaks_of)
        ratios = f"{colm / most:.2f} | {colm / b:.2f} | {min(accumulated):.1f} to {max(accumulated):.1f}"
        name = f"{model} | {engine} | {'yes' if checkpointing else 'no'}"
        lines.append(f"| {name} | {weights:.1f} | {cells} | {ratios} |")
    return "\n".join(lines)


def measured_table() -> str:
    """Measured peaks, and predicted over measured; the last measurement of each."""
    lines = [
        "| engine | arm | checkpointing, accumulated | sketch, MB | training, MB | predicted: sketch | training |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    found = {
        (row["engine"], row["arm"], row["checkpointing"], row["accumulated"]): row
        for row in rows.read("memory")
        if row["kind"] == "measured"
    }
    for (engine, arm, checkpointing, _), row in found.items():
        own = row["measured"].get("allocator", row["measured"].get("live"))
        sketch, train = (own.get(phase) for phase in ("sketch", "train"))
        cells = [f"{peak / 1e6:.1f}" if peak else "-" for peak in (sketch, train)]
        cells += [f"{row['phases'][name] / own[name]:.3f}" if name in own else "-" for name in ("sketch", "train")]
        lines.append(f"| {engine} | {arm} | {'yes' if checkpointing else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"memory predicted": predicted_table, "memory measured": measured_table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "measure", "rank"))
    parser.add_argument("--models", nargs="+", choices=models.CONFIGS, default=list(models.CONFIGS))
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--tokens", type=int, default=200, help="tokens per example")
    parser.add_argument("--micro_batch", type=int, default=1024, help="tokens of a micro-batch with accumulation")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--gpu", action="store_true", help="peaks of the allocator and the device, not live bytes")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--accumulated", action="store_true")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    if given.what == "predict":
        predict(given.models, given.ranks or 4, given.tokens, given.micro_batch, options)
    elif given.what == "measure":
        engines = [given.engine] if given.engine else list(ENGINES)
        # Without, and with each way to save memory.
        cases = [(engine, arm, less, less) for engine in engines for less in (False, True) for arm in ARMS]
        measure(cases, given.ranks or 2, given.gpu, options)
    else:
        measure_here(given.engine, given.arm, given.checkpointing, given.accumulated, given.gpu, options)


if __name__ == "__main__":
    main()
