"""Selection against the published code: three consecutive steps of each case, composed as the product composes them.

The reference breaks ties by the order in which its libraries happen to sort, so where candidates tie the *value* of a
choice is compared, not the choice. Step 1 is all ties: every entry of an update is +1 or -1 there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import candidates_of
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Quota
from colm_scale.selection.mask import source_sums, top_columns
from colm_scale.selection.moments import AdamMoments
from colm_scale.selection.quota import allocate
from colm_scale.selection.ranking.facility import cluster_sizes, objective
from colm_scale.selection.ranking.similarity import similarities
from colm_scale.selection.select import select_coreset

CASES = sorted((Path(__file__).parent / "cases").glob("case_*.npz"))
METRICS = {"l1": "l1", "euclidean": "l2", "cosine": "cosine"}
NUMBER_OF_CASES = 19


@dataclass
class Step:
    """One step of a case: what the reference was given and what it chose."""

    sources: Tensor
    coefficients: Tensor
    """``[n, 1]`` of a rank-one case, else empty."""
    gradients: Tensor
    moments: AdamMoments
    """Before the step."""
    kept: Tensor
    per_source: Tensor
    selected: Tensor
    weights: Tensor
    objective: float
    after: tuple[Tensor, Tensor]

    @property
    def picked(self) -> Tensor:
        return self.selected[len(self.kept) :]


@dataclass
class Case:
    meta: dict
    metric: str
    kept_sources: Tensor
    steps: list[Step]


def load(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as stored:
        numbers = {key: torch.from_numpy(stored[key]) for key in stored.files if key != "meta"}
        meta = json.loads(str(stored["meta"]))
    kept_sources = torch.zeros(meta["Q"], dtype=torch.bool)
    kept_sources[meta["kept"]] = True
    moments = AdamMoments(*torch.zeros(2, meta["d"], dtype=torch.float64), 0, tuple(meta["betas"]), meta["eps"])
    steps = []
    for t in (1, 2, 3):
        coefficients = numbers[f"coef_{t}"].double().unsqueeze(1) if meta["rank1"] else torch.empty(meta["n"], 0)
        per_source = torch.zeros(meta["Q"], dtype=torch.int64)
        per_source[numbers[f"quota_sources_{t}"].long()] = numbers[f"quota_{t}"].long()
        after = numbers[f"m_{t}"], numbers[f"v_{t}"]
        steps.append(
            Step(
                sources=numbers[f"sources_{t}"].long(),
                coefficients=coefficients,
                gradients=coefficients * numbers["z"] if meta["rank1"] else numbers[f"gradients_{t}"].double(),
                moments=moments,
                kept=numbers[f"kept_{t}"].long(),
                per_source=per_source,
                selected=numbers[f"selected_{t}"].long(),
                weights=numbers[f"weights_{t}"],
                objective=float(numbers[f"objective_{t}"]),
                after=after,
            )
        )
        moments = AdamMoments(*after, t, moments.betas, moments.epsilon)
    return Case(meta, METRICS[meta["metric"]], kept_sources, steps)


def fixed_point_columns(step: Step, h: int) -> Tensor:
    """``[Q, h]`` the columns the product chooses."""
    u = step.moments.normalise(step.gradients)
    return top_columns(source_sums(u, step.sources, len(step.per_source), len(u)), h)


def source_means(step: Step) -> Tensor:
    """``[Q, d]`` absolute mean update of each source in float64, which the reference ranks columns by."""
    sums = torch.zeros(len(step.per_source), step.gradients.shape[1], dtype=torch.float64)
    sums.index_add_(0, step.sources, step.moments.normalise(step.gradients))
    return sums.abs() / torch.bincount(step.sources, minlength=len(sums)).clamp(min=1).unsqueeze(1)


def float64_columns(step: Step, h: int) -> Tensor:
    return source_means(step).sort(dim=1, descending=True, stable=True).indices[:, :h].sort(1).values


def masked_rows(step: Step, h: int) -> Tensor:
    """``[n, h]`` normalised rows of every candidate at its own source's columns.

    At step 1 the reference tells columns apart by 1e-8 (what Adam's epsilon takes from 1), which the product's fixed
    point calls a tie. Values in different columns cannot be compared, so there the reference's are taken.
    """
    columns = fixed_point_columns(step, h) if step.moments.step else float64_columns(step, h)
    return step.moments.normalise(step.gradients).gather(1, columns[step.sources])


def value(rows: Tensor, step: Step, positions: Tensor, metric: str) -> float:
    """Facility-location value of ``positions``, summed over the sources that have a quota."""
    total = 0.0
    for source in step.sources[positions].unique():
        members = (step.sources == source).nonzero().flatten()
        picks = torch.isin(members, positions).nonzero().flatten()
        total += objective(similarities(rows[members], metric), picks)
    return total


def choose(case: Case, step: Step, rows: Tensor, weights: str = "uniform"):
    quota = Quota(step.kept, step.per_source)
    positions = quota.to_sketch(step.sources)
    matrix = CandidateMatrix(
        positions, rows[positions], torch.ones(len(positions), dtype=torch.bool), torch.zeros(len(positions))
    )
    config = SelectionConfig(ranking="facility", metric=case.metric, weights=weights)
    return select_coreset(matrix, step.sources, quota, config, partial(generator, 0, "facility"))


def test_all_cases_are_here():
    assert len(CASES) == NUMBER_OF_CASES


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request) -> Case:
    return load(request.param)


def test_quotas_are_the_reference_s(case):
    for step in case.steps:
        quota = allocate(candidates_of(step.sources), case.kept_sources, case.meta["b"], generator(0, "overflow"))
        assert quota.kept.tolist() == step.kept.tolist()
        assert quota.overflow == 0
        others = torch.bincount(step.sources, minlength=case.meta["Q"]).masked_fill(case.kept_sources, 0)
        floors = (others * int(step.per_source.sum()) // others.sum()).tolist()
        mine, theirs = quota.per_source.tolist(), step.per_source.tolist()
        # The reference sorts floors with an unstable sort: among equal ones, which gets the extra one is its accident.
        assert sorted(zip(floors, mine)) == sorted(zip(floors, theirs))


def test_quotas_differ_from_the_reference_only_in_the_two_steps_where_floors_tie():
    different = []
    for path in CASES:
        loaded = load(path)
        for number, step in enumerate(loaded.steps, start=1):
            candidates = candidates_of(step.sources)
            quota = allocate(candidates, loaded.kept_sources, loaded.meta["b"], generator(0, "overflow"))
            if not torch.equal(quota.per_source, step.per_source):
                different.append((path.stem, number))
    assert different == [("case_108", 3), ("case_110", 3)]


def test_columns_are_the_reference_s(case):
    h = case.meta["h"]
    for step in case.steps:
        present = step.sources.unique()
        fixed, exact = fixed_point_columns(step, h)[present], float64_columns(step, h)[present]
        means = source_means(step)[present]
        # Rounding moves each entry, and so a mean, by at most half a unit, which is 2**-19 for 128 candidates.
        torch.testing.assert_close(
            means.gather(1, fixed).sort().values, means.gather(1, exact).sort().values, rtol=0, atol=2**-20
        )
        if step.moments.step and not case.meta["rank1"]:  # all columns of a rank-one case tie
            assert torch.equal(fixed, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_picks_are_worth_as_much_as_the_reference_s(case, dtype):
    for step in case.steps:
        rows = masked_rows(step, case.meta["h"])
        selection = choose(case, step, rows.to(dtype))
        assert selection.positions[: selection.kept].tolist() == step.kept.tolist()
        assert step.sources[selection.picked].tolist() == step.sources[step.picked].tolist()
        # Greedy breaks ties otherwise than the reference, which on the line (rank one) leads to other local choices,
        # worth up to 0.5 % less or more; elsewhere only the rounding of float32 rows is left. Rounded to float32 the
        # ties of the line are exact, and in one step of case_121 greedy then ends 0.9 % lower: the product solves rows
        # on the line exactly instead (the last test of this file).
        if case.meta["rank1"] and dtype == torch.float32:
            continue
        relative = 5e-3 if case.meta["rank1"] else 1e-5
        reached = value(rows, step, selection.picked, case.metric)
        assert reached >= step.objective - max(relative * abs(step.objective), 1e-3)


def test_value_of_the_reference_s_picks_is_the_reference_s(case):
    for step in case.steps:
        reached = value(masked_rows(step, case.meta["h"]), step, step.picked, case.metric)
        # float64 here, float32 similarities there: 1e-7. Its euclidean distances come from a float32 matrix product,
        # whose rounding the root near 0 turns into a distance of up to 1e-3 from a candidate to itself.
        assert reached == pytest.approx(step.objective, rel=1e-4 if case.metric == "l2" else 1e-6, abs=1e-5)


def test_moments_are_the_reference_s(case):
    for step in case.steps:
        rows = step.gradients[step.picked]
        learned = step.moments.learn(rows.mean(0), rows.square().mean(0))
        # The reference averages the rows' moments, we take the moments of the average: float64 rounding.
        torch.testing.assert_close(learned.first, step.after[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(learned.second, step.after[1], rtol=0, atol=1e-6)
        assert learned.step == step.moments.step + 1


def test_weights_are_the_reference_s(case):
    for step in case.steps[1:]:  # without ties
        rows = masked_rows(step, case.meta["h"])
        weights = [1.0] * len(step.kept)
        for source in step.sources[step.picked].unique():
            members = (step.sources == source).nonzero().flatten()
            picks = torch.searchsorted(members, step.picked[step.sources[step.picked] == source])
            weights += cluster_sizes(similarities(rows[members], case.metric), picks).tolist()
        assert weights == step.weights.tolist()


def test_one_number_per_candidate_stands_for_a_rank_one_row():
    """Two scalar moments, and facility location on the line, in place of d columns and a mask."""
    found = [loaded for loaded in map(load, CASES) if loaded.meta["rank1"]]
    assert len(found) == 7
    for case in found:
        moments = AdamMoments(*torch.zeros(2, 1, dtype=torch.float64), 0, tuple(case.meta["betas"]), case.meta["eps"])
        for step in case.steps:
            line = moments.normalise(step.coefficients)
            selection = choose(case, step, line)
            rows = masked_rows(step, case.meta["h"])
            # On the line the picks are the optimum, so only the rounding of similarities is left.
            reached = value(rows, step, selection.picked, case.metric)
            assert reached >= step.objective - max(1e-5 * abs(step.objective), 1e-3)
            picked = step.coefficients[step.picked]
            moments = moments.learn(picked.mean(0), picked.square().mean(0))
            z = step.gradients[0] / step.coefficients[0]
            torch.testing.assert_close(moments.first * z, step.after[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(moments.second * z.square(), step.after[1], rtol=0, atol=1e-6)
