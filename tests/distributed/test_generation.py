"""Answers that evaluations generate: where there is room, weights are gathered once for all of them.

Five prompts are five micro-batches on two ranks, one of which has nothing to do at the end; answers end at different
tokens.
"""

from __future__ import annotations

import pytest
from support.worker import ROOMS

SHARDED = ("zero3", "zero3_offload", "fsdp", "fsdp_offload", "fsdp_unsharded")
ENGINES = ("auto", "zero2", *SHARDED)
CASES = ("generating", "last_layer")
PAIRS = [(engine, "generating") for engine in ENGINES]


def generated(cases: dict, engine: str, room: str) -> dict:
    return cases[f"{engine}/generating"]["generated"][room]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_those_of_one_process(ranks, alone, engine, room):
    expected = alone["generating"]["generated"][room]["answers"][12]
    lengths = [len(answer.split()) for answer in expected.values()]
    assert len(lengths) == 5
    assert min(lengths) < max(lengths) == 12
    of_ranks = [generated(cases, engine, room)["answers"][12] for cases in ranks]
    assert sorted(map(len, of_ranks)) == [2, 3]
    assert of_ranks[0] | of_ranks[1] == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_more_tokens_gather_no_more_weights(ranks, engine):
    """Unless there is no room: then each of 10 more tokens gathers at least the four blocks, in at least 2 turns."""
    for cases in ranks:
        more = {room: (of := generated(cases, engine, room)["collectives"])[12] - of[2] for room in ROOMS}
        assert abs(more["room for all"]) < 10
        if engine in SHARDED and engine != "fsdp_unsharded":
            assert more["no room"] > 2 * 10 * 4


@pytest.mark.parametrize("engine", [engine for engine in SHARDED if engine != "fsdp_unsharded"])
def test_weights_are_whole_only_while_generating(ranks, alone, engine):
    whole = alone["last_layer"]["held"][0]
    for cases in ranks:
        assert generated(cases, engine, "room for all")["held"] > 0.95 * whole
        assert generated(cases, engine, "no room")["held"] < 0.6 * whole
        at_start, _, at_end = cases[f"{engine}/generating"]["held"]
        assert at_end <= at_start < 0.6 * whole


@pytest.mark.parametrize("engine", ENGINES)
def test_training_goes_on_as_if_nothing_had_been_generated(ranks, alone, engine):
    for cases in ranks:
        for own, other in zip(cases[f"{engine}/generating"]["steps"], alone["last_layer"]["steps"]):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)
