"""What the follower remembers, on one rank; the whole of it on several is in tests/distributed/test_follow.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.families import base_model, batch_of, with_adapters

from colm_scale.config import DataConfig, RunConfig, SelectionConfig, SourcesConfig
from colm_scale.distributed.follow import DIMENSIONS, Follower, make_follower
from colm_scale.distributed.group import connect
from colm_scale.errors import UserError
from colm_scale.modeling.embedding import mean_states
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import find_probe
from colm_scale.randomness import generator
from colm_scale.records import Candidates, long_tensor
from colm_scale.reporting.facts import drift_line
from colm_scale.sketch.tap import Tap

CONFIG = RunConfig(data=DataConfig(train=["a.jsonl"], sources="b.jsonl"), sources=SourcesConfig(refresh_every=2))
LENGTHS = [9, 5, 7]


@pytest.fixture
def parts() -> SimpleNamespace:
    base = base_model("llama")
    probe = find_probe(base)
    module = ExampleLoss(with_adapters(base))
    sizes = long_tensor([30, 20, 10])
    kept = torch.tensor([False, False, True])
    follower = Follower(CONFIG, module, ("a", "b", "c"), sizes, kept, connect())
    return SimpleNamespace(module=module, tap=Tap(module, probe), follower=follower)


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
    parts.follower.relabelled(candidates(0, 1, 2, 0))  # the last is in no forward
    with parts.follower.looking():
        parts.tap.bare_losses(batch)
    parts.tap.bare_losses(batch_of([6, 6, 6]))  # nobody looks
    parts.follower.remember(candidates(0, 1, 2, 0))
    saved = parts.follower.state()
    assert saved["ids"].tolist() == [100, 101, 102]
    assert saved["sources"].tolist() == [0, 1, 2]
    expected = mean_states(batch, hidden) @ parts.follower._projection
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
        parts.follower.relabelled(candidates(0, 1, 2))
        with parts.follower.looking():
            for name in passes:
                forwards[name]()
        parts.follower.remember(candidates(0, 1, 2))
        found.append(parts.follower.state()["states"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


def test_a_refresh_moves_examples_sizes_and_kept_sources(parts):
    """Of two groups of states, some examples of the one had the other's source."""
    follower = parts.follower
    sources = [0] * 6 + [1] * 5 + [0]
    follower.relabelled(candidates(*sources))
    groups = torch.tensor([0.0] * 6 + [9.0] * 6).unsqueeze(1)
    groups = groups + 0.1 * torch.randn(12, DIMENSIONS, generator=generator(0, "test"))
    follower._local = torch.cat([groups, torch.ones(12, 1)], dim=1)
    follower.remember(candidates(*sources))
    assert follower.refresh(1) is None
    drift = follower.refresh(2)
    assert (drift.examples, drift.moved, drift.new) == (12, 1, [])
    assert drift.sizes == {"a": 29, "b": 21, "c": 10}
    assert follower.relabelled(candidates(*sources)).sources.tolist() == [0] * 6 + [1] * 6
    assert "1 of 12 examples seen have moved" in drift_line(drift)
    assert len(follower.state()["ids"]) == 0, "what came before counts no more"


def test_nothing_is_known_where_nothing_was_seen(parts):
    drift = parts.follower.refresh(2)
    assert (drift.examples, drift.moved, drift.kept, drift.no_longer_kept) == (0, 0, [], [])


def test_sources_are_followed_only_where_that_is_asked_for(parts):
    given = parts.module, ("a",), long_tensor([1]), torch.tensor([False]), connect()
    assert make_follower(CONFIG, *given) is not None
    assert make_follower(RunConfig(), *given) is None


def test_only_sources_that_were_found_are_clustered_again(parts):
    config = RunConfig(sources=SourcesConfig(refresh_every=2))
    assert make_follower(config, parts.module, ("a",), long_tensor([1]), torch.tensor([False]), connect()) is None


def test_names_of_kept_sources_are_not_chosen_again():
    with pytest.raises(UserError, match=r"--sources\.refresh_every 5 without --data\.sources .* names them"):
        RunConfig(sources=SourcesConfig(refresh_every=5), selection=SelectionConfig(kept_sources=["a"]))
    RunConfig(sources=SourcesConfig(refresh_every=5), selection=SelectionConfig(kept_sources=0.5))
    RunConfig(data=CONFIG.data, sources=CONFIG.sources, selection=SelectionConfig(kept_sources=["a"]))
