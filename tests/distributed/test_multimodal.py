"""Models that see: the ids and losses of one process under every engine, none of which loads what text never runs."""

from __future__ import annotations

import pytest
from support import cases as known

CASES = tuple(f"{family}_files" for family in known.SEEING)
PAIRS = [(engine, case) for engine in ("auto", "zero2", "zero3", "fsdp") for case in CASES]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_and_losses_are_those_of_one_process(ranks, alone, engine, case):
    for cases in ranks:
        for own, other in zip(cases[f"{engine}/{case}"]["steps"], alone[case]["steps"], strict=True):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
