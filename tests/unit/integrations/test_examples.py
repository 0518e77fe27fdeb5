"""The examples of docs/examples, run on a tiny model and data made here."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
from support.commands import ROOT, rows, write_rows
from support.trainers import HAS_TRL, WITHOUT_TRL

from colm_scale.base import BASE_MODEL

SIZES = {"sums": 60, "signs": 30, "rare": 6}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> str:
    """96 small sums."""
    found = [
        {"prompt": f"{source} {number} + {number % 7} =\n", "completion": str(number + number % 7), "source": source}
        for source, size in SIZES.items()
        for number in range(size)
    ]
    return str(write_rows(tmp_path / "data.jsonl", found))


def test_plain_loop(data, capsys):
    losses = example("plain_loop").main(data, str(BASE_MODEL), "6")
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert "on 16 of 32" in capsys.readouterr().out
    assert len((ROOT / "docs" / "examples" / "plain_loop.py").read_text("utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", ["trainer", "sft_trainer"])
def test_trainers(name, data, tmp_path):
    if name == "sft_trainer" and not HAS_TRL:
        pytest.skip(WITHOUT_TRL)
    folder = tmp_path / "output"
    trainer = example(name).main(data, str(folder), str(BASE_MODEL), "6")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(map(math.isfinite, losses))
    steps = rows(Path(folder) / "coreset" / "selection.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert {len(row["selected"]) for row in steps} == {16}
    # Two epochs of three steps, each example a candidate once in both.
    for epoch in (steps[:3], steps[3:]):
        assert sorted(id_ for row in epoch for id_ in row["candidates"]) == list(range(96))
    for row in steps:  # rare is smaller than the average source, so kept
        rare = [id_ for id_, source in zip(row["candidates"], row["sources"]) if source == "rare"]
        assert set(rare) <= set(row["selected"])
    assert rows(Path(folder) / "coreset" / "metrics.jsonl")[-1]["peak_bytes"][0] > 0
