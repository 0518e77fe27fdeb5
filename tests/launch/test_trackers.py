"""A run that is followed in TensorBoard, on two ranks, and goes on there when it is resumed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from support.commands import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLLOWED = (*SMALL, "--profile.display", "off", "--checkpoint.every", "1", "--track.to", "tensorboard")


def history(run, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_resumed_run_has_one_history(forked, tmp_path):
    run = tmp_path / "run"
    for number, resumed in enumerate([(), ("--resume", str(run / "checkpoints" / "step-00000001"))]):
        options = [*FOLLOWED, "--output_dir", str(run), *resumed]
        outcome = forked.start(options, tmp_path / f"log{number}", ranks=2).outcome(180).succeeded()
        assert "warning: --track.to" not in outcome.stdout + (run / "log.txt").read_text()
    assert "resuming after step 1" in (run / "log.txt").read_text()
    assert len(list((run / "tensorboard").glob("events*"))) == 2  # of rank 0 alone, once for each start
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert history(run, "train/loss") == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in steps]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [step for step, _ in history(run, "eval/loss_by_source")] == [row["step"] for row in evaluations] == [0, 2]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed here")
def test_one_that_is_not_installed_ends_the_run_before_a_model_is_loaded(forked, tmp_path):
    options = [*SMALL, "--model.name", str(tmp_path), "--track.to", "trackio", "--output_dir", str(tmp_path / "run")]
    outcome = forked.start(options, tmp_path / "log").outcome(180)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error == "error: --track.to trackio: trackio is not installed: pip install trackio, or leave it out"
    assert not (tmp_path / "run").exists()
