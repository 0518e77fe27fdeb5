"""Every launcher and every DeepSpeed file that is shipped runs, and leaves behind what the README promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.commands import (
    ROOT,
    SMALL,
    Outcome,
    deepspeed,
    free_port,
    python,
    rows,
    run,
    torchrun,
    write_rows,
)
from support.families import batch_of_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colm_scale.base import BASE_MODEL
from colm_scale.config import DataConfig
from colm_scale.config.command_line import parse
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.randomness import global_draws

LAUNCHERS = sorted((ROOT / "launchers").glob("*.py"))
METRICS = {
    *("step", "loss", "learning_rate", "gradient_norm", "seconds", "measured_over_floor", "peak_bytes"),
    *("phase_peak_bytes", "exchanged_bytes", "gradient_bytes", "padding_share", "imbalance", "candidates"),
    *("selected", "kept", "invalid", "overflow", "applied", "loss_scale", "telemetry", "noise"),
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def assert_complete(directory: Path, ranks: int, engine: str) -> None:
    """A run directory of 2 steps with the options `SMALL`."""
    metrics, selection = rows(directory / "metrics.jsonl"), rows(directory / "selection.jsonl")
    assert [row["step"] for row in metrics] == [row["step"] for row in selection] == [1, 2]
    for row in metrics:
        assert row.keys() == METRICS
        assert (row["candidates"], row["selected"], row["invalid"]) == (16, 8, 0)
        assert len(row["peak_bytes"]) == ranks
        assert row["loss"] > 0
        assert row["gradient_norm"] > 0
    for row in selection:
        assert len(row["candidates"]) == len(row["sources"]) == 16
        assert len(set(row["selected"])) == len(row["weights"]) == 8
        assert set(row["selected"]) <= set(row["candidates"])
    assert not set(selection[0]["candidates"]) & set(selection[1]["candidates"])  # one epoch shows an example once
    environment = json.loads((directory / "environment.json").read_text("utf-8"))
    assert (environment["world_size"], environment["engine"]) == (ranks, engine)
    assert parse(["--config", str(directory / "config.yaml")]).output_dir == str(directory)
    assert [row["step"] for row in rows(directory / "evaluations.jsonl")] == [0, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launchers")


def test_something_is_shipped():
    assert LAUNCHERS


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
@pytest.mark.parametrize(("start", "ranks", "engine"), [("python", 1, "single"), ("torchrun", 2, "ddp")])
def test_every_launcher(script, start, ranks, engine, folder):
    relative = str(script.relative_to(ROOT))
    command = python(relative) if start == "python" else torchrun(2, relative)
    directory = folder / f"{script.stem}-{start}"
    run([*command, *SMALL, "--output_dir", str(directory)], folder / f"{start}-output").succeeded()
    assert_complete(directory, ranks, engine)


def test_deepspeed_on_two_ranks(folder):
    """All files that are shipped are trained with by `tests/distributed/test_engines.py`."""
    directory = folder / "deepspeed"
    options = [*SMALL, "--ds_config", "ds_configs/zero2.json", "--output_dir", str(directory)]
    run([*deepspeed(2), *options], folder / "deepspeed-output").succeeded()
    assert_complete(directory, 2, "deepspeed")


def test_a_deepspeed_file_that_shards_and_offloads(forked, folder):
    directory = folder / "offloaded"
    options = [*SMALL, "--ds_config", "ds_configs/zero3_offload.json", "--output_dir", str(directory)]
    forked.run("train", options, folder / "offloaded-output", ranks=2).succeeded()
    assert_complete(directory, 2, "deepspeed")


def test_the_documented_line_and_a_file_with_options(folder):
    options = "train: {steps: 2, threads: 1}\nselection: {candidates: 16, budget: 8}\n"
    options += "eval: {every: 0, generate: 0, limit: 2}\n"
    directory = folder / "documented"
    (folder / "options.yaml").write_text(f"{options}output_dir: {directory}\n", "utf-8")
    line = "deepspeed launchers/train.py --ds_config ds_configs/zero2.json"
    command = [*line.split(), "--config", str(folder / "options.yaml")]
    run(command, folder / "documented-output", DLTS_MASTER_PORT=str(free_port())).succeeded()
    assert_complete(directory, 1, "deepspeed")


# A user's own model and data; and starting from what a run has left


@pytest.fixture(scope="module")
def own(folder) -> Path:
    """A folder with a small model, a pair file and a chat file."""
    path = folder / "own"
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with global_draws(torch.device("cpu"), 0, "a user's model"):
        LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path / "model")
    pairs = [{"question": f"{i} + {i}", "answer": f"{2 * i}", "kind": "ab"[i % 2]} for i in range(24)]
    long = [{"question": "long " * 100, "answer": "no", "kind": kind} for kind in "abb"]
    write_rows(path / "pairs.jsonl", pairs + long)
    write_rows(path / "other.jsonl", [row | {"answer": "z" * 12} for row in pairs])
    chat = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(24)]
    write_rows(path / "chat.jsonl", [{"messages": messages} for messages in chat])
    (path / "chat.jinja").write_text(TEMPLATE, "utf-8")
    return path


COLUMNS = {"prompt": "question", "completion": "answer", "source": "kind"}


@pytest.fixture(scope="module")
def outcomes(forked, own) -> dict[str, Outcome]:
    pairs, other, chats = (str(own / f"{name}.jsonl") for name in ("pairs", "other", "chat"))
    data = ("--data.train", pairs, "--data.columns", json.dumps(COLUMNS))
    data += ("--train.learning_rate", "0.01", "--eval.limit", "100")
    options = {
        "pairs": (*data, "--data.eval", pairs),
        "again": (*data, "--data.eval", pairs, "--lora.adapter", str(own / "pairs/adapter")),
        "best": (*data, "--data.eval", other, "--eval.every", "1", "--train.steps", "4"),
        "chat": ("--data.train", chats, "--data.chat_template", str(own / "chat.jinja")),
        "no template": ("--data.train", chats),
    }
    common = [*SMALL, "--model.name", str(own / "model"), "--profile.display", "plain"]
    jobs = {name: [*common, "--output_dir", str(own / name), *more] for name, more in options.items()}
    return forked.run_many(jobs, own / "output", at_once=1)


def held_out_losses(own: Path, data: str, adapter: str) -> dict[str, float]:
    """Mean loss by source, by peft alone and one example at a time."""
    tokenizer = AutoTokenizer.from_pretrained(own / "model")
    base = AutoModelForCausalLM.from_pretrained(own / "model")
    module = ExampleLoss(PeftModel.from_pretrained(base, own / adapter)).eval()
    config = DataConfig(columns=COLUMNS)
    examples = tokenise(read_rows([str(own / data)], config), tokenizer, config, 64)
    found: dict[str, list[float]] = {name: [] for name in examples.source_names}
    for source, start, end in zip(examples.sources.tolist(), examples.offsets, examples.offsets[1:]):
        batch = batch_of_rows([examples.tokens[start:end].long()], [examples.labelled[start:end]])
        with torch.no_grad():
            loss = module(batch)
        found[examples.source_names[source]].append(float(loss))
    return {source: sum(losses) / len(losses) for source, losses in found.items()}


def test_a_model_and_data_of_the_user(outcomes, own):
    outcomes["pairs"].succeeded()
    first = rows(own / "pairs/selection.jsonl")[0]
    assert first["sources"] == ["ab"[i % 2] for i in first["candidates"]]


def test_examples_above_the_context_are_dropped_and_counted_by_source(outcomes, own):
    assert "dropped: 3 (a 1, b 2)" in " ".join(outcomes["pairs"].stdout.split())
    assert all(max(row["candidates"]) < 24 for row in rows(own / "pairs/selection.jsonl"))


def test_a_chat_needs_a_template(outcomes):
    outcomes["chat"].succeeded()
    (error,) = outcomes["no template"].errors
    assert "chat.jsonl line 1" in error
    assert "--data.chat_template FILE" in error


def test_a_saved_adapter_is_peft_s_and_has_the_reported_loss(outcomes, own):
    reported = rows(own / "pairs/evaluations.jsonl")
    found = held_out_losses(own, "pairs.jsonl", "pairs/adapter")
    # float32 sums in another order, one example instead of a padded batch: 1e-6 of a loss. Training moved it by more.
    assert found == pytest.approx(reported[-1]["losses"], rel=1e-5)
    assert found != pytest.approx(reported[0]["losses"], rel=1e-4)


def test_starting_from_an_adapter_is_where_its_run_ended(outcomes, own):
    outcomes["again"].succeeded()
    ended, started = rows(own / "pairs/evaluations.jsonl")[-1], rows(own / "again/evaluations.jsonl")[0]
    assert started["step"] == 0
    # The same float32 tensors on the same micro-batches: nothing rounds.
    assert started["losses"] == pytest.approx(ended["losses"], rel=1e-7)


def test_the_best_adapter_is_kept_and_the_last_beside_it(outcomes, own):
    """The held-out answers are none that the training data give, so the longer it trains, the worse they get."""
    outcomes["best"].succeeded()
    evaluations = {row["step"]: row for row in rows(own / "best/evaluations.jsonl")}
    assert list(evaluations) == [0, 1, 2, 3, 4]
    best = min((1, 2, 3, 4), key=lambda step: evaluations[step]["loss_by_source"])
    assert best < 4
    for name, step in (("adapter", best), ("adapter_last", 4)):
        found = held_out_losses(own, "other.jsonl", f"best/{name}")
        assert found == pytest.approx(evaluations[step]["losses"], rel=1e-5)  # as above
