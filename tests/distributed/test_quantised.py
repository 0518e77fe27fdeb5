"""A base in 4 bits trains as in one process under engines that shard it, which quantise it part by part.

In float32 on the CPU. One process runs bitsandbytes' own layers.
"""

from __future__ import annotations

import pytest
import torch
from support import worker
from support.worker import BLOCKS, RATE, ROOMS

pytest.importorskip("bitsandbytes")
ENGINES = ("fsdp", "zero3")
CASES = ("nf4", "nf4_zeroth_order", "nf4_broken", "nf4_generating", "nf4_forward_reused")
OFFLOADED = [("fsdp_offload", "nf4"), ("zero3_offload", "nf4")]
PAIRS = [(engine, case) for engine in ENGINES for case in CASES] + OFFLOADED
HALF = "nf4_tail"
"""A zeroth-order sketch in bfloat16, of which the last blocks are in float32."""
LAST_BITS = 1e-2 * RATE
"""Largest deviation of most adapter entries, as for bases that are not quantised (`test_engines`): the weights are the
same bits and products are in float32, so only sums are in another order."""
SIZES = {"q": 32 * 32, "k": 32 * 32, "v": 32 * 32, "o": 32 * 32, "gate": 48 * 32, "up": 48 * 32, "down": 32 * 48}
"""Numbers of each quantised weight of a block."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By rank, the result of each ``engine/case``."""
    jobs = {f"{engine}/{case}": (engine, case) for engine, case in [*PAIRS, *((engine, HALF) for engine in ENGINES)]}
    return [rank["cases"] for rank in worker.launch(2, jobs, tmp_path_factory.mktemp("sharded"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    jobs = {case: ("auto", case) for case in (*CASES, HALF)} | {"float32": ("auto", "last_layer")}
    return worker.launch(1, jobs, tmp_path_factory.mktemp("alone"))[0]["cases"]


def packed_bytes(numbers: int) -> int:
    """Codes of 4 bits, and a scale of 8 bits for each 64, in whole float32 numbers."""
    return -(-(numbers // 2 + numbers // 64) // 4) * 4


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_and_losses_are_those_of_one_process(ranks, alone, engine, case):
    for cases in ranks:
        for own, other in zip(cases[f"{engine}/{case}"]["steps"], alone[case]["steps"], strict=True):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)  # float32 sums in another order


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_adapters_are_those_of_one_process(ranks, alone, engine, case):
    for cases in ranks:
        found, expected = cases[f"{engine}/{case}"]["adapters"], alone[case]["adapters"]
        assert [*found] == [*expected]
        apart = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
        assert apart.mean() < LAST_BITS / 10
        assert (apart > LAST_BITS).float().mean() < 1e-3


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_weights_are_those_of_one_process_bit_for_bit(ranks, alone, engine, case):
    """Also after some steps, and the same model for a checkpoint."""
    expected = alone[case]["weights"]
    assert len(expected) == BLOCKS * len(SIZES)
    for cases in ranks:
        found = cases[f"{engine}/{case}"]
        assert [name for name, weight in expected.items() if not torch.equal(found["weights"][name], weight)] == []
        assert found["digest"] == alone[case]["digest"]


def test_quantising_changes_what_is_learned(alone):
    """So that the tests above can fail."""
    (own, *_), (other, *_) = alone["nf4"]["steps"], alone["float32"]["steps"]
    assert own["loss"] != pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize(("engine", "case"), [*((engine, "nf4") for engine in ENGINES), *OFFLOADED])
def test_a_rank_holds_half_of_codes_and_scales(ranks, engine, case):
    """In a floating-point type: shards of integers are refused by some engines, and spoilt by others."""
    held = [cases[f"{engine}/{case}"]["own"] for cases in ranks]
    for name in held[0]:
        size = packed_bytes(SIZES[name.split(".")[-2].removesuffix("_proj")])
        shares = [own[name][1] for own in held]
        assert {own[name][0] for own in held} == {torch.float32}
        assert sum(shares) - size in (0, 4), "the shares are padded to whole numbers"
        assert max(shares) == -(-size // 8) * 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_never_holds_more_than_a_part_that_is_not_quantised(ranks, engine):
    """Of what has been filled, before it is cut: by numbers, of which a packed weight has fewer."""
    for cases in ranks:
        most, total = cases[f"{engine}/nf4"]["moved"]
        assert most < total / 4


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_those_of_one_process(ranks, alone, engine, room):
    """With the weights gathered once, and block by block."""
    expected = alone["nf4_generating"]["generated"][room]["answers"][12]
    one, other = (cases[f"{engine}/nf4_generating"]["generated"][room]["answers"][12] for cases in ranks)
    assert len(expected) == 5
    assert one | other == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_trains_the_same_first_step(ranks, alone, engine):
    expected = alone[HALF]
    for cases in ranks:
        result = cases[f"{engine}/{HALF}"]
        assert {dtype for dtype, _ in result["own"].values()} == {torch.bfloat16}
        assert all(torch.equal(result["weights"][name], weight) for name, weight in expected["weights"].items())
        (own,), (other,) = result["steps"], expected["steps"]
        assert own["ids"].tolist() == other["ids"].tolist()
        # Other micro-batches: activations are rounded to a neighbour 2**-8 away, and a loss is a mean over many.
        assert own["loss"] == pytest.approx(other["loss"], rel=2**-8)
