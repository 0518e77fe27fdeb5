"""The report on discovered sources: agreement with known sources, text, JSON and a map."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from colm_scale.data.readers import Row
from colm_scale.selection.quota import kept_sources

if TYPE_CHECKING:  # matplotlib comes with an extra
    from matplotlib.axes import Axes

_CHARACTERS = 240
"""Most characters that the report shows of an example."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of clusters with known sources.

    Attributes:
        adjusted_rand: Adjusted Rand index: 1 for equal groups, about 0 for unrelated ones.
        recovered: For each small known source, the share of its rows in clusters that the small-source rule keeps.
        kept_share: The share of all rows in kept clusters: the expected value of `recovered` by chance.
    """

    adjusted_rand: float
    recovered: dict[str, float]
    kept_share: float

    @classmethod
    def of(cls, names: Sequence[str], sources: np.ndarray, labels: np.ndarray) -> Agreement:
        """Compare ``[n]`` clusters with ``[n]`` known sources, numbers of ``names``."""
        from sklearn.metrics import adjusted_rand_score

        in_kept, small_sources = small(labels)[labels], small(sources).nonzero()[0].tolist()
        recovered = {names[source]: float(in_kept[sources == source].mean()) for source in small_sources}
        return cls(float(adjusted_rand_score(sources, labels)), recovered, float(in_kept.mean()))


def small(labels: np.ndarray) -> np.ndarray:
    """Apply the small-source rule to ``[n]`` group of each row: ``[k]`` bool, groups that it keeps."""
    sizes = np.bincount(labels)
    return kept_sources(torch.from_numpy(sizes), [], None).numpy() & (sizes > 0)


@dataclass(frozen=True, slots=True)
class Example:
    """A row to show."""

    id: int
    where: str
    text: str

    @classmethod
    def of(cls, row: Row) -> Example:
        """Take the beginning of a row, in one line."""
        written = " | ".join(message.content for message in row.messages) or f"{row.prompt} => {row.completion}"
        line = " ".join(written.split())
        return cls(row.id, row.where, line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]}...")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A discovered source.

    Attributes:
        kept: True if the small-source rule keeps it.
        nearest: The rows nearest to its centre.
        named: Number of its rows by the source that the data names, the most frequent first.
    """

    name: str
    size: int
    kept: bool
    nearest: list[Example]
    named: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """Contents of the report.

    Attributes:
        cut: Rows of which only the first tokens were embedded.
        stability: Agreement of halves (adjusted Rand index) for each number of clusters that was tried.
        noise: With hdbscan, the share of sampled rows that were in no dense cluster, and were assigned to the nearest.
        agreement: Agreement with the sources that the data names; None if it names only one.
        baseline: The same for k-means with as many clusters on TF-IDF.
    """

    rows: int
    embedding: str
    cut: int
    seconds: float
    method: str
    stability: dict[int, float]
    noise: float
    clusters: list[Cluster]
    agreement: Agreement | None
    baseline: Agreement | None


def write_report(report: Report, folder: Path) -> str:
    """Write report.json and report.txt; return the text."""
    text = as_text(report) + f"\nwritten to {folder}: train with --data.sources {folder / 'sources.jsonl'}\n"
    plain = json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(plain + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(text, encoding="utf-8")
    return text


def as_text(report: Report) -> str:
    """Format the report."""
    comparison = _comparison(report)
    lines = [
        f"{report.rows:,} rows, embedded by {report.embedding}, {report.method}: {len(report.clusters)} clusters "
        f"({report.seconds:,.0f} s)"
    ]
    if report.cut:
        lines.append(f"{report.cut:,} rows are longer than --data.max_length: only their beginning was embedded")
    if report.stability:
        tried = ", ".join(f"{number}: {agreement:.2f}" for number, agreement in report.stability.items())
        lines.append(f"stability by number of clusters: {tried}")
    if report.noise:
        lines.append(f"{report.noise:.1%} of the sampled rows are in no dense cluster: assigned to the nearest")
    lines += ["", "kept: fewer rows than the average cluster, so that a run trains on all of its candidates"]
    for cluster in report.clusters:
        lines += ["", f"{cluster.name}  {cluster.size:,} rows{', kept' if cluster.kept else ''}"]
        if comparison:
            mixed = ", ".join(f"{name} {count:,}" for name, count in list(cluster.named.items())[:4])
            more = len(cluster.named) - 4
            lines.append(f"  by its column: {mixed}{f', and {more} more' if more > 0 else ''}")
        lines += [f"  {example.where}: {example.text}" for example in cluster.nearest]
    return "\n".join([*lines, *comparison, ""])


def _comparison(report: Report) -> list[str]:
    """Format the agreement of the clusters and of the baseline; nothing if the data names only one source."""
    if not report.agreement or not report.baseline:
        return []
    ours, theirs = report.agreement, report.baseline
    names = [*ours.recovered]
    width = max(map(len, [*names, "adjusted Rand index"]))
    lines = ["", "agreement with the sources that the data names, next to k-means on TF-IDF with as many clusters:"]
    lines.append(f"  {'':{width}}  {'clusters':>9} {'TF-IDF':>9}")
    lines.append(f"  {'adjusted Rand index':{width}}  {ours.adjusted_rand:9.2f} {theirs.adjusted_rand:9.2f}")
    lines.append("  share of each small source that is in kept clusters:")
    for name in names:
        lines.append(f"  {name:{width}}  {ours.recovered[name]:9.0%} {theirs.recovered[name]:9.0%}")
    lines.append(f"  {'of all rows':{width}}  {ours.kept_share:9.0%} {theirs.kept_share:9.0%}")
    return lines


def draw_map(points: np.ndarray, labels: np.ndarray, report: Report, path: Path) -> None:
    """Draw ``[n, p]`` points by their first two principal components, coloured by ``[n]`` cluster."""
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
