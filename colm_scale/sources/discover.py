"""Discovery of sources in unlabelled data: embed every row, cluster the embeddings, and report on the clusters.

Memory grows by only some 30 bytes per row: rows are read in blocks, their embeddings are in a temporary file, and
everything fitted is fitted to a sample. The rows are read twice, or three times with ``--embedding words``, which
learns its words first.

    N  rows        n  rows of a sample        c  width of an embedding        p  width of a point
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from colm_scale.clustering.cluster import MOST_COMPARED, Clusters, check_installed, hdbscan, kmeans, one_thread
from colm_scale.config.commands import SourcesOptions
from colm_scale.data.readers import Row, each_row
from colm_scale.data.source_labels import label_line
from colm_scale.errors import UserError
from colm_scale.sources.embedders import Embedder, States, Words, term_weights, text_of
from colm_scale.sources.report import Agreement, Cluster, Example, Report, draw_map, small, write_report

BLOCK = 4096
"""Rows held at a time."""
_FITTED = 100_000
"""Most points to which k-means is fitted."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embeddings of all rows.

    Attributes:
        file: ``[N, c]`` float32 embeddings.
        width: c.
        names: Sources that the data names, in the order of their first rows.
        sources: ``[N]`` int32 source of each row.
    """

    file: BinaryIO
    width: int
    names: list[str]
    sources: np.ndarray

    def blocks(self) -> Iterator[np.ndarray]:
        """Iterate over blocks of ``[4096, c]`` embeddings; the last block may be shorter."""
        self.file.seek(0)
        while block := self.file.read(4 * self.width * BLOCK):
            yield np.frombuffer(block, np.float32).reshape(-1, self.width)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Draw ``[n]`` rows, ascending."""
        rows = len(self.sources)
        return np.sort(np.random.default_rng([seed, rows]).choice(rows, min(count, rows), replace=False))

    def picked(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Iterate over the embeddings of some rows, ascending, in the order of blocks."""
        for number, block in enumerate(self.blocks()):
            start, end = np.searchsorted(rows, [number * BLOCK, (number + 1) * BLOCK])
            yield block[rows[start:end] - number * BLOCK]


def discover(options: SourcesOptions) -> str:
    """Write sources.jsonl, report.json, report.txt and map.png; return the text of report.txt.

    Raises:
        UserError: Wrong input, or the folder has a sources.jsonl already.
    """
    check_installed("sklearn", "matplotlib")
    folder = Path(options.output_dir)
    if (folder / "sources.jsonl").exists():
        raise UserError(f"--output_dir {folder} holds sources.jsonl already: use another folder, or remove it")
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    embedder = _embedder(options)
    with _writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        embedded = _embed(options, embedder, file)
        with one_thread():
            space = _space(embedded, options, scaled=embedder.scaled)
            clusters = _cluster(embedded, space, options)
            labels, distances = _assign(embedded, space, clusters)
        nearest = _nearest(labels, distances, options.nearest)
        sample = embedded.sample(MOST_COMPARED, options.seed)
        compared = sample if len(embedded.names) > 1 else sample[:0]
        shown, texts = _write_labels(options, folder, labels, nearest, compared)
        found, baseline = _agreement(embedded, labels, sample, texts, options.seed) if texts else (None, None)
        report = Report(
            rows=len(labels),
            embedding=embedder.name,
            cut=embedder.cut,
            seconds=time.perf_counter() - started,
            method=options.method,
            stability=clusters.stability,
            noise=clusters.noise,
            clusters=_described(labels, embedded, shown),
            agreement=found,
            baseline=baseline,
        )
        draw_map(_points(embedded, sample, space), labels[sample], report, folder / "map.png")
        return write_report(report, folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Create a folder and turn errors of writing to it, within the block, into a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror or error}") from None


def _embedder(options: SourcesOptions) -> Embedder:
    rows = each_row(options.files, options.data)
    if options.by_words:
        return Words(_drawn(rows, MOST_COMPARED, options.seed), options.seed)
    next(rows)  # report an error in the first row before a model is loaded
    return States(options)


def _drawn(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """Draw up to ``count`` rows at random (reservoir sampling)."""
    draws, drawn = np.random.default_rng(seed), []
    for number, row in enumerate(rows):
        if number < count:
            drawn.append(row)
        elif (place := int(draws.integers(number + 1))) < count:
            drawn[place] = row
    return drawn


def _embed(options: SourcesOptions, embedder: Embedder, file: BinaryIO) -> Embedded:
    """Embed every row, and write the embeddings to ``file`` block by block."""
    number: dict[str, int] = {}
    sources, rows, started = [np.zeros(0, np.int32)], 0, time.perf_counter()
    passing = each_row(options.files, options.data)
    while block := list(islice(passing, BLOCK)):
        states = embedder(block)
        if not np.isfinite(states).all():
            row = block[int((~np.isfinite(states)).any(1).argmax())]
            raise UserError(f"{row.where} has an embedding that is not finite: try --dtype float32, or another model")
        file.write(states.tobytes())
        sources.append(np.array([number.setdefault(row.source, len(number)) for row in block], np.int32))
        rows += len(block)
        print(f"embedded {rows:,} rows in {time.perf_counter() - started:,.0f} s", file=sys.stderr, flush=True)
    return Embedded(file, states.shape[1], list(number), np.concatenate(sources))


def _space(embedded: Embedded, options: SourcesOptions, *, scaled: bool) -> Any:
    """Fit principal components to a sample, after standardising each dimension if ``scaled``."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sample = np.concatenate([*embedded.picked(embedded.sample(MOST_COMPARED, options.seed))])
    components = min(options.dimensions, *sample.shape)
    scaler = StandardScaler() if scaled else None
    return make_pipeline(scaler, PCA(components, random_state=options.seed)).fit(sample)


def _cluster(embedded: Embedded, space: Any, options: SourcesOptions) -> Clusters:
    points = _points(embedded, embedded.sample(_FITTED, options.seed), space)
    if options.method == "hdbscan":
        return hdbscan(points, options.smallest, options.seed)
    return kmeans(points, options.clusters, options.stability, options.seed)


def _points(embedded: Embedded, rows: np.ndarray, space: Any) -> np.ndarray:
    """Return ``[n, p]`` the points of some rows, ascending."""
    return np.concatenate([space.transform(some) for some in embedded.picked(rows) if len(some)])


def _assign(embedded: Embedded, space: Any, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[N]`` cluster of every row, numbered by size, the largest first, and ``[N]`` distance to its centre."""
    found = [clusters.assign(space.transform(block)) for block in embedded.blocks()]
    labels, distances = (np.concatenate(parts) for parts in zip(*found))
    by_size = np.bincount(labels, minlength=len(clusters.centres)).argsort(kind="stable")[::-1]
    place = np.empty_like(by_size)
    place[by_size] = np.arange(len(by_size))
    return place[labels].astype(np.int32), distances


def _nearest(labels: np.ndarray, distances: np.ndarray, count: int) -> list[list[int]]:
    """Find the ``count`` rows nearest to the centre of each cluster."""
    order = np.lexsort((distances, labels))
    starts = np.searchsorted(labels[order], np.arange(labels.max() + 2))
    return [order[start:end][:count].tolist() for start, end in pairwise(starts)]


def name_of(cluster: int) -> str:
    return f"cluster-{cluster:02d}"


def _write_labels(
    options: SourcesOptions,
    folder: Path,
    labels: np.ndarray,
    nearest: Sequence[Sequence[int]],
    compared: np.ndarray,
) -> tuple[dict[int, Example], list[str]]:
    """Write sources.jsonl while reading the rows again; return the nearest rows, and the texts of the compared ones.

    Raises:
        UserError: There are more or fewer rows than before.
    """
    wanted, sampled = {row for rows in nearest for row in rows}, set(compared.tolist())
    shown: dict[int, Example] = {}
    texts, count, new = [], 0, folder / ".sources.jsonl.new"
    with new.open("w", encoding="utf-8") as file:
        for row in each_row(options.files, options.data):
            count += 1
            if count > len(labels):
                continue
            file.write(label_line(row, name_of(labels[row.id])))
            if row.id in wanted:
                shown[row.id] = Example.of(row)
            if row.id in sampled:
                texts.append(text_of(row))
    if count != len(labels):
        new.unlink()
        raise UserError(f"the data has changed while it was read: it had {len(labels)} rows and now has {count}")
    new.replace(folder / "sources.jsonl")
    return shown, texts


def _agreement(
    embedded: Embedded, labels: np.ndarray, sample: np.ndarray, texts: list[str], seed: int
) -> tuple[Agreement, Agreement]:
    """Compare the named sources with the clusters, and with as many clusters of k-means on TF-IDF, on one sample."""
    from sklearn.cluster import KMeans

    names, sources = embedded.names, embedded.sources[sample]
    weights = term_weights().fit_transform(texts)
    with one_thread():
        by_words = KMeans(int(labels.max()) + 1, n_init=3, random_state=seed).fit_predict(weights)
    return Agreement.of(names, sources, labels[sample]), Agreement.of(names, sources, by_words)


def _described(labels: np.ndarray, embedded: Embedded, shown: dict[int, Example]) -> list[Cluster]:
    kept, found = small(labels), []
    for cluster, size in enumerate(np.bincount(labels).tolist()):
        within = np.bincount(embedded.sources[labels == cluster], minlength=len(embedded.names))
        mixed = {embedded.names[source]: int(within[source]) for source in within.argsort()[::-1] if within[source]}
        examples = [example for row, example in shown.items() if labels[row] == cluster]
        found.append(Cluster(name_of(cluster), size, bool(kept[cluster]), examples, mixed))
    return found
