"""Mixtures of experts: the ids and losses of one process under every engine, whatever experts a rank's tokens go to."""

from __future__ import annotations

import pytest
from support import cases

MIXTURES = tuple(cases.MIXTURES)
TRAINED = tuple(f"{case}_trained" for case in MIXTURES)
"""With adapters on the experts."""
CASES = (*MIXTURES, *TRAINED, "experts_reused", "experts_unbroken")
PAIRS = [
    *((engine, case) for engine in ("auto", "zero2", "zero3", "fsdp") for case in MIXTURES),
    *((engine, f"{case}_files") for engine in ("zero3", "fsdp") for case in MIXTURES),
    *((engine, case) for engine in ("auto", "zero2", "fsdp") for case in TRAINED),
    *(("fsdp", f"{case}_files") for case in TRAINED),
    *((engine, "experts_reused") for engine in ("auto", "zero2", "fsdp")),
    *((engine, "experts_resumed") for engine in ("auto", "fsdp > auto")),
]


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_and_losses_are_those_of_one_process(ranks, alone, engine, case):
    expected = alone[case.removesuffix("_files").replace("resumed", "unbroken")]["steps"]
    for of_rank in ranks:
        steps = of_rank[f"{engine}/{case}"]["steps"]
        assert len(steps) == len(expected)
        for own, other in zip(steps, expected):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
