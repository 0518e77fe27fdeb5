"""A whole run on two ranks under three engines: it ends, and its first step trains what one process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import rows
from support.faults import SECONDS, Workshop, newest_checkpoint

STEPS = 2


@pytest.fixture(scope="module")
def workshop(forked, tmp_path_factory) -> Workshop:
    return Workshop(forked, tmp_path_factory.mktemp("smoke"), steps=STEPS)


@pytest.fixture(scope="module")
def alone(workshop) -> Path:
    run = workshop.folder / "alone"
    workshop.start(run, "single", ranks=1).outcome(SECONDS).succeeded()
    return run


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp"])
def test_a_run_on_two_ranks_trains_what_one_process_trains(workshop, alone, engine):
    run = workshop.folder / engine
    workshop.start(run, engine).outcome(SECONDS).succeeded()
    metrics = [rows(folder / "metrics.jsonl") for folder in (run, alone)]
    assert [len(of_run) for of_run in metrics] == [STEPS, STEPS]
    assert all(len(row["peak_bytes"]) == 2 for row in metrics[0])
    # Gradients are summed in another order: the first step is the same, those after it nearly so.
    first = [rows(folder / "selection.jsonl")[0] for folder in (run, alone)]
    assert first[0] == first[1]
    for name in ("loss", "gradient_norm"):
        assert metrics[0][0][name] == pytest.approx(metrics[1][0][name], rel=1e-5)
    assert newest_checkpoint(run) == STEPS
    assert (run / "adapter" / "adapter_model.safetensors").exists()
