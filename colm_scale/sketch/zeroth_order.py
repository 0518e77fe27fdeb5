"""The paper's sketch: finite differences of the loss along random directions of the probe tensor (DESIGN 2.1, 2.2).

Every example sees the same directions, so its sketch is K numbers and all that ranks need to exchange. What the
directions look like is known from the seed, so whatever has d columns is rebuilt from the K numbers, block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import Batch, SketchPlan
from colm_scale.selection.mask import source_sums, top_columns
from colm_scale.selection.moments import Moments
from colm_scale.sketch.tap import Tap

BLOCK_COLUMNS = 16_384
"""Columns that are rebuilt at a time."""


def probes(seed: int, num_probes: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The directions ``z`` ``[K, d_out, r]``: standard normal, each keyed by the seed and its number, rank-equal."""
    drawn = [torch.randn(shape, generator=generator(seed, "probe", k)) for k in range(num_probes)]
    return torch.stack(drawn).to(device)


def directional_derivatives(tap: Tap, batch: Batch, directions: Tensor, perturbation: float) -> tuple[Tensor, Tensor]:
    """Two-point estimates of how each example's loss changes along each direction.

    Args:
        batch: ``B`` examples.
        directions: ``[K, d_out, r]``.
        perturbation: The paper's eps.

    Returns:
        losses ``[B]`` (mean over the branches) and coefficients ``[B, K]``,
        ``c_ik = (l_i(+eps z_k) - l_i(-eps z_k)) / (2 eps)``, both float32.
    """
    signed = torch.stack([directions, -directions], dim=1).flatten(0, 1) * perturbation  # + - + - ...
    losses = tap.branched_losses(batch, signed)
    plus, minus = losses[0::2], losses[1::2]
    return losses.mean(0), ((plus - minus) / (2 * perturbation)).T


def rows_from_coefficients(
    coefficients: Tensor, valid: Tensor, directions: Tensor, moments: Moments, plan: SketchPlan, columns: int
) -> Tensor:
    """The candidate matrix of the zeroth-order sketch, a pure function of the gathered coefficients.

    With one probe all rows are multiples of one direction, and the moments are two scalars: the row is the single
    number f(c_i) of DESIGN 2.2 and ``moments`` has length 1. With more, row i holds its source's ``columns`` columns of
    the normalised ``g_i = mean_k c_ik z_k``.

    Args:
        coefficients: ``[s, K]`` finite.
        valid: ``[s]`` bool; a row that is not valid is zero and has no say in the choice of columns.
        directions: ``[K, d_out, r]``.
        moments: Of length 1 for K = 1, else d.
        plan: Names the ranked source of each row.

    Returns:
        ``[s, 1]`` for K = 1, else ``[s, h]``, float32.
    """
    if coefficients.shape[1] == 1:
        return moments.normalise(coefficients) * valid.unsqueeze(1)
    z = directions.flatten(1) / len(directions)
    groups = torch.where(valid, plan.groups.to(valid.device), -1)
    ranked = groups >= 0
    sums = []
    for start in range(0, z.shape[1], BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        u = moments.normalise(coefficients[ranked] @ z[:, block], block)
        sums.append(source_sums(u, groups[ranked], plan.num_groups, len(groups)))
    chosen = top_columns(torch.cat(sums, dim=1), columns)  # [G, h]
    rows = coefficients.new_zeros(len(coefficients), chosen.shape[1])
    for group, of_source in enumerate(chosen):
        rows[groups == group] = moments.normalise(coefficients[groups == group] @ z[:, of_source], of_source)
    return rows


def learn_from_coefficients(moments: Moments, coefficients: Tensor, directions: Tensor) -> Moments:
    """The moments after a step whose picked (not kept) rows have these ``coefficients`` ``[p, K]``."""
    if coefficients.shape[1] == 1:
        return moments.learn(coefficients.mean(0), coefficients.square().mean(0))
    z = directions.flatten(1) / len(directions)
    mean, mean_square = torch.empty_like(z[0]), torch.empty_like(z[0])
    for start in range(0, z.shape[1], BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        rows = coefficients @ z[:, block]
        mean[block], mean_square[block] = rows.mean(0), rows.square().mean(0)
    return moments.learn(mean, mean_square)
