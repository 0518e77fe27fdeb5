"""Size of the step at equal time: `stratified` with b of 2b candidates, each b at its own learning rate.

python benchmarks/batch_size.py cost                       what a step of each b costs, interleaved in one process
python benchmarks/batch_size.py run --seeds 3              repeat to continue where it stopped
python benchmarks/batch_size.py run --data maths=TRAIN,HELD_OUT --model FOLDER --steps 60 -- --data.max_length 256

Every b makes the steps that fit into the time of --steps steps of b = 32. Its learning rate is the best of three in
runs with a seed that is used for nothing else: the default rate times the square root of b / 32, half and twice as
much. The half-life of Adam's second moment is fixed in examples (beta2 is 0.999 at b = 32), since a fixed beta2 would
let a small batch forget sooner. Rows are those of `learning.py`, with the noise scale that the run itself has measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from statistics import mean

import learning
import learning_tables
import rows

SIZES = (4, 8, 16, 32, 64)
REFERENCE = 32
FACTORS = (0.5, 1, 2)
ARM = "stratified"
SCORES = tuple(learning_tables.SCORES)


def sized(setting: learning.Setting, b: int, rate: float) -> learning.Setting:
    """The setting with a step of ``b`` examples at a learning rate; both are part of its name."""
    beta2 = 0.999 ** (b / REFERENCE)
    options = ("--train.learning_rate", f"{rate:.3g}", "--train.betas", f"[0.9, {beta2:.7g}]")
    name = f"{setting.data}, b {b}, rate {rate:.3g}"
    return dataclasses.replace(setting, data=name, candidates=2 * b, budget=b, options=(*setting.options, *options))


def rates(base: float, b: int) -> list[float]:
    """The rates that are tried for ``b``."""
    return [float(f"{base * factor * math.sqrt(b / REFERENCE):.2g}") for factor in FACTORS]


def cost(setting: learning.Setting, base: float, rounds: int) -> None:
    """Time a step of every b in turn, round after round, in this process on one thread."""
    steps = {b: learning.prepared(sized(setting, b, base).command_line(ARM)) for b in SIZES}
    seconds = learning.interleaved(steps, rounds)
    for b, taken in seconds.items():
        row = {"benchmark": "learning", "kind": "cost of b", "data": setting.data, "b": b, "rounds": rounds}
        ratio = mean(taken) / mean(seconds[REFERENCE])
        rows.append("learning", row | {"seconds": mean(taken), "over_reference": ratio, "environment": rows.here()})
        print(f"{b:3} {ratio:.3f} of {REFERENCE}", flush=True)


def costs(data: str) -> dict[int, float]:
    """Mean time of a step of each b, relative to the reference."""
    of_data = [row for row in rows.read("learning") if row["kind"] == "cost of b" and row["data"] == data]
    return {row["b"]: row["over_reference"] for row in of_data}


def found(data: str, b: int, rate: float) -> learning_tables.Runs:
    """Runs of a b at a rate, by seed."""
    return learning_tables.of(f"{data}, b {b}, rate {rate:.3g}", "time").get(ARM, {})


def best_rate(data: str, b: int, base: float) -> float | None:
    """The rate with the least loss in the tuning runs; None until all are made."""
    tuned = {rate: found(data, b, rate).get(learning_tables.TUNING_SEED) for rate in rates(base, b)}
    return learning_tables.best(tuned)


def run(setting: learning.Setting, base: float, seeds: int, reference_steps: int) -> None:
    """Make the runs that have no row: first those that find the rates, then every seed."""
    price = costs(setting.data)
    steps = {b: round(reference_steps / price[b]) for b in SIZES}

    def run_missing(b: int, rate: float, seed: int) -> None:
        if seed not in found(setting.data, b, rate):
            learning.run(sized(setting, b, rate), ARM, "time", seed, steps[b])

    for b in SIZES:
        for rate in rates(base, b):
            run_missing(b, rate, learning_tables.TUNING_SEED)
    for seed in range(seeds):
        for b in SIZES:
            run_missing(b, best_rate(setting.data, b, base), seed)


BASES = {"built-in": 1e-2, "maths 2.6M": 5e-3, "superglue 2.6M": 5e-3, "maths superglue-2.6M": 5e-3}
"""Middle learning rate at b = 32."""


def table(data: str) -> str:
    """Losses at equal time by b, and the noise scale that each run has measured."""
    lines = [
        "| b | time of a step | rate | steps | seeds | natural mixture | mean over sources | small sources | natural, "
        f"minus b = {REFERENCE} | over sources, minus b = {REFERENCE} | noise scale |",
        f"|---:|{'---:|' * 10}",
    ]
    price, base = costs(data), BASES[data]
    runs = {}
    for b in SIZES:
        rate = best_rate(data, b, base)
        runs[b] = {seed: run for seed, run in found(data, b, rate or 0).items() if seed != learning_tables.TUNING_SEED}
    for b, of_b in runs.items():
        if of_b:
            steps = next(iter(of_b.values()))["steps"]
            cells = [str(b), f"{price[b]:.2f}", f"{best_rate(data, b, base):.3g}", str(steps), str(len(of_b))]
            cells += [learning_tables.cell([run["after"][score] for run in of_b.values()]) for score in SCORES]
            cells += [learning_tables.difference(of_b, runs[REFERENCE], score) for score in SCORES[:2]]
            inverse = [1 / run["noise"]["scale"] for run in of_b.values() if "noise" in run]
            cells.append(f"{1 / mean(inverse):.0f}" if any(inverse) else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {f"size of b {data}": lambda data=data: table(data) for data in BASES}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "run"))
    parser.add_argument("--data", default="built-in", help="as for learning.py")
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=140, help=f"steps of b = {REFERENCE}")
    parser.add_argument("--rounds", type=int, default=20, help="steps of every b that are timed")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    setting = learning.Setting.of(given.data, given.model, options)
    if given.what == "cost":
        cost(setting, BASES[setting.data], given.rounds)
    else:
        run(setting, BASES[setting.data], given.seeds, given.steps)
        print(table(setting.data))


if __name__ == "__main__":
    main()
