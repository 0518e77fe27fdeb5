"""Tables of the main arms on the built-in mixture: at equal steps, at equal time, and with activation checkpointing.

Runs at equal steps are those of `default_ranking.py`, at the best rate of each arm that was tuned. Activation
checkpointing makes a step of every arm longer, but leaves its losses as they are; only the numbers of steps that fit
into a time are others, and a run without it counts if it has made as many.
"""

from __future__ import annotations

from collections.abc import Callable

import default_ranking
import learning_tables
from arms import REFERENCE
from learning_tables import Runs, cell, difference

TITLES = {
    "random": "`random`: 32 of 64",
    "full n": "`full`: all 64, accumulated",
    "full 2n": "`full`: 128, accumulated",
    "stratified": "`stratified`: 32 of 64",
    "stratified 2b": "`stratified`: 64 of 128, accumulated",
    "equal": "`stratified`, equal shares, nothing kept",
    "colm": "`colm`: 32 of 64 (default)",
    "last_layer matching": "`colm`, each step alone",
    "last_layer": "`colm`, facility location",
    "paper": "`colm --selection.preset paper`",
}
"""From the paper's baselines to its method."""
CHECKPOINTED = "built-in, checkpointed"
_SAME = 0.03
"""Relative difference of numbers of steps that count as equal; a cost is not known better."""


def ranked(data: str) -> Callable[[str], Runs]:
    """Runs of `default_ranking.py` by arm, at the best rate of each, or the default where none was tuned."""

    def of(arm: str) -> Runs:
        rate = default_ranking.best_rate(data, arm) or default_ranking.DEFAULT_RATE.get(data)
        found = default_ranking.found(data, rate, arm)
        return {seed: run for seed, run in found.items() if seed != learning_tables.TUNING_SEED}

    return of


def plain(data: str) -> Callable[[str], Runs]:
    """Runs by arm at the same steps and the same learning rate."""
    return lambda arm: learning_tables.of(data, "steps").get(arm, {})


def at_time(arm: str) -> Runs:
    """Runs of the time of 140 steps of `stratified`, by seed."""
    return learning_tables.of("built-in", "time").get(arm, {})


def checkpointed(arm: str) -> Runs:
    """The same with activation checkpointing."""
    own, plain = learning_tables.of(CHECKPOINTED, "time").get(arm, {}), at_time(arm)
    steps = at_time(REFERENCE)[0]["steps"] / learning_tables.costs(CHECKPOINTED).get(arm, 1)
    as_many = {seed: run for seed, run in plain.items() if abs(run["steps"] / steps - 1) < _SAME}
    return own or as_many


COMPARED: dict[str, Callable[[str], Runs]] = {
    "same steps": ranked("built-in"),
    "same time": at_time,
    "same time, checkpointed": checkpointed,
}


def summary() -> str:
    """Mean over sources of each arm; bold if its difference to `stratified` excludes zero."""
    heads = " | ".join(COMPARED)
    lines = [f"| trains on | time of a step (checkpointed) | {heads} |", "|---|---:|---:|---:|---:|"]
    plain, other = learning_tables.costs("built-in"), learning_tables.costs(CHECKPOINTED)
    for arm, title in TITLES.items():
        times = [f"{price[arm]:.2f}" if arm in price else "-" for price in (plain, other)]
        cells = [title, f"{times[0]} ({times[1]})"]
        for runs in COMPARED.values():
            found = runs(arm)
            text = cell([run["after"]["loss_by_source"] for run in found.values()]) if found else "-"
            apart = difference(found, runs(REFERENCE), "loss_by_source") if arm != REFERENCE else ""
            cells.append(f"**{text}**" if apart.startswith("**") else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def whole(compared: str) -> str:
    """The same arms with steps, seeds, all means and differences, compared in one of the three ways."""
    lines = [
        "| arm | time of a step | steps | seeds | natural mixture | mean over sources | small sources | natural, minus "
        "`stratified` | over sources, minus `stratified` |",
        f"|---|{'---:|' * 8}",
    ]
    runs = COMPARED[compared]
    price = learning_tables.costs(CHECKPOINTED if runs is checkpointed else "built-in")
    reference = runs(REFERENCE)
    for arm, title in {**TITLES, "full b": "`full`: 32", "length systematic": "`length`, systematic"}.items():
        found = reference if arm == REFERENCE else runs(arm)
        if found:
            cells = [title, f"{price[arm]:.2f}" if arm in price else "-"]
            cells += [str(next(iter(found.values()))["steps"]), str(len(found))]
            cells += [cell([run["after"][score] for run in found.values()]) for score in learning_tables.SCORES]
            cells += [difference(found, reference, score) for score in ("loss", "loss_by_source")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MEASURED = {
    "built-in, 32 of 64": ranked("built-in"),
    "maths 2.6M, 32 of 64": ranked("maths 2.6M"),
    "superglue 2.6M, 32 of 64": ranked("superglue 2.6M"),
    **{data: plain(data) for data in (learning_tables.NOTHING_KEPT, *learning_tables.PRETRAINED)},
}
"""Everything where rankings were compared at equal steps."""
RANKINGS = ("colm", "last_layer matching", "last_layer", "paper", "stratified 2b", "full n")


def gains() -> str:
    """Differences to `stratified` at equal steps of every ranking, and of more examples, on all data."""
    heads = [f"`{arm}`" for arm in RANKINGS]
    lines = [f"| data | mean | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    for data, runs in MEASURED.items():
        for score in ("loss", "loss_by_source"):
            cells = [data, learning_tables.SCORES[score]]
            for arm in RANKINGS:
                both = runs(arm).keys() & runs(REFERENCE).keys()
                seeds = f" ({len(both)})" if both else ""
                cells.append(difference(runs(arm), runs(REFERENCE), score) + seeds)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "worth": summary,
    **{f"worth, {name}": lambda name=name: whole(name) for name in COMPARED},
    "ranking and draw": gains,
}
