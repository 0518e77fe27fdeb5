"""Evidence for the default ranking: arms at equal steps, each at its own learning rate.

python benchmarks/default_ranking.py                    the built-in mixture; repeat to continue where it stopped
python benchmarks/default_ranking.py --data maths=TRAIN,HELD_OUT --model FOLDER --seeds 5 --untuned --steps 40 \\
    -- --data.max_length 256

Each arm is first run at three learning rates with a seed that is used for nothing else, and then with the best of them
(the least sum of the losses over examples and over sources) with every seed, all arms of a seed before the next. With
--untuned, arms take the rate of the most similar one that was tuned. Rows are those of `learning.py`, under the name of
the data and the rate; at the default rate, its own rows count as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from statistics import mean

import arms
import learning
import learning_tables
import rows

ARMS = {
    "colm": "`matching` with feedback, weights 1",
    "last_layer matching": "`matching`, each step alone",
    "colm, memory 0.9": "`matching`, memory 0.9",
    "colm, memory 1": "`matching`, memory 1",
    "last_layer": "`facility`",
    "stratified": "`stratified`",
    "last_layer matching unbiased": "`matching`, unbiased weights",
    "paper": "`paper`",
    "random": "`random`",
    "full n": "`full`, n",
    "full b": "`full`, b",
    "full 2n": "`full`, 2n",
    "stratified 2b": "`stratified`, 2b of 2n",
}
"""Titles, the most informative first."""
LIKE = {
    "colm": "last_layer matching",
    "colm, memory 0.9": "last_layer matching",
    "colm, memory 1": "last_layer matching",
    "last_layer": "last_layer matching",
    "last_layer matching unbiased": "last_layer matching",
    "paper": "last_layer matching",
    "stratified": "last_layer matching",
    "random": "stratified",
    "full b": "stratified",
    "full 2n": "full n",
    "stratified 2b": "stratified",
}
"""The arm whose rate an arm takes if it was not tuned itself."""
DEFAULT_RATE = {"built-in": "1e-2"}
SCORES = tuple(learning_tables.SCORES)


def rates(data: str) -> tuple[str, ...]:
    """The rates that are tried: half the default, the default, and twice as much; other models learn slower."""
    return ("5e-3", "1e-2", "2e-2") if data == "built-in" else ("2.5e-3", "5e-3", "1e-2")


def at_rate(setting: learning.Setting, rate: str) -> learning.Setting:
    """The setting with a learning rate."""
    options = (*setting.options, "--train.learning_rate", rate)
    return dataclasses.replace(setting, data=f"{setting.data}, rate {rate}", options=options)


def found(data: str, rate: str | None, arm: str) -> learning_tables.Runs:
    """Runs of an arm at a rate, by seed."""
    if rate is None:
        return {}
    plain = learning_tables.of(data, "steps").get(arm, {}) if rate == DEFAULT_RATE.get(data) else {}
    return plain | learning_tables.of(f"{data}, rate {rate}", "steps").get(arm, {})


def best_rate(data: str, arm: str) -> str | None:
    """The rate with the least loss in the tuning runs; None until all are made."""
    tuned = {rate: found(data, rate, arm).get(learning_tables.TUNING_SEED) for rate in rates(data)}
    return best_rate(data, LIKE[arm]) if None in tuned.values() and arm in LIKE else learning_tables.best(tuned)


def run_missing(setting: learning.Setting, rate: str, arm: str, seed: int, steps: int) -> None:
    """Run an arm at a rate with a seed, unless there is a row."""
    if seed not in found(setting.data, rate, arm):
        learning.run(at_rate(setting, rate), arm, "steps", seed, steps)


def table(data: str) -> str:
    """Losses of every arm at its best rate, and their differences to facility location with the same seed."""
    lines = [
        "| arm | rate | seeds | nearer than a draw | natural mixture | mean over sources | small sources | natural, "
        "minus `facility` | over sources, minus `facility` | small, minus `facility` |",
        f"|---|{'---:|' * 9}",
    ]
    runs = {}
    for arm in ARMS:
        at_best = found(data, best_rate(data, arm), arm)
        runs[arm] = {seed: run for seed, run in at_best.items() if seed != learning_tables.TUNING_SEED}
    for arm, of_arm in runs.items():
        if not of_arm:
            continue
        nearer = [run["telemetry"]["nearer"] for run in of_arm.values() if "nearer" in run["telemetry"]]
        cells = [ARMS[arm], str(best_rate(data, arm)), str(len(of_arm)), f"{mean(nearer):.1%}" if nearer else "-"]
        cells += [learning_tables.cell([run["after"][score] for run in of_arm.values()]) for score in SCORES]
        cells += [learning_tables.difference(of_arm, runs["last_layer"], score) for score in SCORES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {f"default ranking {data}": lambda data=data: table(data) for data in learning_tables.DATA}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="built-in", help="as for learning.py")
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm in arms.ARMS])
    parser.add_argument("--untuned", action="store_true", help="tune `matching` and `full n` alone")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--steps", type=int, default=80)
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    setting = learning.Setting.of(given.data, given.model, options)
    for arm in given.arms:
        for rate in () if given.untuned and arm in LIKE else rates(setting.data):
            run_missing(setting, rate, arm, learning_tables.TUNING_SEED, given.steps)
        print(f"{arm}: learning rate {best_rate(setting.data, arm)}", flush=True)
    for seed in range(given.seeds):
        for arm in given.arms:
            run_missing(setting, best_rate(setting.data, arm), arm, seed, given.steps)
    print(table(setting.data))


if __name__ == "__main__":
    main()
