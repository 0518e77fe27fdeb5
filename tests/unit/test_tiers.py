"""Every test is run by `make test-all` or by `make test-faults`, and `make test` leaves out only what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKERS = ("slow", "faults", "browser")
COLLECT = """
import json, sys, pytest

class Listing:
    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in items}
        open(sys.argv[1], "w").write(json.dumps(found))

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", ""], plugins=[Listing()]))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> dict[str, list[str]]:
    """The markers of every test there is."""
    listing = tmp_path_factory.mktemp("tiers") / "tests.json"
    subprocess.run([sys.executable, "-c", COLLECT, str(listing)], check=True, capture_output=True, cwd=ROOT)
    return json.loads(listing.read_text("utf-8"))


def run_by(target: str, collected: dict[str, list[str]]) -> set[str]:
    """The tests that a target of the Makefile runs: those that its folders hold and its ``-m`` lets through."""
    said = subprocess.run(["make", "--dry-run", target], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    (line,) = re.findall(r"-m pytest (.*)", said)
    words = shlex.split(line)
    expression = words[words.index("-m") + 1]
    folders = tuple(f"{word}/" for word in words if (ROOT / word).is_dir()) or ("tests/",)
    return {
        test
        for test, marks in collected.items()
        if test.startswith(folders) and eval(expression, {}, {marker: marker in marks for marker in MARKERS})
    }


@pytest.mark.slow
def test_every_test_is_in_one_tier(collected):
    every, faults = (run_by(target, collected) for target in ("test-all", "test-faults"))
    assert every | faults == collected.keys()
    assert not every & faults
    quick = run_by("quick", collected)
    assert quick < every
    assert run_by("test-browser", collected) == {test for test in collected if test.startswith("tests/browser/")}
    assert {test.split("/")[1] for test in quick} == {"unit", "parity", "smoke"}


@pytest.mark.slow
def test_what_make_test_leaves_out_is_marked_or_in_another_folder(collected):
    left_out = run_by("test-all", collected) - run_by("quick", collected)
    folders = {test.split("/")[1] for test in left_out if "slow" not in collected[test]}
    assert folders == {"distributed", "launch", "browser", "gpu"}
