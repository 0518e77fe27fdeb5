from __future__ import annotations

import torch

from colm_scale.randomness import generator
from colm_scale.selection.ranking.exact import whole_numbers


def test_sums_are_exact_in_any_order_and_near_the_values():
    values = torch.randn(500, 3, generator=generator(0, "values"), dtype=torch.float64) * 1e-9
    whole = whole_numbers(values)
    order = torch.randperm(500, generator=generator(0, "order"))
    assert torch.equal(whole, whole.round())
    assert whole.cumsum(0)[-1].tolist() == whole[order].cumsum(0)[-1].tolist() == whole.sum(0).tolist()
    assert (4 * whole.abs().sum(0) < 2**53).all()
    torch.testing.assert_close(whole / whole.abs().max(), values / values.abs().max(), rtol=0, atol=1e-11)
    assert values.cumsum(0)[-1].tolist() != values[order].cumsum(0)[-1].tolist(), "or this shows nothing"


def test_what_differs_by_rounding_is_equal():
    tenth = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert tenth[0] + tenth[1] != tenth[2]
    whole = whole_numbers(torch.stack([tenth[0] + tenth[1], tenth[2]]))
    assert whole[0] == whole[1]


def test_nothing_but_zeros_stays_zero():
    assert whole_numbers(torch.zeros(3, dtype=torch.float64)).tolist() == [0, 0, 0]
