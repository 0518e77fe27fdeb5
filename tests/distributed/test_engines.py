"""Every engine trains as one process does: the same ids, the same adapters, less of the model on each rank.

All engines run one after the other in the same two processes (`support.worker`), on the CPU, in float32 unless said.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import worker
from support.cases import STEPS
from support.worker import RATE

BASIC = ("last_layer_with_floor", "broken")
ALL = (*BASIC, "zeroth_order_1", "clipped", "checkpointed", "starved")
CASES = {
    "auto": ALL,
    "zero1": BASIC,
    "zero2": ALL,
    "zero2_offload": BASIC,
    "zero3": ALL,
    "zero3_offload": BASIC,
    "fsdp": ALL,
    "fsdp_offload": BASIC,
    "fsdp_unsharded": BASIC,
}
ENGINES = tuple(CASES)
MAIN = tuple(engine for engine, cases in CASES.items() if cases == ALL)
NOT_COMPARED = ("broken", "clipped", "starved")
"""Adapters of these are compared by tests of their own, or have made one step."""
SHARDED = ("zero3", "zero3_offload", "fsdp", "fsdp_offload")
PAIRS = [(engine, case) for engine, cases in CASES.items() for case in cases]
HALF = ("bfloat16", "float16")
CHANGES = ("auto > fsdp", "fsdp > zero3", "zero3 > zero1", "zero2 > auto")
"""Engines to begin and to go on under."""
SCRATCH = re.compile(
    "_lazy_init_ran|_has_rebuilt_buckets"  # of DDP, after its first forward
)
DEEPSPEEDS_SCRATCH = re.compile(
    "tput_timer|param_coordinator|_hook_state|applied_pre_backward|_step_applied"  # of the last step and backward
    "|grad|ipg_bucket|param_buffer_of_bit16"  # gradients and other buffers, written before they are read
    "|loss_scale"  # set before each backward
)
LAST_BITS = 1e-2 * RATE
"""Largest deviation of most adapter entries. Gradients are float32 sums in another order, off by some 2**-23 of their
size; Adam makes of an entry's gradient a change of about RATE whatever its size, and of its error the same share. Only
where a gradient is itself rounding is the change arbitrary."""


SKIPPED = ("overflowing", "poisoned")


REDUCTIONS = {
    "auto": ("allreduce_", 0, 1),
    "zero1": ("allreduce_", 0, 1),
    "zero2": ("allreduce_", 1, 1),
    "zero3": ("_reduce_scatter_base_", 1, 1),
    "fsdp": ("_reduce_scatter_base_", 0, worker.BLOCKS),
}
"""Collective that reduces gradients, and its number in a micro-batch and in the last of a step. From ZeRO-2 on a rank
keeps only its part of the gradients, so all are reduced."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By rank, the result of each ``engine/case``."""
    jobs = {f"{engine}/{case}": (engine, case) for engine, case in PAIRS}
    jobs |= {f"{engine}/{case}": (engine, case) for engine in MAIN for case in (*HALF, *SKIPPED)}
    jobs |= {f"{engine}/counted": (engine, "counted") for engine in REDUCTIONS}
    jobs |= {f"{change}/broken": (change, "broken") for change in CHANGES}
    found = worker.launch(2, jobs, tmp_path_factory.mktemp("engines"), timeout_seconds=900)
    return [rank["cases"] for rank in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    jobs = {case: ("auto", case) for case in (*ALL, *HALF, *SKIPPED, "not_clipped", "last_layer", "floored")}
    return worker.launch(1, jobs, tmp_path_factory.mktemp("alone"))[0]["cases"]


@pytest.fixture(scope="module")
def start():
    return flat(worker.adapters(worker.model()[0]))


def flat(adapters: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in adapters.values()])


def ids(result: dict) -> list[list[int]]:
    return [step["ids"].tolist() for step in result["steps"]]


def assert_same_adapters(result: dict, expected: dict, start: torch.Tensor) -> None:
    ours, theirs = flat(result["adapters"]), flat(expected["adapters"])
    assert (theirs - start).abs().mean() > RATE / 2
    apart = (ours - theirs).abs()
    assert apart.mean() < LAST_BITS / 10
    assert (apart > LAST_BITS).float().mean() < 1e-3


# float32


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_ids_are_those_of_one_process(ranks, alone, engine, case):
    for cases in ranks:
        assert ids(cases[f"{engine}/{case}"]) == ids(alone[case])


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, case in PAIRS if case not in NOT_COMPARED])
def test_adapters_are_those_of_one_process(ranks, alone, start, engine, case):
    assert len(alone["last_layer_with_floor"]["steps"]) == STEPS > 5
    for cases in ranks:
        assert_same_adapters(cases[f"{engine}/{case}"], alone[case], start)


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine in MAIN for case in (*ALL, "float16")])
def test_the_noise_of_the_gradient_is_that_of_one_process(ranks, alone, engine, case):
    """Whatever an engine multiplies the loss by: the number of ranks, a scale of float16."""
    found, expected = (of[0]["telemetry"] for of in (ranks[0][f"{engine}/{case}"]["steps"], alone[case]["steps"]))
    for name in {"noise", "signal", "trained", "worth"} & (expected.keys() | found.keys()):
        near = 1e-2 if case == "float16" else 1e-4
        assert found[name] == pytest.approx(expected[name], rel=near, abs=near / 10 * expected["noise"])


def test_matching_one_derivative_is_not_worth_more_examples(alone):
    """Whatever the selection has matched of one number says little about the whole gradient."""
    for case, is_worth_more in (("last_layer", True), ("zeroth_order_1", False)):
        steps = [step["telemetry"] for step in alone[case]["steps"]]
        assert any(step["worth"] > 1.01 * step["trained"] for step in steps) == is_worth_more


def test_replicas_have_the_same_adapters(ranks):
    """Only where each rank has them whole: of shards the first rank has made one set."""
    one, other = (cases["auto/last_layer_with_floor"]["adapters"] for cases in ranks)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("engine", MAIN)
def test_clipping_is_that_of_one_process(ranks, alone, start, engine):
    norms = [step["norm"] for step in alone["clipped"]["steps"]]
    assert min(norms) > 5 * 0.02, "the limit of the case is far below"
    result = ranks[0][f"{engine}/clipped"]
    assert [step["norm"] for step in result["steps"]] == pytest.approx(norms, rel=1e-5)
    assert_same_adapters(result, alone["clipped"], start)


def test_clipping_changes_what_is_trained(alone):
    """Adam forgives a gradient's size, but not that the steps' gradients were scaled differently."""
    clipped, free = (flat(alone[case]["adapters"]) for case in ("clipped", "not_clipped"))
    assert (clipped - free).abs().mean() > LAST_BITS


@pytest.mark.parametrize("engine", MAIN)
def test_checkpointing_activations_changes_nothing_but_memory(ranks, engine):
    """The recomputed activations are the same bits, so the ids are, and the losses."""
    with_it, without = (ranks[0][f"{engine}/{case}"]["steps"] for case in ("checkpointed", "last_layer_with_floor"))
    for own, other in zip(with_it, without):
        assert own["ids"].tolist() == other["ids"].tolist()
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)


FLOORED = [
    (engine, case)
    for engine in ENGINES
    for case in ("last_layer_with_floor", *HALF)
    if case not in HALF or engine in MAIN
]


@pytest.mark.parametrize(("engine", "case"), FLOORED)
def test_the_floor_leaves_everything_as_it_was(ranks, engine, case):
    """Before the first step, and after some."""
    for cases in ranks:
        assert_floors_changed_nothing(cases[f"{engine}/{case}"])


@pytest.mark.parametrize("case", ["last_layer_with_floor", *HALF, "floored"])
def test_the_floor_of_one_process_leaves_everything_as_it_was(alone, case):
    assert_floors_changed_nothing(alone[case])


def assert_floors_changed_nothing(result: dict) -> None:
    floor = result["floor"]
    assert floor["seen"] > 1000
    scratch = DEEPSPEEDS_SCRATCH if result["name"] == "deepspeed" else SCRATCH
    for changed in (floor["changed_at_first"], floor["changed"]):
        assert not [path for path in changed if not scratch.search(path)]


# What a rank holds


@pytest.mark.parametrize("engine", SHARDED)
def test_weights_are_shared_out(ranks, alone, engine):
    """Between steps half of them is on each of two ranks; while a layer of a block runs, that and what is gathered for
    it: the block under FSDP2, the layer under ZeRO-3. A block is a fifth of this model."""
    whole = alone["last_layer_with_floor"]["held"][0]
    for cases in ranks:
        at_start, most, at_end = cases[f"{engine}/last_layer_with_floor"]["held"]
        assert whole / 2 <= at_start <= 0.52 * whole  # the adapters' shards are padded
        assert at_end <= at_start
        assert at_start < most <= 0.7 * whole


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in SHARDED])
def test_other_engines_hold_them_all_while_a_block_runs(ranks, alone, engine):
    """So that the test above can fail."""
    whole = alone["last_layer_with_floor"]["held"][0]
    most = ranks[0][f"{engine}/last_layer_with_floor"]["held"][1]
    assert most > 0.95 * whole if engine != "fsdp_unsharded" else most > 0.5 * whole


# Going on from a checkpoint


@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_run_is_an_unbroken_one_bit_for_bit(ranks, engine):
    for cases in ranks:
        broken, whole = cases[f"{engine}/broken"], cases[f"{engine}/last_layer_with_floor"]
        for own, other in zip(broken["steps"], whole["steps"], strict=True):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["loss"] == other["loss"]
            assert all(torch.equal(a, b) for a, b in zip(own["moments"], other["moments"], strict=True))
        assert all(torch.equal(broken["adapters"][name], values) for name, values in whole["adapters"].items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_under_another_engine(ranks, alone, start, change):
    for cases in ranks:
        assert ids(cases[f"{change}/broken"]) == ids(alone["last_layer"])
        assert_same_adapters(cases[f"{change}/broken"], alone["last_layer"], start)


# Half precision


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("engine", MAIN)
def test_half_precision_trains_the_same_first_step(ranks, alone, engine, dtype, record_property):
    """Later steps may differ: a gradient summed in another order moves adapters by a last bit, which half precision
    makes the difference between two neighbouring activations."""
    expected, result = alone[dtype], ranks[0][f"{engine}/{dtype}"]
    differs = [own != other for own, other in zip(ids(result), ids(expected))]
    record_property("first step that differs", differs.index(True) + 1 if any(differs) else None)
    assert not differs[0]
    losses = [step["loss"] for step in result["steps"]]
    assert all(map(math.isfinite, losses))
    # Two ranks form other micro-batches than one: some activations are rounded to their neighbour, which is a relative
    # 2**-8 away in bfloat16 and 2**-11 in float16. The loss is a mean over some hundred tokens, so far less is left.
    spacing = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert losses[0] == pytest.approx(expected["steps"][0]["loss"], rel=spacing / 10)
    assert {values.dtype for values in result["adapters"].values()} == {torch.float32}


@pytest.mark.parametrize("engine", MAIN)
def test_float16_scales_the_loss_and_not_the_gradient(ranks, alone, engine):
    """The norm is that of the gradient itself; a scale that was too large is halved, and that step is left out."""
    for step, expected in zip(ranks[0][f"{engine}/float16"]["steps"], alone["float16"]["steps"], strict=True):
        assert step["loss_scale"] == expected["loss_scale"]
        assert step["applied"] == expected["applied"]
    first = ranks[0][f"{engine}/float16"]["steps"][0]
    assert first["loss_scale"] == 2.0**16
    assert first["norm"] == pytest.approx(alone["float16"]["steps"][0]["norm"], rel=1e-3)
    assert {step["loss_scale"] for step in ranks[0][f"{engine}/bfloat16"]["steps"]} == {1.0}


# What contributes nothing


@pytest.mark.parametrize("engine", [*MAIN, "alone"])
def test_moments_learn_from_applied_steps_only(ranks, alone, engine):
    runs = [cases[f"{engine}/overflowing"] for cases in ranks] if engine != "alone" else [alone["overflowing"]]
    for run in runs:
        first, second, third, fourth = run["steps"]
        assert [step["applied"] for step in run["steps"]] == [False, True, False, True]
        assert [step["moment_steps"] for step in run["steps"]] == [0, 1, 1, 2]
        assert not any(average.any() for average in first["moments_after"])
        assert all(map(torch.equal, second["moments_after"], third["moments_after"]))
        assert not any(map(torch.equal, third["moments_after"], fourth["moments_after"]))
        assert all(map(torch.equal, fourth["moments_after"], runs[0]["steps"][3]["moments_after"]))


@pytest.mark.parametrize("engine", MAIN)
def test_a_micro_batch_without_weight_adds_nothing_whatever_the_losses_of_candidates_left_out(
    ranks, alone, start, engine
):
    for cases in ranks:
        result = cases[f"{engine}/poisoned"]
        assert ids(result) == ids(alone["poisoned"])
        assert_same_adapters(result, alone["poisoned"], start)
    assert all(cases[f"{engine}/poisoned"]["steps"][0]["trained_batches"] == 3 for cases in ranks)
    empty = [sum(step["empty_batches"] for step in cases[f"{engine}/poisoned"]["steps"]) for cases in ranks]
    assert sum(empty) == 3


# What is exchanged


@pytest.mark.parametrize("engine", REDUCTIONS)
def test_gradients_are_reduced_once_if_the_engine_can_wait(ranks, start, engine):
    name, each, last = REDUCTIONS[engine]
    for cases in ranks:
        for number, step in enumerate(cases[f"{engine}/counted"]["steps"], 1):
            *others, end = step["collectives"]
            assert len(others) == 3
            assert [counts.get(name, 0) for counts in others] == [each] * 3
            assert end.get(name, 0) == last
            assert step["gradient_bytes"] == 4 * len(start) * (1 + 3 * (each > 0))
            if engine == "auto":
                # In its second step DDP orders its buckets once as gradients came.
                assert sum(map(len, others)) == (number == 2)
                assert end == {name: 1}, "no buffers"
