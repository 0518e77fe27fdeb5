"""What a report of real runs shows in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from support.commands import SMALL, rows

pytestmark = pytest.mark.browser

RUNS = ("ranked", "drawn")


@pytest.fixture(scope="module")
def runs(chromium, forked, tmp_path_factory) -> dict[str, Path]:
    """Two runs of three steps, by the product. (Not made where there is no browser to look at them.)"""
    folder = tmp_path_factory.mktemp("runs")
    options = (*SMALL, "--train.steps", "3", "--eval.every", "1", "--profile.floor_every", "1")
    options = (*options, "--profile.display", "off")
    methods = dict(zip(RUNS, ("colm", "stratified")))
    jobs = {
        name: [*options, "--selection.method", method, "--output_dir", str(folder / name)]
        for name, method in methods.items()
    }
    for outcome in forked.run_many(jobs, folder / "logs").values():
        outcome.succeeded()
    return {name: folder / name for name in RUNS}


@pytest.fixture(scope="module")
def page(runs, driver, forked, tmp_path_factory):
    """The browser with the report of both, written by the command."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    outcome = forked.run("report", [*map(str, runs.values()), "--output", str(output)], output.parent / "log")
    assert f"report: {output}" in outcome.succeeded().stdout
    driver.get("about:blank")
    driver.get_log("performance")  # what the browser's own first tab asked for
    driver.get(output.as_uri())
    return driver


def table(page, caption: str) -> dict[str, dict[str, str]]:
    """A table's cells as they are shown, by the heading of their row and column."""
    read = """
        const found = [...document.querySelectorAll('table')].find(table => table.caption.textContent === arguments[0]);
        return [...found.rows].map(row => [...row.cells].map(cell => cell.innerText.trim()));
    """
    head, *body = page.execute_script(read, caption)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def test_nothing_goes_wrong_and_nothing_is_fetched(page):
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in sent]
    assert page.current_url in asked  # the log does record requests
    assert {url for url in asked if not url.startswith("data:")} == {page.current_url}
    assert page.title == "colm_scale: ranked, drawn"


def test_losses_are_the_runs(page, runs):
    held_out, trained = table(page, "First and last evaluation"), table(page, "Training loss")
    for name, folder in runs.items():
        first, *_, last = rows(folder / "evaluations.jsonl")
        steps = rows(folder / "metrics.jsonl")
        assert held_out["natural mixture"][name] == f"{first['loss']:.3f} → {last['loss']:.3f}"
        for source, loss in last["losses"].items():
            assert held_out[source][name] == f"{first['losses'][source]:.3f} → {loss:.3f}"
        assert trained[name]["first step"] == f"{steps[0]['loss']:.3f}"
        assert trained[name]["last step"] == f"{steps[-1]['loss']:.3f}"


def test_costs_are_the_runs(page, runs):
    headlines = table(page, "The runs")
    for name, folder in runs.items():
        steps = rows(folder / "metrics.jsonl")
        assert headlines[name]["s per step"] == f"{median(row['seconds']['step'] for row in steps):.3f}"
        assert headlines[name]["step / floor"] == f"{median(row['measured_over_floor'] for row in steps):.3f}"
        assert headlines[name]["peak GiB"] == f"{max(max(row['peak_bytes']) for row in steps) / 2**30:.2f}"
        assert headlines[name]["steps"] == "3 of 3"


def test_coverage_is_the_runs(page, runs):
    shown = table(page, "Candidates / trained on, as shares of a source's examples")["all sources"]
    for name, folder in runs.items():
        steps = rows(folder / "selection.jsonl")
        sources = json.loads((folder / "run.json").read_text())["sources"]
        size = sum(source["examples"] for source in sources)
        assert len(sources) > 10
        seen, trained = ({example for row in steps for example in row[what]} for what in ("candidates", "selected"))
        assert shown[name] == f"{len(seen) / size:.1%} / {len(trained) / size:.1%}"
        assert shown["examples"] == f"{size:,}"


def test_options_that_differ(page):
    assert table(page, "Differences between the runs")["selection.method"] == {"ranked": "colm", "drawn": "stratified"}


def test_every_chart_is_drawn(page):
    """Each has a size, and lines in it that have one too."""
    sizes = page.execute_script("""
        const size = (element) => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
        return [...document.querySelectorAll('figure')].map(figure =>
            [size(figure.querySelector('svg')), ...[...figure.querySelectorAll('.series')].map(size)]);
    """)
    assert len(sizes) > 20
    for (width, height), *lines in sizes:
        assert width > 150
        assert height > 80
        assert lines
        assert any(sum(line) > 20 for line in lines)
        assert all(line[0] <= width and line[1] <= height for line in lines)


def test_nothing_is_wider_than_the_page(page):
    assert page.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_lines_have_the_colour_of_their_run(page):
    stroke = "return getComputedStyle(document.querySelector('.series.run-{} path')).stroke"
    chip = "return getComputedStyle(document.querySelector('.chip .run-{}')).backgroundColor"
    colours = [page.execute_script(stroke.format(number)) for number in (1, 2)]
    assert colours[0] != colours[1]
    assert [page.execute_script(chip.format(number)) for number in (1, 2)] == colours


def test_a_run_can_be_taken_out_of_the_charts(page):
    opacity = "return getComputedStyle(document.querySelector('.series.run-2')).opacity"
    assert page.execute_script(opacity) == "1"
    page.find_element("id", "show-2").click()
    assert float(page.execute_script(opacity)) < 0.2
    assert page.execute_script(opacity.replace("run-2", "run-1")) == "1"
    page.find_element("id", "show-2").click()
    assert page.execute_script(opacity) == "1"


def test_light_and_dark(page):
    """The page follows what the system asks for, its charts with it."""
    paper = "return getComputedStyle(document.body).backgroundColor"
    ink = "return getComputedStyle(document.querySelector('figure text')).fill"
    shown = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shown[scheme] = [sum(map(int, page.execute_script(colour)[4:-1].split(","))) for colour in (paper, ink)]
    assert shown["light"][0] > 700 > 400 > shown["light"][1]
    assert shown["dark"][0] < 100 < 400 < shown["dark"][1]


def test_tables_that_are_folded_open(page):
    find = "return [...document.querySelectorAll('summary')].find(one => one.textContent === 'All options')"
    summary = page.execute_script(find)
    assert set(table(page, "All options")) == {""}
    summary.click()
    assert table(page, "All options")["train.steps"] == {"ranked": "3", "drawn": "3"}
