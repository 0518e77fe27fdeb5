from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from colm_scale.errors import UserError
from colm_scale.explain.explain import explain
from colm_scale.explain.plots import draw
from colm_scale.explain.show import as_json, tables, write

SIZES = {"big": 60, "mid": 30, "rare": 6}
SOURCES = [name for name, size in SIZES.items() for _ in range(size)]
FAVOURED, NEGLECTED = (0, 1, 2), (3, 4)


FORMULA = "cost $\\x$"
"""The name of a source that matplotlib would take for a formula, and a wrong one."""


def record(folder, steps: int, planted: bool = True, candidates: int = 24, budget: int = 12):
    """A run of whole epochs, 4 steps each, that keeps the rare source, and picks at random but for the planted."""
    draws, order = random.Random(0), []
    with (folder / "selection.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            if not order:
                order = draws.sample(range(len(SOURCES)), len(SOURCES))
            ids = [order.pop() for _ in range(candidates)]
            of = {name: [id_ for id_ in ids if SOURCES[id_] == name] for name in SIZES}
            left = budget - len(of["rare"])
            quota = left * len(of["big"]) // (len(of["big"]) + len(of["mid"]))
            by_wish = sorted(of["big"], key=lambda id_: (planted * _wish(id_), draws.random()))
            picks = by_wish[:quota] + draws.sample(of["mid"], left - quota)
            row = {"step": step, "candidates": ids, "sources": [SOURCES[id_] for id_ in ids]}
            row |= {"selected": of["rare"] + picks, "weights": [1.0] * budget, "kept": len(of["rare"])}
            file.write(json.dumps(row) + "\n")
    return folder


def _wish(id_: int) -> int:
    return -1 if id_ in FAVOURED else 1 if id_ in NEGLECTED else 0


def with_examples(folder, more: int):
    names = [*SOURCES, *["big"] * more]
    pq.write_table(pa.table({"id": list(range(len(names))), "source": names}), folder / "examples.parquet")
    return folder


def test_what_was_planted_is_found_and_nothing_else(tmp_path):
    found = explain(record(tmp_path, 160), 0.05)
    assert set(found.examples.ids[found.told_apart(1)]) == set(FAVOURED)
    assert set(found.examples.ids[found.told_apart(-1)]) == set(NEGLECTED)
    assert set(found.never_trained) == set(NEGLECTED)


def test_random_picks_are_told_from_chance_in_nothing(tmp_path):
    found = explain(record(tmp_path, 160, planted=False), 0.05)
    assert not len(found.told_apart(1))
    assert not len(found.told_apart(-1))
    spreads = {source.name: source.spread for source in found.sources}
    assert spreads["rare"] is None
    assert 0.6 < spreads["big"] < 1.5
    assert 0.5 < spreads["mid"] < 1.7


def test_few_candidacies_can_tell_nothing_and_that_is_said(tmp_path):
    found = explain(record(tmp_path, 4), 0.05)
    assert not found.examples.testable.any()
    assert not len(found.told_apart(1))


def test_sources_are_compared_with_uniform_draws(tmp_path):
    found = {source.name: source for source in explain(record(tmp_path, 160, planted=False), 0.05).sources}
    rare = found["rare"]
    assert (rare.candidacies, rare.selections, rare.kept) == (240, 240, 240)
    assert rare.expected == pytest.approx(120)
    assert rare.favoured == 1
    assert found["big"].favoured == -1
    assert sum(source.expected for source in found.values()) == pytest.approx(160 * 12)
    assert Counter({name: source.candidacies for name, source in found.items()}) == {
        name: 40 * size for name, size in SIZES.items()
    }


def test_the_expectation_is_the_chance_of_each_step(tmp_path):
    row = {"step": 1, "candidates": [1, 2, 3, 4, 5], "sources": list("aaabb"), "selected": [4, 1, 3], "kept": 1}
    (tmp_path / "selection.jsonl").write_text(json.dumps(row | {"weights": [1.0] * 3}) + "\n", "utf-8")
    examples = explain(tmp_path, 0.05).examples
    assert examples.expected.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1, 0])
    assert examples.selections.tolist() == [1, 0, 1, 1, 0]


def test_examples_that_never_came_are_known_where_they_were_written_down(tmp_path):
    found = explain(with_examples(record(tmp_path, 8), more=3), 0.05)
    assert found.never_candidates.tolist() == [96, 97, 98]
    big = next(source for source in found.sources if source.name == "big")
    assert (big.examples, big.candidates) == (63, 60)
    assert big.coverage == pytest.approx(big.trained / 63)


def test_sizes_alone_tell_how_many_never_came(tmp_path):
    sources = [{"name": name, "examples": size + 2, "kept": False} for name, size in (SIZES | {"never": 5}).items()]
    record(tmp_path, 8)
    (tmp_path / "run.json").write_text(json.dumps({"sources": sources}), "utf-8")
    found = explain(tmp_path, 0.05)
    assert {source.name: source.examples for source in found.sources}["never"] == 7
    assert "Never candidates: 13 (their ids were not recorded)." in shown(found)


def test_a_histogram_of_random_picks_is_that_of_chance(tmp_path):
    found = explain(record(tmp_path, 160, planted=False), 0.05)
    assert found.histogram.sum(1).tolist() == pytest.approx([96, 96])
    assert np.abs(found.histogram[0] - found.histogram[1])[:40].max() < 10


def test_reasons_come_from_the_audit(tmp_path):
    (tmp_path / "audit").mkdir()
    rows = {"source": ["big", "big", "mid"], "reason": ["selected", "passed over", "selected"]}
    for number in (1, 2):
        pq.write_table(pa.table(rows), tmp_path / "audit" / f"part-{number:08d}-{number:08d}.parquet")
    sources = {source.name: source.reasons for source in explain(record(tmp_path, 8), 0.05).sources}
    assert sources == {"big": {"selected": 2, "passed over": 2}, "mid": {"selected": 2}, "rare": {}}


def shown(found) -> str:
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables(found, top=2))
    return console.export_text()


def test_tables_json_and_files_say_the_same(tmp_path):
    found = explain(with_examples(record(tmp_path, 160), more=1), 0.05)
    said = shown(found)
    assert "favoured: trained on more often than by chance (3)" in said
    assert "Never trained on, though candidates: 2 (ids " in said
    assert "Never candidates: 1 (ids 96)." in said
    write(found, 2, tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "explain.json").read_text("utf-8"))
    assert plain == as_json(found, 2)
    assert plain["examples"]["favoured"] == 3
    assert len(plain["examples"]["favoured_first"]) == 2
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "examples.parquet").to_pylist()}
    assert len(rows) == 97
    assert {id_ for id_, row in rows.items() if row["than_by_chance"] == "more"} == set(FAVOURED)
    assert rows[96]["candidacies"] == 0
    assert rows[0]["source"] == "big"


def test_plots_are_pictures(tmp_path):
    files = draw(explain(record(tmp_path, 8), 0.05), tmp_path / "out")
    assert [file.name for file in files] == ["coverage.png", "times_trained.png", "over_time.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 4000 for file in files)


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path):
    record(tmp_path, 8)
    text = (tmp_path / "selection.jsonl").read_text("utf-8").replace('"mid"', json.dumps(FORMULA))
    (tmp_path / "selection.jsonl").write_text(text, "utf-8")
    found = explain(tmp_path, 0.05)
    assert FORMULA in {source.name for source in found.sources}
    assert len(draw(found, tmp_path / "out")) == 3


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no selection\.jsonl"):
        explain(tmp_path, 0.05)
