"""A reused forward trains what a second one does, under every engine."""

from __future__ import annotations

import pytest
import torch

KINDS = ("", "_branched", "_padded")
WAYS = ("forward_reused", "not_forward_reused")
ENGINES = ("auto", "zero1", "zero2", "zero3", "fsdp")
COMPARED = [
    *[(engine, f"{way}{kind}") for engine in ("auto", "zero2") for kind in KINDS for way in WAYS],
    *[(engine, way) for engine in ("fsdp", "zero1", "zero3") for way in WAYS],
    ("auto", "forward_reused_offloaded"),
    ("auto", "forward_reused_bounded"),
    ("fsdp_offload", "forward_reused"),
    ("fsdp_offload", "not_forward_reused"),
]
PAIRS = [*COMPARED, *[(engine, f"forward_reused_{how}") for engine in ENGINES for how in ("unchecked", "wrongly")]]
CASES = [*[f"{way}{kind}" for kind in KINDS for way in WAYS], "forward_reused_offloaded"]


def assert_alike(forward_reused, twice):
    assert len(forward_reused) == 3
    for step, other in zip(forward_reused, twice):
        assert step["ids"].tolist() == other["ids"].tolist()
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["norm"] == pytest.approx(other["norm"], rel=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "_offloaded"])
def test_on_one_process(alone, kind):
    forward_reused = alone[f"forward_reused{kind}"]["steps"]
    assert_alike(forward_reused, alone[f"not_forward_reused{kind.removesuffix('_offloaded')}"]["steps"])
    for step in forward_reused:  # all that was sketched, which kept sources were not
        share = (len(step["ids"]) - step["kept"]) / len(step["ids"])
        assert step["telemetry"]["forward_reused_share"] == pytest.approx(share)
        assert 0 < share < 1


@pytest.mark.parametrize("engine", ENGINES)
def test_the_check_changes_nothing(ranks, engine):
    for cases in ranks:
        found, unchecked = (cases[f"{engine}/forward_reused{how}"] for how in ("", "_unchecked"))
        for step, other in zip(found["steps"], unchecked["steps"], strict=True):
            assert (step["loss"], step["norm"]) == (other["loss"], other["norm"])
            assert step["ids"].tolist() == other["ids"].tolist()
        for name, weight in found["adapters"].items():
            assert weight.equal(unchecked["adapters"][name]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_refuses_wrong_gradients(ranks, engine):
    first, second = (cases[f"{engine}/forward_reused_wrongly"]["refused"] for cases in ranks)
    assert first == second
    assert "step 1: with forward reuse" in first


@pytest.mark.parametrize(("engine", "case"), [pair for pair in COMPARED if pair[1].startswith("forward_reused")])
def test_on_two_ranks(ranks, alone, engine, case):
    kind = case.removeprefix("forward_reused")
    twice = "not_forward_reused" if kind in ("_offloaded", "_bounded") else f"not_forward_reused{kind}"
    for cases in ranks:
        steps = cases[f"{engine}/{case}"]["steps"]
        assert_alike(steps, cases[f"{engine}/{twice}"]["steps"])
        share = [step["telemetry"]["forward_reused_share"] for step in steps]
        assert all(0 < of_step < 1 for of_step in share)
        if case == "forward_reused_bounded":
            full = [step["telemetry"]["forward_reused_share"] for step in cases[f"{engine}/forward_reused"]["steps"]]
            assert sum(share) < sum(full)
    final = [ranks[0][f"{engine}/{name}"]["adapters"] for name in (case, twice)]
    for name, weight in final[0].items():
        assert torch.allclose(weight, final[1][name], atol=2e-4), name
