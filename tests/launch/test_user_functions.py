"""The examples of docs/CONTRIBUTING.md, run as the page says; and the package run as a module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.commands import ROOT, SMALL, Forked, Outcome, rows, run

EXAMPLES = ROOT / "docs" / "examples"
PARTS = {
    "ranking": ("--selection.ranking", f"{EXAMPLES / 'own_ranking.py'}:farthest_first"),
    "estimator": (
        *("--selection.estimator", f"{EXAMPLES / 'own_estimator.py'}:mean_hidden_state"),
        *("--selection.metric", "cosine"),
    ),
    "losses": (
        *("--selection.estimator", f"{EXAMPLES / 'loss_estimator.py'}:loss", "--selection.ranking", "systematic"),
    ),
    "neither": (),
}


def selected(forked: Forked, folder: Path, name: str, ranks: int, *options: str) -> list[list[int]]:
    """Ids that each step of a run selects."""
    place = folder / f"{name}-{ranks}"
    given = [*SMALL, *PARTS[name], *options, "--output_dir", str(place)]
    forked.start(given, folder / f"log-{name}-{ranks}", ranks).outcome(120).succeeded()
    return [row["selected"] for row in rows(place / "selection.jsonl")]


@pytest.fixture(scope="module")
def by_default(forked, tmp_path_factory) -> list[list[int]]:
    return selected(forked, tmp_path_factory.mktemp("default"), "neither", 1)


@pytest.mark.parametrize("name", ["ranking", "estimator", "losses"])
def test_an_example_selects_the_same_on_one_rank_and_on_two(forked, by_default, tmp_path, name):
    alone = selected(forked, tmp_path, name, 1)
    assert len(alone) == 2
    assert all(len(set(ids)) == 8 for ids in alone)
    assert alone == selected(forked, tmp_path, name, 2)
    assert alone != by_default


def refused(forked: Forked, tmp_path: Path, *options: str) -> Outcome:
    outcome = forked.start([*SMALL, *options, "--output_dir", str(tmp_path / "run")], tmp_path / "log", 2).outcome(60)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    return outcome


def test_a_function_that_cannot_be_loaded_is_one_line_before_the_model_is(forked, tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError('mine')", encoding="utf-8")
    said = refused(forked, tmp_path, "--selection.ranking", f"{tmp_path / 'mine.py'}:f").errors[0]
    assert "--selection.ranking" in said
    assert "cannot be loaded: RuntimeError: mine" in said


def test_an_estimator_that_returns_no_rows_ends_the_run_in_one_line(forked, tmp_path):
    (tmp_path / "mine.py").write_text("def f(tap, batch): return tap.bare_losses(batch)", encoding="utf-8")
    given = [*SMALL, "--selection.estimator", f"{tmp_path / 'mine.py'}:f", "--output_dir", str(tmp_path / "run")]
    outcome = forked.start(given, tmp_path / "log").outcome(60)
    assert outcome.code == 1
    assert "mine.py:f returned a tensor [" in outcome.errors[0]
    assert "one row per example" in outcome.errors[0]


def test_the_package_runs_as_a_module(tmp_path):
    outcome = run([sys.executable, "-m", "colm_scale", "train", "--selection.budgt", "3"], tmp_path / "log")
    assert outcome.code == 2
    assert "did you mean --selection.budget?" in outcome.stderr
