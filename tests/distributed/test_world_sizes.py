"""The same run on 1, 2 and 4 ranks, alone, under DDP and under DeepSpeed ZeRO-2, on the CPU.

`support.worker` trains every case once per engine and world size; the tests read what the ranks wrote.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support import worker
from support.cases import STEPS, D
from support.families import labels_of
from support.worker import RATE

from colm_scale.data.batching import collate
from colm_scale.records import CandidateMatrix, Candidates
from colm_scale.selection.feedback import ErrorFeedback
from colm_scale.selection.rule import SelectionRule

METHODS = ("last_layer", "columns", "zeroth_order_1", "zeroth_order_3", "stratified", "random", "full")
CASES = {name: worker.CASES[name] for name in (*METHODS, "last_layer_with_floor_later", "cluster", "token", "starved")}
"""The others have a file each beside this one."""
RUNS = {
    "single": ("auto", 1),
    "ddp-2": ("auto", 2),
    "ddp-4": ("auto", 4),
    "zero2-1": ("zero2", 1),
    "zero2-2": ("zero2", 2),
}
SKETCHED = tuple(name for name, case in CASES.items() if case.selection.method == "colm")
GRADIENT = 2e-6
"""Largest deviation of a gradient, relative to its largest entry: float32 sums over at most 400 tokens, in another
order and grouped into other micro-batches, are off by a few times 2**-24 of the sum of what is added."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The results of each rank of a run, which is started when the first test asks for it."""

    def launch(name: str) -> list[dict]:
        engine, world_size = RUNS[name]
        return worker.launch(world_size, {case: (engine, case) for case in CASES}, tmp_path_factory.mktemp(name))

    return functools.cache(launch)


@pytest.fixture(scope="module", params=RUNS)
def ranks(request, launched):
    return launched(request.param)


@pytest.fixture(scope="module", params=[name for name, (_, world_size) in RUNS.items() if world_size > 1])
def several(request, launched):
    """The runs with more than one rank."""
    return launched(request.param)


@pytest.fixture(scope="module")
def alone(launched):
    """The one rank without an engine that shards, which all others are compared with."""
    return launched("single")[0]["cases"]


@pytest.fixture(scope="module")
def data():
    return worker.examples()


@pytest.fixture(scope="module")
def references(alone, data):
    """The gradient, and the loss, of a case's first step by plain autograd."""
    return functools.cache(lambda case: reference_gradient(case, alone[case]["steps"][0], data))


@pytest.fixture(scope="module")
def start():
    """The adapters that every run starts with."""
    return flat(worker.adapters(worker.model()[0]))


def flat(adapters: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in adapters.values()])


def steps_of(ranks: list[dict], case: str) -> list[list[dict]]:
    """``[rank][step]``."""
    return [rank["cases"][case]["steps"] for rank in ranks]


def sources_of(ids: torch.Tensor, data) -> torch.Tensor:
    index = {id_: i for i, id_ in enumerate(data.ids.tolist())}
    return data.sources[[index[id_] for id_ in ids.tolist()]]


# Which examples


def test_each_run_has_the_engine_it_asks_for(launched):
    names = {run: launched(run)[0]["cases"]["full"]["name"] for run in RUNS}
    assert names == {
        "single": "single",
        "ddp-2": "ddp",
        "ddp-4": "ddp",
        "zero2-1": "deepspeed",
        "zero2-2": "deepspeed",
    }


@pytest.mark.parametrize("case", METHODS)
def test_ids_are_equal_at_every_world_size(ranks, alone, case):
    expected = alone[case]["steps"]
    assert len(expected) == STEPS >= 6
    for steps in steps_of(ranks, case):
        for number, (own, reference) in enumerate(zip(steps, expected, strict=True), 1):
            assert own["candidate_ids"].tolist() == reference["candidate_ids"].tolist(), f"step {number}"
            assert own["ids"].tolist() == reference["ids"].tolist(), f"step {number}"
            assert own["weights"].tolist() == reference["weights"].tolist(), f"step {number}"


def test_cases_select_different_examples(alone):
    """So that the comparison above is not of runs that select the same whatever they do."""
    chosen = {case: tuple(alone[case]["steps"][0]["ids"].sort().values.tolist()) for case in METHODS}
    assert len(set(chosen.values())) == len(METHODS)


@pytest.mark.parametrize("case", METHODS)
def test_composition_is_that_of_the_method(alone, data, case):
    for step in alone[case]["steps"]:
        sources = sources_of(step["ids"], data)
        candidates = sources_of(step["candidate_ids"], data)
        small = int((candidates >= 2).sum())  # sources c, d and e have fewer examples than the average source
        budget = 24 if case == "full" else 12
        assert len(set(step["ids"].tolist())) == len(step["ids"]) == budget
        assert set(step["ids"].tolist()) <= set(step["candidate_ids"].tolist())
        if case not in ("random", "full"):
            assert step["kept"] == int((sources >= 2).sum()) == small


@pytest.mark.parametrize("case", SKETCHED)
def test_candidate_matrix_of_the_first_step_is_equal_bit_for_bit(ranks, alone, case):
    expected = alone[case]["steps"][0]["matrix"]
    assert expected["rows"].abs().sum() > 0
    for steps in steps_of(ranks, case):
        for field, values in steps[0]["matrix"].items():
            assert torch.equal(values, expected[field]), field


@pytest.mark.parametrize("case", SKETCHED)
def test_every_rank_has_the_same_matrix_and_would_select_the_same(ranks, data, case):
    config = CASES[case].selection
    rule = SelectionRule(config, worker.kept(config, data), worker.run_config(CASES[case]).train.seed)
    first, *others = steps_of(ranks, case)
    for steps in others:
        for own, of_first in zip(steps, first, strict=True):
            assert all(torch.equal(own["matrix"][field], of_first["matrix"][field]) for field in own["matrix"])
            assert torch.equal(own["positions"], of_first["positions"])
    feedback = ErrorFeedback.beginning(len(data.source_names), config.feedback_columns(D))
    for number, step in enumerate(first, 1):
        indices, matrix = step["indices"], CandidateMatrix(**step["matrix"])
        candidates = Candidates(number, indices, data.ids[indices], data.sources[indices], data.lengths[indices])
        again = rule.select(candidates, rule.quota(candidates), matrix, feedback)
        feedback = feedback.after(matrix, candidates.sources, again)
        assert torch.equal(again.positions, step["positions"])
        assert torch.equal(again.weights, step["weights"])


# What is trained


def reference_gradient(case: str, step: dict, data) -> tuple[dict[str, torch.Tensor], float]:
    """One process, one padded batch of the whole coreset, the model's own logits and plain autograd."""
    module, _ = worker.model()
    batch = collate(data, step["indices"][step["positions"]], step["positions"], worker.PAD, torch.device("cpu"))
    logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = labels_of(batch)[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100)
    counts, weights = (targets != -100).sum(1), step["weights"]
    if worker.run_config(CASES[case]).train.loss == "token":
        loss = (weights * nll.sum(1)).sum() / (weights * counts).sum()
    else:
        loss = (weights * nll.sum(1) / counts).sum() / weights.sum()
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named])
    return {name: gradient for (name, _), gradient in zip(named, gradients)}, float(loss.detach())


@pytest.mark.parametrize("case", ["last_layer", "full", "cluster", "token", "starved"])
def test_gradient_is_that_of_one_process_with_one_batch(ranks, references, case):
    expected, loss = references(case)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-2
    for rank in ranks:
        result = rank["cases"][case]
        assert result["steps"][0]["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=0, atol=float(GRADIENT * scale))
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
        assert result["steps"][0]["norm"] == pytest.approx(norm, rel=1e-5)


def test_weights_and_token_counts_move_the_gradient(alone):
    """So that the test above can tell the losses apart."""
    step = alone["cluster"]["steps"][0]
    assert step["weights"].max() > 1
    name = next(name for name, gradient in alone["cluster"]["gradients"].items() if gradient.abs().max() > 0)
    found = [alone[case]["gradients"][name] for case in ("last_layer", "cluster", "token")]
    scale = found[0].abs().max()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other]).abs().max() > 100 * GRADIENT * scale


def test_ranks_without_enough_examples_run_as_many_forwards(several):
    steps = [steps[0] for steps in steps_of(several, "starved")]
    assert sum(step["empty_batches"] for step in steps) > 0
    assert len({step["trained_batches"] for step in steps}) == 1
    # The three examples are each a micro-batch, and so are the eight candidates.
    world_size = len(several)
    assert {step["forwards"] for step in steps} == {8 // world_size + math.ceil(3 / world_size)}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_runs_as_many_forwards(several, case):
    for step in zip(*steps_of(several, case), strict=True):
        assert len({of_rank["forwards"] for of_rank in step}) == 1


@pytest.mark.parametrize("case", METHODS)
def test_adapters_after_the_steps(ranks, alone, start, case):
    """Equal on all ranks to the last bit, and close to those of one rank.

    Gradients differ in their last bits (see GRADIENT), and Adam divides an entry by its own size: one that is all
    rounding moves by a whole learning rate in whichever direction. Such entries are few, so the tail is counted and
    not bounded. One other example in one coreset moves most entries by more than a tenth of the rate.
    """
    expected = flat(alone[case]["adapters"])
    assert (expected - start).abs().mean() > RATE
    results = [flat(rank["cases"][case]["adapters"]) for rank in ranks]
    for values in results:
        assert torch.equal(values, results[0])
        apart = (values - expected).abs()
        assert apart.mean() < 1e-3 * RATE
        assert (apart > 1e-2 * RATE).float().mean() < 1e-3


# What is exchanged and held


def expected_bytes(case: str, step: dict, world_size: int) -> dict[str, int]:
    """What a step moves, with every share padded to the largest. Nothing at all with one rank.

    With S = W * (largest share) rows, G ranked sources, e = ceil(d / W) columns for each rank to own:

        zeroth_order   gather     4 S (K + 1)
        last_layer     gather     4 S (h + 2)
                       columns    4 G W e + 8 W G min(h, e), with this compression
                       moments    16 d, if anything was picked
        all            broadcast  16 b + 40
                       control    4 W, whether each rank agrees
                       report     4 n losses, 4 (Q + 1) (64 + 1) sums of the gradients of the coreset's Q sources, and
                                  8 bytes per rank for the seconds and memory peaks of each phase
    """
    if world_size == 1:
        return {}
    config = CASES[case].selection
    budget = config.candidates if config.method == "full" else config.budget
    spans = step["phases"] * (1 + step["kinds"])
    trained = worker.examples().sources[step["indices"][step["positions"]]].unique()
    expected = {
        "broadcast": 16 * budget + 40,
        "control": 4 * world_size,
        "report": 4 * (config.candidates + (len(trained) + 1) * 65) + 8 * world_size * spans,
    }
    if config.method != "colm":
        return expected
    if config.estimator == "zeroth_order":
        return expected | {"gather": 4 * step["padded"] * (config.num_probes + 1)}
    expected |= {"gather": 4 * step["padded"] * (config.columns + 2), "moments": 16 * D}
    if config.compression == "columns":
        owned, sources = math.ceil(D / world_size), step["ranked"]
        agreed = 4 * sources * world_size * owned + 8 * world_size * sources * min(config.columns, owned)
        expected["columns"] = agreed
    return expected


@pytest.mark.parametrize("case", CASES)
def test_bytes_between_ranks(ranks, case):
    for steps in steps_of(ranks, case):
        for step in steps:
            assert step["bytes"] == expected_bytes(case, step, len(ranks))


@pytest.mark.parametrize("case", CASES)
def test_the_noise_of_the_gradient_is_that_of_one_rank(ranks, alone, case):
    found, expected = (steps[0]["telemetry"] for steps in (steps_of(ranks, case)[0], alone[case]["steps"]))
    assert ("noise" in expected) == (case != "starved"), "which trains on three examples of three sources"
    for name in {"noise", "signal", "trained", "worth"} & expected.keys():
        # float32 sums of up to 24 products; the signal is a difference, of about the size of the noise.
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5 * expected["noise"])


@pytest.mark.parametrize("case", SKETCHED)
def test_padding_of_the_shares_is_small(ranks, case):
    for steps in zip(*steps_of(ranks, case), strict=True):
        sketched = steps[0]["sketched"]
        assert sum(step["own"] for step in steps) == sketched <= steps[0]["padded"]
        assert steps[0]["padded"] == len(ranks) * max(step["own"] for step in steps)


@pytest.mark.parametrize(("case", "copies"), [("columns", 2), ("last_layer", 3)])
def test_no_rank_holds_the_gradients_of_all_candidates(ranks, case, copies):
    """Neither as the estimator counts, nor as the garbage collector finds, nor for a moment in any operation.

    Projections are made with the gradients, and so held once more than columns, which are read off them later.
    """
    n, h = 24, CASES[case].selection.columns
    for steps in steps_of(ranks, case):
        step = steps[0]
        assert 0 < step["held"] <= step["own"] * D < n * D
        exchanged = step["padded"] * (h + 2)
        assert step["live"] <= step["held"] + copies * exchanged < step["own"] * D + n * D / 4
        # A micro-batch's gradients multiplied out, or the sums of the ranked sources: nothing larger is ever made.
        assert step["largest"] <= max(step["largest_micro_batch"], step["ranked"]) * D < step["sketched"] * D / 2
        for later in steps:
            assert 0 < later["held"] <= later["own"] * D


def test_what_ranks_hold_falls_with_their_number(launched):
    runs = ("single", "ddp-2", "ddp-4")
    held = [max(steps[0]["held"] for steps in steps_of(launched(run), "last_layer")) for run in runs]
    assert held[1] < 0.7 * held[0]  # whole micro-batches are dealt, so shares are not quite equal
    assert held[2] < 0.4 * held[0]


# The moments


@pytest.mark.parametrize("case", SKETCHED)
def test_moments_of_the_first_step_are_equal_bit_for_bit(ranks, alone, case):
    expected = alone[case]["steps"][0]["moments"]
    assert all(moment.abs().sum() > 0 for moment in expected)
    for steps in steps_of(ranks, case):
        assert all(torch.equal(own, other) for own, other in zip(steps[0]["moments"], expected, strict=True))


@pytest.mark.parametrize("case", ["last_layer", "zeroth_order_1", "zeroth_order_3"])
def test_moments_of_all_ranks_stay_equal_and_close_to_those_of_one(ranks, alone, case):
    """The losses behind a finite difference are about 5, so it is off by some 5 * 2**-24 / (2 * EPSILON) = 1e-5,
    against differences of 0.1 and more; exact gradients are off by the adapters, a thousandth of a step."""
    expected = alone[case]["steps"][-1]["moments"]
    last = [steps[-1]["moments"] for steps in steps_of(ranks, case)]
    for moments in last:
        for own, of_first, other in zip(moments, last[0], expected, strict=True):
            assert torch.equal(own, of_first)
            torch.testing.assert_close(own, other, rtol=0, atol=1e-3 * float(other.abs().max()))


def test_one_probe_needs_two_scalars(ranks):
    """A and B are running means of the picked candidates' coefficients and of their squares."""
    beta1, beta2 = worker.run_config(CASES["zeroth_order_1"]).train.betas
    for steps in steps_of(ranks, "zeroth_order_1"):
        first = second = 0.0
        for step in steps:
            coefficients = dict(zip(step["matrix"]["positions"].tolist(), step["coefficients"].flatten().tolist()))
            picked = [coefficients[position] for position in step["positions"][step["kept"] :].tolist()]
            assert len(picked) > 1
            first = beta1 * first + (1 - beta1) * math.fsum(picked) / len(picked)
            second = beta2 * second + (1 - beta2) * math.fsum(c * c for c in picked) / len(picked)
            # float32 means of about ten numbers of either sign: a few 2**-24 of the largest
            size = max(map(abs, picked))
            assert float(step["moments"][0]) == pytest.approx(first, abs=1e-6 * size)
            assert float(step["moments"][1]) == pytest.approx(second, rel=1e-5)


def test_exact_moments_are_those_of_the_picked_gradients(alone, data):
    """After a step: (1 - beta) times the mean of plain per-example gradients of the probe tensor; so their squares."""
    step = alone["last_layer"]["steps"][0]
    module, tap = worker.model()
    picked = step["positions"][step["kept"] :]
    gradients = []
    for position in picked:
        batch = collate(data, step["indices"][position].view(1), position.view(1), worker.PAD, torch.device("cpu"))
        loss = module(batch).sum()
        gradients.append(torch.autograd.grad(loss, tap.lora_b.weight)[0].flatten())
    rows = torch.stack(gradients)
    beta1, beta2 = worker.run_config(CASES["last_layer"]).train.betas
    expected = (1 - beta1) * rows.mean(0), (1 - beta2) * rows.square().mean(0)
    for own, other in zip(step["moments"], expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=float(10 * GRADIENT * other.abs().max()))


# The bare floor


def test_the_floor_runs_the_tokens_of_the_step_once_more(ranks):
    for rank in ranks:
        result = rank["cases"]["last_layer_with_floor_later"]
        assert result["floor"]["seconds"] > 0
        assert result["floor"]["forwards"] == result["steps"][worker.FLOOR_AFTER - 1]["forwards"] > 1


def test_a_run_with_the_floor_goes_on_as_one_without(ranks):
    for rank in ranks:
        with_floor, without = rank["cases"]["last_layer_with_floor_later"], rank["cases"]["last_layer"]
        for name, values in without["adapters"].items():
            assert torch.equal(with_floor["adapters"][name], values)
        for own, other in zip(with_floor["steps"], without["steps"], strict=True):
            assert own["ids"].tolist() == other["ids"].tolist()
            assert own["bytes"] == other["bytes"]


# Ranks that disagree


@pytest.fixture(scope="module")
def faults(several):
    return [rank["faults"] for rank in several]


def test_a_rank_with_other_candidates_is_named_on_every_rank(faults):
    last = len(faults) - 1
    for found in faults:
        kind, message = found["share_selection"]
        assert kind == "TrainingError"
        assert message.startswith(f"step 7: rank {last} does not agree with rank 0")


def test_a_rank_with_other_data_is_named_once(faults):
    last = len(faults) - 1
    kinds = [found["agree"][0] for found in faults]
    assert kinds == ["UserError", *["PeerFailed"] * last]
    for found in faults:
        message = found["agree"][1]
        assert message.startswith(f"rank {last} and rank 0 differ in training data")


def test_an_error_of_one_rank_ends_all_and_is_said_once(faults):
    last = len(faults) - 1
    assert faults[last]["together"] == ("UserError", "the file is missing")
    for found in faults[:last]:
        assert found["together"] == ("PeerFailed", f"rank {last} failed")


def test_of_several_errors_the_lowest_rank_tells_its_own(faults):
    assert faults[0]["together_two"] == ("PeerFailed", "rank 1 failed")
    assert faults[1]["together_two"] == ("UserError", "rank 1 found it")
    for found in faults[2:]:
        assert found["together_two"] == ("PeerFailed", "rank 1 failed")


def test_ranks_measure_the_same_kinds_of_memory_if_nvml_answers_on_one_alone(faults):
    own = tuple(10 + rank for rank in range(len(faults)))
    for found in faults:
        assert found["memory"] == {"allocator": {"train": own, "step": own}}


def test_ranks_that_agree_go_on(faults):
    for found in faults:
        assert found["agreed"] == ("nothing", "")
        assert found["shared"]["positions"].tolist() == [1, 3]
        assert found["shared"]["weights"].tolist() == [1.0, 2.5]
        assert (found["shared"]["kept"], found["shared"]["overflow"], found["shared"]["invalid"]) == (1, 3, 4)
