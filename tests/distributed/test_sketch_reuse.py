"""Sketches that are reused: the same on two ranks under any engine as on one."""

from __future__ import annotations

import functools

import pytest
import torch
from support import worker
from support.cases import REUSE_STEPS

JOBS = {
    "auto": ("reused_1", "reused_3", "reused_sketch_broken"),
    "fsdp > auto": ("reused_3_broken",),
    "zero2": ("reused_sketch",),
    "zero3": ("reused_1",),
}
CASES = ("reused_1", "reused_3", "reused_sketch")
PAIRS = [(engine, case) for engine, cases in JOBS.items() for case in cases]
EPOCH = 4
"""Steps in which 96 examples are each a candidate once."""


@functools.cache
def ages(case: str, candidate_ids: tuple[tuple[int, ...], ...], positions: tuple[tuple[int, ...], ...]):
    """By step, for each row of the matrix, how many steps ago its sketch was made; 0 for those to be made."""
    reuse, made, found = worker.CASES[case].selection.reuse, {}, []
    for step, (ids, rows) in enumerate(zip(candidate_ids, positions), 1):
        old = [step - made.get(ids[row], -reuse) for row in rows]
        found.append([age if age <= reuse else 0 for age in old])
        made |= {ids[row]: step for row, age in zip(rows, found[-1]) if not age}
    return found


def ages_of(case: str, steps: list[dict]) -> list[list[int]]:
    ids = tuple(tuple(step["candidate_ids"].tolist()) for step in steps)
    return ages(case, ids, tuple(tuple(step["matrix"]["positions"].tolist()) for step in steps))


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_are_those_of_one_process_that_never_stopped(ranks, alone, engine, case):
    expected = alone[case.removesuffix("_broken")]["steps"]
    for cases in ranks:
        steps = cases[f"{engine}/{case}"]["steps"]
        assert [step["ids"].tolist() for step in steps] == [step["ids"].tolist() for step in expected]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_who_has_a_fresh_sketch_is_not_forwarded(ranks, engine, case):
    steps = [cases[f"{engine}/{case}"]["steps"] for cases in ranks]
    expected = ages_of(case, steps[0])
    assert any(age for of_step in expected for age in of_step)
    for number, of_step in enumerate(expected):
        new = of_step.count(0)
        assert sum(of_rank[number]["own"] for of_rank in steps) == new
        for of_rank in steps:
            step = of_rank[number]
            assert (step["sketched_batches"] > 0) == ("gather" in step["bytes"]) == (new > 0)
            old = [age for age in of_step if age]
            assert step["telemetry"]["reused_share"] == pytest.approx(len(old) / len(of_step))
            assert step["telemetry"]["reused_age"] == pytest.approx(sum(old) / max(1, len(old)))


def test_later_epochs_forward_nothing_but_the_coreset(alone):
    steps = alone["reused_3"]["steps"]
    assert len(steps) == REUSE_STEPS > 2 * EPOCH
    for number, step in enumerate(steps, 1):
        sketched = step["forwards"] - step["trained_batches"]
        assert sketched == 3 * step["sketched_batches"]  # the blocks below the last run once, and it once a direction
        assert (sketched > 0) == (number <= EPOCH)
        assert step["sketched"] > 0, "candidates are compared in every step"


@pytest.mark.parametrize("case", ["reused_1", "reused_3"])
def test_coefficients_are_those_of_the_step_that_made_them(alone, case):
    steps = alone[case]["steps"]
    for number, old in enumerate(ages_of(case, steps)):
        step = steps[number]
        for position, age, row in zip(step["matrix"]["positions"], old, step["coefficients"]):
            then = steps[number - age]
            (before,) = (then["candidate_ids"] == step["candidate_ids"][position]).nonzero().flatten()
            assert torch.equal(row, then["coefficients"][torch.searchsorted(then["matrix"]["positions"], before)])


def test_rows_of_old_coefficients_are_made_with_the_moments_of_now(alone):
    """The scalar map of one probe, and moments that also learn from reused coefficients."""
    beta1, beta2 = worker.run_config(worker.CASES["reused_1"]).train.betas
    first = second = torch.zeros(1)
    for count, step in enumerate(alone["reused_1"]["steps"], 1):
        c = step["coefficients"]
        m, v = beta1 * first + (1 - beta1) * c, beta2 * second + (1 - beta2) * c.square()
        expected = m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt() + 1e-8)
        torch.testing.assert_close(step["matrix"]["rows"], expected, rtol=1e-5, atol=1e-6)
        picked = torch.searchsorted(step["matrix"]["positions"], step["positions"][step["kept"] :])
        first = beta1 * first + (1 - beta1) * c[picked].mean(0)
        second = beta2 * second + (1 - beta2) * c[picked].square().mean(0)
        torch.testing.assert_close(step["moments"], (first, second), rtol=1e-5, atol=1e-6)


def test_exact_moments_learn_only_where_a_gradient_is_at_hand(alone):
    steps = alone["reused_sketch"]["steps"]
    learned = []
    for before, step, old in zip(steps, steps[1:], ages_of("reused_sketch", steps)[1:]):
        fresh = {position for position, age in zip(step["matrix"]["positions"].tolist(), old) if not age}
        picked = set(step["positions"][step["kept"] :].tolist())
        learned.append(bool(fresh & picked))
        same = all(torch.equal(one, other) for one, other in zip(before["moments"], step["moments"]))
        assert same != learned[-1]
    assert any(learned)
