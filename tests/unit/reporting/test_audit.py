from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq
import pytest
import torch
from unit.reporting.test_run_directory import REPORT

from colm_scale.data.examples import Examples
from colm_scale.errors import TrainingError
from colm_scale.records import REASONS, Audit, long_tensor
from colm_scale.reporting import audit
from colm_scale.reporting.audit import AuditWriter
from colm_scale.reporting.run_directory import RunDirectory

NAMES = ["algebra", "ζ"]
CODES = [REASONS.index(reason) for reason in ("passed over", "selected", "no quota", "kept")]


def report(step: int):
    found = Audit(
        reasons=torch.tensor(CODES, dtype=torch.uint8),
        scores=torch.tensor([0.5, 0.0, torch.nan, torch.nan]),
        losses=torch.tensor([1.0, 2.0, torch.nan, torch.nan]),
    )
    return dataclasses.replace(REPORT, step=step, audit=found)


def add(writer: AuditWriter, step: int) -> None:
    made = report(step)
    writer.add(made, made.audit, NAMES)


def steps_in(folder) -> dict[str, list[int]]:
    return {part.name: pq.read_table(part)["step"].to_pylist() for part in sorted(folder.iterdir())}


def test_a_row_for_every_candidate(tmp_path):
    writer = AuditWriter(tmp_path / "audit")
    add(writer, 3)
    writer.flush()
    assert pq.read_table(tmp_path / "audit").to_pylist() == [
        {"step": 3, "id": 50, "source": "algebra", "reason": "passed over", "score": 0.5, "loss": 1.0, "weight": 0.0},
        {"step": 3, "id": 60, "source": "ζ", "reason": "selected", "score": 0.0, "loss": 2.0, "weight": 2.0},
        {"step": 3, "id": 70, "source": "ζ", "reason": "no quota", "score": None, "loss": None, "weight": 0.0},
        {"step": 3, "id": 80, "source": "algebra", "reason": "kept", "score": None, "loss": None, "weight": 1.0},
    ]


def test_what_is_held_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "MOST_ROWS", 8)
    writer = AuditWriter(tmp_path)
    for step in range(1, 6):
        add(writer, step)
    assert steps_in(tmp_path) == {
        "part-00000001-00000002.parquet": [1] * 4 + [2] * 4,
        "part-00000003-00000004.parquet": [3] * 4 + [4] * 4,
    }
    writer.flush()
    writer.flush()  # there is nothing more
    assert steps_in(tmp_path)["part-00000005-00000005.parquet"] == [5] * 4
    assert len(pq.read_table(tmp_path)) == 20


def test_steps_that_come_again_are_taken_out(tmp_path):
    writer = AuditWriter(tmp_path)
    for step in range(1, 7):
        add(writer, step)
        if step % 2 == 0:
            writer.flush()
    (tmp_path / "part-00000007-00000008.parquet.new").write_bytes(b"PAR1 and no more")
    audit.cut(tmp_path, 3)
    assert steps_in(tmp_path) == {
        "part-00000001-00000002.parquet": [1] * 4 + [2] * 4,
        "part-00000003-00000003.parquet": [3] * 4,
    }


def test_a_run_that_begins_has_no_old_rows(tmp_path):
    for resume in (False, True):
        directory = RunDirectory(str(tmp_path / "run"), resume=resume)
        directory.create("", {}, after=0)
        directory.report(report(1), NAMES)
        directory.flush()
        assert steps_in(tmp_path / "run" / "audit") == {"part-00000001-00000001.parquet": [1] * 4}


def test_a_run_without_an_audit_writes_none(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    directory.create("", {})
    directory.report(REPORT, NAMES)
    directory.flush()
    assert not (tmp_path / "run" / "audit").exists()


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    directory.create("", {})
    (tmp_path / "run" / "audit").write_text("a file")
    directory.report(report(1), NAMES)
    with pytest.raises(TrainingError, match="audit cannot be written"):
        directory.flush()


def test_all_examples_are_listed(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    directory.create("", {})
    ids, sources, protected = long_tensor([4, 9]), long_tensor([1, 0]), torch.tensor([True, False])
    nothing = long_tensor([])
    directory.examples(Examples(nothing, nothing, nothing, ids, sources, protected, tuple(NAMES), {}, {}))
    assert pq.read_table(tmp_path / "run" / "examples.parquet").to_pylist() == [
        {"id": 4, "source": "ζ", "protected": True},
        {"id": 9, "source": "algebra", "protected": False},
    ]
