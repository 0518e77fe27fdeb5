"""Every optimizer under the engines that can run it: the same ids and adapters as one process, broken off or not."""

from __future__ import annotations

import pytest
import torch
from support import worker

OPTIMIZERS = {
    "auto": ("sgd", "lion", "adafactor", "muon"),
    "zero2": ("sgd",),
    "zero3": ("lion",),
    "fsdp": ("sgd", "lion"),
}
PAIRS = [(engine, name) for engine, names in OPTIMIZERS.items() for name in names]
CHANGES = (("zero3 > auto", "lion"), ("fsdp > zero2", "sgd"))
APART = {"sgd": 1e-5, "lion": 1e-3, "adafactor": 1e-4, "muon": 0.1}
"""Mean deviation of adapters from those of one process, as a share of how far they have moved. Gradients are float32
sums in another order. Lion moves an entry whose gradient is rounding by as much as any other. Muon orthogonalises in
bfloat16, which tells numbers apart by 1/256 of their size."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    jobs = {f"{engine}/{name}{end}": (engine, f"{name}{end}") for engine, name in PAIRS for end in ("", "_broken")}
    jobs |= {f"{change}/{name}": (change, f"{name}_broken") for change, name in CHANGES}
    found = worker.launch(2, jobs, tmp_path_factory.mktemp("optimizers"), timeout_seconds=600)
    return [rank["cases"] for rank in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    jobs = {name: ("auto", name) for name in OPTIMIZERS["auto"]}
    return worker.launch(1, jobs, tmp_path_factory.mktemp("alone"))[0]["cases"]


def flat(adapters: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in adapters.values()])


def ids(result: dict) -> list[list[int]]:
    return [step["ids"].tolist() for step in result["steps"]]


@pytest.mark.parametrize(("engine", "name"), [*PAIRS, *CHANGES])
def test_a_run_is_that_of_one_process(ranks, alone, engine, name):
    start = flat(worker.adapters(worker.model()[0]))
    expected = flat(alone[name]["adapters"])
    for cases in ranks:
        result = cases[f"{engine}/{name}"]
        assert ids(result) == ids(alone[name])
        apart = (flat(result["adapters"]) - expected).abs().mean()
        assert apart <= APART[name] * (expected - start).abs().mean()


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_a_broken_run_is_an_unbroken_one_bit_for_bit(ranks, engine, name):
    for cases in ranks:
        broken, whole = cases[f"{engine}/{name}_broken"], cases[f"{engine}/{name}"]
        for own, other in zip(broken["steps"], whole["steps"], strict=True):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == other["loss"]
            assert all(torch.equal(a, b) for a, b in zip(own["moments"], other["moments"], strict=True))
        assert all(torch.equal(broken["adapters"][name], values) for name, values in whole["adapters"].items())


def test_optimizers_differ(alone):
    found = [flat(alone[name]["adapters"]) for name in OPTIMIZERS["auto"]]
    assert not any(torch.equal(one, other) for number, one in enumerate(found) for other in found[:number])
