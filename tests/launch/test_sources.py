"""``colm-scale sources`` as users call it, and a run that takes what it has written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.commands import SMALL, rows, write_rows

from colm_scale.data.builtin import builtin_rows

KINDS = ("CoT/shop", "EQ/number", "PoT/area")


@pytest.fixture(scope="module")
def folder(forked, tmp_path_factory) -> Path:
    """Rows without labels, of three kinds, and their sources as the command finds them."""
    folder = tmp_path_factory.mktemp("sources")
    data = [row for row in builtin_rows("train") if row["source"] in KINDS][:300]
    write_rows(folder / "rows.jsonl", [{name: row[name] for name in ("instruction", "output")} for row in data])
    options = [str(folder / "rows.jsonl"), "--embedding", "states", "--output_dir", str(folder / "out")]
    options += ["--clusters", "2", "3"]
    said = forked.run("sources", options, folder / "log").succeeded().stdout
    assert "kmeans: 3 clusters" in said
    return folder


def given(folder: Path) -> list[str]:
    return ["--data.train", str(folder / "rows.jsonl"), "--data.sources", str(folder / "out/sources.jsonl")]


def test_a_run_goes_by_them_and_finds_them_anew(forked, folder):
    options = [*SMALL, *given(folder), "--train.steps", "4", "--sources.refresh_every", "2"]
    options += ["--output_dir", str(folder / "run")]
    said = forked.run("train", options, folder / "log run", ranks=2).succeeded().stdout
    assert "300 examples of 3 sources" in said
    assert "sources re-clustered after step 4" in said
    sizes = Counter(row["source"] for row in rows(folder / "out/sources.jsonl"))
    steps = rows(folder / "run/selection.jsonl")
    assert {name for step in steps for name in step["sources"]} <= sizes.keys()
    drift = rows(folder / "run/drift.jsonl")
    assert [row["step"] for row in drift] == [2, 4]
    assert all(16 < row["examples"] <= 32 and row["seconds"] > 0 for row in drift)
    assert all(sum(row["sizes"].values()) == 300 for row in drift)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["FILE is missing"]),
        (["rows.jsonl", "--cluster", "3"], ["unknown option --cluster", "--clusters"]),
        (["rows.jsonl", "--method", "means"], ["--method is 'means'", "kmeans"]),
        (["missing.jsonl"], ["missing.jsonl does not exist"]),
    ],
)
def test_wrong_input_is_one_line(options, words, forked, tmp_path):
    outcome = forked.run("sources", options, tmp_path / "log")
    assert outcome.code == 2
    assert len(outcome.errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.errors[0]


def test_the_file_of_other_rows_is_told_before_a_model_is_loaded(forked, folder, tmp_path):
    lines = (folder / "out/sources.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "odd.jsonl").write_text("".join([*lines[:4], lines[5], lines[4], *lines[6:]]))
    options = [*given(folder)[:2], "--data.sources", str(tmp_path / "odd.jsonl"), "--output_dir", str(tmp_path / "run")]
    outcome = forked.run("train", [*SMALL, *options], tmp_path / "log")
    assert outcome.code == 2
    (said,) = outcome.errors
    assert all(f"{name}.jsonl line 5" in said for name in ("odd", "rows"))
