"""The paper's sketch: changes of the loss along random directions of the probe tensor (docs/method.md).

They are finite differences, as in the paper. All examples share the K directions, so ranks exchange only K numbers per
example. The directions follow from the seed, so everything with d columns is rebuilt from the K numbers, block by
block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import Batch, SketchPlan, on_device
from colm_scale.selection.mask import source_sums, top_columns
from colm_scale.selection.moments import Moments
from colm_scale.sketch.tap import Tap

PERTURBATION = 1e-3
"""Step of the finite difference, the paper's eps."""
BLOCK_COLUMNS = 16_384
"""Columns rebuilt at a time."""


def probes(seed: int, num_probes: int, size: int, device: torch.device) -> Tensor:
    """Draw the directions ``z`` ``[K, size]``: standard normal, keyed by seed and number, equal on every rank."""
    drawn = [torch.randn(size, generator=generator(seed, "probe", k)) for k in range(num_probes)]
    return torch.stack(drawn).to(device)


def directional_derivatives(tap: Tap, batch: Batch, directions: Tensor, perturbation: float) -> tuple[Tensor, Tensor]:
    """Two-point estimates of the directional derivatives of each example's loss.

    Args:
        batch: ``B`` examples.
        directions: ``[K, d]``.
        perturbation: Step of the difference, eps.

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
    number f(c_i), and ``moments`` has length 1. With more, row i holds its source's ``columns`` columns of
    the normalised ``g_i = mean_k c_ik z_k``.

    Args:
        coefficients: ``[s, K]`` finite.
        valid: ``[s]`` bool; other rows are zero and do not influence the choice of columns.
        directions: ``[K, d]``.
        moments: Averages of length 1 for K = 1, else d.
        plan: Gives the ranked source of each row.

    Returns:
        ``[s, 1]`` for K = 1, else ``[s, h]``, float32.
    """
    if coefficients.shape[1] == 1:
        return moments.normalise(coefficients) * valid.unsqueeze(1)
    z = directions / len(directions)
    device = valid.device
    of_ranked = (plan.groups >= 0).nonzero().flatten()  # found on the CPU: the device would make the host wait
    ranked, of = on_device(of_ranked, device), on_device(plan.groups[of_ranked], device)
    counted = valid[ranked].unsqueeze(1)
    c = torch.where(counted, coefficients[ranked], 0.0)
    moments = moments.fitted(c.abs().sum(1) * z.abs().max())
    sums = torch.zeros(plan.num_groups, z.shape[1], dtype=torch.int32, device=z.device)
    floor = moments.floor(_mean_squares(c, z))
    for some, block, u in _updates(c, z, moments, floor):
        sums[:, block] += source_sums(torch.where(counted[some], u, 0.0), of[some], plan.num_groups, len(valid))
    chosen = top_columns(sums, columns)  # [G, h]
    rows = coefficients.new_zeros(len(coefficients), chosen.shape[1])
    if moments.whole_rows:
        found = [u.gather(1, chosen[of[some]]) for some, _, u in _updates(c, z, moments, floor)]
        rows[ranked] = torch.cat([rows[:0], *found])
    else:
        for group, of_source in enumerate(chosen):
            mine = on_device((plan.groups[of_ranked] == group).nonzero().flatten(), device)
            rows[ranked[mine]] = moments.normalise(c[mine] @ z[:, of_source], of_source, floor[mine])
    return torch.where(valid.unsqueeze(1), rows, 0.0)


def _mean_squares(coefficients: Tensor, z: Tensor) -> Tensor:
    """``[s]`` mean squares of the rows ``coefficients @ z``, which are never held."""
    return ((coefficients @ (z @ z.T)) * coefficients).sum(1).clamp(min=0) / z.shape[1]


def _updates(
    coefficients: Tensor, z: Tensor, moments: Moments, floor: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ``(candidates, columns, u)``: a few columns of all candidates at a time, or all columns of a few candidates
    if the moments need whole rows."""
    count, d = len(coefficients), z.shape[1]
    if not moments.whole_rows:
        for start in range(0, d, BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            yield slice(None), block, moments.normalise(coefficients @ z[:, block], block, floor)
        return
    step = max(1, count * BLOCK_COLUMNS // d)
    for start in range(0, count, step):
        some = slice(start, start + step)
        yield some, slice(None), moments.normalise(coefficients[some] @ z, floor=floor[some])


def learn_from_coefficients(moments: Moments, coefficients: Tensor, directions: Tensor) -> Moments:
    """The moments after a step, from the ``coefficients`` ``[p, K]`` of its picked (not kept) rows."""
    if coefficients.shape[1] == 1:
        return moments.learn(coefficients.mean(0), coefficients.square().mean(0))
    z = directions / len(directions)
    mean, mean_square = torch.empty_like(z[0]), torch.empty_like(z[0])
    for start in range(0, z.shape[1], BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        rows = coefficients @ z[:, block]
        mean[block], mean_square[block] = rows.mean(0), rows.square().mean(0)
    return moments.learn(mean, mean_square)
