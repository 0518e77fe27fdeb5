from __future__ import annotations

import numpy as np
import pytest
import torch

from colm_scale.randomness import generator
from colm_scale.selection.ranking.similarity import distances, similarities

METRICS = ["l1", "l2", "cosine"]


def normal(n: int, h: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, h, generator=generator(n, "test rows"), dtype=dtype)


def reference(rows: torch.Tensor, metric: str) -> np.ndarray:
    x = rows.double().numpy()
    difference = x[:, None] - x[None]
    if metric == "cosine":
        norms = np.linalg.norm(x, axis=1)
        return x @ x.T / np.outer(norms, norms)
    apart = np.abs(difference).sum(-1) if metric == "l1" else np.sqrt((difference**2).sum(-1))
    return apart.max() - apart


def test_distances_by_hand():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    assert distances(rows, "l1").tolist() == [[0, 7, 3], [7, 0, 4], [3, 4, 0]]
    assert distances(rows, "l2").tolist() == [[0, 5, 3], [5, 0, 4], [3, 4, 0]]
    assert similarities(rows, "l1").tolist() == [[7, 0, 4], [0, 7, 3], [4, 3, 7]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "h"), [(1, 1), (2, 1), (7, 33), (40, 300)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_similarities_equal_the_definition(metric, n, h, dtype, tolerance):
    rows = normal(n, h, dtype)
    found = similarities(rows, metric)
    assert found.dtype == dtype
    # Sums of h terms: the rounding of the type, relative to the largest.
    np.testing.assert_allclose(found.numpy(), reference(rows, metric), rtol=0, atol=tolerance * h**0.5 * 10)


@pytest.mark.parametrize("metric", METRICS)
def test_symmetric_to_the_last_bit_with_an_exact_diagonal(metric):
    found = similarities(normal(60, 77), metric)
    assert torch.equal(found, found.T)
    assert (found.diagonal() == (1.0 if metric == "cosine" else found.max())).all()


@pytest.mark.parametrize("metric", METRICS)
def test_permuting_the_rows_permutes_the_matrix_to_the_last_bit(metric):
    rows, order = normal(60, 77), torch.randperm(60, generator=generator(0, "test order"))
    assert torch.equal(similarities(rows[order], metric), similarities(rows, metric)[order][:, order])


def test_duplicates_are_as_similar_as_a_candidate_to_itself():
    rows = normal(5, 40)[[0, 1, 1, 2]]
    for metric in METRICS:
        found = similarities(rows, metric)
        assert found[1, 2] == found[1, 1]


def test_the_cosine_with_a_row_of_zeros_is_0():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0, -1, 0], [0, 0, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(similarities(rows, "cosine"), expected, rtol=0, atol=1e-6)  # float32 rounding


def test_the_cosine_does_not_depend_on_length():
    rows = normal(6, 9)
    scale = torch.tensor([1e-6, 1e-3, 1.0, 2.0, 1e3, 1e6]).unsqueeze(1)
    torch.testing.assert_close(similarities(rows * scale, "cosine"), similarities(rows, "cosine"), rtol=0, atol=1e-5)
