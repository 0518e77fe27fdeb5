from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from support.families import base_model

from colm_scale.config import DataConfig, ModelConfig, RowConfig
from colm_scale.config.commands import SourcesOptions
from colm_scale.data.builtin import builtin_rows
from colm_scale.data.readers import read_rows
from colm_scale.data.source_labels import labelled
from colm_scale.errors import UserError
from colm_scale.modeling.embedding import embed
from colm_scale.sources import discover as discovering
from colm_scale.sources.discover import discover
from colm_scale.sources.report import Cluster, Report, draw_map

SIZES = {"sea": 90, "law": 60, "tea": 12}
WORDS = {"sea": "wave sail tide reef port gull", "law": "court judge claim fine oath plea", "tea": "leaf cup brew mint"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(discovering, "BLOCK", 50)  # so that there are several


def write(path: str, *, named: bool, order_seed: int = 0) -> list[str]:
    """A file of rows about three things, and what each row is about."""
    draw = Random(order_seed)
    about = [subject for subject, size in SIZES.items() for _ in range(size)]
    draw.shuffle(about)
    with open(path, "w") as file:
        for subject in about:
            words = draw.choices(WORDS[subject].split(), k=8)
            row = {"prompt": " ".join(words[:5]), "completion": " ".join(words[5:])}
            file.write(json.dumps(row | ({"source": subject} if named else {})) + "\n")
    return about


def test_groups_are_found_written_and_read_back():
    about = write("rows.jsonl", named=False)
    said = discover(SourcesOptions(files=["rows.jsonl"], embedding="words", clusters=[3], output_dir="out"))
    rows = list(labelled(read_rows(["rows.jsonl"], DataConfig()), "out/sources.jsonl"))
    assert {(row.source, subject) for row, subject in zip(rows, about)} == {
        ("cluster-00", "sea"),
        ("cluster-01", "law"),
        ("cluster-02", "tea"),
    }
    report = json.loads(Path("out/report.json").read_text())
    assert [(found["size"], found["kept"]) for found in report["clusters"]] == [(90, False), (60, False), (12, True)]
    assert report["agreement"] is None
    assert "cluster-02  12 rows, kept" in said
    assert Path("out/map.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("map.png", "report.json", "report.txt", "sources.jsonl"),
    ]


def test_a_map_shows_names_as_they_are():
    names = ("cost $\\x$", "law")
    clusters = [Cluster(name, 3, False, [], {}) for name in names]
    report = Report(6, "words", 0, 0.0, "kmeans", {}, 0.0, clusters, None, None)
    points = np.arange(12.0).reshape(6, 2)
    draw_map(points, np.arange(6) % 2, report, Path("map.png"))
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def test_known_sources_are_compared_with():
    write("rows.jsonl", named=True)
    said = discover(SourcesOptions(files=["rows.jsonl"], embedding="words", clusters=[3], output_dir="out"))
    report = json.loads(Path("out/report.json").read_text())
    assert report["agreement"] == {"adjusted_rand": 1, "recovered": {"tea": 1}, "kept_share": 12 / 162}
    assert report["clusters"][1]["named"] == {"law": 60}
    assert "adjusted Rand index" in said


def test_the_nearest_examples_are_nearest():
    labels, distances = np.array([0, 1, 0, 0, 1]), np.array([3.0, 2.0, 1.0, 2.0, 1.0])
    assert discovering._nearest(labels, distances, 2) == [[2, 3], [4, 1]]


def test_the_model_tells_kinds_of_problems_apart():
    kinds = ("CoT/shop", "EQ/number", "PoT/area")
    rows = [row for row in builtin_rows("train") if row["source"] in kinds][:240]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = RowConfig(max_length=48)
    discover(SourcesOptions(files=["rows.jsonl"], embedding="states", clusters=[6], output_dir="out", data=short))
    report = json.loads(Path("out/report.json").read_text())
    assert report["embedding"] == "the built-in base"
    assert report["cut"] > 0
    # A kind may be several clusters, but hardly a cluster several kinds.
    assert sum(max(found["named"].values()) for found in report["clusters"]) >= 0.95 * len(rows)


def test_blocks_and_their_number_make_no_difference(monkeypatch):
    write("rows.jsonl", named=False)
    found = []
    for block in (7, 1000):
        monkeypatch.setattr(discovering, "BLOCK", block)
        options = SourcesOptions(files=["rows.jsonl"], embedding="words", clusters=[2, 3], output_dir=f"out{block}")
        discover(options)
        found.append(Path(f"out{block}/sources.jsonl").read_text())
    assert found[0] == found[1]


def test_an_embedding_is_the_mean_of_the_last_hidden_states():
    model = base_model("llama").eval()
    rows = [torch.arange(3, 3 + length) for length in (9, 4, 7)]
    found = embed(model, rows, token_budget=16)
    for row, state in zip(rows, found):
        hidden = model(row.unsqueeze(0), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(state, hidden[0].mean(0).detach())


def test_what_was_found_before_is_not_overwritten():
    write("rows.jsonl", named=False)
    options = SourcesOptions(files=["rows.jsonl"], embedding="words", clusters=[2], output_dir="out")
    discover(options)
    with pytest.raises(UserError, match="holds sources"):
        discover(options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": ["missing.jsonl"]}, "missing.jsonl does not exist"),
        ({"files": ["rows.jsonl", "bad.jsonl"], "embedding": "words"}, "bad.jsonl line 2, column 12: invalid JSON"),
        ({"model": ModelConfig(name="nowhere/at-all")}, "--model.name nowhere/at-all"),
        ({"adapter": "nowhere"}, "--adapter nowhere"),
        ({"clusters": [90], "embedding": "words"}, "162 rows are too few for 90 clusters"),
    ],
)
def test_wrong_input_is_said(options, words):
    write("rows.jsonl", named=False)
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=words):
        discover(SourcesOptions(**{"files": ["rows.jsonl"], "output_dir": "out", **options}))


def test_a_model_is_used_where_one_is_named():
    def by_words(**options) -> bool:
        return SourcesOptions(files=["rows.jsonl"], **options).by_words

    assert by_words()
    assert not any([by_words(adapter="a"), by_words(model=ModelConfig(name="m")), by_words(embedding="states")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": [1]}, "--clusters"),
        ({"stability": 1.5}, "--stability is 1.5"),
        ({"embedding": "words", "adapter": "a"}, "--embedding words uses no model: leave --adapter out"),
    ],
)
def test_wrong_options_are_said(options, words):
    with pytest.raises(UserError, match=words):
        SourcesOptions(files=["rows.jsonl"], **options)


