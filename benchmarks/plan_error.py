"""The plan as an estimator: planned and measured peaks of random configurations, judged as in xMem (arXiv 2510.21048).

python benchmarks/plan_error.py               the configurations that have no row yet
python benchmarks/plan_error.py --again       plan them again from the micro-batches of their rows, and measure nothing

Draws family, engine, activation checkpointing and forward reuse, micro-batch, method and estimator, dtype and sizes
from seeds. Each configuration runs on the CPU; the live bytes of all tensors on the first rank in the last step are
compared with the plan for that rank's micro-batches. Rows are appended to benchmarks/results/plan_error.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import memory
import models
import rows
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from colm_scale.base import BASE_MODEL
from colm_scale.config import command_line as arguments
from colm_scale.distributed.connect import connect
from colm_scale.engines.choose import loading_device, make_engine
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.plan.fake import fake_model, tried
from colm_scale.plan.memory import Batches, peaks
from colm_scale.profiling.live_tensors import LiveBytes
from colm_scale.profiling.spans import Spans
from colm_scale.run import assemble as assembly
from colm_scale.run.inputs import read_inputs
from colm_scale.run.prepare import resolve

CONFIGURATIONS = range(40, 80)
"""Others than the first 40, on which the formulas for ZeRO, experts and forward reuse were tuned."""
STEPS = 2
"""The first allocates the optimizer's averages."""
LIMIT_SECONDS = 300
_GROUPED = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "stablelm", "qwen3_moe")
_OWN_OPTIONS: dict[str, dict] = {
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 128},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 128, "layer_types": None},
    "phi3": {"original_max_position_embeddings": 1024},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"dropout": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
FAMILIES = (*_GROUPED, "opt", "gpt_neox", "phi")
ENGINES = {"single": 1, "DDP": 2, "FSDP2": 2, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 2}


def drawn(number: int) -> dict[str, object]:
    """Draw a configuration: names and numbers that determine it."""
    draw = random.Random(f"plan_error {number}").choice
    case: dict[str, object] = {"family": draw(FAMILIES), "engine": draw(tuple(ENGINES))}
    case |= {"hidden": draw((128, 192, 256, 320)), "blocks": draw((4, 6, 8, 10))}
    case |= {"vocabulary": draw((2048, 4096, 8192))}
    case |= {"dtype": draw(("float32", "float32", "bfloat16")), "rank": draw((4, 16, 32))}
    case |= {"candidates": draw((8, 16, 32)), "micro_batch_tokens": draw((256, 512, 1024, 2048))}
    case |= {"checkpointing": draw(("no", "yes", "reuse", "reuse")), "packing": draw(("auto", "auto", "off"))}
    case["method"] = draw(("last_layer", "last_layer", "zeroth_order", "zeroth_order, 4 probes", "stratified", "full"))
    return case


def config_of(case: dict) -> PretrainedConfig:
    """The model's configuration."""
    hidden, heads, family = case["hidden"], case["hidden"] // 32, case["family"]
    width = {"opt": "ffn_dim", "qwen3_moe": "moe_intermediate_size"}.get(family, "intermediate_size")
    options = {"hidden_size": hidden, "num_hidden_layers": case["blocks"], "vocab_size": case["vocabulary"]}
    options |= {"num_attention_heads": heads, width: 3 * hidden, "max_position_embeddings": 1024, "pad_token_id": 0}
    if family in _GROUPED:
        options |= {"num_key_value_heads": heads // 2, "head_dim": 32}
    options |= {"word_embed_proj_dim": hidden} if family == "opt" else {}
    return AutoConfig.for_model(family, **(options | _OWN_OPTIONS.get(family, {})))


def options_of(case: dict, folder: Path) -> list[str]:
    """Options of the product."""
    n, (estimator, *probes) = case["candidates"], case["method"].split(", ")
    found = ["--model.name", str(folder), "--train.dtype", case["dtype"], "--lora.rank", str(case["rank"])]
    found += ["--selection.candidates", str(n), "--train.micro_batch_tokens", str(case["micro_batch_tokens"])]
    found += ["--train.packing", case["packing"], "--profile.display", "off", "--data.max_length", "256"]
    found += ["--train.activation_checkpointing", str(case["checkpointing"] != "no").lower()]
    found += ["--train.forward_reuse", "off"] if case["checkpointing"] == "yes" else []
    if estimator in ("stratified", "full"):
        found += ["--selection.method", estimator]
    else:
        found += ["--selection.estimator", estimator, *(["--selection.num_probes", "4"] if probes else [])]
    found += ["--selection.budget", str(n // 2)]
    if case["engine"].startswith("ZeRO"):
        stage = case["engine"][-1]
        made = json.loads((rows.ROOT / "ds_configs" / f"zero{stage}.json").read_text("utf-8"))
        # Buckets for small models, or they would be most of every peak.
        sizes = {name: 200_000 for name in made["zero_optimization"] if name.endswith("bucket_size")}
        made["zero_optimization"] |= sizes
        (folder / "ds_config.json").write_text(json.dumps(made), "utf-8")
        found += ["--ds_config", str(folder / "ds_config.json")]
    return found + (["--engine", "fsdp"] if case["engine"] == "FSDP2" else [])


def measured(options: list[str], send: Callable[[dict], None]) -> None:
    """Run on this rank; the first rank sends its peaks by phase and the lengths in its micro-batches."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    config = resolve(arguments.parse(options))
    group = connect()
    inputs = read_inputs(config, group)
    examples = inputs.sampler.examples
    held = (getattr(examples, field.name) for field in dataclasses.fields(examples))
    live = LiveBytes(outside=[value for value in held if isinstance(value, torch.Tensor)])
    with live:
        module, weights, tap = assembly.build_model(config, loading_device(config, inputs.ds_config, group), group)
        live.count([*module.parameters(), *module.buffers()])
        made = make_engine(config, inputs.ds_config, module, group, weights)
        gc.collect()
        spans = Spans(group.device, memory.LiveMeter(live), lambda _: None)
        step = assembly.build_step(config, inputs, made, tap, spans, group)
        for number in range(1, STEPS + 1):
            gc.collect()
            report, work = step(number, 1e-3)
    if group.is_first:
        found = {phase: peak[0] for phase, peak in report.phase_peak_bytes["live"].items()}
        trained = [micro.batch for micro in work.trained]
        of_batches = {"sketched": [list(batch.lengths) for batch in work.sketched]}
        of_batches |= {"trained": [list(batch.lengths) for batch in trained]}
        widest = max(work.sketched or trained, key=lambda batch: sum(batch.lengths))
        share = len(widest.targets.tokens) / sum(widest.lengths)
        send({"measured": {phase: found[phase] for phase in found if phase != "step"}, **of_batches, "share": share})
    group.close()


def planned(options: list[str], of: PretrainedConfig, ranks: int, row: dict) -> dict[str, int]:
    """Plan the peaks of a measured step by phase."""
    config = resolve(arguments.parse(options))
    batches = Batches(row["sketched"], row["trained"])
    ds_config = read_ds_config(config, ranks)
    return peaks(config, ds_config, fake_model(config, of, tried(config, of)), ranks, batches, row["share"]).phases


def run(case: dict, known: dict | None) -> dict:
    """Measure a configuration in forked ranks, unless ``known`` has that, and plan it in another process."""
    ranks, of = ENGINES[case["engine"]], config_of(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = options_of(case, folder)
        row = known or {}
        if not known:
            models.write(of, folder, AutoTokenizer.from_pretrained(BASE_MODEL))
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            row = _of_processes([lambda send, r=r: _on_rank(r, ranks, port, options, send) for r in range(ranks)])
        else:
            of.save_pretrained(folder)
        row["planned"] = _of_processes([lambda send: send(planned(options, of, ranks, row))])
    return row


def _on_rank(rank: int, ranks: int, port: int, options: list[str], send: Callable[[dict], None]) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    measured(options, send)


def _of_processes(works: list[Callable[[Callable[[dict], None]], None]]) -> dict:
    """Fork a process for each; return the one result."""
    forks = multiprocessing.get_context("fork")
    results = forks.Queue()
    processes = [forks.Process(target=_quietly, args=(work, results.put), daemon=True) for work in works]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT_SECONDS
    try:
        while time.monotonic() < end:
            if not results.empty():
                return results.get()
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.1)
        raise RuntimeError("failed, or took too long; its output is above")
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _quietly(work: Callable[[Callable[[dict], None]], None], send: Callable[[dict], None]) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # DeepSpeed's lines
    work(send)


def by_number() -> dict[int, dict]:
    """The last row of each configuration."""
    return {row["number"]: row for row in rows.read("plan_error")}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--numbers", nargs="+", type=int, default=CONFIGURATIONS)
    given = parser.parse_args()
    known = by_number()
    for number in given.numbers:
        case = drawn(number)
        before = known.get(number)
        if (before is None) == given.again:
            continue
        parts = ("measured", "sketched", "trained", "share")
        try:
            found = run(case, {part: before[part] for part in parts} if before else None)
        except RuntimeError as error:
            print(number, case, error, flush=True)
            continue
        row = {"benchmark": "plan_error", "number": number, "case": case, **found, "environment": rows.here()}
        rows.append("plan_error", row)
        print(number, f"{error_of(row):+.3f}", by_phase(row), *case.values(), flush=True)


def error_of(row: dict) -> float:
    """Planned over measured peak of the step, minus one."""
    own = {phase: peak for phase, peak in row["measured"].items() if phase in row["planned"]}
    return max(row["planned"].values()) / max(own.values()) - 1


def by_phase(row: dict) -> str:
    """Planned over measured peak of each phase."""
    both = [phase for phase in row["planned"] if phase in row["measured"]]
    return ", ".join(f"{phase} {row['planned'][phase] / row['measured'][phase]:.3f}" for phase in both)


def table() -> str:
    """Errors of all configurations, and of those of each engine."""
    lines = [
        "| engine | configurations | measured peaks, MB | median error | worst | out of memory if trusted | unused |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    every = list(by_number().values())
    groups = {"all": every}
    for engine in ENGINES:
        groups[engine] = [row for row in every if row["case"]["engine"] == engine]
    for engine, of in groups.items():
        if not of:
            continue
        errors = [error_of(row) for row in of]
        peak = [max(row["measured"].values()) / 1e6 for row in of]
        worst = max(errors, key=abs)
        out = sum(error < 0 for error in errors) / len(errors)
        beyond = sum(error < -0.05 for error in errors) / len(errors)
        unused = [max(0.0, error) for error in errors]
        cells = [f"{min(peak):.0f} to {max(peak):.0f}", f"{median(map(abs, errors)):.1%}", f"{worst:+.1%}"]
        cells += [f"{out:.0%} ({beyond:.0%} beyond 5 %)", f"{sum(unused) / len(unused):.1%}"]
        lines.append(f"| {engine} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"plan error": table}


if __name__ == "__main__":
    main()
    sys.stdout.flush()
