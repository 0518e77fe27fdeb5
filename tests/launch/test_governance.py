"""Protected sources, the coverage floor, the audit, ``replay`` and ``explain`` as users call them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import SMALL, rows, write_rows

DATA = [
    {"instruction": f"What is {i} plus {i % 7}?", "output": str(i + i % 7), "source": "ab"[i % 2] if i % 12 else "rare"}
    for i in range(60)
]
OPTIONS = (
    *SMALL, "--train.steps", "6", "--profile.floor_every", "0", "--selection.kept_sources", "[]",
    "--selection.coverage_floor", "0.4", "--checkpoint.every", "3",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("governance")


@pytest.fixture(scope="module")
def data(folder) -> str:
    return str(write_rows(folder / "data.jsonl", DATA))


@pytest.fixture(scope="module")
def original(forked, folder, data) -> Path:
    """A run of CoLM in one process."""
    out = folder / "run"
    forked.run("train", [*OPTIONS, "--data.train", data, "--output_dir", str(out)], folder / "log").succeeded()
    return out


@pytest.fixture(scope="module")
def replayed(forked, folder, original) -> Path:
    out = folder / "replayed"
    forked.run("replay", [str(original), "--output_dir", str(out)], folder / "log replay").succeeded()
    return out


def test_the_audit_holds_every_candidate_and_agrees_with_the_record(original):
    table = pq.read_table(original / "audit").to_pylist()
    steps = rows(original / "selection.jsonl")
    assert len(steps) == 6
    for step in steps:
        own = [row for row in table if row["step"] == step["step"]]
        assert [row["id"] for row in own] == step["candidates"]
        assert [row["source"] for row in own] == step["sources"]
        weights = dict(zip(step["selected"], step["weights"]))
        assert {row["id"]: row["weight"] for row in own if row["weight"]} == weights
        assert {row["id"] for row in own if row["reason"] == "selected"} == set(step["selected"])
        assert any(row["reason"] == "passed over" for row in own)
        assert all(row["loss"] > 0 and row["score"] >= 0 for row in own if row["reason"] == "selected")
    assert {part.name for part in (original / "audit").iterdir()} == {
        "part-00000001-00000003.parquet",
        "part-00000004-00000006.parquet",
    }
    assert len(pq.read_table(original / "examples.parquet")) == 60


def test_every_source_is_covered_in_every_stretch(original):
    steps = rows(original / "selection.jsonl")
    for source in ("a", "b", "rare"):
        seen = [step["sources"].count(source) for step in steps]
        of = [dict(zip(step["candidates"], step["sources"])) for step in steps]
        used = [sum(names[id_] == source for id_ in step["selected"]) for names, step in zip(of, steps)]
        assert all(sum(used[i:j]) > 0.4 * sum(seen[i:j]) - 1 for i in range(6) for j in range(i + 1, 7)), source


def test_a_replay_trains_the_same_and_selects_nothing(original, replayed):
    assert rows(replayed / "selection.jsonl") == rows(original / "selection.jsonl")
    metrics = rows(replayed / "metrics.jsonl")
    assert [row["loss"] for row in metrics] == [row["loss"] for row in rows(original / "metrics.jsonl")]
    assert not any("sketch" in row["seconds"] for row in metrics)
    assert (replayed / "adapter" / "adapter_model.safetensors").read_bytes() == (
        original / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_replay_on_two_ranks_under_another_engine(forked, original, folder):
    out = folder / "two"
    options = ("--engine", "fsdp", "--output_dir", str(out))
    forked.run("replay", [str(original), *options], folder / "log two", ranks=2).succeeded()
    assert rows(out / "selection.jsonl") == rows(original / "selection.jsonl")
    losses = [row["loss"] for row in rows(out / "metrics.jsonl")]
    # Other micro-batches: sums in float32 in another order.
    assert losses == pytest.approx([row["loss"] for row in rows(original / "metrics.jsonl")], rel=1e-4)
    assert len(rows(out / "metrics.jsonl")[0]["peak_bytes"]) == 2


def test_a_replay_that_is_cut_short_goes_on(forked, original, replayed, folder):
    out = folder / "resumed"
    shutil.copytree(replayed, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    options = ("--resume", "auto", "--output_dir", str(out))
    forked.run("replay", [str(original), *options], folder / "log resumed").succeeded()
    assert rows(out / "selection.jsonl") == rows(original / "selection.jsonl")
    expected = [row["loss"] for row in rows(original / "metrics.jsonl")]
    assert [row["loss"] for row in rows(out / "metrics.jsonl")] == expected
    assert pq.read_table(out / "audit")["step"].to_pylist() == pq.read_table(original / "audit")["step"].to_pylist()


def test_a_replay_of_other_data_is_refused(forked, original, folder):
    fewer = str(write_rows(folder / "fewer.jsonl", DATA[:40]))
    other = str(write_rows(folder / "other.jsonl", [row | {"output": "1"} for row in DATA]))
    first = next(
        (step["step"], id_) for step in rows(original / "selection.jsonl") for id_ in step["candidates"] if id_ >= 40
    )
    refused = {
        fewer: [f"step {first[0]}: id {first[1]}", "not among the training examples"],
        other: ["on other rows"],
    }
    for number, (data, words) in enumerate(refused.items()):
        outcome = forked.run("replay", [str(original), "--data.train", data], folder / f"log refused {number}")
        assert outcome.code == 2
        assert len(outcome.errors) == 1
        for word in words:
            assert word in outcome.errors[0]


def test_a_streamed_run_is_replayed_streamed_and_held(forked, folder, data):
    """Each makes the same examples out of the same rows; held, they are sought by id."""
    out = folder / "streamed"
    options = (*SMALL, "--data.train", data, "--data.streaming", "true", "--data.shuffle_rows", "32")
    forked.run("train", [*options, "--output_dir", str(out)], folder / "log streamed").succeeded()
    for streaming in ("true", "false"):
        again = folder / f"streamed {streaming}"
        more = ("--data.streaming", streaming, "--output_dir", str(again))
        forked.run("replay", [str(out), *more], folder / f"log streamed {streaming}").succeeded()
        for name in ("selection.jsonl", "metrics.jsonl"):
            compared = [[row["step"], row.get("loss"), row.get("selected")] for row in rows(again / name)]
            assert compared == [[row["step"], row.get("loss"), row.get("selected")] for row in rows(out / name)]


def test_explain_works_with_the_audit_and_without(forked, original, folder):
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(original / "selection.jsonl", bare)
    found = {}
    for run_folder in (original, bare):
        outcome = forked.run("explain", [str(run_folder), "--format", "json"], folder / f"log {run_folder.name}")
        found[run_folder] = json.loads(outcome.succeeded().stdout)
        assert {file.name for file in (run_folder / "explain").iterdir()} == {
            *("explain.json", "examples.parquet", "coverage.png", "times_trained.png", "over_time.png"),
        }
    picks = [id_ for step in rows(original / "selection.jsonl") for id_ in step["selected"]]
    assert found[original]["examples"]["trained"] == found[bare]["examples"]["trained"] == len(set(picks))
    assert found[original]["examples"]["never_candidates"] == 0
    assert found[bare]["examples"]["never_candidates"] is None
    with_reasons = {source["name"]: source["reasons"] for source in found[original]["sources"]}
    assert sum(count for of in with_reasons.values() for count in of.values()) == 6 * 16
    assert not any(source["reasons"] for source in found[bare]["sources"])


def test_a_protected_source_is_trained_on_whole_whatever_else_is_kept(forked, folder, data):
    out = folder / "protected"
    options = ("--data.train", data, "--data.protected_sources", "rare", "--audit", "false", "--output_dir", str(out))
    options = (*SMALL, "--selection.kept_sources", "[]", *options)
    forked.run("train", options, folder / "log protected").succeeded()
    for step in rows(out / "selection.jsonl"):
        rare = {id_ for id_, source in zip(step["candidates"], step["sources"]) if source == "rare"}
        assert rare == set(step["selected"][: step["kept"]])
    assert not (out / "audit").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay"], ["RUN is missing"]),
        (["replay", "nowhere"], ["nowhere is not a run directory"]),
        (["replay", "RUN", "--selection.budget", "4"], ["--selection.budget", "leave it out"]),
        (["replay", "RUN", "--train.setps", "4"], ["unknown option --train.setps", "--train.steps"]),
        (["replay", "RUN", "--train.steps", "7"], ["has 6 steps", "would make 7: use --train.steps 6"]),
        (["explain"], ["RUN is missing"]),
        (["explain", "nowhere"], ["nowhere is not the directory of a run"]),
        (["explain", "RUN", "--fromat", "json"], ["unknown option --fromat", "--format"]),
        (["explain", "RUN", "--alpha", "2"], ["--alpha is 2.0"]),
    ],
)
def test_wrong_input_is_one_line(arguments, words, forked, original, tmp_path):
    command, *options = (str(original) if word == "RUN" else word for word in arguments)
    outcome = forked.run(command, options, tmp_path / "log")
    assert outcome.code == 2
    assert len(outcome.errors) == 1, outcome.stderr
    for word in words:
        assert word in outcome.errors[0]
