"""Options and values that went: each is refused with its way out, and the table agrees with the options that there are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from colm_scale.checkpoint.identity import check_same_run
from colm_scale.config import SelectionConfig, removed
from colm_scale.config.command_line import option_types, parse, read_trained
from colm_scale.config.removed import Removed
from colm_scale.errors import UserError

ROOT = Path(__file__).parents[3]
WAY_OUT = "use --train.steps"


@pytest.fixture(autouse=True)
def went(monkeypatch):
    """An option and values that never were, as if they had been removed."""
    monkeypatch.setitem(removed.OPTIONS, "train.stepz", Removed(3, WAY_OUT))
    monkeypatch.setitem(removed.VALUES, ("train.stepz", "many"), "use --train.epochs")
    monkeypatch.setitem(removed.VALUES, ("selection.metric", "l3"), "use --selection.metric l2")


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text, "utf-8")
        return str(tmp_path / "config.yaml")

    return write


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.stepz", "3"], f"--train.stepz was removed: {WAY_OUT}"),  # its default as well: it has no effect
        (["--train.stepz=4"], f"--train.stepz was removed: {WAY_OUT}"),
        (["--train.stepz"], f"--train.stepz was removed: {WAY_OUT}"),
        (["--train.stepz", "many"], "--train.stepz many was removed: use --train.epochs"),
        (["--selection.metric", "l3"], "--selection.metric l3 was removed: use --selection.metric l2"),
    ],
)
def test_the_command_line_names_the_way_out(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse(arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz: 4", f"--train.stepz was removed: {WAY_OUT}"),
        ("stepz: many", "--train.stepz many was removed: use --train.epochs"),
    ],
)
def test_a_file_names_the_line_too(file, line, message):
    path = file(f"train:\n  seed: 1\n  {line}\n")
    with pytest.raises(UserError, match=f"^--config {re.escape(path)} line 3: {re.escape(message)}$"):
        parse(["--config", path])


def test_a_removed_default_in_a_file_changes_nothing(file):
    assert parse(["--config", file("train: {stepz: 3, seed: 7}")]).train.seed == 7


def test_a_trained_adapter_does_not_depend_on_how_its_examples_were_selected(file):
    text = "selection: {gone: 5, metric: l3}\nprofile: {gone: 5}\nlora: {rank: 3}\n"
    assert read_trained(Path(file(text))).lora.rank == 3
    with pytest.raises(UserError, match=r"line 1: unknown option selection\.gone"):
        parse(["--config", file(text)])
    with pytest.raises(UserError, match=r"line 1: --train\.stepz was removed"):
        read_trained(Path(file("train: {stepz: 5}")))


def test_a_checkpoint_with_a_removed_default_is_gone_on_from():
    facts = {"data": "d", "model": "m", "proxy": None}
    current = {**facts, "config": {"train.seed": 1}}
    check_same_run({**facts, "config": {"train.seed": 1, "train.stepz": 3}}, current, Path("c"))
    with pytest.raises(UserError, match=rf"--train\.stepz is no such option.*made with 4 \({WAY_OUT}\)"):
        check_same_run({**facts, "config": {"train.seed": 1, "train.stepz": 4}}, current, Path("c"))


def test_what_was_removed_is_not_there():
    real = {name for name in removed.OPTIONS if name != "train.stepz"}
    assert len(real) >= 25
    assert real.isdisjoint(option_types())
    hints = {f"selection.{name}": hint for name, hint in get_type_hints(SelectionConfig).items()}
    for option, value in removed.VALUES:
        choices = str(hints.get(option, ""))
        assert f"'{value}'" not in choices, (option, value)


@pytest.mark.parametrize("sentence", [*(gone.way_out for gone in removed.OPTIONS.values()), *removed.VALUES.values()])
def test_what_a_way_out_names_is_there(sentence):
    options = re.findall(r"--([a-z]+\.[a-z0-9_]+)", sentence)
    assert set(options) <= set(option_types())
    for path, _, function in re.findall(r"((?:docs|benchmarks)/[\w/]+\.(?:py|md))(:(\w+))?", sentence):
        assert (ROOT / path).is_file(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text("utf-8"), sentence
