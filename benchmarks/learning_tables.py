"""Tables and plots of the learning benchmark: means over seeds with 95 % confidence intervals (Student's t).

python benchmarks/learning_tables.py      draw the plots into docs/plots

The last columns are paired: with the same seed, all arms get the same candidates in the same order and start from the
same adapters, so the difference to `stratified` has less spread than the scores. A difference is bold if its interval
excludes zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev
from typing import TypeVar

import rows
from arms import GROUPS, REFERENCE

PLOTS = rows.ROOT / "docs" / "plots"
SCORES = {"loss": "natural mixture", "loss_by_source": "mean over sources", "small_loss": "small sources"}
# Student's t, 97.5 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Runs = dict[int, dict]
"""The runs of an arm by seed."""
Rate = TypeVar("Rate", str, float)
TUNING_SEED = 100
"""Seed of the runs that choose a learning rate, and of no others."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval; NaN for one value."""
    if len(values) == 1:
        return values[0], float("nan")
    return mean(values), _T[len(values) - 2] * stdev(values) / sqrt(len(values))


def of(data: str, match: str) -> dict[str, Runs]:
    """Runs of every arm at matched ``steps`` or ``time``, by seed; the last of repeated runs.

    If the cost of an arm was measured again, runs with the number of steps of the earlier cost are left out.
    """
    found: dict[str, Runs] = defaultdict(dict)
    of_runs = [row for row in rows.read("learning") if row["kind"] == "run"]
    of_match = [row for row in of_runs if (row["data"], row["match"]) == (data, match)]
    steps = {row["arm"]: row["steps"] for row in of_match}
    for row in of_match:
        if row["steps"] == steps[row["arm"]]:
            found[row["arm"]][row["seed"]] = row
    return found


def costs(data: str) -> dict[str, float]:
    """Median step time of each arm, relative to the reference."""
    return {
        row["arm"]: row["over_reference"]["p50"]
        for row in rows.read("learning")
        if row["kind"] == "cost" and row["data"] == data
    }


def table(data: str, match: str, arms: Sequence[str], *, measured: bool = False) -> str:
    """Held-out scores of `stratified` and other arms, and their differences to `stratified` with the same seed.

    The time of a step is the cost measured in one process or, with ``measured``, the mean over runs of their medians.
    """
    lines = [
        "| arm | steps | seeds | time of a step | peak | natural mixture | mean over sources | small sources | right "
        "answers | natural, minus `stratified` | over sources, minus `stratified` |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found, price = of(data, match), costs(data)
    if measured:
        taken = {arm: mean(run["step_seconds"]["p50"] for run in runs.values()) for arm, runs in found.items()}
        price = {arm: seconds / taken[REFERENCE] for arm, seconds in taken.items()}
    for arm in dict.fromkeys([REFERENCE, *arms]):
        if runs := found.get(arm):
            any_run = next(iter(runs.values()))
            cells = [f"`{arm}`", str(any_run["steps"]), str(len(runs)), f"{price[arm]:.2f}" if arm in price else "-"]
            cells.append(f"{max(run['peak_bytes'] for run in runs.values()) / 2**30:.2f} GiB")
            cells += [cell([run["after"][score] for run in runs.values()]) for score in SCORES]
            accuracies = [run["after"]["accuracy"] for run in runs.values()]
            cells.append(
                "-" if None in accuracies else cell([100 * accuracy for accuracy in accuracies], ".1f") + " %"
            )
            cells += [difference(runs, found[REFERENCE], score) for score in ("loss", "loss_by_source")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best(tuned: dict[Rate, dict | None]) -> Rate | None:
    """The rate whose run has the least sum of the losses over examples and over sources; None if a run is missing."""
    if None in tuned.values():
        return None
    return min(tuned, key=lambda rate: tuned[rate]["after"]["loss"] + tuned[rate]["after"]["loss_by_source"])


def cell(values: Sequence[float], form: str = ".3f") -> str:
    middle, half = interval(values)
    return f"{middle:{form}}" if half != half else f"{middle:{form}} ± {half:{form}}"


def difference(runs: Runs, reference: Runs, score: str) -> str:
    """Mean difference of a score with the same seeds, and its interval; bold if that excludes zero."""
    both = sorted(runs.keys() & reference.keys())
    if runs is reference or not both:
        return "-"
    middle, half = interval([runs[seed]["after"][score] - reference[seed]["after"][score] for seed in both])
    text = f"{middle:+.3f}" if half != half else f"{middle:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(middle) > half else text


def draw(data: str, match: str, chosen: Sequence[str]) -> None:
    """Dots with error bars: a line per arm, a panel per score; the band is `stratified`."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "colm_scale"  # equal rows give an equal file
    from matplotlib import pyplot

    found = of(data, match)
    arms = [arm for arm in chosen if arm in found]
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 0.6 + 0.32 * len(arms)), sharey=True, layout="constrained")
    for panel, (score, title) in zip(panels, SCORES.items()):
        for place, arm in enumerate(arms):
            middle, half = interval([run["after"][score] for run in found[arm].values()])
            panel.errorbar(middle, place, xerr=half, fmt="o", color="C3" if arm == REFERENCE else "C0", capsize=3)
            if arm == REFERENCE:
                panel.axvspan(middle - half, middle + half, color="C3", alpha=0.12)
        panel.set_title(f"held-out loss, {title}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    PLOTS.mkdir(exist_ok=True)
    name = f"learning-{data.replace(' ', '-')}-{match}.svg"
    figure.savefig(PLOTS / name, metadata={"Date": None})
    print(PLOTS.relative_to(rows.ROOT) / name)


def several(names: Sequence[str], match: str, arms: Sequence[str]) -> str:
    """Tables of several data, one below the other, as far as they are measured."""
    measured = [data for data in names if REFERENCE in of(data, match)]
    return "\n\n".join(f"{data}:\n\n{table(data, match, arms)}" for data in measured) or "Not measured yet."


METHODS = [
    arm for group in ("main", "probes", "rankings", "amortised", "allocations") for arm in GROUPS[group]
]
SENSITIVITIES = {
    "h": ("last_layer",),
    "eps": ("paper",),
    "K": ("zeroth_order 16",),
    "ratio": ("last_layer",),
    "boundary": ("stratified, nothing kept",),
    "cap": (),
}
"""Groups that vary one option, and the arms with its other values."""
DATA = ("built-in", "maths 2.6M", "superglue 2.6M")
PRETRAINED = ("maths SmolLM2-135M-Instruct, 8 of 16", "superglue SmolLM2-135M-Instruct, 8 of 32")
"""Data with a real pretrained model (`gradient_bank.py fetch`)."""
NOTHING_KEPT = "superglue 2.6M, nothing kept, 32 of 128"
"""Data where every source has its quota, and a ranking much to choose from."""
FEW = "built-in-1000"
EPOCHS = (FEW, "maths-1000 2.6M")
"""Data with few rows, so that sketches can be reused in several epochs."""
MEMORY = (NOTHING_KEPT, PRETRAINED[1])
"""Data where matching was tried with other memories of its errors."""
FREE = ("length systematic", "words matching of 8b")
"""Arms that choose without a forward."""
TABLES = {
    **{
        f"learning {data} {match}": lambda data=data, match=match: table(data, match, METHODS)
        for data in DATA
        for match in ("time", "steps")
        if of(data, match)
    },
    "learning pretrained": lambda: several(PRETRAINED, "steps", METHODS),
    "learning nothing kept": lambda: table(NOTHING_KEPT, "steps", METHODS),
    "memory": lambda: several(MEMORY, "steps", ("colm", *GROUPS["memory"])),
    "free": lambda: several(DATA[:2], "time", FREE),
    "free in later epochs": lambda: several(EPOCHS, "steps", ("reused matching", "reused colm", "reused losses")),
    **{
        f"sensitivity {group}": lambda arms=(*others, *GROUPS[group]): table("built-in", "steps", arms)
        for group, others in SENSITIVITIES.items()
        if GROUPS[group].keys() & of("built-in", "steps").keys()
    },
    **(
        {"sensitivity staleness": lambda: table(FEW, "steps", ("last_layer", *GROUPS["staleness"]), measured=True)}
        if of(FEW, "steps")
        else {}
    ),
}
"""Tables that have rows."""


def main() -> None:
    """Draw the plots that have rows."""
    for data in DATA:
        for match in ("time", "steps"):
            if of(data, match):
                draw(data, match, METHODS)


if __name__ == "__main__":
    main()
