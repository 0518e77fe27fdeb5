"""Both READMEs hold the tables that the committed rows make, and no row names a machine's path."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.families import base_model, batch_of, with_adapters

from colm_scale.config.command_line import parse
from colm_scale.config.selection import EstimatorName, Ranking, SelectionConfig
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.randomness import generator
from colm_scale.selection.ranking.line import medoids_on_line
from colm_scale.selection.ranking.rank import Ranked
from colm_scale.sketch.tap import Tap

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
RESULTS = sorted((BENCHMARKS / "results").glob("*.jsonl"))


@pytest.fixture(scope="module")
def modules():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    sys.path[:] = before


def test_tables_are_made_from_the_committed_rows(modules):
    tables = modules["tables"]
    of_project = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    for text in (of_project, README):
        assert tables.filled(text) == text, "run: python benchmarks/tables.py --write"
    shown = re.findall(r"<!-- table: (.+?) -->", of_project + README)
    assert sorted(shown) == sorted(tables.all_tables())


def test_every_script_and_every_file_of_rows_is_explained():
    for name in SCRIPTS:
        assert f"`{name}.py`" in README
    for path in RESULTS:
        assert f"`results/{path.name}`" in README


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_rows_are_whole_and_name_no_path(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    for row in rows:
        assert row["environment"]["versions"]["torch"]
        assert not re.search(r'"/\w', json.dumps(row))


# arms.py


def test_every_arm_that_can_be_run_has_options_that_exist(modules):
    arms = modules["arms"]
    for options in arms.ARMS.values():
        parse(list(options)).selection.check_own()
    shown = {arm for group in arms.GROUPS.values() for arm in group}
    assert {"proxy 2 blocks", "eps 0.01"} <= shown - arms.ARMS.keys()


def test_every_arm_has_the_sizes_that_are_asked_for(modules):
    arms = modules["arms"]
    named = ("paper", "full b", "full n", "full 2n", "stratified 2b")
    found = [parse(list(arms.sized(arm, 32, 8))).selection for arm in named]
    assert [(own.candidates, own.budget) for own in found] == [(32, 8), (8, 8), (32, 32), (64, 64), (64, 16)]
    assert parse(list(arms.sized("b 16 of n 64", 32, 8))).selection.budget == 16
    for arm, options in arms.ARMS.items():
        assert parse(list(arms.sized(arm, 64, 32))) == parse(list(options)), "the default's sizes change nothing"


# gradient_match.py


def test_nearness_is_that_of_the_gradients_themselves(modules):
    draw = generator(0, "test")
    gradients, own, whole = (torch.rand(shape, generator=draw).double() for shape in ((9, 4), (5, 9), (5, 9)))
    found = modules["gradient_match"].nearness(gradients @ gradients.T, own, whole)
    ours, theirs, mean = own @ gradients, whole @ gradients, gradients.mean(0)
    torch.testing.assert_close(found["error"], (ours - theirs).norm(dim=1) / theirs.norm(dim=1))
    torch.testing.assert_close(found["cosine"], torch.cosine_similarity(ours, theirs))
    torch.testing.assert_close(found["squared"], (ours - mean).square().sum(1) / mean.square().sum())


def test_bias_is_what_no_number_of_draws_averages_out(modules):
    """Weightings of random examples have none; of the first five examples it is all there is."""
    near, draw = modules["gradient_match"].nearness, generator(0, "test")
    gradients = torch.rand(50, 4, generator=draw).double()
    random, first = torch.zeros(2, 2000, 50, dtype=torch.float64)
    for row in random:
        row[torch.randperm(50, generator=draw)[:5]] = 0.2
    first[:, :5] = 0.2
    unbiased, biased = (near(gradients @ gradients.T, own, own) for own in (random, first))
    assert unbiased["bias"] < 0.02 * unbiased["squared"].mean()
    assert biased["bias"] == pytest.approx(float(biased["squared"][0]))


def test_every_estimator_is_tried_with_every_ranking_and_every_way_is_an_option(modules):
    bench = modules["gradient_match"]
    ways = {name: SelectionConfig(**options) for name, options in bench.ways().items()}
    for way in ways.values():
        way.check_own()
    assert {way.estimator for way in ways.values()} == {*get_args(EstimatorName), modules["arms"].LOSS}
    for estimator in bench.ESTIMATORS:
        tried = {way.ranking for name, way in ways.items() if name.startswith(f"{estimator};")}
        assert tried == set(bench.RANKINGS.values()) - ({bench.arms.own("top")} if estimator == "length" else set())
    assert set(get_args(Ranking)) < set(bench.RANKINGS.values())


def test_parameters_are_taken_in_groups_that_fit(modules, monkeypatch):
    monkeypatch.setattr(modules["gradient_match"], "MOST_NUMBERS", 100)
    groups = list(modules["gradient_match"].in_memory({"a": 4, "b": 6, "c": 1, "d": 30}, examples=10))
    assert groups == [["a", "b"], ["c"], ["d"]]


def test_what_is_remembered_is_what_the_tap_says(modules):
    base = base_model("llama")
    probe = find_probe(base)
    model = ExampleLoss(with_adapters(base))
    tap = Tap(model, probe)
    remembered = modules["gradient_match"].Remembered(tap)
    changes = torch.randn(2, tap.size, generator=generator(0, "test"))
    batches = [batch_of([9, 5, 7]), batch_of([9, 5]), batch_of([9, 5, 7])]  # the last two are known
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for batch in batches:
        losses, delta, a = remembered.factors(batch)
        expected, true_delta, true_a = tap.factors(batch)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(delta.transpose(1, 2) @ a, true_delta.transpose(1, 2) @ true_a)
        torch.testing.assert_close(remembered.branched_losses(batch, changes), tap.branched_losses(batch, changes))
        torch.testing.assert_close(remembered.bare_losses(batch), tap.bare_losses(batch))
    assert len(passes) == 3 + 3 * len(batches), "three of them are the remembered tap's"


# selection_speed.py


def test_greedy_is_timed_beside_one_that_picks_the_same(modules):
    row = modules["selection_speed"].measure_greedy("normal", 60, "cpu", rounds=3)
    assert row["same_picks"]["numpy"]
    assert row["objective_over_ours"]["numpy"] == 1
    assert row["selected"] == 30
    assert 0 < row["seconds"]["colm_scale"]["p20"] <= row["seconds"]["colm_scale"]["p80"]


def test_matching_is_timed_beside_facility_location(modules):
    row = modules["selection_speed"].measure_matching("normal", 60, rounds=3)
    assert row["cpu_seconds"].keys() == {"facility", "matching", "facility, from rows", "matching, from rows"}
    assert all(0 < ratio["p20"] <= ratio["p80"] for ratio in row["over_facility"].values())


# default_ranking.py


def test_an_arm_runs_at_the_rate_that_did_best_in_the_tuning_runs(modules, monkeypatch):
    ranking = modules["default_ranking"]
    losses = {"5e-3": (0.3, 0.2), "1e-2": (0.1, 0.3), "2e-2": (0.3, 0.3)}
    runs = {rate: {100: {"after": {"loss": one, "loss_by_source": other}}} for rate, (one, other) in losses.items()}
    monkeypatch.setattr(ranking, "found", lambda data, rate, arm: runs.get(rate, {}) if arm == "stratified" else {})
    assert ranking.best_rate("built-in", "stratified") == "1e-2"
    assert ranking.best_rate("built-in", "random") == "1e-2", "not tuned itself, it takes the rate of stratified"
    assert ranking.best_rate("built-in", "full n") is None
    del runs["2e-2"]
    assert ranking.best_rate("built-in", "random") is None


# batch_size.py


def test_a_step_of_another_size_has_its_own_rate_and_the_same_half_life_in_examples(modules):
    sizes, learning = modules["batch_size"], modules["learning"]
    assert sizes.rates(1e-2, 32) == [5e-3, 1e-2, 2e-2]
    assert sizes.rates(1e-2, 8) == [2.5e-3, 5e-3, 1e-2]
    setting = sizes.sized(learning.Setting.of("built-in", None, []), 8, 5e-3)
    config = parse(setting.command_line("stratified"))
    assert (config.selection.candidates, config.selection.budget, config.train.learning_rate) == (16, 8, 5e-3)
    assert config.train.betas[1] ** 4 == pytest.approx(0.999, abs=1e-6), "four such steps are one of 32 examples"


# worth_tables.py


def test_a_run_without_checkpointing_counts_if_it_made_as_many_steps(modules, monkeypatch):
    worth, tables = modules["worth_tables"], modules["learning_tables"]
    steps = {"stratified": 140, "random": 133, "full n": 60}
    runs = {arm: {0: {"steps": made}} for arm, made in steps.items()}
    monkeypatch.setattr(tables, "costs", lambda data: {"random": 1.03, "full n": 2.0})
    monkeypatch.setattr(tables, "of", lambda data, match: runs if data == "built-in" else {})
    assert worth.checkpointed("random") == runs["random"], "136 fit"
    assert worth.checkpointed("full n") == {}, "70 would fit"


# words.py


def test_words_are_of_length_one_and_forget_padding(modules):
    batch = batch_of([9, 5, 7])
    rows = modules["words"].words(None, batch)
    assert rows.shape == (3, 1 + modules["words"].PLACES)
    assert rows[:, 0].eq(0).all()
    torch.testing.assert_close(rows[:, 1:].norm(dim=1), torch.ones(3))
    own = batch.input_ids[1, :5].unique()
    assert (rows[1, 1:] > 0).sum() == len((own * 7919 % 512).unique())


def test_a_part_of_a_mixture_keeps_its_held_out_rows(modules, tmp_path):
    lines = [f'{{"number": {number}}}' for number in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    files = f"{tmp_path / 'train.jsonl'},held_out.jsonl"
    options = [modules["learning"].Setting.of(f"mine-20={files}", None, []).options for _ in range(2)]
    first, again = (Path(of[of.index("--data.train") + 1]).read_text().splitlines() for of in options)
    assert first == again
    assert len(set(first)) == 20
    assert set(first) < set(lines)
    assert options[0][options[0].index("--data.eval") + 1] == "held_out.jsonl"


def test_low_losses_are_drawn_half_as_often_and_count_twice(modules):
    losses = torch.tensor([0.1, 0.1, 0.1, 0.1, 3.0, 3.0])
    drawn, weighted, draws = torch.zeros(6), torch.zeros(6), 2000
    for trial in range(draws):
        ranked = Ranked(losses[:, None], losses, 2, 1.0, SelectionConfig(), generator(trial, "draw"), torch.zeros(1))
        picks, weights = modules["rankings"].infobatch(ranked)
        drawn[picks] += 1 / draws
        weighted[picks] += weights.float() / draws
    torch.testing.assert_close(drawn, torch.tensor([0.25] * 4 + [0.5] * 2), atol=0.04, rtol=0)
    torch.testing.assert_close(weighted, torch.full((6,), 1 / 3), atol=0.05, rtol=0)


def test_the_distance_on_the_line_is_that_to_the_nearest_pick(modules, monkeypatch):
    monkeypatch.setattr(modules["selection_speed"], "ON_LINE", 48)
    values = modules["scale"].draw_rows(48, 1).flatten()
    row = modules["selection_speed"].measure_line(4, rounds=1)
    picks = values[medoids_on_line(values, 12)[0]]
    apart = (values.unsqueeze(1) - picks).abs().amin(1)
    assert row["distance"] == pytest.approx(float(apart.double().sum()), rel=1e-6)  # of float32


# arms.py


def test_every_arm_that_is_not_removed_is_a_command_line(modules):
    arms = modules["arms"]
    removed = {arm for group in arms.GROUPS.values() for arm, options in group.items() if options is arms.REMOVED}
    assert removed.isdisjoint(arms.ARMS)
    for options in arms.ARMS.values():
        parse(options).selection.check_own()
