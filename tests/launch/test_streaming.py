"""A run on streamed data that goes on from the middle of a block, an epoch or the run is one that never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import rows
from support.faults import Workshop, result

STREAMED = (
    *("--data.streaming", "true", "--data.shuffle_rows", "13", "--checkpoint.every", "1", "--checkpoint.keep", "20"),
)
"""Blocks of 13 of the 56 rows, 16 candidates a step: steps begin in the middle of blocks, and 20 are over 5 epochs."""


@pytest.fixture(scope="module")
def workshop(forked, tmp_path_factory) -> Workshop:
    return Workshop(forked, tmp_path_factory.mktemp("streaming"), steps=20)


@pytest.fixture(scope="module")
def whole(workshop) -> Path:
    """A run of 20 steps under DDP."""
    run = workshop.folder / "whole"
    workshop.start(run, "ddp", *STREAMED).outcome(120).succeeded()
    return run


@pytest.mark.parametrize("step", [1, 7, 19])
def test_streamed_data_goes_on_in_the_middle(workshop, whole, step):
    run = workshop.folder / f"from-{step}"
    checkpoint = f"checkpoints/step-{step:08d}"
    shutil.copytree(whole / checkpoint, run / checkpoint)
    for file in whole.glob("*.jsonl"):
        shutil.copy(file, run)
    outcome = workshop.go_on(run, "ddp", *STREAMED).succeeded()
    assert f"resuming after step {step}," in outcome.stdout
    assert result(run) == result(whole)


def test_every_row_is_a_candidate_once_per_epoch(whole):
    drawn = [row["candidates"] for row in rows(whole / "selection.jsonl")]
    stream = [number for candidates in drawn for number in candidates]
    assert len(stream) == 320
    for epoch in range(5):
        assert sorted(stream[epoch * 56 :][:56]) == list(range(56))
    assert stream[:56] != stream[56:112]


def test_other_ranks_and_engines_see_the_same_stream(workshop, whole):
    run = workshop.folder / "alone"
    workshop.start(run, "single", *STREAMED, ranks=1).outcome(120).succeeded()
    ours, theirs = (rows(folder / "selection.jsonl") for folder in (run, whole))
    assert [row["candidates"] for row in ours] == [row["candidates"] for row in theirs]
    assert ours[0]["selected"] == theirs[0]["selected"]
