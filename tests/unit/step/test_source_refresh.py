"""What the refresh remembers, on one rank; the whole of it on several is in tests/distributed/test_follow.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import base_model, batch_of, with_adapters

from colm_scale.config import DataConfig, RunConfig, SelectionConfig, SourcesConfig
from colm_scale.distributed.connect import connect
from colm_scale.errors import UserError
from colm_scale.modeling.embedding import mean_states
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.randomness import generator
from colm_scale.records import Candidates, long_tensor
from colm_scale.run.reports import drift_line
from colm_scale.sketch.tap import Tap
from colm_scale.step.source_refresh import DIMENSIONS, ReclusteredSources, SeenStates, SourceRefresh
from colm_scale.step.source_state import SourceState

CONFIG = RunConfig(data=DataConfig(train=["a.jsonl"], sources="b.jsonl"), sources=SourcesConfig(refresh_every=2))
LENGTHS = [9, 5, 7]

STATE = SourceState(torch.zeros(3, dtype=torch.bool), None, CONFIG.selection)


@pytest.fixture
def parts() -> SimpleNamespace:
    base = base_model("llama")
    probe = find_probe(base)
    module = ExampleLoss(with_adapters(base))
    sizes = long_tensor([30, 20, 10])
    kept = torch.tensor([False, False, True])
    seen = SeenStates(module, 0, connect())
    refresh = ReclusteredSources(seen, ("a", "b", "c"), sizes, kept, CONFIG.selection, refresh_every=2)
    return SimpleNamespace(module=module, tap=Tap(module, probe), refresh=refresh)


def candidates(*sources: int, step: int = 1) -> Candidates:
    count = len(sources)
    indices = torch.arange(count)
    return Candidates(step, indices, 100 + indices, long_tensor(sources), torch.full((count,), 5))


def test_what_is_remembered_is_the_mean_of_the_last_hidden_states(parts):
    batch = batch_of(LENGTHS)
    seen = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    output = parts.module.causal_model(**seen, output_hidden_states=True)
    hidden = output.hidden_states[-1].detach()
    assert torch.equal(mean_states(batch, hidden)[1], hidden[1, :5].mean(0))
    parts.refresh.relabelled(candidates(0, 1, 2, 0))  # the last is in no forward
    with parts.refresh.watching():
        parts.tap.bare_losses(batch)
    parts.tap.bare_losses(batch_of([6, 6, 6]))  # nobody looks
    parts.refresh.gather(candidates(0, 1, 2, 0))
    saved = parts.refresh.state()
    assert saved["ids"].tolist() == [100, 101, 102]
    assert saved["sources"].tolist() == [0, 1, 2]
    expected = mean_states(batch, hidden) @ parts.refresh._seen._projection
    torch.testing.assert_close(saved["states"], expected)


def test_branches_of_the_sketch_and_training_are_averaged(parts):
    batch = batch_of(LENGTHS)
    change = 1e-3 * torch.randn(1, parts.tap.size, generator=generator(0, "test"))
    forwards = {
        "bare": lambda: parts.tap.bare_losses(batch),
        "branched": lambda: parts.tap.branched_losses(batch, torch.cat([change, -change])),
    }
    found = []
    for passes in (("bare",), ("branched",), ("bare", "branched")):
        parts.refresh.relabelled(candidates(0, 1, 2))
        with parts.refresh.watching():
            for name in passes:
                forwards[name]()
        parts.refresh.gather(candidates(0, 1, 2))
        found.append(parts.refresh.state()["states"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


def test_a_refresh_moves_examples_sizes_and_kept_sources(parts):
    """Of two groups of states, some examples of the one had the other's source."""
    refresh = parts.refresh
    sources = [0] * 6 + [1] * 5 + [0]
    refresh.relabelled(candidates(*sources))
    groups = torch.tensor([0.0] * 6 + [9.0] * 6).unsqueeze(1)
    groups = groups + 0.1 * torch.randn(12, DIMENSIONS, generator=generator(0, "test"))
    refresh._seen._local = torch.cat([groups, torch.ones(12, 1)], dim=1)
    refresh.gather(candidates(*sources))
    assert refresh(1, STATE) is None
    drift = refresh(2, STATE)
    assert (drift.examples, drift.moved, drift.new) == (12, 1, [])
    assert drift.sizes == {"a": 29, "b": 21, "c": 10}
    assert refresh.relabelled(candidates(*sources)).sources.tolist() == [0] * 6 + [1] * 6
    assert "1 of 12 examples seen have moved" in drift_line(drift)
    assert len(refresh.state()["ids"]) == 0, "what came before counts no more"


def test_nothing_is_known_where_nothing_was_seen(parts):
    drift = parts.refresh(2, STATE)
    assert (drift.examples, drift.moved, drift.kept, drift.no_longer_kept) == (0, 0, [], [])


def test_kept_sources_and_shares_are_those_of_the_sizes_now(parts):
    state = SourceState(torch.tensor([True, False, False]), None, CONFIG.selection)
    parts.refresh(2, state)
    assert state.kept.tolist() == parts.refresh.kept.tolist() == [False, False, True]


def test_fixed_sources_stay_as_the_data_gives_them():
    fixed, given = SourceRefresh(), candidates(0, 1, 2)
    assert fixed.relabelled(given) is given
    assert fixed(2, STATE) is None
    assert fixed.state() == {}


def test_names_of_kept_sources_are_not_chosen_again():
    with pytest.raises(UserError, match=r"--sources\.refresh_every 5 without --data\.sources .* names them"):
        RunConfig(sources=SourcesConfig(refresh_every=5), selection=SelectionConfig(kept_sources=["a"]))
    RunConfig(sources=SourcesConfig(refresh_every=5), selection=SelectionConfig(kept_sources=0.5))
    RunConfig(data=CONFIG.data, sources=CONFIG.sources, selection=SelectionConfig(kept_sources=["a"]))


def test_of_an_example_seen_again_the_last_state_is_remembered_and_it_comes_last(parts):
    """In a step, and in a later one, as the epochs of small data overlap."""
    seen = parts.refresh._seen
    for ids, first in (([5, 6, 5, 7], 0.0), ([6, 8], 10.0)):
        count = len(ids)
        drawn = dataclasses.replace(candidates(*[0] * count), ids=long_tensor(ids), sources=torch.arange(count) % 3)
        seen.begin(count)
        states = (first + torch.arange(count)).unsqueeze(1).expand(count, DIMENSIONS)
        seen._local = torch.cat([2 * states, torch.full((count, 1), 2.0)], dim=1)  # each in two forwards
        seen.gather(drawn)
    state = parts.refresh.state()
    assert state["ids"].tolist() == [5, 7, 6, 8]
    assert state["sources"].tolist() == [2, 0, 0, 1]
    assert state["states"][:, 0].tolist() == [2.0, 3.0, 10.0, 11.0]
    again = SeenStates(parts.module, 0, connect())
    again.load(state)
    assert all(torch.equal(again.state()[name], state[name]) for name in ("ids", "sources", "states"))


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=5), max_size=4))
def test_sources_are_those_of_the_last_move(changes):
    refresh = ReclusteredSources.__new__(ReclusteredSources)
    refresh._moved, refresh._seen = torch.zeros(0, 2, dtype=torch.int64), SimpleNamespace(begin=lambda count: None)
    expected: dict[int, int] = {}
    drawn = dataclasses.replace(candidates(*[9] * 10), ids=torch.arange(10).flip(0))
    for moved in changes:
        refresh._move(long_tensor(moved).view(-1, 2))
        expected |= dict(moved)
        assert refresh.relabelled(drawn).sources.tolist() == [expected.get(id_, 9) for id_ in range(9, -1, -1)]
