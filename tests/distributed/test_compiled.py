"""Compiled blocks train what plain ones do, on one process; so do their graphs, run uncompiled, under every engine."""

from __future__ import annotations

import pytest

LIKE = {
    "compiled": "plain",
    "compiled_padded": "plain",
    "compiled_forward_reused": "plain",
    "compiled_stratified": "stratified_3",
}
CASES = [*LIKE, *dict.fromkeys(LIKE.values())]
ENGINES = ("auto", "zero2", "fsdp", "zero3")
PAIRS = [(engine, "compiled") for engine in ENGINES]


def assert_alike(compiled, plain):
    assert len(compiled) == 3
    for step, other in zip(compiled, plain):
        assert step["ids"].tolist() == other["ids"].tolist()
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["norm"] == pytest.approx(other["norm"], rel=1e-3)


@pytest.mark.parametrize("case", LIKE)
def test_on_one_process(alone, case):
    assert alone[case]["graphs"] > 0
    assert_alike(alone[case]["steps"], alone[LIKE[case]]["steps"])


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_on_two_ranks(ranks, alone, engine, case):
    for cases in ranks:
        assert cases[f"{engine}/{case}"]["graphs"] > 0
        assert_alike(cases[f"{engine}/{case}"]["steps"], alone[LIKE[case]]["steps"])


def test_nothing_is_compiled_unasked(alone):
    assert not any(alone[case]["graphs"] for case in LIKE.values())
