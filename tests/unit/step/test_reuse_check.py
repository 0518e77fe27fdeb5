from __future__ import annotations

import pytest
import torch
from support.families import base_model, batch_of, some_of, with_adapters

from colm_scale.config import TrainConfig
from colm_scale.distributed.group import Group
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.errors import UserError
from colm_scale.modeling.forward_reuse import HeldBlockInputs
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.records import MicroBatch
from colm_scale.step.reuse_check import ReuseCheck

CPU = torch.device("cpu")
ALL = batch_of([9, 4, 7, 6, 5])
SHARES = torch.tensor([0.5, 0.2, 0.3])


class Training:
    """A model whose engine trains on three of the held examples."""

    def __init__(self, dtype: str = "float32"):
        base = base_model("llama", num_hidden_layers=3).to(getattr(torch, dtype))
        keep_block_inputs_only(base)
        module = ExampleLoss(with_adapters(base))
        self.group = Group(0, 1, 0, 1, CPU)
        self.engine = TorchEngine(module, TrainConfig(dtype=dtype, learning_rate=0.1), self.group)
        self.inputs = HeldBlockInputs(module, 2)
        self.check = ReuseCheck(self.engine, dtype, self.group)
        self.forwards: list[int] = []
        module.register_forward_hook(lambda *_: self.forwards.append(1))

    def step(self, shares: torch.Tensor = SHARES, *, checked: bool = True, scaled: float = 1.0) -> list[torch.Tensor]:
        """Gradients of a step from held inputs of the last block, times ``scaled``; with the forwards it took."""
        batch = some_of(ALL, [3, 0, 1])
        with torch.no_grad(), self.inputs.holding(1):
            self.engine.module(ALL)
        self.inputs.arrange([batch])
        self.inputs._arranged[id(batch)][-1] *= scaled
        self.forwards.clear()
        self.engine.optimizer.zero_grad()
        reused = MicroBatch(batch, shares, True)
        if not checked:
            self.train(reused)
        else:
            with self.check(reused, 1):
                self.train(reused)
        return [weight.grad.clone() for weight in self.engine._parameters.values()]

    def train(self, micro_batch: MicroBatch) -> None:
        with self.inputs.reusing(micro_batch.batch):
            losses = self.engine.forward(micro_batch.batch)
        self.engine.backward((losses * micro_batch.shares).sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_is_the_same_with_the_check_which_is_made_once(dtype):
    training = Training(dtype)
    checked = training.step()
    assert len(training.forwards) == 2
    again = training.step()
    assert len(training.forwards) == 1
    unchecked = Training(dtype).step(checked=False)
    assert any(gradient.any() for gradient in checked)
    for gradients in zip(checked, again, unchecked):
        assert gradients[0].equal(gradients[1])
        assert gradients[0].equal(gradients[2])


def test_a_wrong_gradient_is_refused():
    with pytest.raises(UserError, match=r"step 1: .* differs .* in float32 .* use --train\.forward_reuse off"):
        Training().step(scaled=0.9)
    assert not Training().step(torch.zeros(3), scaled=0.9)[0].any()


@pytest.mark.parametrize("nothing", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_shows_nothing_leaves_the_check_to_the_next(nothing):
    training = Training()
    training.step(SHARES * nothing)
    with pytest.raises(UserError, match="forward reuse"):
        training.step(scaled=0.9)


def test_without_reuse_there_is_nothing_to_check():
    training = Training()
    with training.check(MicroBatch(some_of(ALL, [1]), SHARES[:1], False), 1):
        pass
    assert not training.forwards
