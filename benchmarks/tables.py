"""The tables of both READMEs, from the rows in benchmarks/results.

python benchmarks/tables.py            print every table
python benchmarks/tables.py --write    insert them between the markers in README.md and benchmarks/README.md
python benchmarks/tables.py --check    exit with 1 if they are not up to date
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from statistics import mean

import rows

README = rows.ROOT / "README.md"
BENCHMARKS_README = rows.ROOT / "benchmarks" / "README.md"
MAKERS = (
    *("engines", "checkpoints", "data_loading", "loading", "faults", "fuzz_readers"),
    *("scale", "host_time", "selection_speed", "estimator_cost", "gradient_match", "learning_tables", "drift"),
    *("default_ranking", "batch_size", "worth_tables"),
    *("step_time", "against_trl", "memory", "plan_error", "scaling", "time_to_loss", "sources", "host_reads"),
    "bank_tables",
)
"""Benchmarks with their own tables."""


def learning_table(name: str) -> str:
    """Held-out scores after training, mean and range over seeds, one row per method."""
    lines = [
        "| method | trained, step | natural mixture | mean over sources | small sources | right answers |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for method, of_method in by_method(name).items():
        first = of_method[0]
        n, b = first["candidates"], first["budget"]
        trained = f"{n} (accumulated)" if method == "full" else f"{b}" if method == "random" else f"{b} of {n}"
        scores = ("loss", "loss_by_source", "small_loss")
        cells = [spread([row["after"][key] for row in of_method], ".3f") for key in scores]
        accuracy = spread([row["after"]["accuracy"] for row in of_method], ".1%")
        lines.append(f"| {' | '.join([f'`{method}`', trained, *cells, accuracy])} |")
    before = of_method[0]["before"]
    lines.append(
        f"| before training | - | {before['loss']:.3f} | {before['loss_by_source']:.3f} | {before['small_loss']:.3f} | "
        f"{percent(before['accuracy'])} |"
    )
    return "\n".join(lines)


def cost_table(name: str) -> str:
    """Cost of a step, one row per method: of several seeds, the run with the median ratio of step to bare floor."""
    lines = [
        "| method | s per step | step / bare floor (p20 to p80) | outside forward, backward | bytes exchanged | peak |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, of_method in by_method(name).items():
        measured = sorted(of_method, key=lambda row: row["measured_over_floor"]["p50"])[len(of_method) // 2]
        floor, seconds = measured["measured_over_floor"], measured["step_seconds"]["p50"]
        exchanged = sum(measured["exchanged_bytes"].values())
        lines.append(
            f"| `{method}` | {seconds:.2f} | {floor['p50']:.2f} ({floor['p20']:.2f} to {floor['p80']:.2f}) | "
            f"{measured['share_outside']['p50']:.1%} | {exchanged:,.0f} | "
            f"{max(measured['peak_bytes']) / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def by_method(name: str) -> dict[str, list[dict]]:
    """Rows with this name, by method in the order of the runs; of repeated seeds, the last row."""
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows.read("runs"):
        if row["name"] == name:
            found[row["method"]][row["seed"]] = row
    return {method: list(seeds.values()) for method, seeds in found.items()}


def spread(values: list[float | None], form: str) -> str:
    """Mean, and the range if there are several values."""
    if any(value is None for value in values):
        return "-"
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{value:.1%}"


TABLES = {
    "learning default": lambda: learning_table("default"),
    "learning mixture": lambda: learning_table("mixture"),
    "cost default": lambda: cost_table("cost-default"),
    "cost mixture": lambda: cost_table("mixture"),
}


def filled(readme: str) -> str:
    """The text of a README with every marked table replaced."""
    for name, make in all_tables().items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        readme = pattern.sub(lambda marks, make=make: f"{marks[1]}{make()}\n{marks[2]}", readme)
    return readme


def all_tables() -> dict[str, Callable[[], str]]:
    """Every table that has rows."""
    return TABLES | {name: make for maker in MAKERS for name, make in importlib.import_module(maker).TABLES.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in (README, BENCHMARKS_README)}
    made = {path: filled(text) for path, text in texts.items()}
    if given.write:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
    elif given.check:
        sys.exit(made != texts)
    else:
        print("\n\n".join(f"{name}\n{make()}" for name, make in all_tables().items()))


if __name__ == "__main__":
    main()
