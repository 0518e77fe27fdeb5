"""Scaling of a step: with ranks at fixed total work and at fixed work per rank, and with the candidates.

python benchmarks/scaling.py ranks          1, 2 and 4 ranks on this machine
python benchmarks/scaling.py candidates     64 to 4,096 candidates on one rank, half of them selected
python benchmarks/scaling.py balance -- --data.train FILE       tokens of the busiest of 2, 4 and 8 ranks, simulated
python benchmarks/scaling.py plots          docs/plots/scaling-*.svg from the rows

Uses the built-in base and mixture, and DDP. `scale.py` simulates everything but the model on up to 1,024 ranks. Rows
are appended to benchmarks/results/scaling.jsonl; options after -- go to the product.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict

import rows
import runs
import step_time
import torch
import transformers

from colm_scale.config import command_line as arguments
from colm_scale.distributed.connect import connect
from colm_scale.randomness import generator
from colm_scale.run.inputs import read_inputs
from colm_scale.run.prepare import resolve
from colm_scale.selection.route import deal, form_micro_batches, route

RANKS = (1, 2, 4)
CANDIDATES = (64, 256, 1024, 4096)
FIXED = 64
MICRO_BATCH = 4096
MODEL_PHASES = ("sketch", "train")


def measure(kind: str, candidates: int, rounds: int, options: list[str]) -> None:
    """Time steps on this rank; the first rank appends the row."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    group = connect()
    arguments = ["--selection.candidates", str(candidates), "--selection.budget", str(candidates // 2), *options]
    step, *_ = step_time.prepare([*step_time.QUIET, *arguments], group)
    phases, tokens, imbalance = defaultdict(list), [], []
    for number in range(1, rounds + 2):
        report, _ = step(number, 1e-3)
        if number == 1:
            continue
        tokens.append(int(report.candidates.lengths.sum()))
        imbalance.append(report.imbalance)
        for name, seconds in report.seconds.items():
            phases[name].append(seconds)
    if group.is_first:
        row = {"benchmark": "scaling", "kind": kind, "ranks": group.world_size, "candidates": candidates}
        row |= {"rounds": rounds, "tokens": sum(tokens) / len(tokens), "imbalance": max(imbalance)}
        row |= {"phases": {name: runs.quantiles(seconds) for name, seconds in phases.items()}}
        rows.append("scaling", row | {"environment": rows.here()})
        print(kind, group.world_size, candidates, f"{row['phases']['step']['p50']:.3f} s", flush=True)
    group.barrier()
    os._exit(0)  # like the product: gloo's threads may wait for a rank that has exited


def start(kind: str, ranks: int, candidates: int, rounds: int, options: list[str]) -> None:
    """Start the ranks of one measurement."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), __file__, "rank"]
    command += ["--kind", kind, "--candidates", str(candidates), "--rounds", str(rounds), "--", *options]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def balance(draws: int, options: list[str]) -> None:
    """Tokens of the busiest rank over the mean, for random candidates with real lengths, half of them trained on."""
    inputs = read_inputs(resolve(arguments.parse(options)), connect())
    examples, ways = inputs.sampler.examples, {"padded": (False, False), "even, packed": (True, True)}
    for n in (128, 256):
        for ranks in (2, 4, 8):
            for way, (even, packed) in ways.items():
                sketch, train = [], []
                for number in range(draws):
                    chosen = torch.randperm(len(examples), generator=generator(0, "balance", number))[:n]
                    lengths, every = examples.lengths[chosen], torch.arange(n)
                    formed = form_micro_batches(lengths, every, MICRO_BATCH, packed=packed, even=even)
                    shares = deal(formed, lengths, ranks, packed=packed)
                    loads = [sum(int(lengths[p]) for members in share for p in members) for share in shares]
                    sketch.append(max(loads) * ranks / sum(loads))
                    train.append(route(lengths, every[: n // 2], ranks, MICRO_BATCH, packed=packed).imbalance)
                row = {"benchmark": "scaling", "kind": "balance", "ranks": ranks, "candidates": n, "way": way}
                row |= {"micro_batch_tokens": MICRO_BATCH, "draws": draws}
                row |= {"sketch": runs.quantiles(sketch), "train": runs.quantiles(train)}
                row |= {"data": runs.digest(arguments.parse(options).data.train), "mean_sketch": sum(sketch) / draws}
                rows.append("scaling", row | {"mean_train": sum(train) / draws, "environment": rows.here()})
                print(n, ranks, way, row["mean_sketch"], sum(train) / draws, flush=True)


def last(kind: str) -> list[dict]:
    """Rows of a kind; the last measurement of each."""
    return list({(r["ranks"], r["candidates"]): r for r in rows.read("scaling") if r["kind"] == kind}.values())


def median(row: dict, phase: str = "step") -> float:
    """Seconds."""
    return row["phases"].get(phase, {"p50": 0.0})["p50"]


def by_ranks() -> str:
    """Tokens per second and rank, relative to one rank."""
    lines = [
        "| ranks | candidates | s per step | tokens/s, relative to one rank | per rank | imbalance |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in ("strong", "weak"):
        found = last(kind)
        one = found[0]["tokens"] / median(found[0])
        for row in found:
            speed = row["tokens"] / median(row) / one
            lines.append(
                f"| {row['ranks']} ({kind}) | {row['candidates']} | {median(row):.2f} | {speed:.2f} | "
                f"{speed / row['ranks']:.2f} | {row['imbalance']:.3f} |"
            )
    return "\n".join(lines)


def by_candidates() -> str:
    """Seconds of each phase per 64 candidates, and share outside forward and backward."""
    names = ("sample", "gather", "select", "learn", "route", "report")
    lines = [
        f"| candidates | s per step | sketch and training | {' | '.join(names)} | all outside |",
        "|---:|---:|---:|" + "---:|" * (len(names) + 1),
    ]
    for row in last("candidates"):
        whole = median(row)
        inside = sum(median(row, phase) for phase in MODEL_PHASES)
        shares = " | ".join(f"{median(row, name) / whole:.1%}" for name in names)
        lines.append(
            f"| {row['candidates']:,} | {whole:.2f} | {inside / whole:.1%} | {shares} | {1 - inside / whole:.1%} |"
        )
    return "\n".join(lines)


def balances() -> str:
    """Tokens of the busiest rank over the mean for sketch and training, before and after balancing."""
    found = {(r["candidates"], r["ranks"], r["way"]): r for r in rows.read("scaling") if r["kind"] == "balance"}
    lines = [
        "| candidates | ranks | sketch: fewest micro-batches, padded | even, packed | training: padded | packed |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for (n, ranks, way), row in found.items():
        if way == "padded":
            now = found[n, ranks, "even, packed"]
            cells = (row["mean_sketch"], now["mean_sketch"], row["mean_train"], now["mean_train"])
            lines.append(f"| {n} | {ranks} | {' | '.join(f'{value:.3f}' for value in cells)} |")
    return "\n".join(lines)


TABLES = {"scaling with ranks": by_ranks, "scaling with candidates": by_candidates, "balance": balances}


def plots() -> None:
    """Draw one file per curve."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder = rows.ROOT / "docs" / "plots"
    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for kind in ("strong", "weak"):
        found = last(kind)
        one = found[0]["tokens"] / median(found[0])
        axes.plot([r["ranks"] for r in found], [r["tokens"] / median(r) / one for r in found], marker="o", label=kind)
    axes.plot(RANKS, RANKS, color="grey", linestyle=":", label="linear")
    axes.set(xlabel="ranks (2 cores)", ylabel="tokens per second, relative to one rank", xticks=RANKS)
    axes.legend()
    figure.savefig(folder / "scaling-ranks.svg", bbox_inches="tight", metadata={"Date": None})
    found = last("candidates")
    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for phase in ("step", "sketch", "train", "gather", "select", "learn", "route", "report"):
        axes.plot([r["candidates"] for r in found], [median(r, phase) for r in found], marker="o", label=phase)
    axes.set(xscale="log", yscale="log", xlabel="candidates, half selected", ylabel="seconds")
    axes.legend(fontsize="small")
    figure.savefig(folder / "scaling-candidates.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranks", "candidates", "balance", "plots", "rank"))
    parser.add_argument("--kind", default="candidates")
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--rounds", type=int)
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    match given.what:
        case "ranks":
            for ranks in RANKS:
                start("strong", ranks, FIXED * 2, given.rounds or 6, options)
            for ranks in RANKS:
                start("weak", ranks, FIXED * ranks, given.rounds or 6, options)
        case "candidates":
            for count in CANDIDATES:
                start("candidates", 1, count, given.rounds or max(2, 512 // count), options)
        case "balance":
            balance(given.rounds or 200, options)
        case "plots":
            plots()
        case "rank":
            measure(given.kind, given.candidates, given.rounds, options)


if __name__ == "__main__":
    main()
