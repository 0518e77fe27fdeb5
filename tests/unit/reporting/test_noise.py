"""The noise scale of a run, its interval, and the advice."""

from __future__ import annotations

import json
import math

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.reporting.noise import NoiseScale


def after(noise: float, signal: float, spread: float = 0.1, steps: int = 50, worth: float = 32.0) -> NoiseScale:
    """A run with these means, and relative standard deviations of ``spread`` in one step."""
    total, draw = NoiseScale(), generator(0, "steps")
    factors = 1 + spread * torch.randn(steps, 2, generator=draw)
    factors /= factors.mean(0)
    for of_noise, of_signal in factors.tolist():
        total.add({"noise": noise * of_noise, "signal": signal * of_signal, "trained": 32.0, "worth": worth})
    return total


def test_noise_and_signal_are_averaged_before_they_are_divided():
    total = NoiseScale()
    for noise, signal in ((10.0, -1.0), (30.0, 2.0), (20.0, 2.0)):
        total.add({"noise": noise, "signal": signal, "trained": 8.0, "worth": 9.0})
    assert total.scale == pytest.approx(20)
    total.add({"noise": math.nan, "signal": 1.0, "trained": 8.0, "worth": 9.0})
    total.add({})
    assert total.scale == pytest.approx(20)
    assert (total.trained, total.worth) == (8, 9)


def test_a_larger_batch_still_helps_far_below_the_noise_scale():
    (sentence,) = after(400, 1).sentences()
    assert sentence.startswith("The gradient's noise equals its signal at a batch of 400 examples (95 %: 3")
    assert sentence.endswith(
        "A step trains on 32 examples. That is less: a larger batch, or a coreset of one, can still help."
    )


def test_more_and_smaller_steps_help_far_above_it():
    (sentence,) = after(4, 1, worth=37.2).sentences()
    assert sentence.endswith(
        "A step trains on 32 chosen examples, by their sketches worth 37 random ones. That is more: a larger batch, or "
        "a coreset of one, can hardly help; more and smaller steps would."
    )


def test_near_the_noise_scale_neither_does():
    (sentence,) = after(33, 1, spread=0.5).sentences()
    assert sentence.endswith("That is about as many: neither a larger batch nor smaller steps would help much.")


def test_a_signal_that_cannot_be_told_from_0_leaves_the_interval_open():
    total = NoiseScale()
    for noise, signal in [(390.0, 11.0), (410.0, -9.0)] * 25:
        total.add({"noise": noise, "signal": signal, "trained": 32.0, "worth": 32.0})
    low, high = total.interval()
    assert 100 < low < 110  # 1 + 1.96 * 10 / 7 is the largest signal
    assert high == math.inf
    assert "to ∞)" in total.rows()["gradient noise scale"]


def test_too_few_steps_say_nothing():
    assert after(400, 1, steps=5).sentences() == []
    assert after(400, 1, steps=5).rows() == {}
    assert NoiseScale().recent() == []
    assert after(400, 1, steps=1).recent() == ["noise scale 400"]


def test_the_interval_holds_the_true_ratio_in_95_of_100_runs():
    draw, inside = generator(0, "runs"), 0
    for _ in range(400):
        total = NoiseScale()
        common = torch.randn(40, generator=draw)  # noise and signal of a step go together
        for one, other in zip(common.tolist(), torch.randn(40, generator=draw).tolist()):
            total.add({"noise": 20 + 8 * one, "signal": 1 + 0.6 * one + other, "trained": 8.0, "worth": 8.0})
        low, high = total.interval()
        inside += low <= 20 <= high
    assert 0.91 < inside / 400 < 0.99


def test_the_recent_figure_forgets():
    total = after(400, 1)
    for _ in range(100):
        total.add({"noise": 10.0, "signal": 1.0, "trained": 32.0, "worth": 32.0})
    assert total.recent() == ["noise scale 12"]
    assert total.scale == pytest.approx(140, rel=0.01)


def test_sources_have_their_own():
    total = NoiseScale()
    for row in ([[4.0, 1.0], [math.nan, math.nan]], [[8.0, 3.0], [5.0, -1.0], [math.nan, math.nan]]):
        total.add({}, torch.tensor(row))
    assert total.of_sources(["a", "b", "c"]) == {"noise scale": {"a": "3", "b": "∞"}}
    assert NoiseScale().of_sources(["a"]) == {}


def test_it_goes_on_from_its_state_and_from_a_checkpoint_without_it():
    total, again = after(400, 1), NoiseScale()
    total.add({}, torch.tensor([[4.0, 1.0]]))
    again.load({})
    assert again.state() == NoiseScale().state()
    again.load(json.loads(json.dumps(total.state())))
    for one in (total, again):
        one.add({"noise": 10.0, "signal": 1.0, "trained": 32.0, "worth": 32.0}, torch.tensor([[4.0, 1.0]]))
    assert again.state() == total.state()
    assert again.sentences() == total.sentences() != []
