"""The scripts that made the built-in base model still make it."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from colm_scale.base import BASE_MODEL

SCRIPTS = Path(__file__).resolve().parents[3] / "benchmarks" / "base_model"


@pytest.fixture(scope="module")
def make():
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make")
    sys.path[:] = before


def test_the_tokenizer_is_made_again_as_it_was_shipped(make):
    """From documents of every kind, so a corpus that has changed shows here."""
    made = json.loads(make.make_tokenizer(seed=0).backend_tokenizer.to_str())
    assert made == json.loads((BASE_MODEL / "tokenizer.json").read_text("utf-8"))


def test_documents_are_functions_of_the_seed(make):
    first, again, other = (list(islice(make.documents(seed), 50)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_few_steps_write_a_whole_folder(make, tmp_path):
    make.main(["--steps", "2", "--threads", "1", "--out", str(tmp_path / "base")])
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in BASE_MODEL.iterdir()}
    readme = (tmp_path / "base" / "README.md").read_text("utf-8")
    assert "Made by `python benchmarks/base_model/make.py --steps 2 " in readme
