from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
from support.commands import rows as read_rows
from support.pages import Page
from support.runs import SIZES, SOURCES, evaluation, write_run

from colm_scale.errors import UserError
from colm_scale.reporting.page import write_page
from colm_scale.reporting.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def written(tmp_path, *runs) -> tuple[Page, str]:
    """The page of some runs, parsed, and its text."""
    output = tmp_path / "page.html"
    write_page([str(run) for run in runs], output)
    text = output.read_text("utf-8")
    return Page.of(text), text


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Page, str]:
    folder = tmp_path_factory.mktemp("two")
    write_run(folder / "first", steps=8)
    write_run(folder / "second", steps=4, planned=6, method="stratified", faster=2, ranks=1)
    return written(folder, folder / "first", folder / "second")


def test_headlines_stand_side_by_side(two):
    table = two[0].table("The runs")
    assert list(table) == ["first", "second"]
    first, second = table["first"], table["second"]
    assert (first["selection"], second["selection"]) == ("colm, 4 of 8", "stratified, 4 of 8")
    assert (first["steps"], second["steps"]) == ("8 of 8", "4 of 6")
    assert (first["natural mixture"], second["natural mixture"]) == ("0.389", "0.700")  # 3.5 / 9, 3.5 / 5
    assert (first["mean over sources"], first["small sources"]) == ("0.444", "0.556")  # 4 / 9, 5 / 9
    assert (first["s per step"], second["s per step"]) == ("1.000", "0.500")
    assert first["step / floor"] == "1.250"
    assert first["peak GiB"] == "2.26"  # 2 + 1 / 4 + 8 / 1000
    assert first["engine"] == "ddp on 2 rank(s)"


def test_held_out_loss_of_every_source(two):
    table = two[0].table("First and last evaluation")
    assert table["algebra"] == {"first": "3.000 → 0.333", "second": "3.000 → 0.600"}
    assert table["trivia"]["first"] == "5.000 → 0.556"
    assert table["accuracy, mean over sources"]["first"] == "25.0% → 25.0%"


def test_curves_and_tables_are_each_of_the_same_examples(two):
    page = two[0]
    assert page.table("First and last point of the curves")["algebra"]["first"] == "6.000 → 0.667"
    (means,) = (given["aria-label"] for tag, given in page.tags if "mean over sources" in given.get("aria-label", ""))
    assert f"first, {2 * len(SOURCES)} examples" in means


def test_a_run_whose_last_evaluation_is_of_a_sample(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    rows = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (run / "evaluations.jsonl").write_text("".join(rows[:-1]))
    page, _ = written(tmp_path, run)
    assert page.table("First and last evaluation")["algebra"] == {"run": "6.000 → 2.000"}
    assert page.table("The runs")["run"]["natural mixture"] == "2.333"
    counted = 2 * len(SOURCES)
    said = f"run: Its last evaluation so far scored only a sample of {counted} held-out examples."
    assert said in page.items


def test_evaluations_of_other_examples_are_not_joined(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    rows = read_rows(run / "evaluations.jsonl")
    more = [row | {"step": row["step"] + 5} for row in rows]
    for row in more:
        row["sample"] = row["sample"] | {"counts": dict.fromkeys(SOURCES, 5)}
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + more))
    label = next(
        given["aria-label"] for tag, given in written(tmp_path, run)[0].tags if "algebra" in given.get("aria-label", "")
    )
    assert "run, 2 examples: 6.000 at step 0, 1.200 at step 4; run, 5 examples: 6.000 at step 5" in label


def test_two_points_make_no_chart(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    rows = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (run / "evaluations.jsonl").write_text(rows[0] + rows[-1])
    page, _ = written(tmp_path, run)
    assert "figure" not in {tag for tag, _ in page.tags}
    assert page.table("First and last evaluation")["algebra"] == {"run": "3.000 → 1.000"}


def test_training_loss(two):
    row = two[0].table("Training loss")["first"]
    assert (row["first step"], row["last step"], row["largest gradient norm"]) == ("4.000", "0.500", "0.500")


def test_coverage_counts_different_examples(tmp_path):
    run = write_run(tmp_path / "run", steps=6)
    page, _ = written(tmp_path, run)
    rows = read_rows(run / "selection.jsonl")
    seen = {example: source for row in rows for example, source in zip(row["candidates"], row["sources"])}
    trained = {example for row in rows for example in row["selected"]}
    drawn, picked = Counter(seen.values()), Counter(seen[example] for example in trained)
    assert 0 < len(trained) < len(seen) < sum(SIZES)
    table = page.table("Candidates / trained on, as shares of a source's examples")
    for name, size in zip(SOURCES, SIZES):
        row = table[f"{name} (kept)" if size < 10 else name]
        assert row["examples"] == str(size)
        assert row["run"] == f"{drawn[name] / size:.1%} / {picked[name] / size:.1%}"
    assert table["all sources"]["run"] == f"{len(seen) / sum(SIZES):.1%} / {len(trained) / sum(SIZES):.1%}"
    shares = page.table("Mean share of the candidates → of the coreset")
    of_all = Counter(source for row in rows for source in row["sources"])
    assert shares["algebra"]["run"].startswith(f"{of_all['algebra'] / of_all.total():.1%} → ")


def test_phases_and_floor(two):
    table = two[0].table("Median seconds of each phase (share of the step); bare floor with 20th and 80th percentiles")
    assert table["sketch"] == {"first": "0.3000 (30.0%)", "second": "0.1500 (30.0%)"}
    assert table["bare floor"]["second"] == "0.400 (0.400 to 0.400)"
    assert table["step / bare floor"]["first"] == "1.250 (1.250 to 1.250)"


def test_the_start_by_part_is_no_difference_between_runs(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "old")]
    for run, data in zip(runs, (0.5, 1.25)):
        file = run / "environment.json"
        found = json.loads(file.read_text()) | {"start_seconds": {"data": data, "model": 2.0}}
        file.write_text(json.dumps(found))
    page, _ = written(tmp_path, *runs)
    (caption,) = (caption for caption in page.tables if caption.startswith("Seconds from the start of the process"))
    assert page.table(caption) == {
        "data": {"a": "0.50", "b": "1.25", "old": "-"},
        "model": {"a": "2.00", "b": "2.00", "old": "-"},
        "whole": {"a": "2.50", "b": "3.25", "old": "-"},
    }
    assert "Differences between the runs" not in page.tables


def test_memory_by_kind_and_rank(two):
    rows = two[0].tables["Peak memory of the run"]
    assert rows[0][:4] == ["run", "kind", "rank", "peak GiB"]
    assert [row[:4] for row in rows[1:]] == [
        ["first", "nvml", "0", "2.01"],
        ["first", "nvml", "1", "2.26"],
        ["first", "allocator", "0", "1.01"],
        ["first", "allocator", "1", "1.26"],
        ["second", "nvml", "0", "2.00"],
        ["second", "allocator", "0", "1.00"],
    ]
    assert {row[5] for row in rows[1:]} == {"train"}


def test_how_near_the_coreset_was(two):
    run, verdict = two[0].tables["Verdicts"][1]
    assert run == "first"
    assert "nearer to the candidates' mean than that of a random draw" in verdict
    assert "8 of 8 steps" in verdict
    assert two[0].tables["Verdicts"][2][1] == "Too few steps were compared with a random draw."


def test_how_large_the_steps_should_have_been(two):
    page = two[0]
    run, verdict = page.tables["Verdicts on the size of a step"][1]
    assert run == "first"
    assert "the gradient's noise equals its signal at a batch of 20 examples" in verdict
    assert "worth at most 5 random ones. A larger batch, or a coreset of one, can save up to 80% of the" in verdict
    assert page.tables["Verdicts on the size of a step"][2][1].startswith("Too few steps")
    (title, found), *_ = page.table("Noise scale of the run").items()
    assert title == "gradient noise scale of the run"
    assert found["first"].startswith("20 examples")
    (chart,) = (given["aria-label"] for tag, given in page.tags if given.get("aria-label", "").startswith("Gradient n"))
    assert "first, noise scale: 19." in chart
    assert "first, worth of a step: 5.000 at step" in chart


@pytest.mark.parametrize(("freedom", "first"), [(12, 3), (4, None)])
def test_a_step_is_worth_something_before_the_scale_is_known(tmp_path, freedom, first):
    """Steps of few examples have little to say about the variance: it takes 32 degrees of freedom together."""
    run = write_run(tmp_path / "run", steps=4)
    steps = [step | {"noise": step["noise"] | {"freedom": freedom}} for step in read_rows(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page, _ = written(tmp_path, run)
    (chart,) = (given["aria-label"] for tag, given in page.tags if given.get("aria-label", "").startswith("Gradient n"))
    assert "worth of a step: 5.000 at step 1, 5.000 at step 4" in chart
    assert re.findall(r"noise scale: [\d.]+ at step (\d)", chart) == ([str(first)] if first else [])


def test_differences_of_the_configuration_come_first(two):
    table = two[0].table("Differences between the runs")
    assert table["world_size"] == {"first": "2", "second": "1"}  # of the environment, which comes last
    options = two[0].table("All options")
    assert options["selection.method"] == {"first": "colm", "second": "stratified"}
    captions = list(two[0].tables)
    assert captions.index("Differences between the runs") < captions.index("All options")


def test_runs_that_do_not_differ(tmp_path):
    _, text = written(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert "The runs do not differ here." in text


def test_the_page_needs_nothing_from_elsewhere(two):
    page, text = two
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//\w|@import|<img|<iframe", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert all(link[0] in "#d" for link in page.attributes("href"))
    assert {link for link in page.attributes("href") if link[0] == "d"} == {"data:,"}
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]


def test_every_picture_is_also_told_in_words(two):
    page = two[0]
    figures = [given for tag, given in page.tags if tag == "figure"]
    assert len(figures) > 12
    assert all(given["role"] == "img" and re.search(r": \d+\.\d", given["aria-label"]) for given in figures)
    algebra = next(given["aria-label"] for given in figures if "algebra" in given["aria-label"])
    assert "Held-out loss, algebra. first, 2 examples: 6.000 at step 0, 0.667 at step 8; " in algebra
    assert "second, 2 examples: 6.000 at step 0" in algebra


def test_ids_are_unique_and_found(two):
    page, text = two
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_lines_take_the_colours_of_the_page(two):
    page, text = two
    classes = Counter(page.attributes("class"))
    assert classes["series run-1"] > 10
    assert classes["series run-2"] > 10
    drawn = text[text.index("<svg") :]
    assert "var(--run-1)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}", drawn)


FORMULA = "cost $\\x$"
NASTY = '<img src=x onerror="alert(1)">&amp;{{7*7}}'


def test_names_are_text(tmp_path):
    run = write_run(tmp_path / "a<b>&'\"<!--", sources=(FORMULA, NASTY, "</svg><script>x</script>"))
    page, text = written(tmp_path, run)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert {NASTY, FORMULA} < set(page.table("First and last evaluation"))
    assert [name for name in page.attributes("aria-label") if f"Held-out loss, {FORMULA}." in name]
    assert page.table("The runs")["a<b>&'\"<!--"]
    assert "49" not in page.table("First and last evaluation")
    assert text.count("<title>colm_scale") == 1


# What is not whole


def test_a_run_under_way(two):
    assert "second: 4 of 6 steps are recorded: the run is in progress, or was stopped." in two[0].items


def test_a_run_without_evaluations(tmp_path):
    page, _ = written(tmp_path, write_run(tmp_path / "run", evaluated=False))
    assert "run: There is no evaluations.jsonl." in page.items
    assert "run: No evaluation is recorded, so there is no held-out loss." in page.items
    assert page.table("The runs")["run"]["natural mixture"] == "-"
    assert "First and last evaluation" not in page.tables


def test_a_run_that_has_only_begun(tmp_path):
    run = tmp_path / "run"
    RunDirectory(str(run)).create("train:\n  steps: 3\n", {}, facts={"schedule": {"steps": 3}, "sources": []})
    page, _ = written(tmp_path, run)
    assert "run: No step is recorded yet." in page.items
    assert page.table("The runs")["run"]["steps"] == "0 of 3"
    assert "figure" not in {tag for tag, _ in page.tags}


def test_files_that_are_missing_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("selection.jsonl", "config.yaml", "environment.json", "run.json"):
        (run / name).unlink()
    page, _ = written(tmp_path, run)
    for name in ("selection.jsonl", "config.yaml", "environment.json", "run.json"):
        assert f"run: There is no {name}." in page.items
    assert page.table("The runs")["run"]["steps"] == "4"
    assert "run does not record the size of its sources: counts instead of shares." in page.items


@pytest.mark.parametrize("name", ["metrics.jsonl", "selection.jsonl", "evaluations.jsonl"])
def test_a_line_that_is_being_written(tmp_path, name):
    run = write_run(tmp_path / "run")
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:-7])
    page, _ = written(tmp_path, run)
    assert f"run: The last line of {name} is incomplete and was skipped." in page.items


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics.jsonl", '{"step": 1', ["line 1", "not the JSON row of a step"]),
        ("metrics.jsonl", "[1]", ["line 1"]),
        ("metrics.jsonl", '{"step": 9}', ["line 2", "step 2 follows step 9"]),
        ("selection.jsonl", '{"step": 1, "candidates": [1], "sources": [], "selected": []}', ["line 1", "not match"]),
        ("evaluations.jsonl", '{"step": 0, "losses": {}}', ["line 1", "it lacks 'accuracies'"]),
    ],
)
def test_a_damaged_line_is_refused(tmp_path, name, line, words):
    run = write_run(tmp_path / "run")
    _, *rest = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([line, *rest]) + "\n")
    with pytest.raises(UserError) as caught:
        write_page([str(run)], tmp_path / "page.html")
    assert all(word in str(caught.value) for word in [str(run / name), "is damaged", *words])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", "{"),
        ("config.yaml", "a: [1"),
        ("run.json", "{}"),
        ("run.json", "[]"),
        ("run.json", '{"sources": [1]}'),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content):
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        write_page([str(run)], tmp_path / "page.html")


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory: it has no metrics\.jsonl"):
        write_page([str(tmp_path)], tmp_path / "page.html")


def test_a_run_is_named_once(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="is listed twice"):
        write_page([str(run), f"{run}/../run"], tmp_path / "page.html")


def test_too_many_runs(tmp_path):
    with pytest.raises(UserError, match="list at most 8"):
        write_page([str(number) for number in range(9)], tmp_path / "page.html")


def test_a_place_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"--output .*nowhere/page.html cannot be written"):
        write_page([str(run)], tmp_path / "nowhere" / "page.html")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    page, _ = written(tmp_path, write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"))
    assert list(page.table("The runs")) == ["a/run", "b/run"]


def test_numbers_that_are_not_there(tmp_path):
    """A loss that was not finite is null."""
    run = write_run(tmp_path / "run", evaluated=False)
    rows = read_rows(run / "metrics.jsonl")
    rows[1]["loss"] = rows[2]["gradient_norm"] = rows[0]["telemetry"]["sketch_error"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = evaluation(0, SOURCES)
    bad.losses["algebra"] = np.nan
    RunDirectory(str(run), resume=True).evaluation(bad)
    page, _ = written(tmp_path, run)
    table = page.table("First and last evaluation")
    assert (table["algebra"]["run"], table["geometry"]["run"]) == ("-", "4.000")
    assert page.table("Training loss")["run"]["last step"] == "1.000"


def test_steps_of_which_little_is_known(tmp_path):
    run = write_run(tmp_path / "run", evaluated=False)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    page, _ = written(tmp_path, run)
    assert page.table("Training loss")["run"]["last step"] == "0.500"
    assert page.table("The runs")["run"]["s per step"] == "-"


def test_many_ranks_are_a_range(tmp_path):
    page, _ = written(tmp_path, write_run(tmp_path / "run", ranks=9, kinds=("resident",)))
    label = next(text for text in page.attributes("aria-label", "figure") if "resident" in text)
    assert re.findall(r"run, (\w+): ([\d.]+)", label) == [("lowest", "2.001"), ("highest", "4.001")]
    assert len(page.tables["Peak memory of the run"]) == 10


def test_few_ranks_are_a_line_each(two):
    label = next(text for text in two[0].attributes("aria-label", "figure") if "nvml" in text)
    assert re.findall(r"(\w+), (rank \d)", label) == [("first", "rank 0"), ("first", "rank 1"), ("second", "rank 0")]
