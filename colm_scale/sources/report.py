"""What was found, as text, JSON and a picture."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colm_scale.data.readers import Row
from colm_scale.sources.agreement import Agreement

if TYPE_CHECKING:  # matplotlib comes with an extra
    from matplotlib.axes import Axes

_CHARACTERS = 240
"""Most that is shown of an example."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row, for people to look at."""

    id: int
    where: str
    text: str

    @classmethod
    def of(cls, row: Row) -> Example:
        """Its beginning, in one line."""
        written = " | ".join(message.content for message in row.messages or ()) or f"{row.prompt} => {row.completion}"
        line = " ".join(written.split())
        return cls(row.id, row.where, line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]}...")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A source that was found.

    Attributes:
        kept: Whether the small-source rule keeps it.
        nearest: The rows nearest to its centre.
        named: How many of its rows have which source by the data itself, the most frequent first.
    """

    name: str
    size: int
    kept: bool
    nearest: list[Example]
    named: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """All that is said; `agreement` and `baseline` only where the data names several sources."""

    rows: int
    embedding: str
    cut: int
    """Rows of which only the first tokens were looked at."""
    seconds: float
    method: str
    stability: dict[int, float]
    """For each number of clusters that was tried, how well clusterings of halves agree (adjusted Rand index)."""
    noise: float
    """hdbscan: share of the rows looked at that were in no dense cluster, and went to the nearest."""
    clusters: list[Cluster]
    agreement: Agreement | None
    baseline: Agreement | None
    """Of k-means with as many clusters on TF-IDF."""


def write_report(report: Report, folder: Path) -> str:
    """Write report.json and report.txt; returns the latter."""
    text = said(report) + f"\nwritten to {folder}: train with --data.sources {folder / 'sources.jsonl'}\n"
    plain = json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(plain + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(text, encoding="utf-8")
    return text


def said(report: Report) -> str:
    """The report as text."""
    several = report.agreement is not None
    lines = [
        f"{report.rows:,} rows, embedded by {report.embedding}, {report.method}: {len(report.clusters)} clusters "
        f"({report.seconds:,.0f} s)"
    ]
    if report.cut:
        lines.append(f"{report.cut:,} rows are longer than --data.max_length: only their beginning was looked at")
    if report.stability:
        tried = ", ".join(f"{number}: {agreement:.2f}" for number, agreement in report.stability.items())
        lines.append(f"stability by number of clusters: {tried}")
    if report.noise:
        lines.append(f"{report.noise:.1%} of the rows that were looked at are in no dense cluster: put to the nearest")
    lines += ["", "kept: fewer rows than the average cluster, so that a run trains on all of its candidates"]
    for cluster in report.clusters:
        lines += ["", f"{cluster.name}  {cluster.size:,} rows{', kept' if cluster.kept else ''}"]
        if several:
            mixed = ", ".join(f"{name} {count:,}" for name, count in list(cluster.named.items())[:4])
            more = len(cluster.named) - 4
            lines.append(f"  by its column: {mixed}{f', and {more} more' if more > 0 else ''}")
        lines += [f"  {example.where}: {example.text}" for example in cluster.nearest]
    return "\n".join([*lines, *_agreement_lines(report), ""])


def _agreement_lines(report: Report) -> list[str]:
    ours, theirs = report.agreement, report.baseline
    if ours is None or theirs is None:
        return []
    names = [*ours.recovered]
    width = max(map(len, [*names, "adjusted Rand index"]))
    lines = ["", "beside the sources that the data names, and beside k-means on TF-IDF with as many clusters:"]
    lines.append(f"  {'':{width}}  {'clusters':>9} {'TF-IDF':>9}")
    lines.append(f"  {'adjusted Rand index':{width}}  {ours.adjusted_rand:9.2f} {theirs.adjusted_rand:9.2f}")
    lines.append("  share of each small source that is in kept clusters:")
    for name in names:
        lines.append(f"  {name:{width}}  {ours.recovered[name]:9.0%} {theirs.recovered[name]:9.0%}")
    lines.append(f"  {'of all rows':{width}}  {ours.kept_share:9.0%} {theirs.kept_share:9.0%}")
    return lines


def draw_map(points: np.ndarray, labels: np.ndarray, report: Report, path: Path) -> None:
    """A picture of ``[n, p]`` points by their first two principal components, coloured by ``[n]`` cluster."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # a source's name may hold dollar signs
        figure = Figure(figsize=(9, 7), layout="constrained")
        axes = figure.subplots()
        for number, cluster in enumerate(report.clusters):
            _draw_cluster(axes, points[labels == number], number, cluster)
        axes.set(xlabel="first principal component", ylabel="second", title=f"{len(points):,} of {report.rows:,} rows")
        figure.legend(loc="outside right upper", markerscale=2, fontsize="small")
        figure.savefig(path, dpi=120)


def _draw_cluster(axes: Axes, own: np.ndarray, number: int, cluster: Cluster) -> None:
    if len(own):
        colour, mark = f"C{number % 10}", "os^vD"[number // 10 % 5]
        label = f"{cluster.name} ({cluster.size:,}{', kept' if cluster.kept else ''})"
        axes.scatter(own[:, 0], own[:, 1], s=8, alpha=0.5, color=colour, marker=mark, linewidths=0, label=label)
        axes.annotate(cluster.name.removeprefix("cluster-"), own[:, :2].mean(0), weight="bold", ha="center")
