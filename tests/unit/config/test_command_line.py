"""What the words of a command line and the lines of a file become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from colm_scale.config.command_line import parse, parse_own, parse_plan, parse_train
from colm_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Every kind of option."""

    files: list[str]
    """What it is about."""
    shares: float | Literal["equal", "proportional"] | dict[str, float] = "proportional"
    """A number, a name or a mapping."""
    kept: float | list[str] | None = None
    """A number or names."""
    columns: dict[str, str] = field(default_factory=dict)
    """A mapping."""
    numbers: list[int] = field(default_factory=list)
    """Whole numbers."""
    pair: tuple[float, float] = (0.0, 1.0)
    """Two numbers."""
    name: str | None = None
    """A text."""
    on: bool = False
    """A truth."""


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--shares", "0.5"], "shares", 0.5),
        (["--shares=equal"], "shares", "equal"),
        (["--shares", "{math: 3, code: 1}"], "shares", {"math": 3.0, "code": 1.0}),
        (["--kept", "0.25"], "kept", 0.25),
        (["--kept", "a"], "kept", ["a"]),
        (["--kept", "a b", "12", "null"], "kept", ["a b", "12", "null"]),
        (["--kept", "[]"], "kept", []),
        (["--kept=null"], "kept", None),
        (["--columns", "{input: question, output: answer}"], "columns", {"input": "question", "output": "answer"}),
        (["--numbers", "4", "6"], "numbers", [4, 6]),
        (["--numbers", "[4, 6]"], "numbers", [4, 6]),
        (["--pair", "1e-5", "2"], "pair", (1e-5, 2.0)),
        (["--pair=[1, 2]"], "pair", (1.0, 2.0)),
        (["--name", "12"], "name", "12"),
        (["--name", "-x"], "name", "-x"),
        (["--name", ""], "name", ""),
        (["--on", "true"], "on", True),
        (["--on"], "on", True),
    ],
)
def test_every_kind_of_value(words, name, value):
    assert getattr(parse_own("kinds", Kinds, ["a.jsonl", *words]), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shares", "sequal"], "--shares is 'sequal', but must be a number or one of 'equal', 'proportional' or"),
        (["--columns", "{a: [1]}"], "--columns is '{a: [1]}', but must be"),
        (["--numbers", "4", "x"], "but must be list[a whole number]"),
        (["--pair", "1"], "--pair is '1', but must be tuple[a number, a number]"),
        (["--of", "true"], "unknown option --of: did you mean --on?"),
        (["--config", "a.yaml"], "unknown option --config"),
    ],
)
def test_a_wrong_value_names_option_and_value_and_what_it_must_be(words, message):
    with pytest.raises(UserError) as error:
        parse_own("kinds", Kinds, ["a.jsonl", *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["a", "b", "--name", "n"], ["--name", "n", "a", "b"], ["--name=n", "a", "b"]])
def test_what_a_command_is_about_may_stand_anywhere(words):
    assert parse_own("kinds", Kinds, words) == Kinds(files=["a", "b"], name="n")


def test_what_a_command_is_about_is_needed():
    with pytest.raises(UserError, match=r"^colm-scale kinds FILE\.\.\.: FILE is missing"):
        parse_own("kinds", Kinds, ["--name", "n"])


def test_the_last_file_and_the_command_line_win(tmp_path):
    (tmp_path / "a").write_text("train: {steps: 1, seed: 1, timeout: 5}", "utf-8")
    (tmp_path / "b").write_text("train:\n  seed: 2\n  adam_epsilon: 1e-7\n", "utf-8")
    words = ["--train.timeout", "7", "--config", str(tmp_path / "a"), f"--config={tmp_path / 'b'}", "--local_rank=0"]
    train = parse(words).train
    assert (train.steps, train.seed, train.timeout, train.adam_epsilon) == (1, 2, 7.0, 1e-7)


def test_a_file_may_share_options_between_groups(tmp_path):
    (tmp_path / "a").write_text("eval: &often {every: 7}\ncheckpoint: {<<: *often, keep: 3}\n", "utf-8")
    config = parse(["--config", str(tmp_path / "a")])
    assert (config.eval.every, config.checkpoint.every, config.checkpoint.keep) == (7, 7, 3)


@pytest.mark.parametrize("text", ["train: &a {steps: *a}", "train: &a\n  b: *a", "\x01", "a: 1\n---\nb: 2"])
def test_a_file_that_is_odd_is_an_error_in_a_line(tmp_path, text):
    (tmp_path / "a").write_text(text, "utf-8")
    with pytest.raises(UserError, match=rf"^--config {tmp_path}/a.*$"):
        parse(["--config", str(tmp_path / "a")])


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_the_dry_run_takes_no_word(flag):
    assert parse_train([flag, "--train.steps", "3"])[1]
    assert not parse_train(["--train.steps", "3"])[1]
    with pytest.raises(UserError, match="'3' belongs to no option"):
        parse_train([flag, "3"])


def test_the_options_of_a_plan_may_stand_in_a_file(tmp_path):
    (tmp_path / "a").write_text("plan: {world_size: 4}\ntrain: {seed: 3}\n", "utf-8")
    run, plan = parse_plan(["--config", str(tmp_path / "a")])
    assert (run.train.seed, plan.world_size) == (3, 4)
    with pytest.raises(UserError, match=r"line 1: unknown option plan\.world_size"):
        parse(["--config", str(tmp_path / "a")])


def test_the_help_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_own("kinds", Kinds, ["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: colm-scale kinds FILE... [OPTIONS]\n")
    assert max(map(len, shown.splitlines())) <= 80
    assert "--pair" in shown
    assert "default: (0.0, 1.0)" in " ".join(shown.split())


def test_the_help_of_a_plan_says_what_a_plan_is(capsys):
    with pytest.raises(SystemExit):
        parse_plan(["--help"])
    usage, description, *_ = capsys.readouterr().out.split("\n\n")
    assert usage == "usage: colm-scale plan [OPTIONS]"
    assert description.startswith("Estimate memory")


@pytest.mark.parametrize("name", ["config", "print_config", "dry-run", "local_rank"])
def test_a_file_holds_options_of_a_run_only(tmp_path, name):
    (tmp_path / "a").write_text(f"{name}: 1\n", "utf-8")
    with pytest.raises(UserError, match=rf"line 1: unknown option {name}"):
        parse_train(["--config", str(tmp_path / "a")])
