"""Explanation of a run from its record: how its selection treated sources and examples.

An example is favoured if it was trained on more often than chance explains. Chance draws the same number of picks of
its source in each step at random, as `stratified` does, so that the count follows a Poisson binomial distribution. A
source is favoured if more of it was trained on than by a uniform draw of the same size from each step's candidates:
hypergeometric in each step, approximately normal in the sum.

    N  examples        Q  sources
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colm_scale.data.recorded_selection import FILE, recorded_steps
from colm_scale.errors import UserError
from colm_scale.explain.chance import distribution, false_discovery, family_wise, most_extreme, two_sided
from colm_scale.explain.tally import Floats, Ints, Tally, tally

_BLOCK = 1 << 22
"""Probabilities computed at a time, 32 MB."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Numbers of one source.

    Attributes:
        examples: Training examples of the source; None if the run has not recorded it.
        candidates, trained: Examples that were candidates, and trained on, at least once.
        candidacies, selections, kept: Total times that its examples were candidates, trained on, and kept.
        expected: Expected selections of a uniform draw from each step's candidates.
        p_value: Probability of as large a difference by such draws, corrected for all sources (Holm).
        favoured: 1 if significantly more was trained on than by such draws, -1 if significantly less, else 0.
        spread: Variance of the examples' selections over that of random picks of the same number: 1 by chance, more if
            the same examples are picked repeatedly, less if they take turns. None if always all or none are picked.
        reasons: Number of candidates by reason, from the audit; empty without one.
    """

    name: str
    examples: int | None
    candidates: int
    trained: int
    candidacies: int
    selections: int
    kept: int
    expected: float
    p_value: float
    favoured: int
    spread: float | None
    reasons: Mapping[str, int]

    @property
    def known(self) -> int:
        """Training examples of the source; if not recorded, those that were candidates."""
        return self.candidates if self.examples is None else self.examples

    @property
    def coverage(self) -> float:
        """Share of its `known` examples that were trained on."""
        return self.trained / self.known if self.known else 0.0


@dataclass(frozen=True, slots=True)
class ExampleFacts:
    """Columns ``[N]`` of all known examples, sorted by id.

    Attributes:
        sources: Indices into `Explanation.sources`.
        candidacies, selections: Times that each was a candidate, and trained on.
        expected: Expected selections by chance.
        p_values: Two-sided p-values of the selections; 1 if chance allows only one outcome.
        adjusted: The same, corrected for all examples (Benjamini and Hochberg).
        testable: bool, examples for which some outcome would be significant even alone.
    """

    ids: Ints
    sources: Ints
    candidacies: Ints
    selections: Ints
    expected: Floats
    p_values: Floats
    adjusted: Floats
    testable: np.ndarray


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of a run.

    Attributes:
        alpha: Significance level.
        lists_all: True if ``examples`` includes those that never were candidates.
        histogram: ``[2, most + 1]`` number of examples trained on 0, 1, ... times: in the run, and expected by chance.
    """

    run: Path
    steps: int
    alpha: float
    sources: Sequence[SourceFacts]
    examples: ExampleFacts
    lists_all: bool
    tally: Tally
    histogram: Floats

    @property
    def never_candidates(self) -> Ints:
        """Ids of the examples that never were candidates; empty unless ``lists_all``."""
        found: Ints = self.examples.ids[self.examples.candidacies == 0]
        return found

    @property
    def never_trained(self) -> Ints:
        """Ids of the candidates that were never trained on, those with the most candidacies first."""
        found = (self.examples.candidacies > 0) & (self.examples.selections == 0)
        order = np.argsort(-self.examples.candidacies[found], kind="stable")
        ids: Ints = self.examples.ids[found][order]
        return ids

    def told_apart(self, sign: int) -> Ints:
        """Find the examples trained on more often (1) or less often (-1) than by chance, by ascending p-value."""
        examples = self.examples
        found = (examples.adjusted <= self.alpha) & (np.sign(examples.selections - examples.expected) == sign)
        places: Ints = found.nonzero()[0]
        ordered: Ints = places[np.argsort(examples.p_values[places], kind="stable")]
        return ordered


def explain(run: Path, alpha: float) -> Explanation:
    """Explain the run in a run directory.

    Raises:
        UserError: It is not a run directory, or its record is damaged.
    """
    if not (run / FILE).is_file():
        raise UserError(f"{run} is not the directory of a run that has made a step: there is no {FILE} in it")
    counts = tally(recorded_steps(run / FILE))
    lists_all = (run / "examples.parquet").is_file()
    known = _known(run / "examples.parquet") if lists_all else (np.zeros(0, np.int64), ())
    sizes = Counter(known[1]) if lists_all else _sizes(run)
    names = [*counts.names, *(name for name in sizes if name not in counts.names)]
    examples, histogram = _examples(counts, names, known, alpha)
    sources = _sources(counts, names, sizes, examples, _reasons(run / "audit"), alpha)
    return Explanation(run, len(counts.candidates), alpha, sources, examples, lists_all, counts, histogram)


def _examples(
    counts: Tally, names: Sequence[str], known: tuple[Ints, Sequence[str]], alpha: float
) -> tuple[ExampleFacts, Floats]:
    """Build the columns of all examples, with those of the ``known`` ones that never were candidates; a histogram."""
    ids, first, inverse = np.unique(counts.ids, return_index=True, return_inverse=True)
    candidacies = np.bincount(inverse)
    selections = np.bincount(inverse, counts.chosen).astype(np.int64)
    expected = np.bincount(inverse, counts.chances)
    p_values, least, histogram = _tested(counts, inverse, candidacies, selections)
    tested = least < 1
    adjusted = np.ones(len(ids))
    adjusted[tested] = false_discovery(p_values[tested])
    testable = least * max(1, tested.sum()) <= alpha
    columns = [ids, counts.sources[first], candidacies, selections, expected, p_values, adjusted, testable]
    absent = ~np.isin(known[0], ids)
    number = {name: place for place, name in enumerate(names)}
    of = np.array([number[name] for name in np.asarray(known[1], object)[absent]], np.int64)
    fill = (0, 0, 0.0, 1.0, 1.0, False)
    more = [known[0][absent], of, *(np.full(len(of), value) for value in fill)]
    columns = [np.concatenate(pair) for pair in zip(columns, more)]
    order = columns[0].argsort()
    return ExampleFacts(*(column[order] for column in columns)), histogram


def _tested(counts: Tally, inverse: Ints, candidacies: Ints, selections: Ints) -> tuple[Floats, Floats, Floats]:
    """Compute ``[N]`` p-values, ``[N]`` the smallest possible ones, and the histogram of `Explanation`."""
    p_values, least = np.ones(len(candidacies)), np.ones(len(candidacies))
    by_example = np.argsort(inverse, kind="stable")
    starts = np.concatenate([[0], np.cumsum(candidacies)[:-1]])
    histogram = np.zeros((2, int(candidacies.max()) + 1))
    histogram[0] = np.bincount(selections, minlength=histogram.shape[1])
    for times in np.unique(candidacies):
        own = (candidacies == times).nonzero()[0]
        for block in np.array_split(own, math.ceil(len(own) * (times + 1) / _BLOCK)):
            of_block = by_example[starts[block][:, np.newaxis] + np.arange(times)]
            found = distribution(counts.chances[of_block])
            p_values[block], least[block] = two_sided(found, selections[block]), most_extreme(found)
            histogram[1, : times + 1] += found.sum(0)
    return p_values, least, histogram


def _sources(
    counts: Tally,
    names: Sequence[str],
    sizes: Mapping[str, int],
    examples: ExampleFacts,
    reasons: Mapping[str, Mapping[str, int]],
    alpha: float,
) -> list[SourceFacts]:
    num, found = len(names), []
    absent = num - len(counts.names)  # the last sources, which never had a candidate
    expected, p_values = _uniform(counts)
    expected, p_values = np.pad(expected, (0, absent)), np.pad(family_wise(p_values), (0, absent), constant_values=1)
    totals = [np.pad(of.sum(0), (0, absent)).tolist() for of in (counts.candidates, counts.trained, counts.kept)]
    variances = np.bincount(counts.sources, counts.chances * (1 - counts.chances), num)
    squares = np.bincount(examples.sources, (examples.selections - examples.expected) ** 2, num)
    seen = np.bincount(examples.sources[examples.candidacies > 0], minlength=num)
    trained = np.bincount(examples.sources[examples.selections > 0], minlength=num)
    for place, name in enumerate(names):
        candidacies, selections, kept = (of[place] for of in totals)
        spread = float(squares[place] / variances[place]) if variances[place] > 0 else None
        found.append(
            SourceFacts(
                name,
                examples=sizes.get(name),
                candidates=int(seen[place]),
                trained=int(trained[place]),
                candidacies=candidacies,
                selections=selections,
                kept=kept,
                expected=float(expected[place]),
                p_value=float(p_values[place]),
                favoured=int(np.sign(selections - expected[place])) if p_values[place] <= alpha else 0,
                spread=spread,
                reasons=dict(reasons.get(name, {})),
            )
        )
    return found


def _uniform(counts: Tally) -> tuple[Floats, Floats]:
    """Compute ``[Q]`` expected selections of uniform draws, and ``[Q]`` p-values of the actual ones."""
    n, b = counts.candidates.sum(1, keepdims=True), counts.trained.sum(1, keepdims=True)
    share = counts.candidates / n
    variance = (b * share * (1 - share) * (n - b) / np.maximum(n - 1, 1)).sum(0)
    expected = (b * share).sum(0)
    apart = np.abs(counts.trained.sum(0) - expected) - 0.5  # continuity correction
    z = np.clip(apart, 0, None) / np.sqrt(np.where(variance > 0, variance, 1))
    return expected, np.where(variance > 0, [math.erfc(of / math.sqrt(2)) for of in z], 1.0)


def _sizes(run: Path) -> dict[str, int]:
    """Read the number of training examples of each source from ``run.json``; empty if it has none."""
    try:
        found = json.loads((run / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {source["name"]: source["examples"] for source in found.get("sources", ())}


def _known(file: Path) -> tuple[Ints, Sequence[str]]:
    """Read ids and sources of all training examples."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=["id", "source"])
    return table["id"].to_numpy(), table["source"].to_pylist()


def _reasons(folder: Path) -> dict[str, dict[str, int]]:
    """Count the candidates of each source by reason."""
    found: dict[str, dict[str, int]] = {}
    for part in sorted(folder.glob("part-*.parquet")):
        import pyarrow.parquet as pq

        table = pq.read_table(part, columns=["source", "reason"])
        for row in table.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
            of_source = found.setdefault(row["source"], {})
            of_source[row["reason"]] = of_source.get(row["reason"], 0) + row["count_all"]
    return found
