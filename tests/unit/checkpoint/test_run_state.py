"""What a run would lose is what another gets back; the launched tests do the same under every engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.families import adapted_model, batch_of

from colm_scale.checkpoint.background import BackgroundWriter
from colm_scale.checkpoint.files import NO_CHECKPOINT
from colm_scale.checkpoint.run_state import RunState
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.base import LossScale
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.engines.tensors import collect
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.selection.coverage import Coverage
from colm_scale.selection.feedback import ErrorFeedback
from colm_scale.selection.moments import AdamMoments
from colm_scale.selection.quota import RecentSources
from colm_scale.sketch.store import NoSketchStore, SketchStore
from colm_scale.step.source_refresh import SourceRefresh

GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
IDENTITY = {"config": {"train.seed": 0}, "data": "d", "model": "m"}


class Part:
    """A sampler or session: a number that changes."""

    def __init__(self, number: int):
        self.number = number

    def state(self) -> dict:
        return {"number": self.number}

    def load(self, state: dict) -> None:
        self.number = state["number"]


def parts(folder: Path, number: int, identity: dict = IDENTITY) -> SimpleNamespace:
    """A run whose every part says ``number``."""
    engine = TorchEngine(ExampleLoss(adapted_model("llama")), TrainConfig(), GROUP)
    moments = AdamMoments(torch.ones(3) * number, torch.ones(3), number, (0.9, 0.99), 1e-8)
    estimator = SimpleNamespace(moments=moments, store=NoSketchStore())
    sampler, session = Part(number), Part(number)
    recent = RecentSources(torch.tensor([number > 3, False]), torch.tensor([number, 2]))
    feedback = ErrorFeedback(torch.full((2, 3), number / 4, dtype=torch.float64))
    sources = SimpleNamespace(recent=recent, coverage=Coverage(torch.tensor([250_000, number])), feedback=feedback)
    select = SimpleNamespace(sketch=SimpleNamespace(estimator=estimator), sources=sources)
    train = SimpleNamespace(engine=engine)
    step = SimpleNamespace(sampler=sampler, refresh=SourceRefresh(), select=select, train=train)
    state = RunState(BackgroundWriter(CheckpointFolder(folder, 1)), identity, {}, step, session, GROUP)
    return SimpleNamespace(
        engine=engine, estimator=estimator, sources=sources, sampler=sampler, session=session, state=state
    )


def trained(run: SimpleNamespace) -> None:
    run.engine.backward(run.engine.forward(batch_of([6, 4])).sum())
    run.engine.step(1e-2)


@pytest.fixture
def saved(tmp_path) -> SimpleNamespace:
    run = parts(tmp_path, 7)
    trained(run)
    trained(run)
    run.engine.scale = LossScale(1024.0, 5)
    run.state.save(20)
    run.state.wait()
    return run


def load(run: SimpleNamespace, folder: Path) -> int:
    return run.state.load(CheckpointFolder(folder, 1).newest(fallback=False) or NO_CHECKPOINT)


def test_every_part_comes_back(saved, tmp_path):
    run = parts(tmp_path, 1)
    assert load(run, tmp_path) == 20
    for file, named in collect(saved.engine, GROUP).items():
        back = collect(run.engine, GROUP)[file]
        assert named.keys() == back.keys()
        assert all(torch.equal(named[name], back[name]) for name in named)
    assert run.engine.updates == 2
    assert run.engine.scale == LossScale(1024.0, 5)
    assert (run.sampler.number, run.session.number) == (7, 7)
    assert run.estimator.moments.step == 7
    assert run.estimator.moments.first.tolist() == [7.0] * 3
    assert run.sources.recent.kept.tolist() == [True, False]
    assert run.sources.recent.seen.tolist() == [7, 2]
    assert run.sources.coverage.owed.tolist() == [250_000, 7]
    assert run.sources.feedback.deviations.tolist() == [[1.75] * 3] * 2
    run.engine.scale = saved.engine.scale = LossScale(1.0)
    for one in (saved, run):
        trained(one)
    ours, theirs = (collect(one.engine, GROUP)["adapter"] for one in (run, saved))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "Adam's bias correction counts on"


def test_what_the_steps_change_while_it_is_written_is_not_in_it(tmp_path, monkeypatch):
    """Everything that is saved is changed in place, as far as anything is."""
    run, may_write, write = parts(tmp_path, 7), threading.Event(), CheckpointFolder.write
    run.estimator.store = SketchStore(reuse=4, entries=8)
    run.estimator.store.add(torch.tensor([70]), torch.tensor([20]), torch.tensor([[1.0, 2.0, 3.0]]))
    trained(run)
    moved = {"ids": torch.tensor([1, 2])}
    run.state._refresh.state = lambda: moved
    expected = {
        file: {name: tensor.clone() for name, tensor in named.items()}
        for file, named in (collect(run.engine, GROUP) | run.state._selection.tensors(20)).items()
    }

    def wait_and_write(self, *content):
        may_write.wait()
        return write(self, *content)

    monkeypatch.setattr(CheckpointFolder, "write", wait_and_write)
    run.state.save(20)
    trained(run)
    run.sampler.number = run.session.number = 9
    run.engine.scale = LossScale(2.0, 1)
    for changed in (moved["ids"], *run.estimator.moments.tensors().values(), run.estimator.store._rows):
        changed.add_(1)
    known = run.sources
    for tensor in (known.recent.seen, known.coverage.owed, known.recent.kept, known.feedback.deviations):
        tensor.zero_()
    may_write.set()
    run.state.wait()
    found = CheckpointFolder(tmp_path, 1).newest(fallback=False)
    assert found.tensors.pop("clusters")["ids"].tolist() == [1, 2]
    assert found.tensors.keys() == expected.keys()
    for file, named in expected.items():
        assert all(torch.equal(found.tensors[file][name], tensor) for name, tensor in named.items()), file
    assert (found.state["sampler"], found.state["session"]) == ({"number": 7}, {"number": 7})
    assert (found.state["updates"], found.state["loss_scale"]["scale"]) == (1, 1.0)


def test_without_a_checkpoint_a_run_begins(tmp_path):
    run = parts(tmp_path, 1)
    assert load(run, tmp_path) == 0
    assert run.sampler.number == 1


def test_no_frozen_weight_is_saved(saved, tmp_path):
    found = CheckpointFolder(tmp_path, 1).newest(fallback=False)
    assert found.tensors.keys() == {"adapter", "optimizer", "moments", "sources"}
    assert found.tensors["adapter"]
    assert all("lora_" in name for file in ("adapter", "optimizer") for name in found.tensors[file])


def test_another_runs_checkpoint_is_refused_and_nothing_changes(saved, tmp_path):
    run = parts(tmp_path, 1, {**IDENTITY, "config": {"train.seed": 1}})
    with pytest.raises(UserError, match=r"--train\.seed is 1, but the checkpoint was made with 0"):
        load(run, tmp_path)
    assert run.sampler.number == 1


def test_a_state_of_another_version_is_told_with_it(saved, tmp_path):
    found = CheckpointFolder(tmp_path, 1).newest(fallback=False)
    state = json.loads(json.dumps(found.state))
    del state["sampler"]
    state["written_by"]["colm_scale"] = "0.0.9"
    CheckpointFolder(tmp_path, 1).write(20, state, found.tensors)
    with pytest.raises(UserError, match=r"written by colm_scale 0\.0\.9, which saved other things \('sampler'\)"):
        load(parts(tmp_path, 1), tmp_path)


def test_sketches_that_still_count_come_back(tmp_path):
    run, again = parts(tmp_path, 7), parts(tmp_path, 1)
    for one in (run, again):
        one.estimator.store = SketchStore(reuse=4, entries=8)
    run.estimator.store.add(torch.tensor([70]), torch.tensor([16]), torch.tensor([[1.0, 2.0, 3.0]]))
    run.estimator.store.add(torch.tensor([80, 90]), torch.tensor([18, 18]), torch.tensor([[0.1, 0.2, 0.3]] * 2))
    run.state.save(20)
    run.state.wait()
    assert load(again, tmp_path) == 20
    places = again.estimator.store.find(torch.tensor([90, 70, 80, 60]), 21)
    assert (places >= 0).tolist() == [True, False, True, False], "70 counts until step 20"
    rows, steps = again.estimator.store.at(places[[0, 2]])
    assert torch.equal(rows, torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert steps.tolist() == [18, 18]


def test_a_store_without_sketches_comes_back_empty(tmp_path):
    run, again = parts(tmp_path, 7), parts(tmp_path, 1)
    for one in (run, again):
        one.estimator.store = SketchStore(reuse=4, entries=8)
    run.state.save(20)
    run.state.wait()
    assert load(again, tmp_path) == 20
    assert again.estimator.store.find(torch.tensor([0, 70]), 21).tolist() == [-1, -1]
