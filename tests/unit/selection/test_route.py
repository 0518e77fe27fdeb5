from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.selection.route import deal, form_micro_batches, route, route_evenly

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def lognormal(n: int, trial: int = 0) -> torch.Tensor:
    drawn = torch.randn(n, generator=generator(trial, "test lengths"))
    return (drawn * 0.6 + 5).exp().clamp(8, 2048).long()


def cost(members, lengths) -> int:
    return len(members) * max((int(lengths[position]) for position in members), default=0)


def fewest(lengths: list[int], budget: int) -> int:
    """Dynamic programming over all ways to cut the sorted lengths into runs."""
    ordered = sorted(lengths, reverse=True)
    best = [0] + [len(ordered)] * len(ordered)
    for end in range(1, len(ordered) + 1):
        for start in range(end):
            if end - start == 1 or (end - start) * ordered[start] <= budget:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


def test_micro_batches_by_hand():
    lengths = long_tensor([10, 30, 10, 20, 10, 90, 10, 20])
    # Longest first: 5, 1, 3, 7, 0, 2, 4, 6. 90 exceeds the budget and stands alone. Filling up to 60 gives costs
    # 90, 60, 60, 20; the same number at a limit of 40 gives 90, 30, 40, 40.
    assert form_micro_batches(lengths, torch.arange(8), 60) == ((5,), (1,), (3, 7), (0, 2, 4, 6))


def test_only_the_given_positions_are_grouped_and_equal_lengths_keep_their_order():
    lengths = long_tensor([7, 7, 7, 7, 7])
    assert form_micro_batches(lengths, long_tensor([3, 0, 4]), 14) == ((3, 0), (4,))
    assert form_micro_batches(lengths, long_tensor([]), 14) == ()


def test_equal_examples_are_spread_so_that_none_is_left_over():
    micro_batches = form_micro_batches(torch.full((10,), 8), torch.arange(10), 3 * 8)
    assert [len(members) for members in micro_batches] == [3, 3, 2, 2]


@given(LENGTHS, st.integers(1, 150))
def test_micro_batches_hold_every_position_once_within_the_budget(lengths, budget):
    micro_batches = form_micro_batches(long_tensor(lengths), torch.arange(len(lengths)), budget)
    assert sorted(chain(*micro_batches)) == list(range(len(lengths)))
    assert all(len(members) == 1 or cost(members, lengths) <= budget for members in micro_batches)
    assert len(micro_batches) == fewest(lengths, budget)
    ordered = [lengths[position] for position in chain(*micro_batches)]
    assert ordered == sorted(ordered, reverse=True)


def test_the_last_micro_batch_is_no_straggler():
    for trial in range(20):
        lengths = lognormal(100, trial)
        costs = [cost(members, lengths) for members in form_micro_batches(lengths, torch.arange(100), 2048)]
        # Without balancing the last is filled by what happens to be left, anything from one short example up.
        assert costs[-1] >= 0.4 * max(costs)


def test_deal_by_hand():
    lengths = long_tensor([50, 40, 30, 20, 10])
    micro_batches = [(0,), (1,), (2,), (3,), (4,)]
    # 50 | 40; 30 onto 40; 20 onto 50; 10 onto the lower of 70 and 70.
    assert deal(micro_batches, lengths, 2) == (((0,), (3,), (4,)), ((1,), (2,), ()))
    # 50 | 40 | 30; 20 onto 30, which makes 50; 10 onto 40.
    assert deal(micro_batches, lengths, 3) == (((0,), ()), ((1,), (4,)), ((2,), (3,)))
    assert deal(micro_batches[:1], lengths, 3) == (((0,),), ((),), ((),))
    assert deal([], lengths, 2) == ((), ())


def test_deal_never_exceeds_an_equal_share_however_cheap_the_rest():
    lengths = long_tensor([100, 1, 1, 1])
    assert deal([(0,), (1,), (2,), (3,)], lengths, 2) == (((0,), (3,)), ((1,), (2,)))


@given(LENGTHS, st.integers(1, 150), st.integers(1, 6))
def test_dealt_micro_batches_are_whole_and_equally_many(lengths, budget, ranks):
    lengths = long_tensor(lengths)
    micro_batches = form_micro_batches(lengths, torch.arange(len(lengths)), budget)
    shares = deal(micro_batches, lengths, ranks)
    assert len(shares) == ranks
    assert {len(share) for share in shares} == {-(-len(micro_batches) // ranks)}
    assert sorted(members for members in chain(*shares) if members) == sorted(micro_batches)
    for share in shares:  # empty ones last
        assert all(bool(left) >= bool(right) for left, right in pairwise(share))


def test_micro_batches_do_not_depend_on_the_number_of_ranks():
    lengths = lognormal(60)
    micro_batches = form_micro_batches(lengths, torch.arange(60), 1024)
    for ranks in (1, 2, 4):
        assert {members for members in chain(*deal(micro_batches, lengths, ranks)) if members} == set(micro_batches)


def test_route_by_hand():
    lengths = long_tensor([9, 50, 40, 30, 20, 10, 9])
    routed = route(lengths, long_tensor([5, 4, 3, 2, 1]), 2, 60)
    # 50 | 40; 30 onto 40; 20 onto 50; 10 onto rank 0 (both have 70). Rank 1's 40 and 30 do not fit together, so both
    # ranks run two.
    assert routed.micro_batches == (((1,), (4, 5)), ((2,), (3,)))
    assert routed.tokens == (80, 70)
    assert routed.padded_tokens == (90, 70)
    assert routed.imbalance == pytest.approx(80 / 75)


def test_a_rank_that_needs_fewer_micro_batches_forms_smaller_ones():
    # Rank 0 gets the 60, rank 1 the six 10s; budget 60 would let rank 1 run one, rank 0 needs two for 60 and 8.
    lengths = long_tensor([60, 10, 10, 10, 10, 10, 10, 8])
    routed = route(lengths, torch.arange(8), 2, 60)
    assert routed.micro_batches == (((0,), (7,)), ((1, 2, 3), (4, 5, 6)))


def test_only_a_rank_with_too_few_examples_runs_empty_micro_batches():
    lengths = long_tensor([100, 40, 30, 30])
    routed = route(lengths, torch.arange(4), 2, 50)
    assert routed.micro_batches == (((0,), (), ()), ((1,), (2,), (3,)))
    routed = route(lengths, long_tensor([2]), 3, 50)
    assert routed.micro_batches == (((2,),), ((),), ((),))
    assert routed.tokens == (30, 0, 0)
    assert routed.padded_tokens == (30, 0, 0)


@given(LENGTHS, st.integers(1, 150), st.integers(1, 6))
def test_every_candidate_is_routed_once_within_the_budget(lengths, budget, ranks):
    tensor = long_tensor(lengths)
    routed = route(tensor, torch.arange(len(lengths)), ranks, budget)
    assert sorted(chain(*chain(*routed.micro_batches))) == list(range(len(lengths)))
    dealt = [list(chain(*share)) for share in routed.micro_batches]
    (count,) = {len(share) for share in routed.micro_batches}
    assert count == max(fewest([lengths[p] for p in positions], budget) for positions in dealt)
    for share, positions in zip(routed.micro_batches, dealt):
        assert all(len(members) <= 1 or cost(members, lengths) <= budget for members in share)
        assert sum(not members for members in share) == max(0, count - len(positions))
    assert routed.tokens == tuple(sum(lengths[p] for p in positions) for positions in dealt)
    assert routed.padded_tokens == tuple(sum(cost(m, lengths) for m in share) for share in routed.micro_batches)
    # Longest first ends within one example of the least loaded.
    assert max(routed.tokens) - min(routed.tokens) <= max(lengths)


@pytest.mark.parametrize("trial", range(5))
def test_eight_ranks_are_balanced_within_one_percent(trial):
    lengths = lognormal(512, trial)
    positions = torch.randperm(512, generator=generator(trial, "test picks"))[:256]
    routed = route(lengths, positions, 8, 4096)
    assert routed.imbalance < 1.01
    round_robin = [int(lengths[positions[rank::8]].sum()) for rank in range(8)]
    assert max(round_robin) / (sum(round_robin) / 8) > routed.imbalance + 0.02


def test_the_order_of_positions_matters_only_between_equal_lengths():
    lengths = torch.randperm(50, generator=generator(0, "test lengths")) + 1
    shuffled = torch.randperm(50, generator=generator(0, "test order"))
    assert route(lengths, shuffled, 4, 100) == route(lengths, torch.arange(50), 4, 100)
    assert form_micro_batches(lengths, shuffled, 100) == form_micro_batches(lengths, torch.arange(50), 100)


@given(LENGTHS, st.integers(1, 150))
def test_packed_micro_batches_cost_their_own_tokens(lengths, budget):
    micro_batches = form_micro_batches(long_tensor(lengths), torch.arange(len(lengths)), budget, packed=True)
    assert sorted(chain(*micro_batches)) == list(range(len(lengths)))
    costs = [sum(lengths[position] for position in members) for members in micro_batches]
    assert all(len(members) == 1 or spent <= budget for members, spent in zip(micro_batches, costs))
    assert len(micro_batches) <= len(form_micro_batches(long_tensor(lengths), torch.arange(len(lengths)), budget))


@given(LENGTHS, st.integers(1, 150), st.booleans())
def test_even_micro_batches_can_be_shared_out_evenly(lengths, budget, packed):
    few = form_micro_batches(long_tensor(lengths), torch.arange(len(lengths)), budget, packed=packed)
    even = form_micro_batches(long_tensor(lengths), torch.arange(len(lengths)), budget, packed=packed, even=True)
    assert sorted(chain(*even)) == sorted(chain(*few))
    assert len(few) <= len(even) < 2 * len(few)
    if len(even) < len(lengths):
        assert len(even) % 8 == 0 or len(even) in (1, 2, 4)


def test_packed_routes_have_no_padding():
    lengths = lognormal(64)
    routed = route(lengths, torch.arange(64), 4, 1024, packed=True)
    assert routed.padded_tokens == routed.tokens
    assert sum(routed.tokens) == int(lengths.sum())


@pytest.mark.parametrize(("ranks", "examples"), [(2, 64), (4, 64), (8, 128)])
def test_ranks_get_equally_many_tokens(ranks, examples):
    for trial in range(20):
        lengths = lognormal(examples, trial)
        for packed in (False, True):
            assert route(lengths, torch.arange(examples), ranks, 2048, packed=packed).imbalance < 1.01
        micro_batches = form_micro_batches(lengths, torch.arange(examples), 2048, packed=True, even=True)
        shares = deal(micro_batches, lengths, ranks, packed=True)
        loads = [sum(int(lengths[position]) for members in share for position in members) for share in shares]
        assert max(loads) * ranks < 1.01 * sum(loads)


def test_examples_stay_where_their_inputs_are_held_and_the_others_even_it_out():
    lengths, at = lognormal(64), torch.arange(64) % 3 - 1  # kept nowhere, on rank 0, on rank 1
    routed = route(lengths, torch.arange(64), 2, 512, packed=True, held_on=at)
    assert sorted(chain(*chain(*routed.micro_batches))) == list(range(64))
    for rank, share in enumerate(routed.micro_batches):
        assert {int(at[position]) for members in share[: routed.reused] for position in members} == {rank}
        assert {int(at[position]) for members in share[routed.reused :] for position in members} == {-1}
    assert len({len(share) for share in routed.micro_batches}) == 1
    assert routed.imbalance < 1.01
    assert routed.work[0] < routed.tokens[0]


def test_where_all_that_is_picked_is_on_one_rank_the_imbalance_shows_it():
    lengths = lognormal(8)
    routed = route(lengths, torch.arange(8), 2, 4096, packed=True, held_on=torch.zeros(8, dtype=torch.int64))
    assert routed.imbalance == 2
    assert routed.micro_batches[1] == ((),)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_as_many_micro_batches_as_are_asked_for(packed, count):
    """Fewer and more than the budget demands, and more than there are examples; every example is in one of them."""
    lengths = long_tensor([9, 3, 30, 4, 12, 7, 7, 1])
    chosen = long_tensor([0, 2, 3, 4, 5, 7])
    routed = route_evenly(lengths, chosen, 2, count, packed=packed)
    assert [len(share) for share in routed.micro_batches] == [count, count]
    trained = [position for share in routed.micro_batches for micro_batch in share for position in micro_batch]
    assert sorted(trained) == chosen.tolist()
    busiest = max(sum(map(bool, share)) for share in routed.micro_batches)
    assert busiest == min(count, max(sum(map(len, share)) for share in routed.micro_batches))
