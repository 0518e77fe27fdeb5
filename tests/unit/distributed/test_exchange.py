"""What ranks tell each other, with ranks that are threads: nothing of torch.distributed takes part."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm_scale.config import SelectionConfig
from colm_scale.distributed.exchange import gather_rows, share_selection
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, Quota, Selection, SketchPlan, long_tensor
from colm_scale.selection.select import select_coreset

UNTIMED = settings(deadline=None)  # a busy machine makes no failure


class Ranks:
    """Threads that hand each other tensors. ``damage`` changes what rank 1 receives of a broadcast."""

    def __init__(self, count: int, damage: Callable[[Tensor], None] = lambda tensor: None):
        self.slots: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=30)
        self.damage = damage

    def run(self, work: Callable[[Rank], object]) -> list[Future]:
        """What each rank's call of ``work`` came to."""
        with ThreadPoolExecutor(len(self.slots)) as pool:
            return [pool.submit(work, Rank(self, rank)) for rank in range(len(self.slots))]


class Rank:
    """The part of `Group` that the exchange uses."""

    device = torch.device("cpu")

    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.rank, self.world_size = ranks, rank, len(ranks.slots)

    def _everybodys(self, tensor: Tensor) -> list[Tensor]:
        self.ranks.slots[self.rank] = tensor
        self.ranks.barrier.wait()
        taken = list(self.ranks.slots)
        self.ranks.barrier.wait()
        return taken

    def all_gather(self, tensor: Tensor, label: str) -> Tensor:
        return torch.stack(self._everybodys(tensor))

    gathered = Group.gathered

    def broadcast(self, tensor: Tensor, label: str) -> Tensor:
        received = self._everybodys(tensor)[0].clone()
        if self.rank == 1:
            self.ranks.damage(received)
        return received


def drawn(n: int = 8, step: int = 3) -> Candidates:
    zeros = torch.zeros(n, dtype=torch.int64)
    return Candidates(step, torch.arange(n), 2**40 + 7 * torch.arange(n), zeros, zeros + 9)


@st.composite
def selections(draw) -> tuple[Selection, int]:
    """A selection of some of 8 candidates, and a budget."""
    budget = draw(st.integers(1, 8))
    positions = draw(st.permutations(range(8)))[: draw(st.integers(0, budget))]
    weight = st.floats(min_value=2.0**-126, max_value=2.0**100, width=32)
    weights = draw(st.lists(weight, min_size=len(positions), max_size=len(positions)))
    counts = st.integers(0, 2**40)
    kept = draw(st.integers(0, len(positions)))
    return (
        Selection(long_tensor(positions), torch.tensor(weights, dtype=torch.float32), kept, draw(counts), draw(counts)),
        budget,
    )


def shared(selection: Selection, budget: int, ranks: Ranks, candidates: tuple[Candidates, ...] | None = None):
    of_rank = candidates or (drawn(),) * len(ranks.slots)
    return ranks.run(lambda rank: share_selection(None if rank.rank else selection, budget, of_rank[rank.rank], rank))


@UNTIMED
@given(selections(), st.integers(2, 3))
def test_every_rank_gets_the_selection_of_the_first_to_the_last_bit(case, count):
    selection, budget = case
    for future in shared(selection, budget, Ranks(count)):
        received = future.result()
        assert received.positions.dtype == torch.int64
        assert received.weights.dtype == torch.float32
        assert torch.equal(received.positions, selection.positions)
        assert torch.equal(received.weights, selection.weights)
        for name in ("kept", "overflow", "invalid"):
            assert getattr(received, name) == getattr(selection, name)


def assert_rank_1_is_named(futures: list[Future]) -> None:
    for future in futures:  # on every rank, so that none trains on
        with pytest.raises(TrainingError, match="step 3: rank 1 does not agree with rank 0"):
            future.result()


@UNTIMED
@given(selections(), st.data())
def test_any_number_that_arrives_changed_is_found_out(case, data):
    selection, budget = case
    place = data.draw(st.integers(0, 5 + 2 * budget - 1))
    bit = data.draw(st.integers(0, 63))

    def damage(message: Tensor) -> None:
        message[place] ^= torch.tensor(1).bitwise_left_shift(bit)

    assert_rank_1_is_named(shared(selection, budget, Ranks(2, damage)))


@UNTIMED
@given(st.permutations(range(6)).filter(lambda order: order != list(range(6))))
def test_numbers_that_arrive_in_another_order_are_found_out(order):
    selection = Selection(long_tensor([4, 0, 7, 2, 1, 5]), torch.arange(1.0, 7.0))

    def damage(message: Tensor) -> None:
        message[5:11] = message[5:11][list(order)]

    assert_rank_1_is_named(shared(selection, 6, Ranks(2, damage)))


@settings(UNTIMED, max_examples=30)
@given(selections(), st.integers(0, 7), st.integers(-3, 3).filter(bool))
def test_a_rank_that_has_drawn_other_candidates_is_found_out(case, place, change):
    selection, budget = case
    other = drawn()
    ids = other.ids.clone()
    ids[place] += change
    assert_rank_1_is_named(shared(selection, budget, Ranks(2), (drawn(), dataclasses.replace(other, ids=ids))))


@UNTIMED
@given(st.integers(1, 5))
def test_a_rank_in_another_step_is_found_out(change):
    selection = Selection(long_tensor([1]), torch.ones(1))
    for future in shared(selection, 1, Ranks(2), (drawn(), drawn(step=3 + change))):
        with pytest.raises(TrainingError, match="rank 1 does not agree"):
            future.result()


# Rows


@st.composite
def plans(draw) -> SketchPlan:
    """Some of 12 candidates, in micro-batches of any size on any rank, in any order; empty ones among them."""
    positions = sorted(draw(st.sets(st.integers(0, 11), min_size=1)))
    ranks = draw(st.integers(1, 3))
    shares: list[list[list[int]]] = [[[], []] for _ in range(ranks)]
    for position in draw(st.permutations(positions)):
        draw(st.sampled_from(shares[draw(st.integers(0, ranks - 1))])).append(position)
    groups = torch.zeros(len(positions), dtype=torch.int64)
    return SketchPlan(long_tensor(positions), groups, 1, tuple(tuple(map(tuple, share)) for share in shares))


def gathered(plan: SketchPlan, of_candidate: Tensor) -> list[Tensor]:
    """What each rank has of the rows, of which it has computed those of its own micro-batches, in their order."""

    def work(rank: Rank) -> Tensor:
        mine = [position for micro_batch in plan.shares[rank.rank] for position in micro_batch]
        return gather_rows(of_candidate[mine], plan, rank, "gather")

    return [future.result() for future in Ranks(len(plan.shares)).run(work)]


@UNTIMED
@given(plans(), st.integers(1, 3), st.sampled_from([torch.float32, torch.int32, torch.float64]))
def test_every_rank_has_the_row_of_every_candidate_in_its_place(plan, columns, dtype):
    of_candidate = (1 + torch.arange(12 * columns)).view(12, columns).to(dtype)
    for rows in gathered(plan, of_candidate):
        assert rows.dtype == dtype
        assert torch.equal(rows, of_candidate[plan.positions])


@UNTIMED
@given(plans(), st.data())
def test_which_rank_sketches_what_changes_no_selection(plan, data):
    entries = data.draw(st.lists(st.integers(-2, 2), min_size=24, max_size=24))
    of_candidate = torch.tensor(entries, dtype=torch.float32).view(12, 2)
    sources = torch.randint(0, 2, (12,), generator=generator(0, "test sources"))
    there = torch.bincount(sources[plan.positions], minlength=2)
    quota = Quota(long_tensor([]), (there + 1) // 2)
    valid = of_candidate[plan.positions, 0] != 2

    def selected(rows: Tensor) -> Selection:
        matrix = CandidateMatrix(plan.positions, rows * valid.unsqueeze(1), valid, rows[:, 0])
        config = SelectionConfig(ranking="facility", weights="cluster")
        return select_coreset(matrix, sources, quota, config, partial(generator, 0, "none"))

    alone = selected(of_candidate[plan.positions])
    for rows in gathered(plan, of_candidate):
        assert torch.equal(selected(rows).positions, alone.positions)
        assert torch.equal(selected(rows).weights, alone.weights)
