"""Tables of an explanation for the terminal, and its JSON and Parquet files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from colm_scale.explain.explain import Explanation, SourceFacts
from colm_scale.records import REASONS

_VERDICTS = {1: "more", -1: "less", 0: "as expected"}


def tables(found: Explanation, top: int) -> Group:
    """Format the explanation, each list of examples at most ``top`` long."""
    parts = [_source_table(found)]
    if any(source.reasons for source in found.sources):
        parts.append(_reason_table(found.sources))
    for sign, called, how in ((1, "favoured", "more"), (-1, "neglected", "less")):
        if len(places := found.told_apart(sign)):
            parts.append(_example_table(found, places, top, f"{called}: trained on {how} often than by chance"))
    return Group(*parts, *map(Text, sentences(found, top)))


def sentences(found: Explanation, top: int) -> list[str]:
    """Summarise the examples that were never trained on, and the tests against chance."""
    examples = found.examples
    never, told = found.never_trained, [len(found.told_apart(sign)) for sign in (1, -1)]
    candidates = int((examples.candidacies > 0).sum())
    said = [f"{found.steps:,} steps: {candidates:,} examples were candidates, {candidates - len(never):,} trained on."]
    unseen = [source.examples - source.candidates for source in found.sources if source.examples is not None]
    said.append(f"Never trained on, though candidates: {len(never):,}{_some(never, top)}.")
    if found.lists_all:
        said.append(f"Never candidates: {len(found.never_candidates):,}{_some(found.never_candidates, top)}.")
    elif len(unseen) == len(found.sources):
        said.append(f"Never candidates: {sum(unseen):,} (their ids were not recorded).")
    else:
        said.append("The run has not recorded how many examples never were candidates.")
    said.append(
        f"More often than by chance: {told[0]:,} examples; less often: {told[1]:,} (false discovery rate "
        f"{found.alpha:g}). {int(examples.testable.sum()):,} could be significant even alone."
    )
    return said


def as_json(found: Explanation, top: int) -> dict[str, object]:
    """Convert the explanation to plain JSON, each list of examples at most ``top`` long."""
    examples = found.examples
    sources = [
        {**dataclasses.asdict(source), "coverage": source.coverage, "favoured": _VERDICTS[source.favoured]}
        for source in found.sources
    ]

    def listed(name: str, ids: np.ndarray) -> dict[str, object]:
        return {name: len(ids), f"{name}_first": ids[:top].tolist()}

    never_candidates = listed("never_candidates", found.never_candidates)
    return {
        "run": str(found.run),
        "steps": found.steps,
        "alpha": found.alpha,
        "sources": sources,
        "examples": {
            "candidates": int((examples.candidacies > 0).sum()),
            "trained": int((examples.selections > 0).sum()),
            **listed("never_trained", found.never_trained),
            **(never_candidates if found.lists_all else never_candidates | {"never_candidates": None}),
            "testable": int(examples.testable.sum()),
            **listed("favoured", examples.ids[found.told_apart(1)]),
            **listed("neglected", examples.ids[found.told_apart(-1)]),
        },
    }


def write(found: Explanation, top: int, folder: Path) -> None:
    """Write ``explain.json`` and ``examples.parquet``.

    Raises:
        OSError: They cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(json.dumps(as_json(found, top), indent=2, ensure_ascii=False), "utf-8")
    examples = found.examples
    verdicts = np.zeros(len(examples.ids), np.int64)
    for sign in (1, -1):
        verdicts[found.told_apart(sign)] = sign
    names = pa.array([source.name for source in found.sources], pa.string())
    columns = {
        "id": examples.ids,
        "source": pa.DictionaryArray.from_arrays(pa.array(examples.sources, pa.int32()), names),
        "candidacies": examples.candidacies,
        "selections": examples.selections,
        "expected": examples.expected,
        "p_value": examples.p_values,
        "adjusted": examples.adjusted,
        "than_by_chance": [_VERDICTS[verdict] for verdict in verdicts.tolist()],
    }
    pq.write_table(pa.table(columns), folder / "examples.parquet", compression="zstd")


def _source_table(found: Explanation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="sources", title_justify="left")
    table.add_column("source")
    columns = ("examples", "candidates", "trained on", "coverage", "selections", "of candidacies", "kept")
    for column in (*columns, "by uniform draws", "p", "trained", "spread"):
        table.add_column(column, justify="right")
    for source in found.sources:
        share = source.selections / source.candidacies if source.candidacies else 0.0
        table.add_row(
            Text(source.name),
            _or_none(source.examples, ","),
            f"{source.candidates:,}",
            f"{source.trained:,}",
            f"{source.coverage:.1%}",
            f"{source.selections:,}",
            f"{share:.1%}",
            f"{source.kept:,}",
            f"{source.expected:,.1f}",
            f"{source.p_value:.2g}",
            _VERDICTS[source.favoured],
            _or_none(source.spread, ".2f"),
        )
    return table


def _reason_table(sources: Sequence[SourceFacts]) -> Table:
    present = [reason for reason in REASONS if any(reason in source.reasons for source in sources)]
    table = Table(box=box.SIMPLE_HEAD, title="candidates by reason", title_justify="left")
    table.add_column("source")
    for reason in present:
        table.add_column(reason, justify="right")
    for source in sources:
        table.add_row(Text(source.name), *(f"{source.reasons.get(reason, 0):,}" for reason in present))
    return table


def _example_table(found: Explanation, places: np.ndarray, top: int, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{title} ({len(places):,})", title_justify="left")
    for column in ("id", "source", "candidate", "trained on", "by chance", "p", "adjusted"):
        table.add_column(column, justify="left" if column == "source" else "right")
    examples = found.examples
    for place in places[:top]:
        table.add_row(
            str(examples.ids[place]),
            Text(found.sources[examples.sources[place]].name),
            f"{examples.candidacies[place]:,}",
            f"{examples.selections[place]:,}",
            f"{examples.expected[place]:.1f}",
            f"{examples.p_values[place]:.2g}",
            f"{examples.adjusted[place]:.2g}",
        )
    return table


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _some(ids: np.ndarray, top: int) -> str:
    shown = ", ".join(map(str, ids[:top].tolist()))
    return f" (ids {shown}{', ...' if len(ids) > top else ''})" if shown else ""
