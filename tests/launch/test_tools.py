"""The commands around a run, as users call them: --dry-run, merge, eval, doctor."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.commands import ROOT, SMALL, rows, run
from transformers import AutoModelForCausalLM

from colm_scale.base import BASE_MODEL

TRAIN = [*SMALL, "--eval.generate", "1"]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def trained(forked, tmp_path_factory) -> Path:
    """A run of 2 steps."""
    folder = tmp_path_factory.mktemp("tools")
    forked.run("train", [*TRAIN, "--output_dir", str(folder / "run")], folder / "log").succeeded()
    return folder / "run"


@pytest.fixture(scope="module")
def first_step(trained) -> dict:
    return rows(trained / "selection.jsonl")[0]


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(forked, first_step, tmp_path):
    runs = sorted((ROOT / "runs").glob("*"))
    options = [*TRAIN, "--output_dir", str(tmp_path / "run"), "--dry-run"]
    said = forked.run("train", options, tmp_path / "log").succeeded()
    assert not (tmp_path / "run").exists()
    assert sorted((ROOT / "runs").glob("*")) == runs
    for words in (
        "6,010 examples of 14 sources",
        "kept sources (9): ",
        "step 1 by source",
        "step 2: 16 candidates of ",
        "Peak memory of a rank, GiB",
        f"{tmp_path / 'run'}/metrics.jsonl",
        "dry run: 2 of 2 steps remain; nothing was written",
    ):
        assert words in said.stdout
    assert "step 3" not in said.stdout
    # The same candidates and as many kept as in the run: the table's columns, source by source.
    lines = [line.split() for line in said.stdout.splitlines()]
    shown = {words[0]: int(words[1]) for words in lines if len(words) == 5 and words[1].isdigit() and "/" in words[0]}
    assert shown == Counter(first_step["sources"])


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_a_dry_run_of_several_ranks(engine, forked, tmp_path):
    options = ["--ds_config", "ds_configs/zero2.json"] if engine == "zero2" else ["--engine", "fsdp"]
    options = [*TRAIN, *options, "--output_dir", str(tmp_path / "run"), "--dry_run"]
    said = forked.run("train", options, tmp_path / "log", ranks=2).succeeded().stdout
    assert "micro-batch(es) on each of 2 rank(s)" in said
    assert f"on 2 rank(s) under {'ZeRO-2' if engine == 'zero2' else 'FSDP2'}" in said
    assert said.count("dry run:") == 1  # one rank speaks
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_run_that_goes_on_leaves_it_as_it_is(forked, trained, tmp_path):
    before = contents(trained)
    options = [*TRAIN, "--train.steps", "5", "--output_dir", str(trained), "--resume", "auto", "--dry-run"]
    outcome = forked.run("train", options, tmp_path / "other")
    assert outcome.code == 2  # it would be another run
    assert "--train.steps is 5, but the checkpoint was made with 2" in outcome.errors[0]
    options = [*TRAIN, "--output_dir", str(trained), "--resume", "auto", "--dry-run"]
    said = forked.run("train", options, tmp_path / "same").succeeded().stdout
    assert "resuming after step 2" in said
    assert "dry run: 0 of 2 steps remain" in said
    assert contents(trained) == before


def test_the_flag_is_in_the_help_and_no_option_of_a_configuration(forked, tmp_path):
    assert "--dry-run" in forked.run("train", ["--help"], tmp_path / "help").succeeded().stdout
    printed = forked.run("train", ["--dry-run", "--print_config"], tmp_path / "print").succeeded().stdout
    assert "train:" in printed
    assert "dry" not in printed
    (error,) = forked.run("train", ["--dryrun"], tmp_path / "typo").errors
    assert "did you mean --dry-run?" in error


def test_merge_writes_a_model_that_transformers_loads(forked, trained, tmp_path):
    options = [str(trained), "--output", str(tmp_path / "merged")]
    said = forked.run("merge", options, tmp_path / "log").succeeded().stdout
    assert "merged and adapted model: logits differ by at most" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert not torch.allclose(merged(tokens).logits, base(tokens).logits, atol=1e-3)  # training moved it
    (error,) = forked.run("merge", options, tmp_path / "again").errors
    assert "exists already" in error


@pytest.fixture(scope="module")
def scores(forked, trained, tmp_path_factory) -> tuple[str, dict]:
    """What is shown and written on two ranks."""
    folder = tmp_path_factory.mktemp("scores")
    options = [str(trained), "--base", "true", "--out", str(folder / "scores.json")]
    said = forked.run("eval", options, folder / "log", ranks=2).succeeded().stdout
    return said, json.loads((folder / "scores.json").read_text("utf-8"))


def test_eval_finds_what_the_run_found_before_and_after(trained, scores):
    before, after = rows(trained / "evaluations.jsonl")
    for found, expected in ((scores[1]["base"], before), (scores[1]["adapter"], after)):
        # float32 sums in another order: two ranks instead of one.
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["small_loss"] == pytest.approx(expected["small_loss"], rel=1e-5)
        assert found["accuracies"] == expected["accuracies"]
        assert found["counts"] == expected["counts"]
    assert before["losses"] != pytest.approx(after["losses"], rel=1e-3)


def test_eval_shows_a_table_once_and_the_harness_line(trained, scores):
    said, written = scores
    for words in ("held-out loss", "natural mixture", "mean over sources", "small sources", "base -> adapter"):
        assert said.count(words) == 1
    assert "CoT/shop" in said
    assert "above --limit, not evaluated: 308" in said  # 14 sources of 24, 2 of each
    assert f"peft={trained}/adapter,dtype=float32" in said
    assert written["lm_eval"] in said


def test_eval_on_other_data_of_a_checkpoint(forked, trained, tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"{i} + 1?", "output": f"{i + 1}"}) + "\n" for i in range(5)))
    options = [str(trained / "checkpoints/step-00000002"), "--data", str(data), "--limit", "4", "--generate", "0"]
    said = forked.run("eval", [*options, "--threads", "1"], tmp_path / "log").succeeded().stdout
    assert "own" in said
    assert "above --limit, not evaluated: 1 (own 1)" in said
    assert "--adapter_only true" in said  # lm_eval wants a PEFT folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge"], "RUN is missing"),
        (["merge", "nowhere"], "nowhere: there is no such folder"),
        (["merge", "{run}", "--adaptor", "best"], "did you mean --adapter?"),
        (["eval", "{run}", "--data", "missing.jsonl"], "missing.jsonl"),
        (["eval", "{run}", "--out", "no/such/folder.json"], "--out no/such/folder.json"),
        (["eval", "{run}", "--generate", "-1"], "eval.generate is -1"),
        (["doctor", "--timeout", "soon"], "--timeout is 'soon'"),
    ],
)
def test_wrong_input_is_one_line(forked, trained, words, message, tmp_path):
    command, *options = (word.format(run=trained) for word in words)
    outcome = forked.run(command, options, tmp_path / "log")
    assert outcome.code == 2
    assert len(outcome.errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert message in outcome.errors[0]


def test_doctor_tries_local_ranks_and_ends_with_0_or_1(forked, tmp_path):
    good = forked.run("doctor", ["--json", "true", "--output_dir", str(tmp_path)], tmp_path / "good")
    found = json.loads(good.stdout)
    assert good.code == int(any(finding["status"] == "problem" for finding in found))
    assert {"about": "2 rank(s): gloo", "status": "ok"}.items() <= found[-1].items()
    (tmp_path / "hosts").write_text("10.0.0.1 slots=two\n")
    bad = forked.run("doctor", ["--ranks", "0", "--hostfile", str(tmp_path / "hosts")], tmp_path / "bad")
    assert bad.code == 1
    assert "line 1 is '10.0.0.1 slots=two'" in bad.stdout


def test_doctor_on_two_ranks_speaks_once(forked, tmp_path):
    said = forked.run("doctor", ["--output_dir", str(tmp_path)], tmp_path / "log", ranks=2).stdout
    assert said.count("all ranks reach each other") == 1
    assert said.count("problem(s)") == 1


def test_doctor_works_without_deepspeed(tmp_path):
    """A folder in front of the installed packages makes deepspeed one that cannot be imported."""
    (tmp_path / "deepspeed.py").write_text("raise ImportError('not here')", "utf-8")
    words = ["-m", "colm_scale", "doctor", "--ranks", "1", "--json", "true", "--output_dir", str(tmp_path)]
    outcome = run([sys.executable, *words], tmp_path / "log", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "Traceback" not in outcome.stderr
    assert json.loads(outcome.stdout)[-1]["about"] == "1 rank(s): gloo"
