"""Sharding of a model on the CPU, or in files: never is more than a part of it whole on the device."""

from __future__ import annotations

import functools

import pytest
from support import worker

from colm_scale.engines.fsdp import units
from colm_scale.modeling.losses import ExampleLoss

CASES = {1: ("tied",), 2: ("cluster", "tail", "tied"), 4: ("tied",)}
"""By number of ranks: float32, bfloat16 with float32 adapters, and one weight for embedding and head."""
ENGINES = {1: ("zero3", "fsdp"), 2: ("zero3", "zero3_offload", "fsdp", "fsdp_offload"), 4: ("zero3", "fsdp")}
RUNS = [(engine, case, ranks) for ranks, cases in CASES.items() for case in cases for engine in ENGINES[ranks]]
FROM_FILES = [(engine, f"{case}_files", ranks) for engine, case, ranks in RUNS]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The results of each rank of a number of ranks."""

    def launch(ranks: int) -> list[dict]:
        cases = [*CASES[ranks], *(f"{case}_files" for case in CASES[ranks])]
        jobs = {f"{engine}/{case}": (engine, case) for engine in ENGINES[ranks] for case in cases}
        if ranks == 1:
            jobs |= {case: ("auto", case) for of_two in CASES[2] for case in (of_two, f"{of_two}_files")}
        return [rank["cases"] for rank in worker.launch(ranks, jobs, tmp_path_factory.mktemp(f"on-{ranks}"))]

    return functools.cache(launch)


def made_of(case: str) -> ExampleLoss:
    return worker.model(**worker.CASES[case].model)[0]


@pytest.mark.parametrize(("engine", "case", "ranks"), RUNS)
def test_what_is_whole_on_the_device_is_a_weight_or_a_block(launched, engine, case, ranks):
    module = made_of(case)
    blocks = [unit if isinstance(unit, list) else [unit] for unit in units(module.causal_model)[:-1]]
    of_units = [{id(w): w.numel() for part in block for w in part.parameters()} for block in blocks]
    largest = max(w.numel() for w in module.parameters())
    if engine.startswith("fsdp"):
        largest = max(sum(of_unit.values()) for of_unit in of_units)
    for cases in launched(ranks):
        most, total = cases[f"{engine}/{case}"]["moved"]
        assert total == sum(w.numel() for w in module.parameters())
        assert most == largest < total / 4


@pytest.mark.parametrize(("engine", "case", "ranks"), FROM_FILES)
def test_what_a_rank_has_read_is_shards_and_one_part(launched, engine, case, ranks):
    parts = [unit if isinstance(unit, list) else [unit] for unit in units(made_of(case).causal_model)[:-1]]
    frozen = [{id(w): w.numel() for m in part for w in m.parameters() if not w.requires_grad} for part in parts]
    for cases in launched(ranks):
        most, total = cases[f"{engine}/{case}"]["moved"]
        assert total == sum(sum(part.values()) for part in frozen)
        assert most == max(sum(part.values()) for part in frozen) < total / 4


@pytest.mark.parametrize(("engine", "case", "ranks"), RUNS + FROM_FILES)
def test_weights_and_buffers_are_kept_bit_for_bit(launched, engine, case, ranks):
    assert all(cases[f"{engine}/{case}"]["weights_kept"] for cases in launched(ranks))


@pytest.mark.parametrize(("engine", "case", "ranks"), RUNS + FROM_FILES)
def test_ids_and_losses_are_those_of_a_model_that_is_not_sharded(launched, engine, case, ranks):
    (other,) = launched(1)[0][case]["steps"]
    for cases in launched(ranks):
        (own,) = cases[f"{engine}/{case}"]["steps"]
        assert own["ids"].tolist() == other["ids"].tolist()
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)
