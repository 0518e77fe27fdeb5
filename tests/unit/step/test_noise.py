"""Noise of the gradient: what is read against one backward per example, what is estimated against what is true."""

from __future__ import annotations

import pytest
import torch
from support.families import adapted_model, base_model, batch_of, part_of, some_of, with_adapters
from torch import Tensor

from colm_scale.modeling.compiling import compile_blocks
from colm_scale.modeling.load import keep_block_inputs_only
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import decoder_blocks
from colm_scale.randomness import generator
from colm_scale.records import CPU, Candidates, Selection, long_tensor
from colm_scale.step.noise import (
    NO_SUMS,
    GradientNoise,
    GradientSums,
    NoiseMeter,
    gradient_noise,
    make_noise_meter,
)

LENGTHS = [9, 5, 7, 6]
SOURCES = long_tensor([1, 0, 1, 1, 2, 0])
"""Of six candidates, of which the first four are trained on."""
SELECTED = Selection(torch.arange(4), torch.ones(4))
SHARES = torch.tensor([0.125, 0.5, 0.25, 0.125, 0, 0])


def candidates(step: int = 1) -> Candidates:
    n = torch.arange(6)
    return Candidates(step, n, n, SOURCES, n)


def exact(meter: NoiseMeter) -> GradientNoise:
    """A meter that reads whole gradients, in place of their products with random signs."""
    assert isinstance(meter, GradientNoise)
    layer = meter._layer
    meter._count, meter._size = layer.out_features, layer.out_features * layer.in_features
    meter.begin(candidates())
    meter._signs = torch.eye(layer.out_features)
    return meter


def alone(module: ExampleLoss, weight: Tensor) -> Tensor:
    """``[4, d]`` by one forward and backward per example."""
    parts = [part_of(batch_of(LENGTHS), row) for row in range(len(LENGTHS))]
    return torch.stack([torch.autograd.grad(module(part).sum(), weight)[0].flatten() for part in parts])


def packing(family: str) -> ExampleLoss:
    base = base_model(family)
    assert not use_packing(base, "on", CPU).padded_because
    return ExampleLoss(with_adapters(base))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_example_s_gradient_is_read_in_the_backward_of_all(family, checkpointing, packed):
    """In two micro-batches, with weights, and with an engine that multiplies the loss."""
    module = packing(family) if packed else ExampleLoss(adapted_model(family))
    meter = exact(make_noise_meter(module, 0, CPU))
    expected = alone(module, meter._layer.weight)
    if checkpointing:
        keep_block_inputs_only(module.causal_model)
    for chosen in ([0, 2], [1, 3]):
        batch = some_of(batch_of(LENGTHS), chosen, packed=packed)
        losses = meter.forward(module, batch)
        (1024 * losses * SHARES[chosen]).sum().backward()
    torch.testing.assert_close(meter._read[:4], expected, rtol=1e-4, atol=1e-6)
    assert not meter._read[4:].any()
    torch.testing.assert_close(meter._layer.weight.grad.flatten() / 1024, SHARES[:4] @ expected, rtol=1e-4, atol=1e-6)


def test_the_values_are_read_and_filling_micro_batches_are_not():
    module = ExampleLoss(adapted_model("llama"))
    meter = exact(make_noise_meter(module, 0, CPU))
    assert meter._layer is decoder_blocks(module.causal_model)[1][-1].self_attn.v_proj.lora_B["default"]
    filler = batch_of([4])
    object.__setattr__(filler, "positions", long_tensor([]))
    (0 * meter.forward(module, filler)).sum().backward()
    assert not meter._read.any()


def test_what_cannot_be_read_is_left_alone():
    module = ExampleLoss(adapted_model("llama"))
    compile_blocks(decoder_blocks(module.causal_model)[1])
    for one in (module, ExampleLoss(with_adapters(base_model("llama"), use_dora=True))):
        meter = make_noise_meter(one, 0, CPU)
        assert type(meter) is NoiseMeter
        losses = torch.ones(6)
        assert meter.joined(losses, candidates(), SELECTED, SHARES) is losses
        assert meter.gathered(torch.zeros(0)) is NO_SUMS
    found, by_source = gradient_noise(NO_SUMS, SOURCES, SELECTED, SHARES, "colm", 1.0)
    assert found == {}
    assert by_source.isnan().all()


def sums_of(rows: Tensor, selection: Selection = SELECTED, shares: Tensor = SHARES) -> GradientSums:
    """The sums of meters of two ranks that have read half of the ``rows`` ``[n, m]`` each."""
    flat = []
    for rank in range(2):
        meter = GradientNoise(torch.nn.Linear(rows.shape[1], 1), 0, CPU)
        meter._count, meter._size = 1, rows.shape[1]
        meter._read = torch.where((torch.arange(len(rows)) % 2 == rank).unsqueeze(1), rows, 0)
        joined = meter.joined(torch.zeros(len(rows)), candidates(), selection, shares)
        flat.append(joined[len(rows) :])
    return meter.gathered(flat[0] + flat[1])


def test_sums_are_by_source_and_those_of_all_ranks():
    rows = torch.randn(6, 3, generator=generator(0, "rows"))
    found = sums_of(rows)
    torch.testing.assert_close(found.sums, torch.stack([rows[1], rows[0] + rows[2] + rows[3]]))
    torch.testing.assert_close(found.squares, torch.stack([rows[1].square().sum(), rows[[0, 2, 3]].square().sum()]))
    torch.testing.assert_close(found.mean, SHARES[:4] @ rows[:4])


def test_the_estimate_literally():
    rows = torch.randn(6, 3, generator=generator(0, "rows"))
    found, by_source = gradient_noise(sums_of(rows), SOURCES, SELECTED, SHARES, "colm", 0.25)
    own = rows[[0, 2, 3]].double()
    variance = float(own.var(0).sum())  # of source 1
    noisy = variance / float(own.square().sum(1).mean())  # its share of a squared length, in source 0 as well
    of_step = [0.5**2 * noisy * float(rows[1].square().sum()), (0.125**2 * 2 + 0.25**2) * variance]
    size = 1 / (0.5**2 + 2 * 0.125**2 + 0.25**2)
    # Of source 0, one of two was taken: half of its variance is that of the candidates. Of source 1, all were.
    left = (of_step[0] * (0.5 + 0.25 * 0.5) + of_step[1]) / sum(of_step)
    mean = (SHARES[:4] @ rows[:4]).double()
    assert found == pytest.approx(
        {
            "noise": size * sum(of_step),
            "signal": float(mean.square().sum()) - left * sum(of_step),
            "trained": size,
            "worth": size / left,
            "freedom": 2,
        },
        rel=1e-5,
    )
    assert by_source[0].isnan().all()
    assert by_source[1].tolist() == pytest.approx(
        [variance, float(own.mean(0).square().sum()) - variance / 3], rel=1e-5
    )


def test_without_quotas_the_sources_differences_are_noise_too():
    rows = torch.randn(6, 3, generator=generator(0, "rows")) + 5.0 * SOURCES.unsqueeze(1)
    even = torch.tensor([0.25] * 4 + [0.0] * 2)
    found, _ = gradient_noise(sums_of(rows, shares=even), SOURCES, SELECTED, even, "random", 1.0)
    assert found["noise"] == pytest.approx(float(rows[:4].double().var(0).sum()), rel=1e-5)
    within, _ = gradient_noise(sums_of(rows, shares=even), SOURCES, SELECTED, even, "stratified", 1.0)
    assert (found["freedom"], within["freedom"]) == (3, 2)
    assert within["noise"] < found["noise"] / 4


@pytest.mark.parametrize("rows", [torch.full((6, 3), torch.nan), torch.full((6, 3), torch.inf), torch.zeros(6, 3)])
def test_gradients_that_say_nothing_give_nothing(rows):
    assert gradient_noise(sums_of(rows), SOURCES, SELECTED, SHARES, "colm", 1.0)[0] == {}


def test_a_single_example_gives_nothing():
    one, shares = Selection(long_tensor([1]), torch.ones(1)), torch.tensor([0.0, 1, 0, 0, 0, 0])
    for method in ("colm", "random"):
        assert gradient_noise(sums_of(torch.ones(6, 3), one, shares), SOURCES, one, shares, method, 1.0)[0] == {}


@pytest.mark.parametrize("longer", [0.1, 1, 10])
def test_a_source_s_only_example_is_noise_in_proportion_to_its_own_length(longer):
    """All is noise here. With the variance of the other source, a long gradient on its own would count as signal."""
    rows = torch.randn(2000, 4, 50, generator=generator(0, "alone"))
    rows[:, 0] *= longer
    sources, trained = long_tensor([0, 1, 1, 1]), Selection(torch.arange(4), torch.ones(4))
    shares = torch.full((4,), 0.25)
    totals = [0.0, 0.0]
    for own in rows:
        squares = torch.stack([own[0].square().sum(), own[1:].square().sum()])
        sums = GradientSums(torch.stack([own[0], own[1:].sum(0)]), squares, own.mean(0))
        found, _ = gradient_noise(sums, sources, trained, shares, "stratified", 1.0)
        totals = [before + found[name] / len(rows) for before, name in zip(totals, ("noise", "signal"))]
    assert totals[0] == pytest.approx(50 * (3 + longer**2) / 4, rel=0.03)
    assert abs(totals[1]) < 0.02 * totals[0]


def test_noise_and_signal_are_unbiased_whatever_the_signs():
    """A kept source of its own mean, a source of four of many: the mean over steps is the truth."""
    draw, d, r, steps = generator(0, "steps"), 6, 4, 4000
    means = torch.randn(2, d * r, generator=draw) * 0.3
    spread = torch.tensor([0.5, 1.0])
    sources, trained = long_tensor([0, 0, 1, 1, 1, 1]), Selection(torch.arange(6), torch.ones(6))
    shares = torch.full((6,), 1 / 6)
    layer = torch.nn.Linear(r, d)
    meter, found = GradientNoise(layer, 0, CPU), []
    for step in range(steps):
        drawn = Candidates(step, *[torch.arange(6)] * 2, sources, torch.arange(6))
        meter.begin(drawn)
        whole = means[sources] + spread[sources].unsqueeze(1) * torch.randn(6, d * r, generator=draw)
        meter._read = torch.einsum("ndr,dk->nkr", whole.view(6, d, r), meter._signs).flatten(1)
        sums = meter.gathered(meter.joined(torch.zeros(6), drawn, trained, shares)[6:])
        found.append(gradient_noise(sums, sources, trained, shares, "stratified", 1.0)[0])
    noise, signal = (torch.tensor([step[name] for step in found]) for name in ("noise", "signal"))
    expected = d * r * (2 * 0.5**2 + 4 * 1.0**2) / 6
    assert abs(noise.mean() - expected) < 4 * noise.std() / steps**0.5
    truth = float((means[sources].mean(0)).square().sum())
    assert abs(signal.mean() - truth) < 4 * signal.std() / steps**0.5
    assert noise.std() / steps**0.5 < 0.02 * expected
    assert signal.std() / steps**0.5 < 0.1 * truth
