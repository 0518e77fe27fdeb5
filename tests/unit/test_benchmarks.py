"""Both READMEs hold the tables that the committed rows make, and no row names a machine's path."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
RESULTS = sorted((BENCHMARKS / "results").glob("*.jsonl"))


@pytest.fixture(scope="module")
def modules():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    sys.path[:] = before


def test_tables_are_made_from_the_committed_rows(modules):
    tables = modules["tables"]
    of_project = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    for text, made in ((of_project, tables.TABLES), (README, tables.of_benchmarks())):
        assert tables.filled(text, made) == text, "run: python benchmarks/tables.py --write"
        assert sorted(re.findall(r"<!-- table: (.+?) -->", text)) == sorted(made)


def test_every_script_and_every_file_of_rows_is_explained():
    for name in SCRIPTS:
        assert f"`{name}.py`" in README
    for path in RESULTS:
        assert f"`results/{path.name}`" in README


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_rows_are_whole_and_name_no_path(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    for row in rows:
        assert row["environment"]["versions"]["torch"]
        assert not re.search(r'"/\w', json.dumps(row))
