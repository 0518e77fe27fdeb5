"""Sums that come out the same in whatever order they are taken."""

from __future__ import annotations

import math

from torch import Tensor


def whole_numbers(values: Tensor) -> Tensor:
    """``values`` ``[n, ...]`` float64, in multiples of a power of two so small that sums of 4 n of them are exact.

    What is equal but for rounding is then equal, and what looks like a gain is one. The unit goes by the largest value.
    """
    _, exponent = math.frexp(float(values.abs().max()))
    return (values * 2.0 ** (50 - exponent - len(values).bit_length())).round_()
