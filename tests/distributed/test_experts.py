"""Mixtures of experts: the ids and losses of one process under every engine, whatever experts a rank's tokens go to."""

from __future__ import annotations

import pytest
from support import worker

CASES = tuple(worker.MIXTURES)
PAIRS = [
    *((engine, case) for engine in ("auto", "zero2", "zero3", "fsdp") for case in CASES),
    *((engine, f"{case}_files") for engine in ("zero3", "fsdp") for case in CASES),
]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_and_losses_are_those_of_one_process(ranks, alone, engine, case):
    for cases in ranks:
        for own, other in zip(cases[f"{engine}/{case}"]["steps"], alone[case.removesuffix("_files")]["steps"]):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
