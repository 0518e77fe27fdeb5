"""The scripts that made the built-in base model and the built-in mixture still make them."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest

from colm_scale.base import BASE_MODEL, MIXTURE
from colm_scale.data.builtin import builtin_rows

SCRIPTS = Path(__file__).resolve().parents[3] / "benchmarks" / "base_model"


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path[:] = before


@pytest.fixture(scope="module")
def make(script):
    return script("make")


@pytest.fixture(scope="module")
def mixture(script):
    return script("mixture")


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


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_shipped_mixture_is_generated_again_row_by_row(mixture, split):
    assert mixture.make_rows(split, seed=0) == builtin_rows(split)


def test_the_mixture_is_written_as_it_was_shipped(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mixture.py", "--out", str(tmp_path)])
    mixture.main()
    for path in MIXTURE.iterdir():
        assert gzip.decompress((tmp_path / path.name).read_bytes()) == gzip.decompress(path.read_bytes())
        assert path.read_bytes()[4:8] == bytes(4)  # no time in it: the same rows are the same file


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_instruction_of_the_mixture_is_in_both_splits_or_twice_in_one(mixture, seed):
    train, evaluated = ([row["instruction"] for row in mixture.make_rows(split, seed)] for split in ("train", "eval"))
    assert not set(train) & {row["instruction"] for row in builtin_rows("eval")}
    assert len(set(train)) == len(train)
    assert len(set(evaluated)) == len(evaluated)
    assert not any(map(mixture.held_out, train))
    assert all(map(mixture.held_out, evaluated))


def test_another_seed_makes_another_mixture_and_leaves_the_global_generator_alone(mixture):
    before = random.getstate()
    other = {row["instruction"] for row in mixture.make_rows("eval", 1)}
    assert random.getstate() == before
    rows = builtin_rows("eval")
    assert len(other - {row["instruction"] for row in rows}) > len(rows) / 2
