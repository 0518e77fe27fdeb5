"""The Trainer's loop on coresets beside our own: the same ids, the same losses, the same adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from support import cases, trainers, worker
from support.commands import ROOT, rows, run, torchrun
from support.trainers import HAS_TRL, WITHOUT_TRL
from transformers import Trainer, TrainerCallback, TrainingArguments

from colm_scale.config import DataConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.errors import UserError
from colm_scale.integrations import CoresetTrainerMixin
from colm_scale.sketch import zeroth_order

STEPS = 6


def assert_same(found: dict, expected: dict) -> None:
    """Losses and adapters but for the order in which float32 numbers are added up."""
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for name, adapter in expected["adapters"].items():
        # Where a gradient is next to nothing, Adam makes of its sign a step of the learning rate.
        assert (found["adapters"][name] - adapter).abs().max() < STEPS * worker.RATE / 10


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("transformers", "last_layer"),
        ("transformers", "zeroth_order_1"),
        ("transformers", "shared"),
        ("transformers", "cluster"),
        ("transformers", "stratified"),
        ("transformers", "reused_1"),
        pytest.param("trl", "last_layer", marks=pytest.mark.skipif(not HAS_TRL, reason=WITHOUT_TRL)),
    ],
)
def test_what_our_own_loop_selects_and_learns(kind, name, tmp_path):
    case = worker.CASES[name]
    expected, found = trainers.ours(case, STEPS), trainers.train(kind, case, tmp_path, STEPS)
    assert trainers.selected(tmp_path) == expected["selected"]
    assert_same(found, expected)
    weights = [row["weights"] for row in rows(tmp_path / "coreset" / "selection.jsonl")]
    assert weights == expected["weights"]


def test_a_trainer_under_autocast_sketches_almost_as_in_float32(tmp_path, monkeypatch):
    """The trainer turns autocast on within the model's own call; the base is in float32."""
    case, real, seen = worker.CASES["zeroth_order_3"], zeroth_order.directional_derivatives, []

    def spy(tap, batch, directions, perturbation):
        found = real(tap, batch, directions, perturbation)
        seen.append((batch, directions, perturbation, found[1]))
        return found

    monkeypatch.setattr(zeroth_order, "directional_derivatives", spy)
    trainers.train("transformers", case, tmp_path, 1, bf16=True)
    _, tap = worker.model(worker.run_config(case))
    expected = torch.cat([real(tap, *given)[1] for *given, _ in seen])
    found = torch.cat([coefficients for *_, coefficients in seen])
    assert len(found) > 10
    # The lower half of the blocks rounds its products to 2^-9: about 0.015. With autocast in the tail it was 1.2.
    assert 0 < (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_select_and_learn_the_same(stage, tmp_path):
    """In DDP and under DeepSpeed, with examples that go from the rank whose loader has them to the other."""
    case = worker.CASES["last_layer"]
    command = torchrun(2, "tests/support/trainers.py")
    given = {"deepspeed": _ds_config(tmp_path / "ds.json", stage)} if stage else {}
    options = ["transformers", "last_layer", str(tmp_path), "4", "2", "null", json.dumps(given)]
    run([*command, *options], tmp_path / "log", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}").succeeded()
    expected = trainers.ours(case, 4)
    assert trainers.selected(tmp_path) == expected["selected"]
    found = torch.load(tmp_path / "found.pt")
    if not stage:
        # Two micro-batches a step; beside the gradients, DDP reduces which parameters were used.
        reductions = [counts.get("allreduce_", 0) for counts in found["collectives"]]
        assert reductions == [0, 2] * 4
    if stage < 3:  # where the other rank has a half of them
        assert_same(found, expected)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert {"coreset/peak_gib_rank0", "coreset/peak_gib_rank1"} <= found["logs"][0].keys()
    assert all(row["imbalance"] < 1.2 for row in rows(tmp_path / "coreset" / "metrics.jsonl"))


def _ds_config(path: Path, stage: int) -> str:
    """As users write it; but small models are cut into shards too."""
    sizes = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage} | ({f"stage3_{size}": 0 for size in sizes} if stage == 3 else {})
    path.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(batches, "auto")}), "utf-8")
    return str(path)


def test_a_training_that_goes_on_selects_as_if_it_had_never_stopped(tmp_path):
    case = worker.CASES["covered"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = trainers.train("transformers", case, whole, STEPS)
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = trainers.make("transformers", case, resumed, STEPS, **saving)
    first.add_callback(_StopAfter(4))
    first.train()
    assert len(trainers.selected(resumed)) == 4
    found = trainers.train("transformers", case, resumed, STEPS, resume=True, **saving)
    assert trainers.selected(resumed) == trainers.selected(whole)
    for name, adapter in expected["adapters"].items():
        assert torch.equal(found["adapters"][name], adapter), name


def test_a_checkpoint_of_another_selection_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainers.train("transformers", worker.CASES["last_layer"], tmp_path, 2, **saving)
    with pytest.raises(UserError, match=r"selection\.estimator"):
        trainers.train("transformers", worker.CASES["zeroth_order_1"], tmp_path, 4, resume=True)
    for file in (tmp_path / "checkpoint-2" / "coreset" / "step-00000002").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-2" / "coreset" / "step-00000002").rmdir()
    with pytest.raises(UserError, match="was not saved by a trainer with coresets"):
        trainers.train("transformers", worker.CASES["last_layer"], tmp_path, 4, resume=True)


def test_the_end_of_an_epoch_has_a_smaller_coreset(tmp_path):
    """96 rows in steps of 40 candidates: 40, 40, and of what is left, one batch of the two, its share of the budget."""
    case = worker.Case(cases._selection(candidates=40, budget=20))
    trainer = trainers.make("transformers", case, tmp_path, 3)
    trainer.train_dataset = trainer.train_dataset.select(range(96))
    trainer.train()
    found = rows(tmp_path / "coreset" / "selection.jsonl")
    assert [len(row["candidates"]) for row in found] == [40, 40, 16]
    assert [len(row["selected"]) for row in found] == [20, 20, 8]


def test_rows_without_a_token_to_learn_are_no_candidates_and_counted(tmp_path):
    trainer = trainers.make("transformers", worker.CASES["stratified"], tmp_path, 2)
    labels = trainer.train_dataset["labels"]
    muted, source = trainer.train_dataset["coreset_id"][3], trainer.train_dataset["source"][3]
    labels = [[-100] * len(row) if number == 3 else row for number, row in enumerate(labels)]
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels").add_column("labels", labels)
    trainer.train()
    first = rows(tmp_path / "coreset" / "selection.jsonl")[0]
    assert len(first["candidates"]) == 23
    assert muted not in first["candidates"]
    assert trainer.state.log_history[0][f"coreset/dropped/{source}"] == 1


def test_evaluation_is_the_trainer_s_own(tmp_path):
    """Its collator never sees the columns of the selection, and its loss is that of all rows."""
    case = worker.CASES["stratified"]
    trainer = trainers.make("transformers", case, tmp_path, 2)
    trainer.train()
    plain = Trainer(
        model=trainer.model,
        args=TrainingArguments(**trainers.arguments(case, tmp_path / "plain", 2, 1)),
        data_collator=trainers.collate,
    )
    data = trainer.train_dataset.select(range(10))
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(plain.evaluate(data)["eval_loss"], abs=1e-6)


class Rows(torch.utils.data.Dataset):
    """A data set without columns."""

    def __init__(self, data: datasets.Dataset):
        self._rows = data.remove_columns("coreset_id").to_list()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._rows[index]


def _stream(data: datasets.Dataset) -> datasets.IterableDataset:
    return data.remove_columns("coreset_id").to_iterable_dataset()


@pytest.mark.parametrize("make", [Rows, _stream])
def test_other_data_sets_are_numbered(make, tmp_path):
    case = worker.CASES["stratified"]
    data = trainers.data(case, 2)
    trainer = trainers.CoresetTrainer(
        model=worker.model(worker.run_config(case))[0].model,
        args=TrainingArguments(**trainers.arguments(case, tmp_path, 2, 1)),
        data_collator=trainers.collate,
        train_dataset=make(data),
        coreset=case.selection,
        sources={name: data["source"].count(name) for name in set(data["source"])},
    )
    trainer.train()
    found = [row["candidates"] for row in rows(tmp_path / "coreset" / "selection.jsonl")]
    assert found == [list(range(24)), list(range(24, 48))]


class _StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self._step
        return control


SMALL = SelectionConfig(candidates=24, budget=12)


@pytest.mark.parametrize(
    ("coreset", "options", "said"),
    [
        (SelectionConfig(candidates=24, budget=8), {}, "budget is 8, but the trainer trains on 12"),
        (SelectionConfig(candidates=25, budget=12), {}, "25, which 1 process"),
        (SMALL, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (SMALL, {"optim": "rmsprop"}, "optim 'rmsprop' is not known"),
        (RunConfig(model=ModelConfig(name="a/b")), {}, "model.name='a/b' has no effect here"),
        (RunConfig(selection=SMALL, train=TrainConfig(seed=3)), {}, "train.seed=3 has no effect"),
        (RunConfig(selection=SMALL, data=DataConfig(columns={"source": "task"})), {}, "no column 'task'"),
        (RunConfig(data=DataConfig(columns={"output": "text"})), {}, "data.columns.output='text' has no effect"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(coreset, options, said, tmp_path):
    case = worker.CASES["last_layer"]
    with pytest.raises(UserError, match=said):
        trainers.CoresetTrainer(
            model=worker.model(worker.run_config(case))[0].model,
            args=TrainingArguments(**trainers.arguments(case, tmp_path, 2, 1, **options)),
            data_collator=trainers.collate,
            train_dataset=trainers.data(case, 1),
            coreset=coreset,
        )


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd", "lion_32bit", "adafactor"])
def test_known_optimizers(name, tmp_path):
    from colm_scale.integrations.options import optimizer_of

    found = optimizer_of(TrainingArguments(output_dir=str(tmp_path), optim=name, report_to=[]))
    assert found["optimizer"] == name.partition("_")[0]
    TrainConfig(**found)


def test_the_state_is_what_the_trainer_saves(tmp_path):
    trainers.train(
        "transformers", worker.CASES["last_layer"], tmp_path, 2, save_strategy="steps", save_steps=2
    )
    state = json.loads((tmp_path / "checkpoint-2" / "coreset" / "step-00000002" / "state.json").read_text("utf-8"))
    assert (state["step"], state["moment_steps"]) == (2, 2)


def test_the_selection_learns_nothing_from_steps_that_the_optimizer_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: True))
    case = worker.CASES["last_layer"]
    trainers.train("transformers", case, tmp_path, 2, save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "checkpoint-2" / "coreset" / "step-00000002" / "state.json").read_text("utf-8"))
    assert (state["step"], state["moment_steps"]) == (2, 0)
    assert [row["applied"] for row in rows(tmp_path / "coreset" / "metrics.jsonl")] == [False, False]


def test_the_mixin_takes_positional_arguments(tmp_path):
    class Positional(CoresetTrainerMixin, Trainer):
        pass

    case = worker.CASES["stratified"]
    args = TrainingArguments(**trainers.arguments(case, tmp_path, 1, 1))
    model = worker.model(worker.run_config(case))[0].model
    trainer = Positional(model, args, trainers.collate, trainers.data(case, 1), coreset=case.selection)
    trainer.train()
    assert len(trainers.selected(tmp_path)) == 1
