from __future__ import annotations

import pytest
import torch

from colm_scale.config import TrainConfig
from colm_scale.modeling.optimizers import Lion, Sgd, begun_state, default_learning_rate, make_optimizer, state_keys
from colm_scale.randomness import generator

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")
RATE = 0.125


def normal(step: int) -> torch.Tensor:
    return torch.randn(6, 3, generator=generator(step, "test gradients"))


def optimizer_of(name: str, **options) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(normal(100))
    optimizer = make_optimizer([parameter], TrainConfig(optimizer=name, betas=(0.75, 0.5), **options))
    optimizer.param_groups[0]["lr"] = RATE
    return parameter, optimizer


def train(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
    for step in steps:
        parameter.grad = normal(step)
        optimizer.step()
    return parameter.detach().clone()


def test_lion_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    lion = Lion([parameter], betas=(0.75, 0.5), weight_decay=0.0)
    lion.param_groups[0]["lr"] = RATE
    parameter.grad = torch.tensor([4.0, -4.0, 0.0])
    lion.step()
    assert parameter.tolist() == [1 - RATE, 1 + RATE, 1.0]
    # The momentum is 2, -2, 0: 0.75 of it outweighs 0.25 of -4 and of 5, and nothing of it is 0.25 of 1.
    parameter.grad = torch.tensor([-4.0, 5.0, 1.0])
    lion.step()
    assert parameter.tolist() == [1 - 2 * RATE, 1 + 2 * RATE, 1 - RATE]
    assert lion.state[parameter]["exp_avg"].tolist() == [-1.0, 1.5, 0.5]


def test_sgd_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    sgd = Sgd([parameter], momentum=0.5, weight_decay=0.0)
    sgd.param_groups[0]["lr"] = RATE
    for expected in (1 - 2 * RATE, 1 - 2 * RATE - 3 * RATE):
        parameter.grad = torch.tensor([2.0])
        sgd.step()
        assert parameter.item() == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled(name):
    """Without a gradient all that is left of a step is a parameter that is smaller in proportion."""
    parameter, optimizer = optimizer_of(name, weight_decay=0.5)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * (1 - RATE * 0.5))
    without, optimizer = optimizer_of(name)
    without.grad = torch.zeros_like(without)
    optimizer.step()
    assert torch.equal(without, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_begun_early_is_the_state_that_the_optimizer_begins(name):
    whole, early = optimizer_of(name), optimizer_of(name)
    begun = begun_state(early[1], early[0])
    assert begun_state(early[1], early[0]) is begun
    assert set(state_keys(early[1])) <= begun.keys()
    assert torch.equal(train(*early, range(3)), train(*whole, range(3)))
    assert {key: value.shape for key, value in begun.items()} == {
        key: value.shape for key, value in whole[1].state[whole[0]].items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_all_that_a_later_update_depends_on(name):
    whole, other = optimizer_of(name), optimizer_of(name)
    train(*whole, range(3))
    other[0].data.copy_(whole[0].data)
    saved, begun = whole[1].state[whole[0]], begun_state(other[1], other[0])
    for key in [*state_keys(other[1]), *(["step"] if "step" in begun else [])]:
        begun[key].copy_(saved[key])
    assert torch.equal(train(*other, range(3, 6)), train(*whole, range(3, 6)))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_steps_are_about_as_large_as_those_of_adamw(name):
    """A step is in proportion to the learning rate alone, also where the parameter is zero as LoRA's B is at first."""
    parameter, optimizer = optimizer_of(name)
    parameter.data.zero_()
    moved = train(parameter, optimizer, range(1)).square().mean().sqrt() / RATE
    assert 0.5 <= moved / (1.0 if name == "adafactor" else 0.2) <= 1.5


def test_default_rates_are_in_the_same_proportion_for_every_model():
    times = {"adamw": 1, "sgd": 50, "lion": 0.2, "adafactor": 1, "muon": 3}
    for name, factor in times.items():
        assert default_learning_rate(name, builtin=True) == pytest.approx(1e-2 * factor)
        assert default_learning_rate(name, builtin=False) == pytest.approx(2e-4 * factor)
