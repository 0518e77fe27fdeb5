"""The pages say only what is there, and the docstrings become pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from colm_scale.cli import main as cli
from colm_scale.config.command_line import option_types, parse, parse_own, parse_plan
from colm_scale.config.commands import PlanConfig, PreviewConfig
from colm_scale.config.removed import OPTIONS, VALUES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}


def lines_of(page: str, start: str) -> list[list[str]]:
    """The arguments of the commands that a page shows, which begin with ``start``."""
    found = re.findall(rf"^    {re.escape(start)} (.*)", PAGES[page].replace("\\\n", ""), re.MULTILINE)
    return [shlex.split(line) for line in found]


def test_every_run_of_the_staged_start_has_options_that_exist():
    runs = [rest for command, *rest in lines_of("start.md", "colm-scale") if command == "train"]
    full = lines_of("start.md", "deepspeed launchers/train.py")
    assert (len(runs), len(full)) == (2, 1)
    assert [parse(run).output_dir for run in (*runs, *full)] == ["runs/first", "runs/proxy", "runs/full"]


def test_the_plan_of_the_staged_start_is_that_of_its_full_run():
    (plan,) = [rest for command, *rest in lines_of("start.md", "colm-scale") if command == "plan"]
    (full,) = lines_of("start.md", "deepspeed launchers/train.py")
    planned, run = parse_plan(plan)[0], parse(full)
    assert (planned.model, planned.selection, planned.ds_config) == (run.model, run.selection, run.ds_config)


def test_the_preview_of_the_staged_start():
    (preview,) = [rest for command, *rest in lines_of("start.md", "colm-scale") if command == "preview"]
    assert parse_own("preview", PreviewConfig, preview).model.name == "microsoft/phi-2"


def test_the_commands_of_the_staged_start():
    """Of those that start no run, what they are about is all that is given."""
    others = [line for line in lines_of("start.md", "colm-scale") if line[0] not in ("train", "plan", "preview")]
    assert {command for command, *_ in others} == {"sources", "explain", "report"}
    assert not [line for line in others if any(word.startswith("-") for word in line)]
    assert {"train", "plan", "sources", "explain", "report"} <= set(cli.COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_options_that_a_page_names_exist(page):
    text = PAGES[page]
    for path in re.findall(r"(?:launchers|benchmarks|docs|tests|colm_scale)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    options = set(re.findall(r"--([a-z]+\.[a-z0-9_]+)", text))
    assert options <= {*option_types(), *option_types(PlanConfig, "plan.")}


LINKED = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "benchmarks/README.md", ROOT / "ds_configs/README.md"]


def anchors_of(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


@pytest.mark.parametrize("page", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text("utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text("utf-8")), link


@pytest.mark.parametrize("page", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_short_outside_tables(page):
    lines = page.read_text("utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]


def test_anchors_are_made_as_github_makes_them():
    text = "# Before: `--dry-run`\n## 1. Does it run, here?\n## Same\n```\n# no heading\n```\n### [Same](a.md)\n"
    assert anchors_of(text) == {"before---dry-run", "1-does-it-run-here", "same", "same-1"}
    links = [link for page in LINKED for link in re.findall(r"\]\([\w./]*#[\w-]+\)", page.read_text("utf-8"))]
    assert links  # the search does find some


@pytest.mark.parametrize("name", ["own_ranking.py", "own_estimator.py", "loss_estimator.py"])
def test_an_example_is_short_and_is_the_one_of_the_page(name):
    assert len((DOCS / "examples" / name).read_text("utf-8").splitlines()) < 80
    assert f"docs/examples/{name}:" in PAGES["CONTRIBUTING.md"]


def test_make_targets_exist():
    targets = set(re.findall(r"^    make ([\w-]+)", PAGES["CONTRIBUTING.md"], re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert {"test", "lint", "docs"} <= targets
    assert all(f"\n{target}: " in makefile for target in targets)


@pytest.mark.slow
def test_the_docstrings_become_pages_without_a_warning(tmp_path):
    """As ``make docs`` does it: a page for every module, but for those behind a package that says what is public."""
    (line,) = re.findall(r"pdoc (.*) --output-directory build/docs colm_scale", (ROOT / "Makefile").read_text("utf-8"))
    command = [sys.executable, "-m", "pdoc", *line.split(), "--output-directory", str(tmp_path), "colm_scale"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "colm_scale").rglob("*.py")]
    sources = {path: (ROOT / path).with_suffix(".py").read_text("utf-8") for path in modules}
    closed = [path for path in modules if path.name == "__init__" and "__all__" in sources[path]]
    modules = [path for path in modules if path in closed or path.parent / "__init__" not in closed]
    expected = {path.parent if path.name == "__init__" else path for path in modules if path.name != "__main__"}
    there = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")} - {Path("index")}
    assert there == expected
    page = (tmp_path / "colm_scale" / "records.html").read_text("utf-8")
    assert "indices of the training examples" in page


def test_the_page_of_the_architecture_names_every_room_in_order_and_paths_that_exist():
    page = PAGES["architecture.md"]
    declared = (ROOT / "tests/unit/test_architecture.py").read_text("utf-8")
    rooms = re.findall(r'"(\w+)"', declared.split("ROOMS = (")[1].split("\n)")[0])
    assert len(rooms) > 20
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == rooms
    paths = set(re.findall(r"`((?:colm_scale|tests)/[\w/.]+|step/\w+\.py)`", page))
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "colm_scale" / path).exists(), path
    package = "\n".join(path.read_text("utf-8") for path in (ROOT / "colm_scale").rglob("*.py"))
    named = re.findall(r"`([A-Z]\w+)`", page)
    assert len(named) > 15
    for name in named:
        assert re.search(rf"^(class {name}\b|{name}[ :])", package, re.MULTILINE), name
    for linking in (ROOT / "README.md", DOCS / "CONTRIBUTING.md"):
        assert "architecture.md" in linking.read_text("utf-8")


def test_the_changes_name_every_removed_option_and_value():
    (table,) = re.findall(r"\| removed \|.*?\n\n", PAGES["CHANGELOG.md"], re.DOTALL)
    for name in OPTIONS:
        section, option = name.split(".")
        column = section == "data" and option.endswith("_column")
        assert column or f"`{name}`" in table or f"`.{option}`" in table, name
    for name, value in VALUES:
        assert f"`{name} {value}`" in table or (f"`{name} " in table and f"`{value}`" in table), value
