from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

from colm_scale.data.recorded_selection import recorded_steps
from colm_scale.errors import UserError
from colm_scale.records import Candidates, Selection, StepReport, long_tensor
from colm_scale.reporting import run_directory
from colm_scale.reporting.run_directory import RunDirectory
from colm_scale.reporting.summary import Evaluation, HeldOutLoss

REPORT = StepReport(
    step=3,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=math.inf,
    candidates=Candidates(
        step=3,
        indices=long_tensor([5, 6, 7, 8]),
        ids=long_tensor([50, 60, 70, 80]),
        sources=long_tensor([0, 1, 1, 0]),
        lengths=long_tensor([9, 9, 9, 9]),
    ),
    selection=Selection(long_tensor([3, 1]), long_tensor([1, 2]).float(), kept=1, overflow=4, invalid=5),
    seconds={"sketch": 0.25, "step": 1.0},
    peak_bytes=(10, 20),
    phase_peak_bytes={"nvml": {"sketch": (10, 15), "step": (10, 20)}},
    exchanged_bytes={"gather": 128},
    imbalance=1.5,
    padding_share={"train": math.nan},
    telemetry={"rank": 2.5, "share": math.nan},
    noise={"noise": 8.0, "signal": math.nan},
    floor=None,
)
EVALUATION = Evaluation(
    step=0,
    losses={"algebra": 2.0, "ζ": math.nan},
    accuracies={"algebra": 0.5, "ζ": None},
    counts={"algebra": 4, "ζ": 1},
    loss=2.0,
    loss_by_source=math.nan,
    small_loss=None,
    accuracy=0.5,
    whole=True,
    sample=HeldOutLoss(losses={"algebra": 2.5}, counts={"algebra": 1}, loss=2.5, loss_by_source=2.5, small_loss=None),
)


def rows(path) -> list[dict]:
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    directory = RunDirectory(str(tmp_path / "deep" / "run"))
    directory.create("train:\n  steps: 3\n", {"engine": "single", "load": math.nan}, facts={"schedule": {"steps": 3}})
    return directory


def test_a_step_is_a_row_of_metrics_and_one_of_selection(directory):
    directory.report(REPORT, ["algebra", "ζ"])
    assert rows(directory.path / "metrics.jsonl") == [
        {
            "step": 3,
            "loss": 2.5,
            "learning_rate": 1e-3,
            "gradient_norm": None,
            "applied": True,
            "loss_scale": 1.0,
            "seconds": {"sketch": 0.25, "step": 1.0},
            "measured_over_floor": None,
            "peak_bytes": [10, 20],
            "phase_peak_bytes": {"nvml": {"sketch": [10, 15], "step": [10, 20]}},
            "exchanged_bytes": {"gather": 128},
            "gradient_bytes": 0,
            "padding_share": {"train": None},
            "imbalance": 1.5,
            "candidates": 4,
            "selected": 2,
            "kept": 1,
            "invalid": 5,
            "overflow": 4,
            "telemetry": {"rank": 2.5, "share": None},
            "noise": {"noise": 8.0, "signal": None},
        }
    ]
    assert rows(directory.path / "selection.jsonl") == [
        {
            "step": 3,
            "names": ["algebra", "ζ"],
            "candidates": [50, 60, 70, 80],
            "sources": [0, 1, 1, 0],
            "selected": [80, 60],
            "weights": [1.0, 2.0],
            "kept": 1,
        }
    ]


def test_the_names_of_sources_are_written_once_until_they_change(directory):
    for number, names in enumerate([["algebra", "ζ"]] * 2 + [["algebra", "ζ", "new"]] * 2, 1):
        directory.report(dataclasses.replace(REPORT, step=number), names)
    written = [row.get("names") for row in rows(directory.path / "selection.jsonl")]
    assert written == [["algebra", "ζ"], None, ["algebra", "ζ", "new"], None]
    steps = list(recorded_steps(directory.path / "selection.jsonl"))
    assert [step.sources for step in steps] == [["algebra", "ζ", "ζ", "algebra"]] * 4


def test_a_row_of_many_candidates_takes_a_few_bytes_for_each(directory):
    n = 8192
    ids = torch.arange(n) + 100_000
    candidates = Candidates(3, ids, ids, ids % 14, torch.ones(n).long())
    selection = Selection(torch.arange(0, n, 2), torch.ones(n // 2), kept=0)
    report = dataclasses.replace(REPORT, candidates=candidates, selection=selection)
    for _ in range(2):
        directory.report(report, [f"data/CoT/source_{number}.json" for number in range(14)])
    _, line = (directory.path / "selection.jsonl").read_bytes().splitlines()
    # An id of 6 digits and a source of 1 or 2, each with a comma; of every second one an id and a weight, "1.0".
    assert len(line) < n * (7 + 2.3 + 3.5 + 2) + 200


def test_rows_are_appended_in_order_and_are_there_at_once(directory):
    for count in (1, 2, 3):
        directory.report(REPORT, ["algebra", "ζ"])
        assert len(rows(directory.path / "metrics.jsonl")) == count
        assert len(rows(directory.path / "selection.jsonl")) == count


def test_an_evaluation_is_a_row(directory):
    directory.evaluation(EVALUATION)
    assert rows(directory.path / "evaluations.jsonl") == [
        {
            "step": 0,
            "losses": {"algebra": 2.0, "ζ": None},
            "accuracies": {"algebra": 0.5, "ζ": None},
            "counts": {"algebra": 4, "ζ": 1},
            "loss": 2.0,
            "loss_by_source": None,
            "small_loss": None,
            "accuracy": 0.5,
            "whole": True,
            "sample": {
                "losses": {"algebra": 2.5},
                "counts": {"algebra": 1},
                "loss": 2.5,
                "loss_by_source": 2.5,
                "small_loss": None,
            },
        }
    ]


def test_configuration_and_environment(directory):
    assert (directory.path / "config.yaml").read_text() == "train:\n  steps: 3\n"
    assert json.loads((directory.path / "environment.json").read_text()) == {"engine": "single", "load": None}
    assert json.loads((directory.path / "run.json").read_text()) == {"schedule": {"steps": 3}}
    assert (directory.adapter, directory.log) == (directory.path / "adapter", directory.path / "log.txt")


def test_a_folder_with_a_run_is_refused(directory):
    with pytest.raises(UserError, match=rf"--output_dir {re.escape(str(directory.path))} already holds a run"):
        RunDirectory(str(directory.path))


def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path):
    first, second = RunDirectory(str(tmp_path)), RunDirectory(str(tmp_path))
    first.create("", {})
    with pytest.raises(UserError, match=r"--output_dir .* cannot be written: File exists"):
        second.create("", {})


def test_nothing_is_written_before_the_run_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory()
    assert re.fullmatch(r"runs/\d{8}-\d{6}", str(directory.path))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a writable folder"):
        RunDirectory(str(tmp_path / "file" / "run"))
    RunDirectory(str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_a_lock_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"--output_dir .* cannot be used: .*\.lock: Is a directory"):
        RunDirectory(str(tmp_path))


def test_a_run_that_goes_on_takes_later_rows_out_and_a_torn_line(directory):
    for number in (1, 2, 3):
        directory.report(dataclasses.replace(REPORT, step=number), ["algebra", "ζ"])
    with (directory.path / "selection.jsonl").open("a") as file:
        file.write('{"step": 1, "cand')
    again = RunDirectory(str(directory.path), resume=True)
    again.create("train:\n  steps: 4\n", {"engine": "ddp"}, after=2)
    for name in ("metrics.jsonl", "selection.jsonl"):
        assert [row["step"] for row in rows(directory.path / name)] == [1, 2]
    assert (directory.path / "config.yaml").read_text() == "train:\n  steps: 4\n"


def test_a_run_that_begins_again_has_no_rows(directory):
    """It was killed before its first checkpoint, so even the evaluation before training comes again."""
    directory.report(REPORT, ["algebra", "ζ"])
    directory.evaluation(EVALUATION)
    RunDirectory(str(directory.path), resume=True).create("", {}, after=0)
    assert rows(directory.metrics) == rows(directory.path / "evaluations.jsonl") == []


def test_an_evaluation_that_was_put_off_until_the_run_goes_on_is_written_once(directory):
    """After the checkpoint of step 4, the run was evaluated, and killed; the next one evaluates again."""
    for number in (0, 2, 4):
        directory.report(dataclasses.replace(REPORT, step=max(1, number)), ["algebra", "ζ"])
        directory.evaluation(dataclasses.replace(EVALUATION, step=number))
    for evaluated, there in ((4, [0, 2, 4]), (2, [0, 2]), (0, [0])):
        RunDirectory(str(directory.path), resume=True).create("", {}, after=4, evaluated=evaluated)
        assert [row["step"] for row in rows(directory.path / "evaluations.jsonl")] == there
    assert len(rows(directory.metrics)) == 3


SPOILED = {"zeros": b"\0\0\0\n", "list": b"[1]\n", "no step": b'{"loss": 2}\n', "torn": b"{"}


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED)
def test_an_end_that_a_crash_has_spoiled_is_removed(spoiled, directory):
    for number in (1, 2, 3):
        directory.report(dataclasses.replace(REPORT, step=number), ["algebra", "ζ"])
    with directory.metrics.open("ab") as file:
        file.write(spoiled)
    RunDirectory(str(directory.path), resume=True).create("", {}, after=3)
    assert [row["step"] for row in rows(directory.metrics)] == [1, 2, 3]


def test_only_the_rows_that_are_removed_are_read(directory, monkeypatch):
    for number in range(1, 51):
        directory.report(dataclasses.replace(REPORT, step=number), ["algebra", "ζ"])
    read: list[int] = []
    loads = json.loads
    monkeypatch.setattr(run_directory.json, "loads", lambda line: (read.append(1), loads(line))[1])
    RunDirectory(str(directory.path), resume=True).create("", {}, after=48)
    assert sum(read) <= 2 * 3 + 3  # of both files the two rows and the one before; and the lock
    monkeypatch.undo()
    assert [row["step"] for row in rows(directory.metrics)] == [*range(1, 49)]
