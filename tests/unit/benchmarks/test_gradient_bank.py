"""The gradient bank: its inner products are those of autograd, and selections on it are those of the package."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.data.builtin import builtin_rows
from colm_scale.engines.base import trainable
from colm_scale.estimators.make import make_estimator
from colm_scale.randomness import generator
from colm_scale.selection.quota import allocate
from colm_scale.sketch.plan import plan_sketch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
POOL = 8
OPTIONS = ["--lora.rank", "4", "--train.threads", "1", "--train.micro_batch_tokens", "200"]


SLOW = pytest.mark.slow  # loads the model once more

ALONE = "last_layer countsketch; matching"
FED_BACK = f"{ALONE}, with feedback"


@pytest.fixture(scope="module")
def modules():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    names = ("gradient_bank", "bank_ways", "bank_errors", "gradient_match")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 24 rows of the built-in mixture, a few of each source."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in builtin_rows("train")[:24]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def new_bench(modules, data):
    options = ["--data.train", str(data), "--selection.candidates", "4", "--selection.budget", "4", *OPTIONS]
    return lambda: modules["gradient_match"].Bench(options, POOL)


@pytest.fixture(scope="module")
def built(modules, data, tmp_path_factory):
    """A bank of two states, after 0 and 2 steps, and of the probe after 1; and the model after 2."""
    folder = tmp_path_factory.mktemp("bank")
    given = argparse.Namespace(data=f"few={data}", model=None, pool=POOL, steps=[0, 2], batch=4, ages=[1])
    return folder, modules["gradient_bank"].build(folder, given, OPTIONS)


@pytest.fixture(scope="module")
def bank(built):
    return built[0]


@pytest.fixture(scope="module")
def bench(built):
    return built[1]


def by_autograd(bench) -> dict[str, Tensor]:
    parameters = trainable(bench.module)
    rows = []
    for place in range(POOL):
        at = torch.tensor([place])
        (loss,) = bench.module(bench.collate(bench.pool[at], at))
        rows.append([gradient.flatten() for gradient in torch.autograd.grad(loss, list(parameters.values()))])
    return {name: torch.stack(own).double() for name, own in zip(parameters, zip(*rows))}


def close(found: Tensor, expected: Tensor) -> None:
    """Sums of 24-bit numbers in another order."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def check_products(found: dict, of: dict[str, Tensor], seconds: dict[str, Tensor], parts: dict) -> None:
    wholes = {"plain": 0, "scaled": 0}
    for part, names in parts.items():
        own, second = (torch.cat([numbers[name] for name in names], dim=-1) for numbers in (of, seconds))
        for kind, rows in (("plain", own), ("scaled", own / (second.sqrt() + 1e-8))):
            close(found[kind][part], rows @ rows.T)
            wholes[kind] = wholes[kind] + rows @ rows.T
    for kind, whole in wholes.items():
        close(found[kind]["all"], whole)


def test_products_are_those_of_each_example_s_own_gradient(bank, bench, modules):
    of, state = by_autograd(bench), bench.engine.optimizer.state
    v = {name: state[bench.module.get_parameter(name)]["exp_avg_sq"].flatten().double() for name in of}
    seconds = {name: numbers / (1 - 0.999**2) for name, numbers in v.items()}
    found = torch.load(bank / "step-2" / "products.pt", weights_only=True)
    check_products(found, of, seconds, modules["gradient_bank"].parts(of))


@SLOW
def test_before_training_the_scale_is_the_pool_s(bank, new_bench, modules):
    of = by_autograd(new_bench())
    found = torch.load(bank / "step-0" / "products.pt", weights_only=True)
    check_products(found, of, {name: g.square().mean(0) for name, g in of.items()}, modules["gradient_bank"].parts(of))


def test_the_probe_s_gradients_and_products_are_kept(bank, bench, modules):
    of = by_autograd(bench)
    name = next(name for name in of if bench.module.get_submodule(name[:-7]) is bench.probe_tap.lora_b)
    own = of[name].view(POOL, -1, bench.probe_tap.shape[1])[:, bench.probe_tap.rows].flatten(1)
    pool = modules["bank_ways"].Pool(bank, 2)
    close(pool.tap.probe, own)
    close(pool.products["plain"]["probe"], own @ own.T)


def test_features_are_those_of_the_model(bank, bench, modules):
    pool = modules["bank_ways"].Pool(bank, 2)
    blocks = len(bench.probe_tap.blocks)
    states = modules["bank_ways"].read(bank / "step-2" / "states", POOL, 6, -1)
    assert modules["bank_ways"].depths(blocks) == [0, 1, 3, 4, 5, 7]
    for place in range(POOL):
        at = torch.tensor([place])
        batch = bench.collate(bench.pool[at], at)
        inner = bench.module.causal_model
        with torch.no_grad():
            seen = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        for own, block in zip(states[place, :-1], (0, 1, 3, 4, 5)):  # the last one would be behind the final norm
            torch.testing.assert_close(own, seen.hidden_states[block + 1][0].mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pool.tap.losses[at], bench.module(batch).detach())
    assert pool.lengths.tolist() == bench.examples.lengths[bench.pool].tolist()
    torch.testing.assert_close(pool.rows["words"].norm(dim=1), torch.ones(POOL))


@SLOW
def test_an_earlier_state_has_the_probe_of_its_own(bank, modules, new_bench):
    bench = new_bench()
    modules["gradient_bank"].load_training(bench, bank / "training" / "step-1.pt")
    pool = modules["bank_ways"].Pool(bank, 2)
    tap = pool.tap_of(bank / "step-1")
    for batch in bench.micro_batches():
        losses, delta, a = bench.probe_tap.factors(batch)
        torch.testing.assert_close(tap.losses[batch.positions], losses)
        torch.testing.assert_close(tap.probe[batch.positions], (delta.transpose(1, 2) @ a).flatten(1))
    assert not torch.allclose(tap.probe, pool.tap.probe, rtol=1e-3)


@SLOW
def test_an_interrupted_measurement_repeats_nothing(modules, new_bench, tmp_path):
    bench, script = new_bench(), modules["gradient_bank"]
    passes = []
    bench.module.register_forward_hook(lambda *_: passes.append(1))
    batches = list(bench.micro_batches())
    assert len(batches) > 1
    state = script.State(tmp_path, bench)
    state.measure()
    lost = batches[-1].positions.numpy()
    before = script.State(tmp_path, bench)._array("losses").copy()
    state.done[lost], state._array("losses")[lost] = 0, 0
    passes.clear()
    again = script.State(tmp_path, bench)
    again.measure()
    assert len(passes) == 1
    assert (again._array("losses") == before).all()


@SLOW
def test_an_interrupted_training_continues_as_if_it_had_not_been(modules, new_bench, bank, tmp_path):
    whole, resumed, script = new_bench(), new_bench(), modules["gradient_bank"]
    script.train_to(whole, tmp_path / "whole", 3, 4)
    script.train_to(resumed, bank / "training", 3, 4)
    for one, other in zip(trainable(whole.module).values(), trainable(resumed.module).values()):
        assert torch.equal(one, other)
    assert resumed.engine.updates == 3


@pytest.mark.parametrize("compression", ["columns", "countsketch"])
def test_the_package_s_sketches_are_those_of_the_model(compression, bank, bench, modules):
    pool = modules["bank_ways"].Pool(bank, 2)
    config = SelectionConfig(candidates=8, budget=3, compression=compression, columns=16, kept_sources=[])
    places, candidates = pool.draw(0, 8)
    kept = torch.zeros(len(pool.names), dtype=torch.bool)
    quota = allocate(candidates, kept, 3, generator(0, "kept", 1))
    plan = plan_sketch(candidates, quota, 1, 1000)
    shares = [torch.tensor(share) for share in plan.shares[0]]
    stored = pool.estimator(config, pool.tap)
    stored.sketch(plan, [modules["bank_ways"].Stored(at, places[at]) for at in shares])
    real = make_estimator(bench.probe_tap, config, pool.train, pool.group)
    real.sketch(plan, [bench.collate(bench.pool[places[at]], at) for at in shares])
    ours, theirs = stored.gather(), real.gather()
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-3, atol=1e-3 * float(theirs.rows.abs().max()))


def test_derivatives_are_those_that_the_finite_difference_estimates(bank, bench, modules):
    pool = modules["bank_ways"].Pool(bank, 2)
    config = SelectionConfig(candidates=8, budget=3, estimator="zeroth_order", num_probes=3, kept_sources=[])
    places, candidates = pool.draw(0, 8)
    quota = allocate(candidates, torch.zeros(len(pool.names), dtype=torch.bool), 3, generator(0, "kept", 1))
    plan = plan_sketch(candidates, quota, 1, 1000)
    shares = [torch.tensor(share) for share in plan.shares[0]]
    found = []
    for estimator, batches in (
        (pool.estimator(config, pool.tap), [modules["bank_ways"].Stored(at, places[at]) for at in shares]),
        (
            make_estimator(bench.probe_tap, config, pool.train, pool.group),
            [bench.collate(bench.pool[places[at]], at) for at in shares],
        ),
    ):
        estimator.sketch(plan, batches)
        found.append(estimator.exchange())
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.02 * float(found[1].abs().max()))


@SLOW
def test_every_way_selects_as_many_as_the_budget_of_the_candidates(bank, modules):
    ways = modules["bank_ways"]
    pool = ways.Pool(bank, 2)
    for setting, (name, way) in itertools.product(ways.SETTINGS, ways.WAYS.items()):
        if way.rows in pool.rows or not way.rows:
            own = pool.weights(way, setting, 6, 3, 4)
            for number, row in enumerate(own):
                chosen = row.nonzero().flatten()
                assert len(chosen) == 3, name
                assert set(chosen.tolist()) <= set(pool.draw(number, 6)[0].tolist()), name
            torch.testing.assert_close(own.sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_own_rows_are_ranked_by_the_package(bank, modules):
    """Matching is the nearest of all choices, or next to it: no swap improves it."""
    ways, squared = modules["bank_ways"], modules["bank_errors"].squared
    pool = ways.Pool(bank, 2)
    own = pool.weights(ways.WAYS["probe and source, together; matching"], "none kept", 6, 3, 3)
    products = pool.rows["probe and source"].double() @ pool.rows["probe and source"].double().T
    for number, row in enumerate(own):
        places = pool.draw(number, 6)[0]
        everything = torch.zeros(POOL, dtype=torch.float64)
        everything[places] = 1 / 6
        errors = []
        for some in itertools.combinations(places.tolist(), 3):
            picked = torch.zeros(POOL, dtype=torch.float64)
            picked[list(some)] = 1 / 3
            errors.append(float(squared(products, picked.unsqueeze(0), everything)))
        mine = float(squared(products, row.unsqueeze(0), everything))
        assert mine <= sorted(errors)[1] * (1 + 1e-6)


def test_rows_have_the_products_they_are_made_of(modules):
    rows = torch.randn(5, 3, generator=generator(0, "rows")).double()
    found = modules["bank_ways"].rows_of(rows @ rows.T).double()
    torch.testing.assert_close(found @ found.T, rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_the_error_of_a_random_choice_is_the_mean_over_all_choices(modules):
    found_by, rows = modules["bank_errors"], torch.randn(6, 4, generator=generator(0, "rows")).double()
    whole = torch.full((6,), 1 / 6, dtype=torch.float64)
    errors = []
    for some in itertools.combinations(range(6), 2):
        own = torch.zeros(6, dtype=torch.float64)
        own[list(some)] = 1 / 2
        errors.append(float((own @ rows - whole @ rows).square().sum()))
        found = found_by.squared(rows @ rows.T, own.unsqueeze(0), whole)
        assert float(found) == pytest.approx(errors[-1])
    assert found_by.of_random(rows @ rows.T, 2, 6) == pytest.approx(sum(errors) / len(errors))


def test_a_bank_says_what_of_an_error_cancels_over_steps(bank, modules):
    """Compared with the gradients themselves: a square root of their products."""
    ways, measures = modules["bank_ways"], modules["bank_errors"]
    pool, draws = ways.Pool(bank, 2), 20
    found = measures.over_steps(pool, 6, 3, draws)["ways"]
    assert tuple(found) == measures.REPEATED
    plain = pool.products["plain"]["all"]
    values, vectors = torch.linalg.eigh(plain)
    gradients = vectors * values.clamp(min=0).sqrt()
    lengths, unit = gradients.square().sum(1), measures.of_random(plain, 3, POOL)
    for way in ("stratified", "last_layer columns; matching", FED_BACK):
        own = pool.weights(ways.WAYS[way], "none kept", 6, 3, draws)
        apart = own @ gradients - gradients.mean(0)
        tens = torch.stack([apart[:10].mean(0), apart[10:].mean(0)])
        assert found[way]["one"]["mean"] == pytest.approx(float(apart.square().sum(1).mean()) / unit, rel=1e-6)
        assert found[way]["ten"]["mean"] == pytest.approx(float(tens.square().sum(1).mean()) / unit, rel=1e-6)
        assert found[way]["length"] == pytest.approx(float((own @ lengths).mean() / lengths.mean()), rel=1e-6)


def test_feedback_changes_what_is_picked_and_not_how_many(bank, modules):
    ways = modules["bank_ways"]
    pool = ways.Pool(bank, 2)
    alone, fed_back = (pool.weights(ways.WAYS[of], "none kept", 8, 3, 12) for of in (ALONE, FED_BACK))
    assert not torch.equal(alone, fed_back)
    assert torch.equal(alone.sum(1), fed_back.sum(1))


def test_the_noise_scale_is_that_of_the_gradients(modules):
    """In units of examples: spread over squared mean; the interval covers the truth of what they were drawn from."""
    noise, covered = modules["bank_errors"].noise, 0
    for trial in range(20):
        draw = generator(trial, "noise")
        sources = torch.arange(80) % 4
        centres = torch.zeros(4, 50, dtype=torch.float64)
        centres[:, 0], centres[torch.arange(4), torch.arange(1, 5)] = 2, 1  # mean square 4.25, spread 0.75 between
        rows = centres[sources] + torch.randn(80, 50, generator=draw).double() * 0.4  # 8 within
        found = noise(rows @ rows.T, sources)
        covered += abs(found["within"]["mean"] - 8 / 4.25) < found["within"]["interval"]
        assert found["total"]["mean"] == pytest.approx(8.75 / 4.25, rel=0.2)
    assert covered >= 16
    assert found["cosine_within"] > found["cosine"] > 0


def test_sketches_of_the_same_state_have_not_aged(bank, modules):
    aged, pool = modules["bank_errors"].aged, modules["bank_ways"].Pool(bank, 2)
    found = {age: aged(pool, pool.tap_of(bank / f"step-{2 - age}"), ((6, 3),), 4) for age in (0, 1, 2)}
    assert found[0]["probe"] == found[0]["losses"] == 1
    assert found[2]["probe"] < 1
    assert set(found[0]["error"]) == {"matching, 3 of 6", "facility, 3 of 6"}


def test_distances_and_ranks(modules):
    rows = torch.tensor([[0.0, 0], [3, 4], [0, 1]])
    pairs = torch.triu_indices(3, 3, 1)
    assert modules["bank_errors"].distances(rows @ rows.T, pairs).tolist() == pytest.approx([5, 1, 18**0.5])
    one = torch.tensor([1.0, 2, 3, 4])
    assert modules["bank_errors"].correlation(one, one.exp()) == pytest.approx(1)
    assert modules["bank_errors"].correlation(one, -one) == pytest.approx(-1)


def test_a_missing_reader_is_named(modules, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        modules["gradient_bank"].fetch(tmp_path / "model")
