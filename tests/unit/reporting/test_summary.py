from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from colm_scale.records import Candidates, Selection, StepReport, long_tensor
from colm_scale.reporting.summary import Evaluation, HeldOutLoss, RunSummary

GIB = 2**30
NAMES = ["algebra", "[bold]odd", "tiny"]
TOO_LONG = {"dropped": {"algebra": 6, "gone": 2}, "cut": {}}


def report(
    step: int,
    sources: list[int],
    positions: list[int],
    kept: int,
    seconds: dict[str, float],
    floor: float | None,
    exchanged: dict[str, int],
    peaks: dict[str, tuple[int, ...]],
) -> StepReport:
    indices = torch.arange(len(sources))
    return StepReport(
        step=step,
        loss=1.0,
        learning_rate=1e-3,
        gradient_norm=1.0,
        candidates=Candidates(step, indices, indices, long_tensor(sources), indices),
        selection=Selection(long_tensor(positions), torch.ones(len(positions)), kept=kept),
        seconds=seconds,
        peak_bytes=peaks["step"],
        phase_peak_bytes={"nvml": peaks, "allocator": {phase: (GIB,) * len(of) for phase, of in peaks.items()}},
        exchanged_bytes=exchanged,
        imbalance=1.0,
        floor=floor,
    )


def evaluation(step: int, algebra: float, tiny: float, right: float | None) -> Evaluation:
    return Evaluation(
        step=step,
        losses={"algebra": algebra, "tiny": tiny, "unseen": 9.0},
        accuracies={"algebra": right, "tiny": None, "unseen": None},
        counts={"algebra": 4, "tiny": 2, "unseen": 1},
        loss=algebra + 0.001,
        loss_by_source=algebra + 0.002,
        small_loss=tiny,
        accuracy=right,
        whole=True,
        sample=HeldOutLoss({"algebra": algebra}, {"algebra": 1}, None, algebra, None),
    )


@pytest.fixture
def summary() -> RunSummary:
    small = torch.tensor([False, False, True])
    summary = RunSummary(NAMES, long_tensor([1200, 30, 4]), small, "memory (test)", TOO_LONG)
    summary.evaluation(evaluation(0, 2.5, 3.5, 0.25))
    summary.report(
        report(
            1,
            [0, 0, 1, 2, 0, 2],
            [3, 5, 0],
            2,
            {"sketch": 2.0, "train": 3.0, "select": 5.0, "step": 10.0},
            None,
            {"gather": 100, "broadcast": 10},
            {"sketch": (GIB, 4 * GIB), "step": (GIB, 4 * GIB)},
        )
    )
    summary.report(
        report(
            2,
            [1, 1, 0, 2],
            [3, 0, 2],
            1,
            {"sketch": 1.0, "train": 1.0, "step": 2.0},
            1.25,
            {"gather": 300},
            {"sketch": (3 * GIB, 2 * GIB), "step": (3 * GIB, 5 * GIB)},
        )
    )
    summary.report(
        report(3, [0, 0], [1], 0, {"train": 2.0, "step": 4.0}, 1.75, {}, {"sketch": (0, 0), "step": (2 * GIB, 2 * GIB)})
    )
    return summary


def lines(renderable) -> list[list[str]]:
    """The words of each printed line; cells are two or more blanks apart."""
    file = io.StringIO()
    Console(file=file, width=160, force_terminal=False, color_system=None).print(renderable)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in file.getvalue().splitlines()]


def test_sources_are_counted_from_the_reports(summary):
    assert summary.candidates.tolist() == [6, 3, 3]
    assert summary.selected.tolist() == [3, 1, 3]
    assert summary.kept.tolist() == [0, 0, 3]


def test_what_a_step_cost(summary):
    assert summary.seconds == 4.0  # of 10, 2 and 4
    assert summary.share_outside == 0.5  # of 0.5, 0 and 0.5
    assert summary.exchanged_bytes == {"gather": 400 / 3, "broadcast": 10 / 3}


def test_source_table(summary):
    summary.evaluation(evaluation(2, 2.2, 3.2, 0.125))
    summary.evaluation(evaluation(3, 2.25, 3.0, 0.5))
    table = lines(summary.source_table())
    assert ["algebra", "1,200", "6", "3", "0", "6", "2.500 -> 2.250", "25.0% -> 50.0%"] in table
    assert ["[bold]odd", "30", "3", "1", "0", "0", "-", "-"] in table
    assert ["tiny", "4", "3", "3", "3", "0", "3.500 -> 3.000", "-"] in table
    assert ["gone", "0", "0", "0", "0", "2", "-", "-"] in table
    assert ["unseen", "0", "0", "0", "0", "0", "9.000 -> 9.000", "-"] in table
    assert ["mean over examples", "1,234", "12", "7", "3", "8", "2.501 -> 2.251", "-"] in table
    assert ["mean over sources", "-", "-", "-", "-", "-", "2.502 -> 2.252", "25.0% -> 50.0%"] in table
    assert ["small sources", "4", "3", "3", "3", "-", "3.500 -> 3.000", "-"] in table


def test_protected_candidates_have_a_column_where_there_are_any(summary):
    """Counts those that enter as protected, and not those that are selected otherwise."""
    step = report(4, [0, 1, 0, 2], [0, 3, 1], 2, {"step": 1.0}, None, {}, {"step": (GIB, GIB)})
    marked = torch.tensor([True, True, False, False])
    before = lines(summary.source_table())
    summary.report(dataclasses.replace(step, candidates=dataclasses.replace(step.candidates, protected=marked)))
    table = lines(summary.source_table())
    assert "protected" not in before[1]
    assert table[1][:6] == ["source", "examples", "candidates", "selected", "kept", "protected"]
    assert ["algebra", "1,200", "8", "4", "1", "1", "6", "2.500", "25.0%"] in table
    assert ["[bold]odd", "30", "4", "2", "0", "0", "0", "-", "-"] in table
    assert ["mean over sources", *["-"] * 6, "2.502", "25.0%"] in table
    again = RunSummary(NAMES, long_tensor([1200, 30, 4]), torch.tensor([False, False, True]), "memory (test)", {})
    again.load(json.loads(json.dumps(summary.state())))
    assert again.protected.tolist() == [1, 0, 0]


def test_source_table_after_one_evaluation_has_nothing_to_compare(summary):
    table = lines(summary.source_table())
    assert ["tiny", "4", "3", "3", "3", "0", "3.500", "-"] in table


def test_source_table_without_evaluation_and_without_long_examples():
    summary = RunSummary(["only"], long_tensor([5]), torch.tensor([False]), "memory", {})
    summary.report(report(1, [0, 0], [1], 0, {"step": 1.0}, None, {}, {"step": (1,)}))
    table = lines(summary.source_table())
    assert not any("dropped" in line or "cut" in line for line in table)
    assert ["only", "5", "2", "1", "0", "-", "-"] in table


def test_rank_table_has_the_largest_peak_of_each_phase(summary):
    table = lines(summary.rank_table("nvml"))
    assert ["peak memory (test), GiB"] in table
    assert ["rank", "sketch", "step"] in table
    assert ["0", "3.00", "3.00"] in table
    assert ["1", "4.00", "5.00"] in table
    assert ["peak allocator, GiB"] in lines(summary.rank_table("allocator"))
    assert ["1", "1.00", "1.00"] in lines(summary.rank_table("allocator"))


def test_closing_table(summary):
    table = lines(summary.closing_table({"adapter": Path("runs/a/adapter"), "log": Path("runs/a/log.txt")}))
    assert ["adapter", "runs/a/adapter"] in table
    assert ["log", "runs/a/log.txt"] in table
    assert ["seconds per step", "4.000 (median of 3)"] in table
    assert ["outside forward and backward", "50.0% of a step (median)"] in table
    assert ["step / bare floor", "1.500 (median of 2)"] in table
    assert ["exchanged bytes per step", "137 (gather 133, broadcast 3)"] in table


def test_render_has_all_tables(summary):
    everything = lines(summary.render({"adapter": Path("x")}))
    for table in (summary.source_table(), summary.rank_table("nvml"), summary.closing_table({"adapter": Path("x")})):
        assert all(line in everything for line in lines(table))


def test_a_summary_goes_on_from_its_state_as_if_it_had_never_stopped(summary):
    small = torch.tensor([False, False, True])
    again = RunSummary(NAMES, long_tensor([1200, 30, 4]), small, "memory (test)", TOO_LONG)
    again.load(json.loads(json.dumps(summary.state())))
    for one in (summary, again):
        one.evaluation(evaluation(4, 1.5, 2.5, 0.75))
        peaks = {"step": (9 * GIB, GIB, 8 * GIB)}
        one.report(report(4, [2, 1], [0], 1, {"train": 1.0, "step": 2.0}, 1.5, {"gather": 7}, peaks))
    places = {"adapter": Path("a")}
    assert lines(again.render(places)) == lines(summary.render(places))
    assert again.state() == summary.state()


def test_how_near_the_coreset_was_is_said_and_goes_on(summary):
    step = report(4, [0], [0], 0, {"train": 1.0, "step": 1.0}, None, {}, {"step": (GIB, GIB)})
    again = RunSummary(NAMES, long_tensor([1200, 30, 4]), torch.tensor([False, False, True]), "memory (test)", {})
    for number in range(8):
        telemetry = {"rank": number, "sketch_error": 0.25, "sketch_error_stratified": 0.5}
        telemetry |= {"sketch_cosine": 0.75, "sketch_cosine_stratified": 0.625}
        summary.report(dataclasses.replace(step, telemetry=telemetry))
        if number == 3:
            again.load(json.loads(json.dumps(summary.state())))
        elif number > 3:
            again.report(dataclasses.replace(step, telemetry=telemetry))
    for one in (summary, again):
        table = lines(one.closing_table({}))
        assert ["effective rank of the sketches", "3.5"] in table
        title = "relative error of the coreset's mean sketch"
        assert [title, "0.250 (random draw with the same quotas: 0.500)"] in table
        told = " ".join(word for line in lines(one.render({}))[-2:] for word in line)
        assert "nearer to the candidates' mean than that of a random draw with the same quotas" in told
        assert "nearer in 8 of 8 steps" in told


def test_the_noise_of_the_gradient_is_shown_for_each_source_and_the_run_and_goes_on(summary):
    step = report(4, [0], [0], 0, {"train": 1.0, "step": 1.0}, None, {}, {"step": (GIB, GIB)})
    again = RunSummary(NAMES, long_tensor([1200, 30, 4]), torch.tensor([False, False, True]), "memory (test)", {})
    by_source = torch.tensor([[6.0, 2.0], [torch.nan, torch.nan]])
    for number in range(8):
        noise = {"noise": 4.0, "signal": 0.98 + 0.04 * (number % 2), "trained": 32.0, "worth": 40.0}
        summary.report(dataclasses.replace(step, noise=noise, source_noise=by_source))
        if number == 3:
            again.load(json.loads(json.dumps(summary.state())))
        elif number > 3:
            again.report(dataclasses.replace(step, noise=noise, source_noise=by_source))
    head, algebra = (row for row in lines(summary.source_table()) if row and row[0] in ("source", "algebra"))
    assert algebra[head.index("noise scale")] == "3"
    for one in (summary, again):
        table = lines(one.closing_table({}))
        assert ["gradient noise scale of the run", "4 examples (95 %: 3.9 to 4.1)"] in table
        assert ["a step's examples are worth", "at most 40.0 random ones (32.0 were trained on)"] in table
        told = " ".join(word for line in lines(one.render({}))[-3:] for word in line)
        assert "A larger batch, or a coreset of one, can hardly save steps; steps of 2 can save" in told


def test_ranks_may_become_more(summary):
    """A run goes on with three ranks: the peaks of the two before are kept."""
    summary.report(
        report(4, [0], [0], 0, {"train": 1.0, "step": 1.0}, None, {}, {"step": (GIB, 6 * GIB, 7 * GIB)})
    )
    assert summary.state()["peaks"]["nvml"]["step"] == [3 * GIB, 6 * GIB, 7 * GIB]


def test_steps_that_overflowed_are_counted(summary):
    assert "steps without update" not in str(lines(summary.closing_table({})))
    step = report(4, [0], [0], 0, {"train": 1.0, "step": 1.0}, None, {}, {"step": (GIB, GIB)})
    summary.report(dataclasses.replace(step, applied=False, loss_scale=65536.0))
    assert ["steps without update", "1 (float16 overflow)"] in lines(summary.closing_table({}))
