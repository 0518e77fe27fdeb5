"""The README says only what is there: files and options. Its tables are checked with the benchmarks'."""

from __future__ import annotations

import re
from pathlib import Path

from colm_scale.config.command_line import option_types
from colm_scale.config.commands import PlanConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_exist():
    mentioned = set(re.findall(r"--([a-z]+\.[a-z0-9_]+)", README + (ROOT / "docs" / "method.md").read_text()))
    assert "selection.method" in mentioned
    assert mentioned <= {*option_types(), *option_types(PlanConfig, "plan.")}


def test_files_exist():
    for path in re.findall(r"(?:launchers|ds_configs|benchmarks|docs|colm_scale)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    make_targets = set(re.findall(r"^    make (\w+)", README, re.MULTILINE))
    assert make_targets == {"train", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}: " in makefile for target in make_targets)


def test_the_way_to_begin_comes_before_any_table_and_the_results_fit_on_a_screen():
    assert README.index("make train") < README.index("## Your model, your data") < README.index("\n|")
    worth = re.search(r"<!-- table: worth -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert worth
    assert {line.count("|") - 1 for line in worth[1].splitlines()} <= {1, 2, 3, 4, 5}
