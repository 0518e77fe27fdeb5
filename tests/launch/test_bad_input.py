"""Wrong input, as a user meets it: a process that ends with code 2 and one line that says what to change.

Unless a case says otherwise, its model is a folder without weights: had the model been loaded before the error was
found, another message would have come.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from support.commands import LAUNCHER, ROOT, SMALL, Outcome, deepspeed, python, run, torchrun

from colm_scale.base import BASE_MODEL
from colm_scale.config import RunConfig, as_yaml
from colm_scale.config.command_line import option_types, parse
from colm_scale.errors import UserError

GOOD = [{"instruction": f"What is {i} + {i}?", "output": f"{2 * i}", "source": "ab"[i % 2]} for i in range(16)]


def lines(*replaced: tuple[int, object]) -> str:
    """The good data as JSONL, with some lines (from 1) replaced: by an object, or verbatim by a text."""
    content = [json.dumps(row) for row in GOOD]
    for number, line in replaced:
        content[number - 1] = line if isinstance(line, str) else json.dumps(line)
    return "\n".join(content) + "\n"


@dataclass(frozen=True)
class Case:
    """Options, the words that the message must hold, and files that are there, by name in the case's folder."""

    options: str
    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    model: str = "no_weights"


def data(content: str, *words: str, options: str = "", name: str = "train.jsonl") -> Case:
    return Case(f"--data.train {{here}}/{name} {options}", (name, *words), {name: content})


def ds(content: str, *words: str, options: str = "") -> Case:
    files = {"train.jsonl": lines(), "ds.json": content}
    return Case(f"--data.train {{here}}/train.jsonl --ds_config {{here}}/ds.json {options}", ("ds.json", *words), files)


def good(options: str, *words: str, model: str = "no_weights", **files: str) -> Case:
    names = {name.replace("__", "."): content for name, content in files.items()}
    return Case(f"--data.train {{here}}/train.jsonl {options}", words, {"train.jsonl": lines(), **names}, model)


OPTIONS = {
    "unknown option": Case("--train.learning_rat 0.1", ("--train.learning_rat", "did you mean --train.learning_rate?")),
    "unknown option with =": Case("--selektion.budget=3", ("--selektion.budget", "did you mean --selection.budget?")),
    "option of an unknown group": Case("--budget 3", ("unknown option --budget", "--selection.budget")),
    "a word too many": Case("steps", ("steps",)),
    "no value": Case("--train.seed", ("train.seed",)),
    "wrong type": Case("--train.seed two", ("--train.seed is 'two'", "a whole number")),
    "wrong number": Case("--lora.alpha much", ("--lora.alpha is 'much'", "a number")),
    "wrong truth": Case("--model.trust_remote_code perhaps", ("model.trust_remote_code", "'perhaps'", "true or false")),
    "wrong choice": Case("--selection.method clom", ("--selection.method is 'clom'", "'colm', 'stratified', 'random'")),
    "wrong mapping": Case("--data.columns question", ("--data.columns is 'question'", "{NAME: TEXT, ...}")),
    "unknown role of a column": Case(
        "--data.columns.instrution question", ("for 'instrution'", "did you mean 'instruction'", "source, protected")
    ),
    "one beta": Case("--train.betas 0.9", ("train.betas", "0.9")),
    "budget too large": Case("--selection.budget 17", ("--selection.budget is 17", "--selection.candidates (16)")),
    "budget zero": Case("--selection.budget 0", ("--selection.budget is 0", "at least 1")),
    "no candidates": Case("--selection.candidates 0", ("--selection.candidates is 0", "at least 1")),
    "clusters without medoids": Case(
        "--selection.weights cluster --selection.ranking matching", ("--selection.weights cluster", "facility")
    ),
    "shares of no kind": Case("--selection.shares eqal", ("--selection.shares is 'eqal'", "proportional, equal")),
    "shares below zero": Case("--selection.shares {math:-1}", ("--selection.shares", "math")),
    "shares in no file": Case("--selection.shares no.yaml", ("--selection.shares no.yaml", "No such file")),
    "shares in a broken file": Case(
        "--selection.shares {here}/s.yaml", ("s.yaml line 2", "not YAML"), {"s.yaml": "math: 1\n code: ]"}
    ),
    "shares of strangers": Case(
        "--selection.shares {here}/s.json --selection.kept_sources []",
        ("--selection.shares names 'CoT/shpo'", "'CoT/shop'", "The sources are"), {"s.json": '{"CoT/shpo": 1}'},
    ),
    "no steps": Case("--train.steps 0", ("--train.steps is 0", "at least 1")),
    "steps and epochs": Case("--train.epochs 1", ("--train.steps 2", "--train.epochs 1", "leave one out")),
    "deepspeed without a file": Case("--engine deepspeed", ("--engine deepspeed", "--ds_config zero2")),
    "file for another engine": Case("--engine ddp --ds_config f.json", ("--ds_config f.json", "--engine ddp")),
    "config missing": Case("--config {here}/no.yaml", ("--config", "no.yaml", "No such file")),
    "config not YAML": Case("--config {here}/c.yaml", ("c.yaml line 2", "not YAML"), {"c.yaml": "train:\n steps: ]"}),
    "config a list": Case("--config {here}/c.yaml", ("c.yaml", "list"), {"c.yaml": "- 1\n"}),
    "config empty": Case("--config {here}/c.yaml", ("c.yaml", "must contain options"), {"c.yaml": ""}),
    "config with an unknown key": Case(
        "--config {here}/c.yaml", ("c.yaml line 2", "train.stepz", "did you mean --train.steps?"),
        {"c.yaml": "train:\n  stepz: 1"},
    ),
    "config with an unknown group": Case(
        "--config {here}/c.yaml", ("c.yaml line 3", "unknown option trian.steps", "did you mean --train.steps?"),
        {"c.yaml": "train: {seed: 1}\n\ntrian: {steps: 1}"},
    ),
    "config with a wrong type": Case(
        "--config {here}/c.yaml", ("c.yaml line 2", "train.seed is 'two'", "a whole number"),
        {"c.yaml": "\ntrain: {seed: two}"},
    ),
}  # fmt: skip

FILES = {
    "missing file": Case("--data.train {here}/no.jsonl", ("no.jsonl does not exist",)),
    "misspelt file": good("--data.eval {here}/trian.jsonl", "trian.jsonl does not exist", "mean", "/train.jsonl?"),
    "missing folder": Case("--data.train {here}/no/a.jsonl", ("a.jsonl does not exist", "nor does its folder")),
    "a folder": Case("--data.train {here}", ("is a folder without any file of a known format",)),
    "no known suffix": data(lines(), "no suffix", ".jsonl", name="train.txt"),
    "not a file": Case("--data.train what", ("'what'", "neither a file", "nor a hub data set")),
    "a pattern of no file": Case("--data.train what?", ("no file matches what?",)),
    "empty file": data("", "has no rows"),
    "empty list": data("[]", "has no rows", name="train.json"),
    "invalid JSON": data(lines((3, '{"instruction": "a", ')), "train.jsonl line 3, column", "invalid JSON"),
    "invalid JSON over lines": data('[\n{"a": 1},\n{"b" 2}\n]', "train.json line 3, column 6", name="train.json"),
    "not an object": data(lines((2, "17")), "line 2", "17", "must be an object"),
    "missing column": data(
        lines((4, {"question": "a", "answer": "b", "source": "a"})),
        *("line 4", "'question', 'answer', 'source'", "'instruction' and 'output'", "--data.columns"),
    ),
    "column of another name": data(lines(), "line 1", "'answer'", options="--data.columns.output answer"),
    "empty output": data(
        lines((7, {"instruction": "a", "output": " ", "source": "a"})), "line 7", "'output' is empty"
    ),
    "output not text": data(lines((7, {"instruction": "a", "output": 5, "source": "a"})), "line 7", "'output' is 5"),
    "a source missing": data(lines((5, {"instruction": "a", "output": "b"})), "line 5", "no source", "'source'"),
    "an odd mark of protection": data(
        lines((6, {"instruction": "a", "output": "b", "source": "a", "protected": "yes"})),
        *("line 6", "'protected' is \"yes\"", "--data.columns.protected"),
    ),
    "short CSV line": data("instruction,output\na,b\nc\n", "train.csv line 3", "1 cells", name="train.csv"),
    "a twisted chat": data(
        json.dumps({"messages": [{"role": "usr", "content": "a"}]}), "line 1", "messages[0]", '"usr"', "user, assistant"
    ),
    "nobody answers": data(json.dumps({"messages": [{"role": "user", "content": "a"}]}), "line 1", "nothing to learn"),
    "chat template missing": good("--data.chat_template {here}/no.jinja", "no.jinja", "cannot be read"),
    "held-out data wrong": good("--data.eval {here}/eval.jsonl", "eval.jsonl line 2", eval__jsonl=lines((2, "{"))),
    "everything too long": good("--data.max_length 4", "none of the 16 examples", "4 tokens", "--data.max_length"),
    "too few examples": good(
        "--selection.candidates 64", "--selection.candidates is 64", "only 16 training examples", "at most 16"
    ),
    "unknown kept source": good(
        "--selection.kept_sources a bb", "--selection.kept_sources names 'bb'", "did you mean 'b'?", "are: a, b"
    ),
    "ds_config missing": good("--ds_config {here}/no.json", "--ds_config", "no.json", "No such file"),
    "ds_config not JSON": ds('{\n"zero_optimization": {"stage": 2},\n}', "ds.json line 3", "not JSON"),
    "ds_config a list": ds("[1]", "holds a list"),
    "ds_config of stage 4": ds('{"zero_optimization": {"stage": 4}}', "stage is 4", "one of (0, 1, 2, 3)"),
    "ds_config misspelt": ds('{"zero_optimisation": {}}', "zero_optimisation", "did you mean zero_optimization"),
    "ds_config with an unknown key": ds('{"zero_optimization": {"overlap": true}}', "optimization.overlap is True"),
    "resume from nowhere": good("--resume {here}/no", "--resume", "/no: there is no such folder"),
    "resume from no run": good("--resume {here}", "--resume", "is neither a checkpoint"),
    "streamed CSV": data("a,b\n", ".jsonl", options="--data.streaming true", name="train.csv"),
    "streamed row wrong": data(lines((3, "{")), "train.jsonl line 3", options="--data.streaming true"),
    "flash attention on a CPU": good("--model.attention flash_attention_2", "flash_attention_2", "a CPU", "use sdpa"),
    "DDP of one": good("--engine ddp", "--engine ddp needs several processes", "torchrun"),
    "ds_config with a batch size": ds('{"train_micro_batch_size_per_gpu": 4}', "train_micro_batch_size_per_gpu is 4"),
    "ds_config with clipping": ds(
        '{"gradient_clipping": 2.0}', "gradient_clipping is 2.0", "the run uses 0.5", "--train.max_grad_norm",
        options="--train.max_grad_norm 0.5",
    ),
    "ds_config with a type": ds('{"bf16": {"enabled": true}}', "bf16", "--train.dtype", "float32"),
    "ds_config with an optimizer": ds('{"optimizer": {"type": "SGD"}}', '{"type": "SGD"}', "--train.optimizer"),
    "whole matrices in shards": good(
        "--engine fsdp --train.optimizer muon", "--train.optimizer muon", "whole", "fsdp", "single", "ddp"
    ),
    "whole matrices under ZeRO-1": ds(
        '{"zero_optimization": {"stage": 1}}', "--train.optimizer adafactor", "ZeRO-1", "single", "ddp",
        options="--train.optimizer adafactor",
    ),
    "tiny epsilon": good("--train.optimizer adafactor --train.adam_epsilon 1e-30", "--train.adam_epsilon", "1e-15"),
    "reused columns": good(
        "--selection.reuse 3 --selection.compression columns", "--selection.reuse 3", "--selection.compression columns"
    ),
    "no such model": good("", "no_model", "cannot load a model", model="no_model"),
    "not causal": good("", "not a causal language model", "BertForMaskedLM", model="encoder"),
    "its own code": good("", "own code", "--model.trust_remote_code true", model="own_code"),
    "no weights": good("", "no_weights", "cannot load a model", "model.safetensors"),
    "a run is there already": good(
        "--output_dir {here}/earlier", "earlier", "already holds a run", **{"earlier/metrics__jsonl": "{}"}
    ),
    "no folder to write to": good("--output_dir {here}/train.jsonl/a", "--output_dir", "be written"),
    "no such layer": good("--selection.probe w_proj", "--selection.probe 'w_proj'", "v_proj", model="base"),
    "no such target": good("--lora.targets w_proj", "--lora.targets", "w_proj", "self_attn.v_proj", model="base"),
    "probe without adapter": good("--lora.targets q_proj", "v_proj", "--lora.targets", model="base"),
    "no such adapter": good("--lora.adapter {here}/no", "--lora.adapter", "/no", "no adapter", model="base"),
}  # fmt: skip
CASES = OPTIONS | FILES


def make_models(folder: Path) -> None:
    """Models that are wrong in one respect each; ``base`` is right."""
    for name in ("no_weights", "encoder", "own_code"):
        shutil.copytree(BASE_MODEL, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "base").symlink_to(BASE_MODEL)
    (folder / "encoder/config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "utf-8")
    own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "own_code/config.json").write_text(json.dumps(own_code), "utf-8")


def options_of(name: str, folder: Path) -> list[str]:
    """Write a case's files; the whole of its options."""
    case, here = CASES[name], folder / name.replace(" ", "_")
    for file, content in case.files.items():
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text(content, "utf-8")
    here.mkdir(exist_ok=True)
    common = [*SMALL, "--model.name", str(folder / case.model), "--output_dir", str(here / "run")]
    return [*common, *case.options.replace("{here}", str(here)).split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad_input")
    make_models(path)
    return path


@pytest.fixture(scope="module")
def outcomes(forked, folder) -> dict[str, Outcome]:
    return forked.run_many({name: options_of(name, folder) for name in CASES}, folder / "output")


def assert_one_error(outcome: Outcome, *words: str) -> None:
    assert len(outcome.errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    for word in words:
        assert word in outcome.errors[0], outcome.errors[0]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_and_code_2(name, outcomes, folder):
    assert_one_error(outcomes[name], *CASES[name].words)
    assert outcomes[name].code == 2
    assert not (folder / name.replace(" ", "_") / "run").exists()
    # Nothing else is said, but for what libraries have to say once a model is there.
    if CASES[name].model == "no_weights":
        assert outcomes[name].stderr.splitlines() == outcomes[name].errors
        assert outcomes[name].stdout == ""


def test_an_earlier_run_is_left_as_it_was(outcomes, folder):
    earlier = folder / "a_run_is_there_already/earlier"
    assert [file.name for file in earlier.iterdir()] == ["metrics.jsonl"]
    assert (earlier / "metrics.jsonl").read_text("utf-8") == "{}"


# The same through every way of starting


def test_the_launcher_itself(folder):
    outcome = run([*python(), "--selection.budget", "100"], folder / "launcher")
    assert_one_error(outcome, "--selection.budget is 100")
    assert outcome.code == 2


def test_the_launcher_runs_from_anywhere(folder, tmp_path):
    moved = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['train.py', '--data.train', 'a.jsonl']"
    started = f"import runpy; runpy.run_path({str(ROOT / LAUNCHER)!r}, run_name='__main__')"
    outcome = run([sys.executable, "-c", f"{moved}; {started}"], folder / "anywhere")
    assert_one_error(outcome, "a.jsonl does not exist")
    assert outcome.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--train.seed", "two"], ["--train.seed is 'two'"]),
        (["trian"], ["unknown command 'trian'", "train"]),
    ],
)
def test_the_console_command(arguments, words, folder):
    called = f"from colm_scale.cli.main import main; main({arguments!r})"
    outcome = run([sys.executable, "-c", called], folder / "console")
    assert_one_error(outcome, *words)
    assert outcome.code == 2


@pytest.mark.parametrize(
    ("launcher", "options", "words"),
    [
        (None, ["--selection.candidates", "15"], ["--selection.candidates is 15", "2 ranks", "a multiple of 2"]),
        (None, ["--train.step_s", "15"], ["unknown option --train.step_s"]),
        (torchrun, ["--engine", "single"], ["--engine single runs one process", "there are 2"]),
        (deepspeed, ["--ds_config", "{here}/ds.json"], ["train_batch_size is 5", "the run uses 8"]),
    ],
)
def test_one_rank_says_it_and_all_end(launcher, options, words, forked, tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 5}', "utf-8")
    given = [option.replace("{here}", str(tmp_path)) for option in options]
    given, log = [*SMALL, "--output_dir", str(tmp_path / "run"), *given], tmp_path / "output"
    outcome = run([*launcher(2), *given], log) if launcher else forked.run("train", given, log, ranks=2)
    assert len(outcome.errors) == 1, outcome.stderr
    assert all(word in outcome.errors[0] for word in words), outcome.errors
    assert outcome.code not in (0, None)
    assert not (tmp_path / "run").exists()


# What is right


@pytest.fixture(scope="module")
def help_text(folder) -> str:
    return run([*python(), "--help"], folder / "help", COLUMNS="100000").succeeded().stdout


@pytest.mark.parametrize("option", option_types())
def test_help_explains_every_option(option, help_text):
    *groups, name = option.split(".")
    described = reduce(getattr, groups, RunConfig())
    explanation = " ".join(docstrings(type(described))[name].split())
    named, *_ = re.split(r"\n  --", help_text.split(f"\n  --{option} ", 1)[1])
    assert explanation in " ".join(named.split())


def docstrings(config_class: type) -> dict[str, str]:
    """The text under each field of a class, those that it inherits included."""
    return {
        field.target.id: text.value.value
        for owner in config_class.__mro__[:-1]
        for field, text in pairwise(ast.parse(inspect.getsource(owner)).body[0].body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


CHOSEN = [
    *("--train.steps", "7", "--train.betas", "0.8", "0.95", "--selection.kept_sources", "a source", "12", "null"),
    *("--data.train", "a.jsonl", "b c.jsonl", "--data.template", "Q: {instruction}\nA: ", "--model.name", "ünïcode"),
    *("--train.learning_rate", "1e-5", "--selection.budget", "3", "--data.max_length", "77", "--lora.dropout", "0.25"),
    *("--data.columns", "{instruction: question}", "--data.columns.source", "topic"),
]


def test_a_printed_configuration_can_be_read_back(folder):
    printed = run([*python(), *CHOSEN, "--print_config"], folder / "print").succeeded().stdout
    (folder / "printed.yaml").write_text(printed, "utf-8")
    assert parse(["--config", str(folder / "printed.yaml")]) == parse(CHOSEN)


def test_list_options_take_several_words():
    config = parse(CHOSEN)
    assert config.data.train == ["a.jsonl", "b c.jsonl"]
    assert config.selection.kept_sources == ["a source", "12", "null"]
    assert config.train.betas == (0.8, 0.95)
    assert parse(["--data.train", "a.jsonl"]).data.train == ["a.jsonl"]
    assert parse(["--data.train=a.jsonl", "--train.seed", "1"]).data.train == ["a.jsonl"]
    assert parse(["--selection.kept_sources", "[]"]).selection.kept_sources == []
    assert parse(["--selection.kept_sources", '["a, b"]']).selection.kept_sources == ["a, b"]


def test_columns_are_named_together_one_by_one_and_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  columns: {output: answer, source: kind}\n", "utf-8")
    columns = parse(["--config", str(tmp_path / "c.yaml"), "--data.columns.source", "topic"]).data.columns
    assert columns == {"output": "answer", "source": "topic"}
    assert parse(CHOSEN).data.columns == {"instruction": "question", "source": "topic"}
    assert parse([]).data.column("source") == "source"


def test_a_saved_configuration_is_the_same_again(tmp_path):
    (tmp_path / "config.yaml").write_text(as_yaml(parse(CHOSEN)), "utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == parse(CHOSEN)
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))) == set(RunConfig.__dataclass_fields__)


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {steps: 5, seed: 3}\nselection: {candidates: 8, budget: 4}\n", "utf-8")
    file = str(tmp_path / "c.yaml")
    for arguments in (["--config", file, "--train.steps", "9"], [f"--config={file}", "--train.steps=9"]):
        config = parse(arguments)
        assert (config.train.steps, config.train.seed) == (9, 3)
        assert (config.selection.candidates, config.selection.budget) == (8, 4)


def test_an_option_is_not_abbreviated():
    with pytest.raises(UserError, match=r"unknown option --train\.step: did you mean --train\.steps\?"):
        parse(["--train.step", "3"])
