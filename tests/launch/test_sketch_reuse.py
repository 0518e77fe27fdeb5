"""Launched runs with sketches that count for later epochs, on data that is streamed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import rows
from support.faults import Workshop

BREAK = 5
"""Steps before the break. A step has 16 of the 56 rows as candidates, so the first epoch ends within step 4."""


OPTIONS = (
    *("--data.streaming", "true", "--data.shuffle_rows", "13", "--checkpoint.every", "1", "--checkpoint.keep", "9"),
    *("--selection.estimator", "zeroth_order", "--selection.reuse", "99", "--selection.kept_sources", "[]"),
)


@pytest.fixture(scope="module")
def workshop(forked, tmp_path_factory) -> Workshop:
    return Workshop(forked, tmp_path_factory.mktemp("reuse"), steps=8)


@pytest.fixture(scope="module")
def whole(workshop) -> Path:
    """A run of 8 steps on one rank."""
    run = workshop.folder / "whole"
    workshop.start(run, "single", *OPTIONS, ranks=1).outcome(120).succeeded()
    return run


def broken(workshop: Workshop, whole: Path, name: str) -> Path:
    """The same after `BREAK` steps."""
    run = workshop.folder / name
    checkpoint = f"checkpoints/step-{BREAK:08d}"
    shutil.copytree(whole / checkpoint, run / checkpoint)
    for file in whole.glob("*.jsonl"):
        shutil.copy(file, run)
    return run


def test_the_share_of_reused_sketches_is_reported(whole):
    told = [row["telemetry"]["reused_share"] for row in rows(whole / "metrics.jsonl")]
    assert told[:3] == [0.0] * 3
    assert 0 < told[3] < 1
    assert told[4:] == [1.0] * 4


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2)])
def test_a_run_goes_on_with_the_sketches_it_has_on_as_many_ranks_as_there_are(workshop, whole, engine, ranks):
    run = broken(workshop, whole, f"on-{ranks}")
    outcome = workshop.go_on(run, engine, *OPTIONS, ranks=ranks).succeeded()
    assert f"resuming after step {BREAK}," in outcome.stdout
    # All sketches are from before the break: not even rounding differs in what is compared.
    assert rows(run / "selection.jsonl") == rows(whole / "selection.jsonl")
    assert [row["telemetry"]["reused_share"] for row in rows(run / "metrics.jsonl")[BREAK:]] == [1.0] * 3
