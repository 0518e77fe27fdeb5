"""Tests against chance: exact tail probabilities, and their correction for multiple comparisons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def distribution(chances: Floats) -> Floats:
    """Compute ``[m, E + 1]`` probabilities of 0..E successes in E independent trials with ``[m, E]`` ``chances``.

    This is the Poisson binomial distribution, by convolution with one trial after the other.
    """
    found = np.zeros((len(chances), chances.shape[1] + 1))
    found[:, 0] = 1
    for chance in chances.T[:, :, np.newaxis]:
        found[:, 1:] = found[:, 1:] * (1 - chance) + found[:, :-1] * chance
        found[:, :1] *= 1 - chance
    return found


def two_sided(distributions: Floats, counts: NDArray[np.int64]) -> Floats:
    """Compute ``[m]`` p-values of ``[m]`` ``counts``: twice the smaller tail from the count on, at most 1."""
    own = np.arange(distributions.shape[1]) - counts[:, np.newaxis]
    tails = (np.where(own >= 0, distributions, 0).sum(1), np.where(own <= 0, distributions, 0).sum(1))
    found: Floats = np.clip(2 * np.minimum(*tails), 0, 1)
    return found


def most_extreme(distributions: Floats) -> Floats:
    """Compute ``[m]`` smallest values of `two_sided` over all possible counts."""
    rows, possible = np.arange(len(distributions)), distributions > 0
    fewest, most = possible.argmax(1), distributions.shape[1] - 1 - possible[:, ::-1].argmax(1)
    found: Floats = np.clip(2 * np.minimum(distributions[rows, fewest], distributions[rows, most]), 0, 1)
    return found


def false_discovery(p_values: Floats) -> Floats:
    """Adjust ``[m]`` p-values to control the false discovery rate (Benjamini and Hochberg, 1995)."""
    descending = p_values.argsort()[::-1]
    ranks = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum.accumulate(p_values[descending] * len(p_values) / ranks)
    return np.clip(adjusted, 0, 1)[descending.argsort()]


def family_wise(p_values: Floats) -> Floats:
    """Adjust ``[m]`` p-values to control the family-wise error rate (Holm, 1979)."""
    ascending = p_values.argsort()
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.maximum.accumulate(p_values[ascending] * factors)
    return np.clip(adjusted, 0, 1)[ascending.argsort()]
