"""Tables of the gradient bank (`gradient_bank.py`)."""

from __future__ import annotations

import rows
from bank_ways import ALL

SIZES = ((64, 32), (128, 32), (256, 32), (16, 8), (32, 8), (64, 8))
_OF_KEPT = (ALL, "random", "stratified", "last_layer", "zeroth_order", "probe;", "all adapters", "words;", "length")
"""Ways in the tables of the default's kept sources."""
DRAWN = ("random", "stratified")
NOTHING = "Not measured yet."

Row = dict


def found() -> dict[tuple[str, int], list[Row]]:
    """The rows of each mixture and state of the model."""
    of: dict[tuple[str, int], list[Row]] = {}
    for row in rows.read("gradient_bank"):
        of.setdefault((row["data"], row["steps"]), []).append(row)
    return of


def errors_table(of_state: list[Row], setting: str, only: tuple[str, ...] = ("",)) -> str:
    """Squared errors, and in parentheses the share of draws that are nearer than one with the same quotas.

    Bold if the error is below that of the draw.
    """
    measured = [row for row in of_state if row["kind"] == "errors" and row["setting"] == setting]
    of = {(row["n"], row["b"]): row["ways"] for row in measured}
    sizes = [size for size in SIZES if size in of]
    lines = [f"| picks | {' | '.join(f'{b} of {n}' for n, b in sizes)} |", f"|---|{'---:|' * len(sizes)}"]

    def cell(way: str, error: Row) -> str:
        text = f"{error['pool']['mean']:.2f} ± {error['pool']['interval']:.2f}"
        text = f"**{text}**" if error["beyond"]["mean"] + error["beyond"]["interval"] < 0 else text
        return text if way == ALL or way.startswith(DRAWN) else f"{text} ({error['nearer']:.0%})"

    for way in of[sizes[0]]:
        if way.startswith(only):
            lines.append(f"| {way} | {' | '.join(cell(way, of[size][way]) for size in sizes)} |")
    return "\n".join(lines)


def noise_table() -> str:
    """Noise scales and cosines of every mixture and state."""
    lines = [
        "| mixture | after steps | gradients | noise scale | within sources | mean cosine | within sources |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for (data, steps), of_state in found().items():
        scales = next((row["scales"] for row in reversed(of_state) if row["kind"] == "noise"), {})
        for name, scale in scales.items():
            cells = [f"{scale[of]['mean']:.1f} ± {scale[of]['interval']:.1f}" for of in ("total", "within")]
            cells += [f"{scale[of]:.2f}" for of in ("cosine", "cosine_within")]
            lines.append(f"| {data} | {steps} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def age_table() -> str:
    """Correlations and errors of sketches from some steps before."""
    aged = [row for of_state in found().values() for row in of_state if row["kind"] == "age"]
    if not aged:
        return NOTHING
    errors = list(aged[0]["error"])
    lines = [
        "| mixture | age in steps | distances: probe today | all adapters today | of one source | losses "
        f"| {' | '.join(errors)} |",
        f"|---|{'---:|' * (5 + len(errors))}",
    ]
    for (data, _, age), row in {(row["data"], row["steps"], row["age"]): row for row in aged}.items():
        cells = [f"{row[of]:.2f}" for of in ("probe", "all", "within", "losses")]
        cells += [f"{error['mean']:.2f} ± {error['interval']:.2f}" for error in row["error"].values()]
        lines.append(f"| {data} | {age} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table() -> str:
    """Errors of one step and of the mean of ten, and the mean squared length of the chosen examples' gradients."""
    tables = []
    for (data, steps), of_state in found().items():
        of = {(row["n"], row["b"]): row["ways"] for row in of_state if row["kind"] == "over steps"}
        if not of:
            continue
        heads = [f"{b} of {n}: one step | ten steps | length" for n, b in of]
        lines = [f"| picks | {' | '.join(heads)} |", f"|---|{'---:|' * (3 * len(of))}"]
        for way in next(iter(of.values())):
            cells = []
            for ways in of.values():
                one, ten = ways[way]["one"]["mean"], ways[way]["ten"]
                cells += [f"{one:.2f}", f"{ten['mean']:.3f} ± {ten['interval']:.3f}", f"{ways[way]['length']:.2f}"]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        tables.append(f"{data}, after {steps} steps:\n\n" + "\n".join(lines))
    return "\n\n".join(tables) or NOTHING


def every_state(setting: str, only: tuple[str, ...] = ("",)) -> str:
    """`errors_table` of every mixture and state, one below the other."""
    tables = []
    for (data, steps), of_state in found().items():
        if any(row["kind"] == "errors" and row["setting"] == setting for row in of_state):
            when = f"after {steps} steps" if steps else "before training"
            tables.append(f"{data}, {when}:\n\n{errors_table(of_state, setting, only)}")
    return "\n\n".join(tables) or NOTHING


TABLES = {
    "bank errors": lambda: every_state("none kept"),
    "bank errors kept": lambda: every_state("kept", _OF_KEPT),
    "bank steps": steps_table,
    "bank noise": noise_table,
    "bank age": age_table,
}
