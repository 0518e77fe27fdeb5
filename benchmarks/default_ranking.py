"""Evidence for the default ranking: arms at equal steps, each at its own learning rate.

python benchmarks/default_ranking.py                    the built-in mixture; repeat to continue where it stopped
python benchmarks/default_ranking.py --data maths=TRAIN,HELD_OUT --model FOLDER --seeds 5 -- --data.max_length 256

Each arm is first run at three learning rates with seeds that are used for nothing else, and then with the best of them
(the least sum of the losses over examples and over sources) with every seed, all arms of a seed before the next. Rows
are those of `learning.py`, under the name of the data and the rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from statistics import mean

import learning
import learning_tables
import rows

ARMS = {
    "last_layer matching": "`matching`, weights 1",
    "last_layer": "`facility`",
    "stratified": "`stratified`",
    "last_layer matching unbiased": "`matching`, unbiased weights",
    "paper": "`paper`",
    "random": "`random`",
    "full n": "`full`, n",
    "full b": "`full`, b",
    "full 2n": "`full`, 2n",
}
"""Titles, the most informative first."""
RATES = ("5e-3", "1e-2", "2e-2")
TUNING_SEEDS = (100,)
STEPS = {"steps": 80}
SCORES = ("loss", "loss_by_source", "small_loss")


def at_rate(setting: learning.Setting, rate: str) -> learning.Setting:
    """The setting with a learning rate."""
    options = (*setting.options, "--train.learning_rate", rate)
    return dataclasses.replace(setting, data=f"{setting.data}, rate {rate}", options=options)


def scores(data: str, rate: str, arm: str) -> dict[int, dict]:
    """Held-out losses by seed."""
    of_arm = learning_tables.of(f"{data}, rate {rate}", "steps").get(arm, {})
    return {seed: row["after"] for seed, row in of_arm.items()}


def best_rate(data: str, arm: str) -> str | None:
    """The rate with the least loss in the tuning runs; None until all are made."""
    tuned = {rate: [scores(data, rate, arm).get(seed) for seed in TUNING_SEEDS] for rate in RATES}
    if any(None in found for found in tuned.values()):
        return None
    return min(RATES, key=lambda rate: mean(after["loss"] + after["loss_by_source"] for after in tuned[rate]))


def run_missing(setting: learning.Setting, rate: str, arm: str, seeds: Sequence[int]) -> None:
    """Run an arm at a rate with every seed that has no row."""
    for job in learning.missing(at_rate(setting, rate), [arm], ["steps"], seeds, STEPS):
        learning.run(*job)


def table(data: str) -> str:
    """Losses of every arm at its best rate, and their differences to facility location with the same seed."""
    lines = [
        "| arm | rate | seeds | natural mixture | mean over sources | small sources | natural, minus `facility` | over "
        "sources, minus `facility` | small, minus `facility` |",
        f"|---|{'---:|' * 8}",
    ]
    reference = scores(data, best_rate(data, "last_layer") or RATES[1], "last_layer")
    for arm, title in ARMS.items():
        rate = best_rate(data, arm)
        found = {seed: after for seed, after in scores(data, rate or "", arm).items() if seed not in TUNING_SEEDS}
        if not found:
            continue
        cells = [title, str(rate), str(len(found))]
        cells += [learning_tables.cell([after[score] for after in found.values()]) for score in SCORES]
        common = sorted(found.keys() & reference.keys())
        for score in SCORES:
            apart = [found[seed][score] - reference[seed][score] for seed in common]
            cells.append(learning_tables.cell(apart, "+.3f") if arm != "last_layer" and apart else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"default ranking": lambda: table("built-in")}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="built-in", help="as for learning.py")
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    setting = learning.Setting.of(given.data, given.model, options)
    for arm in ARMS:
        for rate in RATES:
            run_missing(setting, rate, arm, TUNING_SEEDS)
        print(f"{arm}: learning rate {best_rate(setting.data, arm)}", flush=True)
    for seed in range(given.seeds):
        for arm in ARMS:
            run_missing(setting, best_rate(setting.data, arm) or RATES[1], arm, [seed])
    print(table(setting.data))


if __name__ == "__main__":
    main()
