"""Every place where the host waits for the device, in a step of each method, on the strict device.

The lists are as short as they can be: a new read fails the test, which names its line. What they say of a GPU is in
`support.strict_device`.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support import strict_runs

FETCHED = ["copy to host records.py:fetched"]
PICKED = ["copy to host selection/ranking/rank.py:_picks"]
SENT = ["copy to host distributed/exchange.py:share_selection", "copy to host distributed/group.py:gathered"]
"""The selection, and whether the ranks agree on it."""
TRAINED = ["copy to host step/train.py:finish", "item engines/base.py:step"]
"""The losses, and the norm of the gradient."""
ENDED = ["synchronize profiling/spans.py:wait"]
TIMED = ["synchronize step/floor.py:_now"] * 2
STEP = {"gather": FETCHED, "select": PICKED, "optimizer": TRAINED, "end": ENDED}
FLOOR = [*TIMED, "item engines/base.py:step", "item step/floor.py:bare_floor_seconds"]
EVALUATED = ["copy to host run/evaluate.py:_combined"]
AFTER = {"floor": FLOOR, "evaluate": EVALUATED}
GENERATED = {*EVALUATED, *(f"{kind} run/evaluate.py:_generate" for kind in ("copy to device", "item", "copy to host"))}
"""Nearly all in transformers, a few for every token."""
MASK = "item modeling/losses.py:forward"
"""transformers looks for padding, twice in a forward of padded examples."""
COUNTED = "copy to host selection/ranking/rank.py:_medoids"
LARGE = "selection/ranking/facility.py:greedy_on_device"

ALIKE = {
    "nothing compared": ["stratified", "random", "full", "length"],
    "one number compared": ["paper", "systematic"],
    "compared in pairs": [
        *("zeroth_order 3", "columns", "own estimator", "own estimator 2", "facility", "cosine cluster", "probe k"),
        *("bfloat16", "float16", "checkpointed", "reuse device", "sgd", "lion", "muon"),
    ],
}
WITHOUT = {"nothing compared": ("gather", "select"), "one number compared": ("select",), "compared in pairs": ()}
ALLOWED = {
    name: {phase: reads for phase, reads in STEP.items() if phase not in WITHOUT[kind]}
    for kind, names in ALIKE.items()
    for name in names
} | {
    "last_layer": {**STEP, **AFTER},
    "reused sketches": {**STEP, "gather": [*FETCHED, "copy to host estimators/reuse.py:exchange"]},
    "padded": {
        **{**STEP, **AFTER, "sketch": [MASK] * 8, "train": [MASK] * 6},
        **{"floor": [*FLOOR, *[MASK] * 14], "evaluate": [*EVALUATED, *[MASK] * 4]},
    },
    # Three for the first and last, and one for each round.
    "large source": {
        **STEP,
        "select": [*[f"item {LARGE}"] * 2, *[f"copy to host {LARGE}"] * 7, *[COUNTED] * 2],
    },
    "reuse cpu": {**STEP, "route": ["event modeling/forward_reuse.py:arrange"]},
    "re-clustered": {**STEP, **AFTER, "optimizer": [*TRAINED, "copy to host step/source_refresh.py:gather"]},
    **{
        engine: {**STEP, "broadcast": SENT, "end": [*ENDED, "copy to host profiling/spans.py:over_ranks"]}
        for engine in strict_runs.ENGINES
    },
}
ALLOWED["ddp"]["train"] = [f"copy to {where} engines/single_and_ddp.py:forward" for where in ("device", "host")] * 2
"""In its second step DDP orders its buckets, once."""
QUICK = ("last_layer", "paper", "stratified", "ddp")
ROUNDED = ("bfloat16", "float16", "zeroth_order 3", *strict_runs.ENGINES)
"""Other kernels than the CPU's own, or absent ranks: ids are others."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, dict]:
    return strict_runs.launch(QUICK, tmp_path_factory.mktemp("strict"))


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, dict]:
    others = [*strict_runs.CASES, *strict_runs.ENGINES]
    return strict_runs.launch([name for name in others if name not in QUICK], tmp_path_factory.mktemp("strict"))


def check(result: dict, allowed: dict[str, list[str]]) -> None:
    """Fail with the lines of the reads that are not allowed."""
    found: dict[str, list[str]] = {}
    for phase, kind, site, _ in result["reads"]:
        found.setdefault(phase, []).append(f"{kind} {site}")
    if generated := found.pop("generate", None):
        assert set(generated) == GENERATED
    other = {
        phase: [" ".join(read) for read in result["reads"] if read[0] == phase]
        for phase in found.keys() | allowed
        if Counter(found.get(phase, [])) != Counter(allowed.get(phase, []))
    }
    assert not other, f"allowed: { {phase: allowed.get(phase, []) for phase in other} }"


def test_a_step_reads_the_device_no_more_than_it_must(quick):
    for name in QUICK:
        check(quick[name], ALLOWED[name])


def test_it_computes_what_the_cpu_computes(quick):
    for name in set(QUICK) - set(ROUNDED):
        assert quick[name]["device"]["ids"] == quick[name]["cpu"]["ids"]
        assert quick[name]["device"]["losses"] == pytest.approx(quick[name]["cpu"]["losses"], rel=1e-5)


def test_a_checkpoint_is_copied_without_waiting_for_the_device(quick):
    """What is read of it after an event is what was there, whatever the next step has changed in place."""
    assert quick["last_layer"]["device"]["snapshot"] == {"in flight": True, "same": True}


@pytest.mark.slow
def test_every_method_reads_the_device_no_more_than_it_must(every):
    for name in ALLOWED.keys() - set(QUICK):
        check(every[name], ALLOWED[name])


@pytest.mark.slow
def test_every_checkpoint_is_copied_without_waiting_for_the_device(every):
    for name in ("padded", "re-clustered"):
        assert every[name]["device"]["snapshot"] == {"in flight": True, "same": True}


@pytest.mark.slow
def test_every_method_computes_what_the_cpu_computes(every):
    for name in every.keys() - set(ROUNDED):
        assert every[name]["device"]["ids"] == every[name]["cpu"]["ids"], name
        assert every[name]["device"]["losses"] == pytest.approx(every[name]["cpu"]["losses"], rel=1e-4), name


@pytest.mark.slow
def test_the_user_s_own_functions_and_torch_s_adafactor_are_all_that_read_more(every):
    selected = [where for phase, _, _, where in every["own ranking"]["reads"] if phase == "select"]
    assert selected
    assert all("docs/examples/own_ranking.py" in where for where in selected)
    stepped = {site for phase, _, site, _ in every["adafactor"]["reads"] if phase == "optimizer"}
    assert stepped == {"step/train.py:finish", "engines/base.py:step"}  # one a tensor, within torch's step


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list]:
    out = tmp_path_factory.mktemp("strict") / "told.json"
    strict_runs.in_process(strict_runs.refusals, str(out))
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("does", "says"),
    {
        "add": "Expected all tensors to be on the same device",
        "where": "Expected all tensors to be on the same device",
        "cat": "Expected all tensors to be on the same device",
        "put into the device from the host": "Expected all tensors to be on the same device",
        "index the host by the device": "indices should be either on cpu or on the same device",
        "generator of the host": "device type for generator",
        "fill from the host's generator": "device type for generator",
        "pin the device": "cannot pin",
        "numpy": "can't convert strict:0 device type tensor to numpy",
    }.items(),
)
def test_it_refuses_to_mix_devices(told, does, says):
    assert says in told[does][0]


@pytest.mark.parametrize(
    ("does", "reads"),
    [
        *((does, "") for does in ("add a number of the host", "random fill", "fill where", "put a number where")),
        *((does, "") for does in ("pinned copy to the device", "repeat_interleave of known size")),
        *((does, "copy to device") for does in ("copy to the device", "tensor on the device")),
        *(("index the device by the host", "copy to device"), ("tolist", "copy to host"), ("mask", "mask")),
        *(("item", "item"), ("bool", "item"), ("nonzero", "nonzero"), ("unique", "_unique2")),
        *(("eigvalsh", "_linalg_eigh"), ("repeat_interleave", "copy to device, repeat_interleave")),
    ],
)
def test_it_notes_what_makes_the_host_wait(told, does, reads):
    assert (told[does][0], ", ".join(told[does][1])) == ("", reads)


def test_a_copy_without_blocking_has_its_values_after_an_event(told):
    assert told["late"] == [True, [1.0, 1.0, 1.0]]


def test_block_inputs_held_on_the_cpu_have_arrived_when_they_are_arranged(told):
    assert told["held"] == [True] * strict_runs.worker.BLOCKS


def test_the_rows_of_a_fused_layer_move_once(told):
    assert told["fused"] == [[MASK], [MASK]]  # of equal lengths, so transformers looks once
