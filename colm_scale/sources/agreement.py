"""How far clusters agree with sources that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from colm_scale.selection.quota import kept_sources


@dataclass(frozen=True, slots=True)
class Agreement:
    """What clusters have found of the true sources.

    Attributes:
        adjusted_rand: 1 if they are the same groups, about 0 if they have nothing to do with each other.
        recovered: For each small true source, the share of its rows that lies in clusters that the rule keeps.
        kept_share: The share of all rows that does: what `recovered` would be by chance.
    """

    adjusted_rand: float
    recovered: dict[str, float]
    kept_share: float


def agreement(names: Sequence[str], sources: np.ndarray, labels: np.ndarray) -> Agreement:
    """Compare.

    Args:
        names: Of the true sources.
        sources: ``[n]`` the true source of each row.
        labels: ``[n]`` its cluster.
    """
    from sklearn.metrics import adjusted_rand_score

    in_kept = small(labels)[labels]
    return Agreement(
        adjusted_rand=float(adjusted_rand_score(sources, labels)),
        recovered={
            names[source]: float(in_kept[sources == source].mean()) for source in small(sources).nonzero()[0].tolist()
        },
        kept_share=float(in_kept.mean()),
    )


def small(labels: np.ndarray) -> np.ndarray:
    """``[k]`` bool, which groups the small-source rule keeps, by ``[n]`` group of each row."""
    sizes = np.bincount(labels)
    return kept_sources(torch.from_numpy(sizes), [], None).numpy() & (sizes > 0)
