"""Functions of the user's in place of parts of the package: found, refused, and what they return checked."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from colm_scale.config import LoraConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.config.user_functions import is_own, load_own
from colm_scale.errors import TrainingError, UserError
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Quota, long_tensor
from colm_scale.selection.select import select_coreset

SOURCES = long_tensor([0, 1, 0, 1, 0, 0])
LOSSES = torch.tensor([1.0, 0.0, 5.0, 0.0, 2.0, 4.0])


@pytest.fixture
def written(tmp_path):
    """A function that writes a ranking's body and returns its name."""

    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(f"import torch\n\n\ndef mine(ranked):\n    {body}\n", encoding="utf-8")
        return f"{tmp_path / 'mine.py'}:mine"

    return write


def select(ranking: str, **options):
    """Two of source 0 (candidates 0, 2, 4, 5), and all of source 1."""
    matrix = CandidateMatrix(torch.arange(6), torch.randn(6, 3), torch.ones(6, dtype=torch.bool), LOSSES)
    quota = Quota(kept=long_tensor([]), per_source=long_tensor([2, 2]))
    config = SelectionConfig(ranking=ranking, **options)
    return select_coreset(matrix, SOURCES, quota, config, partial(generator, 0, "test"))


def test_a_ranking_picks_of_each_ranked_source_and_counts_what_it_says(written):
    ranking = written("return ranked.losses.argsort()[: ranked.count], torch.tensor([3.0, 0.5])")
    selection = select(ranking)
    assert selection.positions.tolist() == [0, 4, 1, 3]  # the lowest losses; source 1 enters whole
    assert selection.weights.tolist() == [3.0, 0.5, 1.0, 1.0]


def test_without_weights_each_counts_what_the_option_says(written):
    ranking = written("return torch.tensor([3, 0]), None")
    assert select(ranking).weights.tolist() == [1, 1, 1, 1]
    unbiased = select(ranking, weights="unbiased")
    assert (unbiased.positions.tolist(), unbiased.weights.tolist()) == ([5, 0, 1, 3], [2, 2, 1, 1])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("torch.tensor([0, 0]), None", r"returned picks \[0, 0\], but must return 2 different rows of 4"),
        ("torch.tensor([0, 4]), None", r"picks \[0, 4\]"),
        ("torch.tensor([0, -1]), None", r"picks \[0, -1\]"),
        ("torch.tensor([1]), None", r"picks \[1\]"),
        ("torch.tensor([0, 1]), torch.tensor([1.0, 0.0])", r"returned weights \[1.0, 0.0\].* each of 2 picks"),
        ("torch.tensor([0, 1]), torch.tensor([1.0])", r"returned weights \[1.0\]"),
    ],
)
def test_what_is_no_pick_ends_the_run(written, returned, said):
    with pytest.raises(TrainingError, match=said):
        select(written(f"return {returned}"))


@pytest.mark.parametrize(
    ("content", "function", "said"),
    [
        ("mine = 1", "mine", "there is no function mine in"),
        ("", "other", "there is no function other in"),
        ("def mine(): pass", "mine", r"mine\(\) must take 1 arguments, see docs/CONTRIBUTING.md"),
        ("import nothing_of_that_name", "mine", "cannot be loaded: ModuleNotFoundError: No module named 'nothing"),
        ("def mine(", "mine", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_function_that_is_none_is_one_clear_error(tmp_path, content, function, said):
    (tmp_path / "mine.py").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"--selection.ranking .*mine.py:{function}: .*{said}"):
        load_own("selection.ranking", f"{tmp_path / 'mine.py'}:{function}", parameters=1)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere\.py cannot be loaded: FileNotFoundError: no such file"):
        load_own("selection.ranking", "nowhere.py:mine", parameters=1)


def test_a_module_that_is_installed(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_mine.py").write_text("def mine(ranked): return 7", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_own("selection.ranking", "a_module_of_mine:mine", parameters=1)(None) == 7
    sys.modules.pop("a_module_of_mine")


def test_a_file_may_define_dataclasses_and_runs_once(tmp_path):
    content = "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n\n"
    content += "@dataclass\nclass A:\n    _: KW_ONLY\n    x: int = 3\n\ndef mine(ranked): return A\n"
    (tmp_path / "mine.py").write_text(content, encoding="utf-8")
    name = f"{tmp_path / 'mine.py'}:mine"
    assert load_own("o", name, 1)(None) is load_own("o", name, 1)(None)
    assert load_own("o", name, 1)(None)().x == 3


@pytest.mark.parametrize(
    ("name", "own"), [("a.py:b", True), ("pkg.mod:f", True), ("facility", False), (":f", False), ("a:", False)]
)
def test_what_names_a_function(name, own):
    assert is_own(name) == own


@pytest.mark.parametrize("option", ["estimator", "ranking"])
def test_a_misspelt_part_is_refused_with_what_there_is(option):
    with pytest.raises(UserError, match=rf"--selection.{option} is 'losss', but must be one of .*FILE\.py:FUNCTION"):
        SelectionConfig(**{option: "losss"})


def test_what_goes_with_the_estimators_of_the_package_only():
    with pytest.raises(UserError, match=r"--selection.reuse 2 works only with the package's estimators"):
        SelectionConfig(estimator="a.py:f", reuse=2)
    train = TrainConfig(forward_reuse="device", activation_checkpointing=True)
    with pytest.raises(UserError, match=r"--train.forward_reuse device: .* --selection.estimator a.py:f"):
        RunConfig(selection=SelectionConfig(estimator="a.py:f"), train=train, lora=LoraConfig())


def test_a_baseline_loads_nothing():
    SelectionConfig(method="stratified", ranking="nowhere.py:f").check_own()
    with pytest.raises(UserError, match="nowhere"):
        SelectionConfig(ranking="nowhere.py:f").check_own()
