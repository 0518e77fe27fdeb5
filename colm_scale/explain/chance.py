"""What chance would have done: exact tail probabilities, and their correction for many comparisons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def distribution(chances: Floats) -> Floats:
    """``[m, E + 1]`` probabilities of 0..E successes in E independent trials of these ``chances`` ``[m, E]`` (the
    Poisson binomial distribution), by convolution of one trial after the other."""
    found = np.zeros((len(chances), chances.shape[1] + 1))
    found[:, 0] = 1
    for chance in chances.T[:, :, np.newaxis]:
        found[:, 1:] = found[:, 1:] * (1 - chance) + found[:, :-1] * chance
        found[:, :1] *= 1 - chance
    return found


def two_sided(distributions: Floats, counts: NDArray[np.int64]) -> Floats:
    """``[m]`` twice the smaller tail that begins at the ``counts`` ``[m]``, at most 1."""
    own = np.arange(distributions.shape[1]) - counts[:, np.newaxis]
    tails = (np.where(own >= 0, distributions, 0).sum(1), np.where(own <= 0, distributions, 0).sum(1))
    found: Floats = np.clip(2 * np.minimum(*tails), 0, 1)
    return found


def most_extreme(distributions: Floats) -> Floats:
    """``[m]`` the smallest that `two_sided` can come to with a count that can come about."""
    rows, possible = np.arange(len(distributions)), distributions > 0
    fewest, most = possible.argmax(1), distributions.shape[1] - 1 - possible[:, ::-1].argmax(1)
    found: Floats = np.clip(2 * np.minimum(distributions[rows, fewest], distributions[rows, most]), 0, 1)
    return found


def false_discovery(p_values: Floats) -> Floats:
    """``[m]`` adjusted so that a bound on them bounds the expected share of false ones (Benjamini, Hochberg, 1995)."""
    descending = p_values.argsort()[::-1]
    ranks = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum.accumulate(p_values[descending] * len(p_values) / ranks)
    return np.clip(adjusted, 0, 1)[descending.argsort()]


def family_wise(p_values: Floats) -> Floats:
    """``[m]`` adjusted so that a bound on them bounds the chance of any false one (Holm, 1979)."""
    ascending = p_values.argsort()
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.maximum.accumulate(p_values[ascending] * factors)
    return np.clip(adjusted, 0, 1)[ascending.argsort()]
