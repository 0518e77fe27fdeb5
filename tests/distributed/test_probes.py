"""Other probes than V, and a random projection: the same on two ranks under any engine as on one."""

from __future__ import annotations

import pytest
import torch
from support import worker
from support.cases import D_OUT, D
from support.worker import RANK

from colm_scale.data.batching import collate
from colm_scale.selection.moments import make_moments
from colm_scale.sketch.compress import CountSketch
from colm_scale.sketch.last_layer import Gradients

JOBS = {
    "auto": ("countsketch_broken", "probe_k", "probe_mlp"),
    "fsdp": ("probe_k", "probe_mlp"),
    "zero3": ("countsketch", "probe_k", "probe_mlp"),
}
PAIRS = [(engine, case) for engine, cases in JOBS.items() for case in cases]
CASES = ("countsketch", "probe_k", "probe_mlp")
SOME = 5
"""So many examples are compared with plain gradients."""


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_sketches_and_ids_are_those_of_one_process(ranks, alone, engine, case):
    expected = alone[case.removesuffix("_broken")]["steps"]
    assert len(expected) == 3
    for cases in ranks:
        steps = cases[f"{engine}/{case}"]["steps"]
        assert list(map(weights_by_id, steps)) == list(map(weights_by_id, expected))
        if engine != "zero3":  # whose last bits may turn round the order of two picks that gain equally much
            assert [step["ids"].tolist() for step in steps] == [step["ids"].tolist() for step in expected]
        matrix, other = steps[0]["matrix"], expected[0]["matrix"]
        assert torch.equal(matrix["positions"], other["positions"])
        # ZeRO-3 multiplies by a function of its own, and the first update of Adam divides last bits by little. It makes
        # signs of gradients, so columns of equal means abound, and last bits decide which of them are compared.
        torch.testing.assert_close(matrix["losses"], other["losses"], rtol=1e-5, atol=0)
        if engine == "zero3" and case == "probe_k":
            continue
        if engine == "zero3":
            assert (matrix["rows"] - other["rows"]).abs().mean() < 1e-4 * other["rows"].abs().mean()
        else:  # the weights of the first step are equal, and so are the shapes of the forwards: bit for bit
            assert torch.equal(matrix["rows"], other["rows"])


def weights_by_id(step: dict) -> dict[int, float]:
    return dict(zip(step["ids"].tolist(), step["weights"].tolist(), strict=True))


def test_rows_are_projections_of_each_examples_gradient(alone):
    """Of its update, which in the first step is Adam's first."""
    data, config = worker.examples(), worker.run_config(worker.CASES["countsketch"])
    module, tap = worker.model()
    step = alone["countsketch"]["steps"][0]
    factors = []
    for position in step["matrix"]["positions"][:SOME]:
        batch = collate(data, step["indices"][position].view(1), position.view(1), worker.PAD, torch.device("cpu"))
        loss = module(batch).sum()
        gradient = torch.autograd.grad(loss, tap.lora_b.weight)[0]
        factors.append((gradient.T, torch.eye(RANK)))
    delta, a = (torch.stack(of_examples) for of_examples in zip(*factors))
    seed, columns, cpu = config.train.seed, config.selection.columns, torch.device("cpu")
    moments = make_moments(config.train, ((D_OUT, RANK),))
    held = Gradients.of(torch.arange(len(delta)), delta, a)
    exact = CountSketch(seed, D, columns, cpu).rows(held, moments)
    # Updates are signs, and of an entry that is all rounding either sign may be found: of few, and each moves 1 by 2.
    apart = (step["matrix"]["rows"][:SOME] - exact).abs()
    assert apart.mean() < 0.05 < 0.5 < exact.abs().mean()


def test_only_the_numbers_that_are_compared_are_exchanged(ranks):
    columns = worker.CASES["countsketch"].selection.columns
    for cases in ranks:
        for step in cases["zero3/countsketch"]["steps"]:
            assert step["bytes"]["gather"] == 4 * step["padded"] * (columns + 2)  # the loss, and the largest entry
            assert "columns" not in step["bytes"]
            assert step["bytes"]["moments"] == 16 * D
            assert step["held"] > 0
