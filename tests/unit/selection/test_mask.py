from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm_scale.randomness import generator
from colm_scale.selection.mask import LARGEST, merge_proposals, source_sums, to_fixed, top_columns


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(0, "test rows"))


def brute_force(sums: list[int], h: int) -> list[int]:
    return sorted(sorted(range(len(sums)), key=lambda column: (-abs(sums[column]), column))[:h])


@pytest.mark.parametrize("count", [1, 2, 3, 128, 1000, 1024])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sum_of_the_largest_entries_fits_and_uses_the_range(count, sign):
    fixed = to_fixed(torch.full((count,), sign * 99.0), count)
    assert fixed.dtype == torch.int32
    total = fixed.long().sum().item()
    assert 2**29 <= abs(total) < 2**31
    assert fixed.sum(dtype=torch.int32).item() == total


def test_entries_are_rounded_to_the_unit_and_clamped():
    one = to_fixed(torch.tensor(1.0), 100).item()
    assert one == 2**20  # 100 * 16 * 2**20 < 2**31 < 100 * 16 * 2**21
    values = torch.tensor([0.0, -2.5, 0.6 / one, LARGEST, 17.0, -1e9])
    assert to_fixed(values, 100).tolist() == [0, -2.5 * one, 1, 16 * one, 16 * one, -16 * one]


def test_source_sums_by_hand():
    u = torch.tensor([[1.0, -2.0], [0.5, 0.25], [3.0, 0.0]])
    sums = source_sums(u, torch.tensor([2, 0, 2]), 3, count=3)
    assert (sums / to_fixed(torch.tensor(1.0), 3)).tolist() == [[0.5, 0.25], [0.0, 0.0], [4.0, -2.0]]


def test_source_sums_depend_neither_on_order_nor_on_how_rows_are_split():
    u, groups = normal(50, 30), torch.randint(0, 4, (50,), generator=generator(0, "test groups"))
    whole = source_sums(u, groups, 4, 50)
    order = torch.randperm(50, generator=generator(0, "test order"))
    assert torch.equal(source_sums(u[order], groups[order], 4, 50), whole)
    parts = [source_sums(u[part], groups[part], 4, 50) for part in order.split(7)]
    assert torch.equal(torch.stack(parts).sum(0, dtype=torch.int32), whole)
    # What the fixed point is for: float32 sums do depend on the order.
    assert not torch.equal(u[order].sum(0), u.sum(0))


def test_top_columns_by_hand():
    sums = torch.tensor([[3, -7, 7, 0, -3], [0, 0, 0, 0, 0]], dtype=torch.int32)
    assert top_columns(sums, 1).tolist() == [[1], [0]]
    assert top_columns(sums, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert top_columns(sums, 9).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_extreme_sums_are_ordered():
    sums = torch.tensor([[2**31 - 2, -(2**31 - 1), 1, 2**31 - 1]], dtype=torch.int32)
    assert top_columns(sums, 1).tolist() == [[1]]
    assert top_columns(sums, 2).tolist() == [[1, 3]]


MATRICES = st.integers(1, 12).flatmap(
    lambda d: st.lists(st.lists(st.integers(-4, 4), min_size=d, max_size=d), min_size=1, max_size=3)
)


@given(MATRICES, st.integers(1, 14))
def test_top_columns_equal_a_full_sort(matrix, h):
    found = top_columns(torch.tensor(matrix, dtype=torch.int32), h)
    assert found.tolist() == [brute_force(sums, h) for sums in matrix]


@given(MATRICES, st.integers(1, 14), st.integers(1, 5))
def test_merged_proposals_equal_the_whole(matrix, h, owners):
    """As the ranks do it: each owns as many columns, the last ones past the end hold zeros."""
    sums = torch.tensor(matrix, dtype=torch.int32)
    d = sums.shape[1]
    owned = -(-d // owners)
    padded = torch.zeros(len(sums), owners * owned, dtype=torch.int32)
    padded[:, :d] = sums
    values, columns = [], []
    for owner, part in enumerate(padded.split(owned, dim=1)):
        best = top_columns(part, h)
        values.append(part.gather(1, best))
        columns.append(best + owner * owned)
    merged = merge_proposals(torch.stack(values), torch.stack(columns), min(h, d))
    assert torch.equal(merged, top_columns(sums, h))
