"""The paper's sketch: how the loss changes along random directions of the probe tensor (DESIGN 2.1, 2.2).

By finite differences, as in the paper, or exactly, by forward-mode differentiation of all that follows the probe.
Every example sees the same directions, so its sketch is K numbers and all that ranks need to exchange. What the
directions look like is known from the seed, so whatever has d columns is rebuilt from the K numbers, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from colm_scale.data.batching import make_batch
from colm_scale.errors import UserError
from colm_scale.randomness import generator
from colm_scale.records import Batch, SketchPlan
from colm_scale.selection.mask import source_sums, top_columns
from colm_scale.selection.moments import Moments
from colm_scale.sketch.precision import without_flash_attention
from colm_scale.sketch.tap import Tap

BLOCK_COLUMNS = 16_384
"""Columns that are rebuilt at a time."""
_ROUNDING = 0.1
"""Largest relative deviation of an exact derivative from another way to it; in bfloat16 about 0.01."""


def probes(seed: int, num_probes: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The directions ``z`` ``[K, *shape]``: standard normal, each keyed by the seed and its number, rank-equal."""
    drawn = [torch.randn(shape, generator=generator(seed, "probe", k)) for k in range(num_probes)]
    return torch.stack(drawn).to(device)


def directional_derivatives(tap: Tap, batch: Batch, directions: Tensor, perturbation: float) -> tuple[Tensor, Tensor]:
    """Two-point estimates of how each example's loss changes along each direction.

    Args:
        batch: ``B`` examples.
        directions: ``[K, d]``.
        perturbation: The paper's eps.

    Returns:
        losses ``[B]`` (mean over the branches) and coefficients ``[B, K]``,
        ``c_ik = (l_i(+eps z_k) - l_i(-eps z_k)) / (2 eps)``, both float32.
    """
    signed = torch.stack([directions, -directions], dim=1).flatten(0, 1) * perturbation  # + - + - ...
    losses = tap.branched_losses(batch, signed)
    plus, minus = losses[0::2], losses[1::2]
    return losses.mean(0), ((plus - minus) / (2 * perturbation)).T


def exact_derivatives(tap: Tap, batch: Batch, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives ``<G_i, z_k>`` that `directional_derivatives` estimates, by forward-mode differentiation.

    A branch changes the probe tensor by zero, with ``z_k`` for its tangent; everything behind it carries the tangent
    along, with attention in plain operations, which have the rules for it.

    Args:
        batch: ``B`` examples.
        directions: ``[K, d]``.

    Returns:
        losses ``[B]`` and derivatives ``[B, K]``, both float32.

    Raises:
        NotImplementedError: A function of the model or its engine has no such rule.
    """

    def plain_attention(*_: object) -> None:
        tail.enter_context(sdpa_kernel(SDPBackend.MATH))

    with without_flash_attention(tap.model), dual_level(), ExitStack() as tail:
        tail.callback(tap.block.register_forward_pre_hook(plain_attention).remove)
        losses = tap.branched_losses(batch, make_dual(torch.zeros_like(directions), directions))
        losses, derivatives = unpack_dual(losses)
    return losses[0], derivatives.T


def check_exact_derivatives(tap: Tap) -> None:
    """Whether `exact_derivatives` are what they should be, on one short example.

    Raises:
        UserError: A function of the model or its engine has no rule for forward-mode differentiation, or loses the
            tangent on its way.
    """
    device, tokens = next(tap.model.parameters()).device, torch.arange(1, 8)
    marks = torch.ones_like(tokens, dtype=torch.bool)
    batch = make_batch([tokens], [marks], torch.arange(1), 0, device, packed=tap.model.packs)
    z = probes(0, 4, tap.shape, device)
    try:
        _, found = exact_derivatives(tap, batch, z)
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
    else:
        _, factors = tap.factors(batch)
        gradient = torch.cat([(delta.transpose(1, 2) @ a).flatten(1) for delta, a in factors], dim=1)
        expected = gradient @ z.T
        if (found - expected).norm() <= _ROUNDING * expected.norm():
            return
        reason = f"the derivative of a short example is {found[0, 0]:g} instead of {expected[0, 0]:g}"
    raise UserError(
        f"--selection.derivative exact: the model or its engine cannot be differentiated in forward mode ({reason}); "
        f"use --selection.derivative finite, or --selection.estimator last_layer, which is exact too"
    )


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
        directions: ``[K, d]``.
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
    c, of = coefficients[ranked], groups[ranked]
    moments = moments.fitted(c.abs().sum(1) * z.abs().max())
    sums = torch.zeros(plan.num_groups, z.shape[1], dtype=torch.int32, device=z.device)
    for some, block, u in _updates(c, z, moments):
        sums[:, block] += source_sums(u, of[some], plan.num_groups, len(groups))
    chosen = top_columns(sums, columns)  # [G, h]
    rows = coefficients.new_zeros(len(coefficients), chosen.shape[1])
    if moments.whole_rows:
        found = [u.gather(1, chosen[of[some]]) for some, _, u in _updates(c, z, moments)]
        rows[ranked] = torch.cat([rows[:0], *found])
        return rows
    for group, of_source in enumerate(chosen):
        rows[groups == group] = moments.normalise(coefficients[groups == group] @ z[:, of_source], of_source)
    return rows


def _updates(coefficients: Tensor, z: Tensor, moments: Moments) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ``(candidates, columns, u)``: a few columns of all candidates at a time, or all columns of a few candidates
    where the moments need whole rows."""
    count, d = len(coefficients), z.shape[1]
    if not moments.whole_rows:
        for start in range(0, d, BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            yield slice(None), block, moments.normalise(coefficients @ z[:, block], block)
        return
    step = max(1, count * BLOCK_COLUMNS // d)
    for start in range(0, count, step):
        some = slice(start, start + step)
        yield some, slice(None), moments.normalise(coefficients[some] @ z)


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
