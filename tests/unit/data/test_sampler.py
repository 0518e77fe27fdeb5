from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.data.examples import Examples
from colm_scale.data.sampler import CandidateSampler
from colm_scale.errors import UserError
from colm_scale.randomness import generator


def examples_of(size: int, dropped: int = 0) -> Examples:
    """``size`` examples whose ids, sources and lengths tell their index."""
    lengths = torch.arange(size) % 5 + 2
    return Examples(
        tokens=torch.zeros(int(lengths.sum()), dtype=torch.int32),
        labelled=torch.ones(int(lengths.sum()), dtype=torch.bool),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        ids=torch.arange(size) * 10 + 7,
        sources=torch.arange(size) % 3,
        protected=torch.arange(size) % 4 == 1,
        source_names=("a", "b", "c"),
        dropped={"a": dropped} if dropped else {},
        cut={},
    )


def stream(size: int, count: int, seed: int, steps: int) -> list[list[int]]:
    """By brute force: all epochs' permutations in a row, cut into steps."""
    permutations = [
        torch.randperm(size, generator=generator(seed, "shuffle", epoch)) for epoch in range(steps * count // size + 1)
    ]
    whole = torch.cat(permutations).tolist()
    return [whole[step * count : (step + 1) * count] for step in range(steps)]


@given(size=st.integers(1, 12), data=st.data(), seed=st.integers(0, 3))
def test_steps_cut_an_endless_stream_of_permutations(size, data, seed):
    count = data.draw(st.integers(1, size))
    sampler = CandidateSampler(examples_of(size), count, seed)
    assert [sampler(step).indices.tolist() for step in range(1, 15)] == stream(size, count, seed, 14)


def test_a_step_is_a_function_of_its_number_alone():
    straight = CandidateSampler(examples_of(10), 4, 0)
    expected = {step: straight(step).indices.tolist() for step in range(1, 31)}
    jumping = CandidateSampler(examples_of(10), 4, 0)
    for step in (30, 3, 4, 3, 17, 1, 18):
        assert jumping(step).indices.tolist() == expected[step]


def test_every_example_is_a_candidate_once_per_epoch():
    sampler = CandidateSampler(examples_of(12), 4, 0)
    epochs = [torch.cat([sampler(step).indices for step in range(first, first + 3)]) for first in (1, 4, 7)]
    assert all(epoch.sort().values.tolist() == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_another_seed_is_another_order():
    first, second = (CandidateSampler(examples_of(50), 50, seed)(1).indices.tolist() for seed in (0, 1))
    assert first != second


def test_candidates_carry_what_belongs_to_them():
    examples = examples_of(20)
    candidates = CandidateSampler(examples, 15, 0)(2)
    assert candidates.step == 2
    assert len(candidates) == 15
    assert candidates.ids.tolist() == [10 * index + 7 for index in candidates.indices.tolist()]
    assert candidates.sources.tolist() == [index % 3 for index in candidates.indices.tolist()]
    assert candidates.lengths.tolist() == [index % 5 + 2 for index in candidates.indices.tolist()]
    assert candidates.protected.tolist() == [index % 4 == 1 for index in candidates.indices.tolist()]
    unmarked = dataclasses.replace(examples, protected=torch.zeros(20, dtype=torch.bool))
    assert CandidateSampler(unmarked, 15, 0)(2).protected is None


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    CandidateSampler(examples_of(20), 15, 0)(2)
    assert torch.equal(before, torch.get_rng_state())


def test_more_candidates_than_examples_are_refused():
    assert len(CandidateSampler(examples_of(9), 9, 0)(1)) == 9
    with pytest.raises(UserError, match=r"--selection\.candidates is 10, .* only 9 .*\(4 were dropped\): .*most 9"):
        CandidateSampler(examples_of(9, dropped=4), 10, 0)
