from __future__ import annotations

import io
import json
import time

from rich.console import Console

from colm_scale.config.commands import DoctorConfig
from colm_scale.doctor import machine
from colm_scale.doctor.examine import examine
from colm_scale.doctor.finding import Finding, as_json, exit_code, guarded, show

FOUND = [Finding("a", "ok", "fine"), Finding("b", "problem", "bad [x]", "do this", "https://example.org/1")]


def test_only_a_problem_is_a_failure():
    assert exit_code(FOUND) == 1
    assert exit_code([Finding("a", "ok", ""), Finding("b", "warning", "")]) == 0


def test_the_table_has_what_to_do_and_verbatim_text():
    out = io.StringIO()
    show(FOUND, Console(file=out))
    for words in ("bad [x]", "-> do this", "https://example.org/1", "1 problem(s), 0 warning(s)"):
        assert words in out.getvalue()


def test_json_has_every_field():
    assert json.loads(as_json(FOUND))[1] == {
        "about": "b", "status": "problem", "what": "bad [x]", "way_out": "do this", "link": "https://example.org/1"
    }  # fmt: skip


def test_a_check_that_fails_or_hangs_is_a_warning():
    def fails():
        raise OSError("the disk is gone")

    (failed,), (hung,) = guarded("disk", fails, 1.0), guarded("disk", lambda: time.sleep(30), 0.1)
    assert (failed.status, "the disk is gone" in failed.what) == ("warning", True)
    assert (hung.status, "did not end within 0.1 s" in hung.what) == ("warning", True)


def test_one_broken_check_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "check_nvml", lambda: 1 / 0)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("nonsense\n")
    found = examine(DoctorConfig(ranks=0, output_dir=str(tmp_path), hostfile=str(hostfile)))
    statuses = {finding.about: finding.status for finding in found}
    assert statuses["NVML"] == "warning"
    assert statuses["torch"] == "ok"
    assert statuses[f"hostfile {hostfile}"] == "problem"
