"""The README says only what is there: files, options, and tables made from committed rows."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from colm_scale.cli import option_types

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_the_committed_rows(tables):
    assert tables.filled(README) == README, "run: python benchmarks/tables.py --write"
    assert README.count("<!-- table:") == len(tables.TABLES)


def test_rows_name_no_path_of_the_machine_they_were_measured_on():
    rows = (ROOT / "benchmarks" / "results" / "runs.jsonl").read_text().splitlines()
    assert rows
    for row in map(json.loads, rows):
        assert row["environment"]["versions"]["torch"]
        assert not re.search(r'"/\w', json.dumps(row)), row["name"]


def test_options_exist():
    mentioned = set(re.findall(r"--([a-z]+\.[a-z_]+)", README + (ROOT / "docs" / "method.md").read_text()))
    assert "selection.method" in mentioned
    assert mentioned <= set(option_types())


def test_files_exist():
    for path in re.findall(r"(?:launchers|ds_configs|benchmarks|docs|colm_scale)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    make_targets = set(re.findall(r"^    make (\w+)", README, re.MULTILINE))
    assert make_targets == {"train", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: " in makefile for target in make_targets)
