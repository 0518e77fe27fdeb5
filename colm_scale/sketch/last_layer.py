"""The exact per-example gradient of the probe tensor, a few columns of which leave the rank (docs/method.md, Gather).

The gradient of example i is ``G_i = delta_i.T @ a_i``. A rank holds its examples' gradients as these factors, or
multiplied out if that is smaller, and computes three things: the sum of the normalised rows per source, the rows at
given columns, and the sums that update the moments. Sums are in fixed point: integer addition does not depend on order,
so the results do not depend on which rank holds which example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.records import Batch, on_device
from colm_scale.selection.mask import power_of_two, to_fixed
from colm_scale.selection.moments import Moments
from colm_scale.sketch.tap import Tap

BLOCK_NUMBERS = 2**22
"""Largest temporary block of multiplied-out gradients ``[B, columns]``, in numbers."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of one micro-batch, as factors or multiplied out, whichever is smaller.

    Attributes:
        rows: ``[B]`` row of each example in the candidate matrix, on the CPU, like `groups` and `picked` below: they
            are known there, and to look for them on the device would make the host wait.
        shape: ``(d_out, r)`` of a gradient.
        parts: The factors, delta ``[B, T, d_out]`` and a ``[B, T, r]``; or the gradients ``[B, d_out, r]`` alone.
        largest: ``[B]`` size of each gradient's largest entry, NaN or infinite where the gradient is not finite.
        mean_square: ``[B]`` of each gradient's entries.
    """

    rows: Tensor
    shape: tuple[int, int]
    parts: tuple[Tensor, ...]
    largest: Tensor
    mean_square: Tensor

    @classmethod
    def of(cls, rows: Tensor, delta: Tensor, a: Tensor) -> Gradients:
        """Hold the factors or their product."""
        (tokens, d_out), r = delta.shape[1:], a.shape[2]
        factors = tokens * (d_out + r) < d_out * r
        parts = (delta, a) if factors else (delta.transpose(1, 2) @ a,)
        unmeasured = cls(rows, (d_out, r), parts, *delta.new_zeros(2, len(rows)))
        sizes = [torch.stack([block.abs().amax(1), block.square().sum(1)]) for _, block in unmeasured.blocks()]
        largest, squares = torch.stack(sizes).unbind(1)
        return dataclasses.replace(unmeasured, largest=largest.amax(0), mean_square=squares.sum(0) / (d_out * r))

    @property
    def numbers(self) -> int:
        """Count of the numbers held."""
        return sum(part.numel() for part in self.parts)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(columns, [B, columns])`` over all d columns, a few output rows of the probe at a time."""
        d_out, r = self.shape
        step = max(1, BLOCK_NUMBERS // (len(self.rows) * r))
        for start in range(0, d_out, step):
            out = slice(start, min(start + step, d_out))
            yield slice(out.start * r, out.stop * r), self._rows(out)

    def updates(self, moments: Moments) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield ``(examples, columns, [examples, columns])`` of the normalised rows: a few columns of all examples at a
        time, or all columns of a few examples if the moments need whole rows."""
        floor = moments.floor(self.mean_square)
        if not moments.whole_rows:
            for columns, block in self.blocks():
                yield slice(None), columns, moments.normalise(block, columns, floor)
            return
        step = max(1, BLOCK_NUMBERS // moments.size)
        for start in range(0, len(self.rows), step):
            examples = slice(start, start + step)
            yield examples, slice(None), moments.normalise(self._rows(slice(None), examples), floor=floor[examples])

    def updates_at(self, columns: Tensor, moments: Moments) -> Tensor:
        """``[B, h]`` entries of the normalised rows at each example's ``columns`` ``[B, h]``."""
        if not moments.whole_rows:
            return moments.normalise(self.at(columns), columns, moments.floor(self.mean_square))
        return torch.cat([u.gather(1, columns[examples]) for examples, _, u in self.updates(moments)])

    def at(self, columns: Tensor) -> Tensor:
        """``[B, h]`` entries of the gradients at each example's ``columns`` ``[B, h]``."""
        if len(self.parts) == 1:
            return self.parts[0].flatten(1).gather(1, columns)
        delta, a = self.parts
        tokens, r = a.shape[1:]
        delta = delta.gather(2, (columns // r).unsqueeze(1).expand(-1, tokens, -1))
        a = a.gather(2, (columns % r).unsqueeze(1).expand(-1, tokens, -1))
        return (delta * a).sum(1)

    def _rows(self, out: slice, examples: slice = slice(None)) -> Tensor:
        """The gradients of some output rows of the probe, ``[B, rows * r]``."""
        if len(self.parts) == 1:
            return self.parts[0][examples, out].flatten(1)
        delta, a = self.parts
        return (delta[examples, :, out].transpose(1, 2) @ a[examples]).flatten(1)


def sketch(tap: Tap, batch: Batch, rows: Tensor) -> tuple[Tensor, Gradients]:
    """Sketch a micro-batch with one forward, and one backward of the last block.

    Returns:
        losses ``[B]``, and the gradients.
    """
    losses, delta, a = tap.factors(batch)
    return losses, Gradients.of(rows, delta, a)


def source_sums(held: list[Gradients], groups: Tensor, num_groups: int, moments: Moments, valid: Tensor) -> Tensor:
    """Fixed-point sums of the normalised rows of this rank's examples, per ranked source.

    Args:
        held: This rank's gradients.
        groups: ``[s]`` ranked source of each row of the candidate matrix, or -1; on the CPU.
        valid: ``[s]`` bool, rows whose gradient is finite.

    Returns:
        int32 ``[num_groups, d]``.
    """
    device = valid.device
    sums = torch.zeros(num_groups, moments.size, dtype=torch.int32, device=device)
    for gradients in held:
        group = groups[gradients.rows]
        counted = on_device(group >= 0, device) & valid[on_device(gradients.rows, device)]
        of = on_device(group.clamp(min=0), device)
        for examples, columns, u in gradients.updates(moments):
            u = torch.where(counted[examples].unsqueeze(1), u, 0.0)
            sums[:, columns].index_add_(0, of[examples], to_fixed(u, len(groups)))
    return sums


def rows_at(held: list[Gradients], columns: Tensor, groups: Tensor, moments: Moments) -> Tensor:
    """The normalised rows of this rank's examples at the columns of their source.

    Args:
        columns: ``[num_groups, h]``.
        groups: ``[s]``, on the CPU.

    Returns:
        ``[examples of this rank, h]`` in the order they were sketched; zero for sources that are not ranked.
    """
    rows = [columns.new_zeros(0, columns.shape[1], dtype=torch.float32)]
    if not len(columns):
        columns = columns.new_zeros(1, columns.shape[1])  # no source is ranked; all rows become zero
    for gradients in held:
        group = on_device(groups[gradients.rows], columns.device)
        own = columns[group.clamp(min=0)]
        rows.append(gradients.updates_at(own, moments) * (group >= 0).unsqueeze(1))
    return torch.cat(rows)


def moment_sums(held: list[Gradients], picked: Tensor, d: int, exponent: Tensor) -> Tensor:
    """Fixed-point sums of ``g`` and ``g^2`` over this rank's picked examples.

    Args:
        picked: ``[s]`` bool, on the CPU.
        d: Numbers in the probe tensor.
        exponent: Every entry of a picked gradient is smaller than ``2**exponent``. Of no dimension, on the device.

    Returns:
        int64 ``[2, d]``; `from_moment_sums` undoes the scaling.
    """
    one = 2.0 ** _moment_bits(len(picked))
    sums = torch.zeros(2, d, dtype=torch.int64, device=exponent.device)
    unit = power_of_two(-exponent)
    for gradients in held:
        chosen = on_device(picked[gradients.rows].nonzero().flatten(), exponent.device)
        for columns, block in gradients.blocks():
            scaled = block[chosen].double() * unit
            sums[0, columns] += (scaled * one).round().long().sum(0)
            sums[1, columns] += (scaled.square() * one).round().long().sum(0)
    return sums


def from_moment_sums(sums: Tensor, rows: int, count: int, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """``mean(g)`` and ``mean(g^2)`` ``[d]`` float32 over ``count`` picked of ``rows`` sketched examples."""
    means = sums.double() / (2.0 ** _moment_bits(rows) * count)
    return (means[0] * power_of_two(exponent)).float(), (means[1] * power_of_two(2 * exponent)).float()


def _moment_bits(rows: int) -> int:
    """Fraction bits such that a sum of ``rows`` numbers below 1 fits into int64 (a double has 53)."""
    return 62 - max(1, rows - 1).bit_length()
