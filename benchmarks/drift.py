"""A drifting mixture: sources appear, shrink and change, with and without refreshes of kept sources and moments.

python benchmarks/drift.py --seeds 0 1 2

Streams the built-in problems in three phases of equal length (`PHASES`), in which different sources are rare: a source
that is small in one phase is large in another, or in the whole data. Each arm runs the product with --data.streaming;
`refreshed` adds --sources.refresh_every. Rows are appended to benchmarks/results/drift.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from random import Random

import rows
import runs
from arms import ARMS
from base_model.mixture import SOURCES, held_out, make_rows
from learning import QUIET
from learning_tables import SCORES, interval

STEPS, CANDIDATES, REFRESH = 120, 64, 20
# Shares of the sources in each third of the run. EQ appears late, CoT/shop shrinks, and "PoT/savings" contains another
# kind of problem in the last third.
PHASES = (
    {"CoT/shop": 20, "CoT/trip": 6, "CoT/share": 3, "PoT/savings": 6, "PoT/farm": 1, "CoT/compare": 1},
    {"CoT/shop": 4, "PoT/farm": 16, "PoT/savings": 8, "PoT/area": 4, "EQ/age": 1, "CoT/trip": 1},
    {"PoT/farm": 1, "EQ/number": 14, "EQ/age": 8, "EQ/coins": 4, "PoT/savings": 4, "CoT/shop": 1},
)
CHANGED = {"PoT/savings": "PoT/clock"}
"""Sources that contain another kind of problem in the last phase."""
REFRESHED = ("--sources.refresh_every", str(REFRESH))
ARMS_HERE = {
    "stratified": ARMS["stratified"],
    "stratified, refreshed": (*ARMS["stratified"], *REFRESHED),
    "last_layer": ARMS["last_layer"],
    "last_layer, refreshed": (*ARMS["last_layer"], *REFRESHED),
    "full n": ARMS["full n"],
}


def write(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write the training rows in the order of the phases, and held-out rows of their sources."""
    draw, taken = Random(f"{seed}:drift"), []
    for number, shares in enumerate(PHASES):
        last = number == len(PHASES) - 1
        for source in draw.choices(list(shares), list(shares.values()), k=STEPS * CANDIDATES // len(PHASES)):
            maker = SOURCES[CHANGED.get(source, source) if last else source][1]
            instruction, output = maker(draw)
            while held_out(instruction):
                instruction, output = maker(draw)
            taken.append({"source": source, "instruction": instruction, "output": output})
    names = {source for shares in PHASES for source in shares}
    kept = [row for row in make_rows("eval", seed) if row["source"] in names | set(CHANGED.values())]
    renamed = {new: old for old, new in CHANGED.items()}
    kept = [row | {"source": renamed.get(row["source"], row["source"])} for row in kept]
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, written in zip(paths, (taken, kept)):
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return paths


def run(arm: str, seed: int) -> None:
    """Run one arm and append its row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, evaluated = write(folder, seed)
        options = [*QUIET, *ARMS_HERE[arm], "--data.train", str(train), "--data.eval", str(evaluated)]
        options += ["--data.streaming", "true", "--data.shuffle_rows", "128", "--train.steps", str(STEPS)]
        options += ["--train.seed", str(seed), "--output_dir", str(folder / "run"), "--eval.every", str(STEPS // 3)]
        options += ["--eval.sample", "10000"]  # all held-out examples, in every evaluation
        subprocess.run(
            [sys.executable, str(rows.ROOT / "launchers" / "train.py"), *options], check=True, stdout=subprocess.DEVNULL
        )
        whole = runs.row(folder / "run", "drift")
        later = [json.loads(line) for line in (folder / "run" / "evaluations.jsonl").open()]
    row = {"benchmark": "drift", "arm": arm, "seed": seed, "steps": STEPS, "refresh": REFRESH}
    row |= {"evaluations": [runs.scores(evaluation) for evaluation in later], "environment": whole["environment"]}
    del row["environment"]["command"]
    rows.append("drift", row)
    print(f"{arm} seed {seed}: {whole['after']}", flush=True)


def drift_table() -> str:
    """Held-out scores after each third of the run."""
    titles = [f"{title}, after {third}/3" for title in SCORES.values() for third in (1, 2, 3)]
    lines = [f"| arm | {' | '.join(titles)} |", f"|---|{'---:|' * 9}"]
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows.read("drift"):
        found[row["arm"]][row["seed"]] = row
    for arm in ARMS_HERE:
        if arm in found:
            cells = []
            for score in SCORES:
                for third in (1, 2, 3):
                    values = [row["evaluations"][third][score] for row in found[arm].values()]
                    middle, half = interval(values)
                    cells.append(f"{middle:.3f}" if half != half else f"{middle:.3f} ± {half:.3f}")
            lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"drift": drift_table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS_HERE, default=list(ARMS_HERE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    for seed in given.seeds:
        for arm in given.arms:
            run(arm, seed)


if __name__ == "__main__":
    main()
