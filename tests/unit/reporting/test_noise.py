"""The noise scale of a run, its interval, and the advice."""

from __future__ import annotations

import json
import math

import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.reporting.noise import NoiseScale


def after(scale: float, spread: float = 0.1, steps: int = 50, worth: float = 32.0) -> NoiseScale:
    """A run with this noise scale, and a relative standard deviation of ``spread`` in one step's signal."""
    total, draw = NoiseScale(), generator(0, "steps")
    for wobble in (spread * torch.randn(steps, generator=draw)).tolist():
        total.add({"noise": 8.0, "signal": 8 * (1 + wobble) / scale, "trained": 32.0, "worth": worth})
    return total


def test_signal_over_noise_is_averaged_and_then_inverted():
    """Whatever the size of a step's gradient."""
    total = NoiseScale()
    for size, inverse in ((1e6, 0.2), (1.0, 0.2), (1e-3, 0.2), (1e-6, -0.1), (1e-2, 0.0)):
        total.add({"noise": size, "signal": size * inverse, "trained": 8.0, "worth": 9.0})
    assert total.scale == pytest.approx(10)
    for noise, signal in ((math.nan, 1.0), (0.0, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        total.add({"noise": noise, "signal": signal, "trained": 8.0, "worth": 9.0})
    total.add({})
    assert total.scale == pytest.approx(10)
    assert (total.trained, total.worth) == (8, 9)


def test_far_below_the_noise_scale_a_larger_batch_saves_steps():
    """In all, 1 + 400 / 32 = 13.5 times the fewest steps; and 1.08 times the fewest examples."""
    (sentence,) = after(400, spread=0).sentences()
    assert sentence == (
        "Over the run, the gradient's noise equals its signal at a batch of 400 examples (95 %: 400 to 400). A step "
        "trains on 32 examples. A larger batch, or a coreset of one, can save up to 93% of the steps; "
        "smaller steps can hardly save examples."
    )


def test_far_above_it_smaller_steps_save_examples():
    """1 + 37.2 / 8 = 5.65 times the fewest examples; steps of an eighth of the scale take 1.125 times as many."""
    (sentence,) = after(8, spread=0, worth=37.2).sentences()
    assert sentence.endswith(
        "A step trains on 32 chosen examples, by their sketches worth at most 37 random ones. A larger batch, or a "
        "coreset of one, can hardly save steps; steps of 1 can save about 80% of the examples, and so of the time."
    )


def test_near_it_either_can_be_saved():
    (sentence,) = after(32, spread=0).sentences()
    assert sentence.endswith(
        "can save up to 50% of the steps; steps of 4 can save about 44% of the examples, and so of the time."
    )


@pytest.mark.parametrize(
    ("ranks", "smaller"),
    [
        (2, "steps of 4 can save about 44% of the examples, and so of the time."),
        (8, "steps of 8 can save about 38% of the examples, and so of the time."),
        (24, "steps of 24 can save about 12% of the examples, and so of the time."),
        (32, "smaller steps can hardly save examples."),
    ],
)
def test_no_step_has_fewer_examples_than_there_are_ranks(ranks, smaller):
    """Of a scale of 32, steps of 4, 8, 24 and 32 take 1.125, 1.25, 1.75 and 2 times the fewest examples."""
    (sentence,) = after(32, spread=0).sentences(ranks=ranks)
    assert sentence.endswith(smaller)


def test_without_a_signal_a_larger_batch_saves_any_number_of_steps():
    total = NoiseScale()
    for _ in range(10):
        total.add({"noise": 8.0, "signal": -0.1, "trained": 32.0, "worth": 32.0})
    (sentence,) = total.sentences()
    assert "at a batch of ∞ examples" in sentence
    assert sentence.endswith("can save up to 100% of the steps; smaller steps can hardly save examples.")


def test_a_signal_that_cannot_be_told_from_0_leaves_the_interval_open():
    total = NoiseScale()
    for signal in [11.0, -9.0] * 25:
        total.add({"noise": 400.0, "signal": signal, "trained": 32.0, "worth": 32.0})
    low, high = total.interval()
    assert 95 < low < 115  # 1 + 1.96 * 10 / 7 is the largest signal
    assert high == math.inf
    assert any("to ∞)" in row for row in total.rows().values())


def test_too_few_steps_say_nothing():
    assert after(400, steps=5).sentences() == []
    assert after(400, steps=5).rows() == {}
    assert NoiseScale().recent() == []
    assert after(400, spread=0, steps=1).recent() == ["noise scale 400"]


def test_the_interval_holds_the_true_scale_in_95_of_100_runs():
    draw, inside = generator(0, "runs"), 0
    for signals in (0.05 + 0.1 * torch.randn(400, 80, generator=draw)).tolist():
        total = NoiseScale()
        for signal in signals:
            total.add({"noise": 1.0, "signal": signal, "trained": 8.0, "worth": 8.0})
        low, high = total.interval()
        inside += low <= 20 <= high
    assert 0.91 < inside / 400 < 0.98


@pytest.mark.parametrize("freedom", [1, 3, 20])
def test_steps_of_few_examples_share_their_variance(freedom):
    """A quotient by a variance of one degree of freedom has no mean: single steps would make of 20 anything near 0."""
    draw, total = generator(0, "few"), NoiseScale()
    for signal, around in torch.randn(2000, 2, freedom, generator=draw):
        size = 2.0 ** -(len(total.state()["inverse"]) / 200)  # gradients shrink
        found = {"noise": size * float(around.square().mean()), "signal": size * (0.05 + 0.1 * float(signal[0]))}
        total.add(found | {"trained": 4.0, "worth": 4.0, "freedom": freedom})
    assert total.scale == pytest.approx(20, rel=0.2)


def test_too_few_degrees_of_freedom_say_nothing():
    total = NoiseScale()
    for _ in range(31):
        total.add({"noise": 1.0, "signal": 0.1, "trained": 4.0, "worth": 4.0, "freedom": 1.0})
    assert total.sentences() == total.recent() == []
    total.add({"noise": 1.0, "signal": 0.1, "trained": 4.0, "worth": 4.0, "freedom": 1.0})
    assert total.recent() == ["noise scale 10"]


def test_the_recent_figure_forgets():
    total = after(400, spread=0)
    for _ in range(20):
        total.add({"noise": 10.0, "signal": 1.0, "trained": 32.0, "worth": 32.0})
    assert total.recent() == ["noise scale 10"]


def test_sources_have_their_own_whatever_the_size_of_a_step_s_gradient():
    total = NoiseScale()
    for size, row in ((1e3, [[4.0, 1.0], [math.nan, math.nan]]), (1.0, [[8.0, 3.0], [5.0, -1.0], [math.nan, 1.0]])):
        of_step = {"noise": size, "signal": 0.0, "trained": 8.0, "worth": 8.0}
        total.add(of_step, size * torch.tensor(row))
    assert total.of_sources(["a", "b", "c"]) == {"noise scale": {"a": "3", "b": "∞"}}
    assert NoiseScale().of_sources(["a"]) == {}


def test_it_goes_on_from_its_state_and_from_a_checkpoint_without_it():
    total, again = after(400), NoiseScale()
    step = {"noise": 10.0, "signal": 1.0, "trained": 32.0, "worth": 32.0, "freedom": 8.0}  # counts with earlier steps
    total.add(step, torch.tensor([[4.0, 1.0]]))
    again.load({})
    assert again.state() == NoiseScale().state()
    again.load(json.loads(json.dumps(total.state())))
    for one in (total, again):
        one.add(step, torch.tensor([[4.0, 1.0]]))
    assert again.state() == total.state()
    assert again.sentences() == total.sentences() != []
