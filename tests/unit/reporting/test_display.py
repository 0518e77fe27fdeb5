from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from rich.table import Table

from colm_scale.records import Candidates, Selection, StepReport
from colm_scale.reporting.display import Display, phase_shares, rank_memory
from colm_scale.reporting.summary import Evaluation, HeldOutLoss

GIB = 2**30
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def report(step: int, floor: float | None = None) -> StepReport:
    rows = torch.arange(4)
    return StepReport(
        step=step,
        loss=2.34567,
        learning_rate=3e-3,
        gradient_norm=0.5,
        candidates=Candidates(step, rows, rows, rows, rows),
        selection=Selection(rows[:2], torch.ones(2)),
        seconds={"sketch": 0.5, "select": 0.01, "train": 1.4, "step": 2.0},
        peak_bytes=(GIB, 3 * GIB // 2),
        phase_peak_bytes={},
        exchanged_bytes={},
        imbalance=1.0,
        floor=floor,
    )


SAMPLE = HeldOutLoss({"a": 2.5}, {"a": 2}, None, 2.5, 3.5)
EVALUATION = Evaluation(0, {"a": 2.0}, {"a": 0.5}, {"a": 4}, None, 2.0, 3.0, 0.125, True, SAMPLE)
OF_SAMPLE = Evaluation(3, {"a": 2.5}, {"a": None}, {"a": 2}, None, 2.5, 3.5, None, False, SAMPLE)


def console(terminal: bool = False) -> Console:
    environment = {"TERM": "xterm"}
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, _environ=environment)


def test_plain_prints_the_numbers_of_a_step(tmp_path):
    shown = console()
    with Display("plain", log=tmp_path / "log.txt", console=shown) as display:
        display.start(10)
        display.step(report(1))
        display.step(report(2, floor=1.0625))
    printed = shown.file.getvalue()
    assert printed.splitlines() == [
        "step  1/10  loss 2.3457  lr 3.00e-03  2.000 s (train 70%, sketch 25%)  peak 1.00 1.50 GiB  left 0:00:18",
        "step  2/10  loss 2.3457  lr 3.00e-03  2.000 s (train 70%, sketch 25%)  step/floor 1.062  peak 1.00 1.50 GiB  "
        "left 0:00:16",
    ]
    assert (tmp_path / "log.txt").read_text() == printed


def test_the_error_of_a_selection_is_compared_with_random():
    telemetry = {"rank": 3.0, "sketch_error": 0.456, "sketch_error_stratified": 0.789}
    step = dataclasses.replace(report(1), telemetry=telemetry)
    for mode, terminal in (("plain", False), ("live", True)):
        shown = console(terminal)
        with Display(mode, console=shown) as display:
            display.start(10)
            display.step(step)
        assert "sketch error 0.46 (random 0.79)" in shown.file.getvalue()


@pytest.mark.parametrize(
    ("total", "expected"),
    [(3, [1, 2, 3]), (100, [*range(1, 101)]), (250, [1, *range(3, 250, 3), 250]), (1000, [1, *range(10, 1001, 10)])],
)
def test_plain_prints_at_most_about_a_hundred_lines(total, expected):
    shown = console()
    with Display("plain", console=shown) as display:
        display.start(total)
        for step in range(1, total + 1):
            display.step(report(step))
    printed = [int(line.split("/")[0].split()[1]) for line in shown.file.getvalue().splitlines()]
    assert printed == expected


def test_messages_stay_as_they_are(tmp_path):
    shown = console()
    display = Display("plain", log=tmp_path / "log.txt", console=shown)
    display.message("ids [3, 4] " + "x" * 200)
    display.message("warning: [bold] is no markup")
    display.evaluation(EVALUATION)
    display.evaluation(OF_SAMPLE)
    assert shown.file.getvalue().splitlines() == [
        "ids [3, 4] " + "x" * 200,
        "warning: [bold] is no markup",
        "held-out loss at step 0 (4 examples): mean over sources 2.000, small sources 3.000, accuracy 12.5%",
        "held-out loss at step 3 (2 sampled examples): mean over sources 2.500, small sources 3.500",
    ]
    assert (tmp_path / "log.txt").read_text() == shown.file.getvalue()


def test_a_table_is_plain_text_in_the_log(tmp_path):
    table = Table("source", "kept")
    table.add_row("[bold]algebra[/]", "3")
    with Display("live", log=tmp_path / "log.txt", console=console(terminal=True)) as display:
        display.message(table)
    logged = (tmp_path / "log.txt").read_text()
    assert "algebra" in logged
    assert "\x1b" not in logged


def test_live_shows_the_numbers_and_restores_the_terminal(tmp_path):
    shown = console(terminal=True)
    with Display("live", "GPU memory (NVML)", tmp_path / "log.txt", shown) as display:
        display.start(10)
        display.step(report(1, floor=1.0625))
        display.step(report(2))
        display.message("warning: look")
        assert SHOW_CURSOR not in shown.file.getvalue()
    printed = shown.file.getvalue()
    for text in ("2/10", "2.3457", "3.00e-03", "train 70%, sketch 25%", "1.062", "GPU memory (NVML)", "1.00 1.50 GiB"):
        assert text in printed
    assert "warning: look" in printed
    assert printed.rfind(SHOW_CURSOR) > printed.rfind(HIDE_CURSOR) >= 0
    assert [line[:10] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "step  1/10",
        "step  2/10",
        "warning: l",
    ]


def test_live_restores_the_terminal_after_an_exception():
    shown = console(terminal=True)
    display = Display("live", console=shown)
    display.start(10)
    with pytest.raises(RuntimeError, match="out of memory"), display:
        raise RuntimeError("out of memory")
    assert shown.file.getvalue().rstrip().endswith(SHOW_CURSOR)
    display.close()  # a second time, without effect
    assert shown.file.getvalue().count(SHOW_CURSOR) == 1


def test_off_writes_the_log_only(tmp_path):
    shown = console()
    with Display("off", log=tmp_path / "log.txt", console=shown) as display:
        display.start(1)
        display.step(report(1))
        display.message("warning: look")
    assert shown.file.getvalue() == ""
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_auto_is_live_on_a_terminal_only(terminal):
    shown = console(terminal)
    with Display("auto", console=shown) as display:
        display.start(2)
        display.step(report(1))
    assert (HIDE_CURSOR in shown.file.getvalue()) == terminal


def test_phase_shares_leave_out_what_is_below_one_percent():
    assert phase_shares({"a": 1.0, "b": 0.02, "c": 3.0, "step": 4.02}) == "c 75%, a 25%"


def test_memory_of_many_ranks_is_a_range():
    assert rank_memory([GIB] * 8) == " ".join(["1.00"] * 8) + " GiB"
    assert rank_memory([2 * GIB, GIB, *[GIB] * 14]) == "1.00 to 2.00 GiB on 16 ranks"
