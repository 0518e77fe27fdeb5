"""The float32 tail, a function of one's own (losses) and lengths: the same on two ranks under any engine as on one."""

from __future__ import annotations

import pytest
import torch
from support import worker

from colm_scale.data.batching import collate
from colm_scale.selection.ranking.line import medoids_on_line
from colm_scale.sketch.zeroth_order import probes

CPU = torch.device("cpu")
JOBS = {
    "auto": ("loss", "length"),
    "fsdp": ("tail", "loss", "length_broken"),
    "zero3": ("tail", "loss_broken", "length"),
}
CASES = ("tail", "loss", "length")
PAIRS = [(engine, case) for engine, cases in JOBS.items() for case in cases]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_sketches_and_ids_are_those_of_one_process(ranks, alone, engine, case):
    expected = alone[case.removesuffix("_broken")]["steps"]
    for cases in ranks:
        steps = cases[f"{engine}/{case}"]["steps"]
        assert [step["ids"].tolist() for step in steps] == [step["ids"].tolist() for step in expected]
        # The weights of the first step are equal, and so are the shapes of the forwards: bit for bit.
        for name in ("positions", "rows", "valid"):
            assert torch.equal(steps[0]["matrix"][name], expected[0]["matrix"][name])


def test_a_float32_tail_finds_the_derivatives_that_half_precision_rounds_away(alone):
    """Of the base as bfloat16 stores it, beside the exact ones of the base in float32: its own 2^-9 apart."""
    step, data, (_, tap) = alone["tail"]["steps"][0], worker.examples(), worker.model()
    gradients = []
    for position in step["matrix"]["positions"]:
        batch = collate(data, step["indices"][position].view(1), position.view(1), worker.PAD, CPU)
        _, delta, a = tap.factors(batch)
        gradients.append((delta.transpose(1, 2) @ a).flatten())
    seed = worker.run_config(worker.CASES["tail"]).train.seed
    exact = torch.stack(gradients) @ probes(seed, 2, tap.size, CPU).T
    assert (step["coefficients"] - exact).norm() / exact.norm() < 0.05


def test_lengths_cost_no_forward_and_no_byte(ranks, alone):
    for result in (alone["length"], *(cases["zero3/length"] for cases in ranks)):
        for step in result["steps"]:
            assert step["forwards"] == step["trained_batches"]
            assert "gather" not in step["bytes"]
    for step in ranks[0]["auto/loss"]["steps"]:
        assert step["forwards"] > step["trained_batches"]
        assert step["bytes"]["gather"] == 4 * step["padded"]


@pytest.mark.parametrize("case", ["loss", "length"])
def test_the_medoids_of_each_source_are_those_of_its_numbers_on_the_line(alone, case):
    data = worker.examples()
    for step in alone[case]["steps"]:
        indices, positions = step["indices"], step["matrix"]["positions"]
        numbers = data.lengths[indices[positions]].float() if case == "length" else step["matrix"]["losses"]
        sources, picked = data.sources[indices], step["positions"][step["kept"] :]
        assert torch.equal(step["matrix"]["rows"], numbers.unsqueeze(1))
        for source in sources[picked].unique():
            of_source = positions[sources[positions] == source]
            chosen = picked[sources[picked] == source]
            medoids, _ = medoids_on_line(numbers[sources[positions] == source], len(chosen))
            assert chosen.tolist() == of_source[medoids].tolist()
