"""The optimizer's update for each example's gradient alone: the rows that are compared (docs/method.md, Gather).

One class per optimizer (``--train.optimizer``) holds its averages of the probe tensors' gradients. After a step, each
average becomes the mean, over the picked (not kept) rows, of its value after each row alone.

With one probe of the zeroth-order estimator all gradients are multiples ``c_i z`` of one direction, and so are the
updates: up to the sign pattern of ``z`` (SGD: ``z`` itself, Muon: its orthogonalisation) the update is one number
``f(c_i)``, which the same class computes for a probe tensor of one number. For Lion and Muon it is a sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.selection.mask import LARGEST, power_of_two

ADAFACTOR_DECAY = 0.8
"""In step t, Adafactor's averages decay by ``1 - t ** -0.8`` (Shazeer and Stern, 2018, sec. 7)."""
MUON_SCALE = 0.2
"""Root mean square of Muon's scaled update, about that of Adam's (Liu et al. 2025, section 2.2)."""
NOISE = 0.01
"""Share of a gradient's scale below which an entry counts in proportion to its size. An update divides each entry by
its own size; what float32 rounds to nothing would become a full step of either sign, and the last bit would choose the
coreset. Rounding is 1e-6 of the scale in float32 and 4e-3 in bfloat16."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

Shapes = tuple[tuple[int, int], ...]
"""``(d_out, r)`` of each probe tensor; a row holds the d numbers of all, one tensor after the other."""
Columns = Tensor | slice
ALL = slice(None)
NO_FLOOR = torch.zeros(())


class Moments(Protocol):
    """The averages of one optimizer, in float32, and the update it makes with them. Frozen; part of a checkpoint.

    Attributes:
        step: Number of steps learned from.
        size: Numbers in a row, d.
        whole_rows: Whether an entry of the update depends on other entries of the gradient, so that `normalise` needs
            whole rows.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # every implementation is a dataclass
    step: int
    whole_rows: bool = False

    @property
    def size(self) -> int: ...

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        """Compute the update ``u`` for each row's gradient alone, without the learning rate.

        Args:
            rows: ``[*, c]`` gradients.
            columns: Indices of the rows' columns among the d entries: ``[c]``, or the shape of ``rows`` if they differ
                by row. `ALL` if `whole_rows` is set.
            floor: ``[*, 1]`` sizes that are added to what entries are divided by (see `floor`). None of them is the
                optimizer itself.

        Returns:
            The shape of ``rows``.
        """

    def floor(self, mean_square: Tensor) -> Tensor:
        """Find the size below which entries are rounding, `NOISE` of the gradient's scale.

        Zero where an entry is not divided by its own size.

        Args:
            mean_square: ``[*]`` of each row over all its d entries.

        Returns:
            ``[*, 1]``.
        """
        return torch.zeros_like(mean_square).unsqueeze(-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> Moments:
        """Return the moments after a step: the mean of those after each of its picked (not kept) rows alone.

        Args:
            mean: ``[d]`` mean gradient of the picked rows.
            mean_square: ``[d]`` mean of its entries' squares.
        """

    def skip(self) -> Moments:
        """Return the moments after a step that picked nothing: unchanged, also in the bias correction.

        The published rule, a mean over picked rows, does not cover this case, and a decay would stand for a gradient of
        zero that was not measured.
        """
        return self

    def fitted(self, largest: Tensor) -> Moments:
        """Scale so that `mask.to_fixed` can hold the updates of rows with entries up to ``largest`` ``[s]`` in size.

        Only updates as large as their gradients need it.
        """
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def fresh(self) -> Moments:
        """Return the moments before the first step."""
        return self.with_tensors({name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()}, 0)

    def with_tensors(self, tensors: Mapping[str, Tensor], step: int) -> Moments:
        """Replace the averages and the number of steps."""
        return dataclasses.replace(self, step=step, **tensors)


def make_moments(train: TrainConfig, shapes: Shapes, device: torch.device | str = "cpu") -> Moments:
    """Make the moments of the user's optimizer before the first step.

    Args:
        shapes: Shapes of the probe tensors; ``((1, 1),)`` for a single zeroth-order probe.
    """
    d = sum(d_out * r for d_out, r in shapes)
    first = torch.zeros(d, device=device)
    match train.optimizer:
        case "adamw":
            return AdamMoments(first, torch.zeros_like(first), 0, train.betas, train.adam_epsilon)
        case "sgd":
            return SgdMoments(first, 0, train.betas[0])
        case "lion":
            return LionMoments(first, 0, train.betas)
        case "adafactor":
            rows, columns = (torch.zeros(sum(sizes), device=device) for sizes in zip(*shapes))
            return AdafactorMoments(rows, columns, 0, shapes, train.adam_epsilon)
        case "muon":
            return MuonMoments(first, 0, shapes, train.betas[0])


@dataclass(frozen=True, slots=True)
class NoMoments(Moments):
    """No moments, for sketches that are not gradients and are compared directly: a loss, a length."""

    step: int = 0
    size = 0

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        return rows

    def learn(self, mean: Tensor, mean_square: Tensor) -> NoMoments:
        return self


@dataclass(frozen=True, slots=True)
class _Averaged(Moments):
    """Moments with a first moment ``[d]`` of all entries."""

    first: Tensor

    @property
    def size(self) -> int:
        return len(self.first)


@dataclass(frozen=True, slots=True)
class AdamMoments(_Averaged):
    """Adam's first and second moment (Kingma and Ba 2015, algorithm 1; the paper's).

    Attributes:
        first: ``[d]`` m.
        second: ``[d]`` v.
        step: Step count of the bias correction.
        betas: Decay rates of m and v.
        epsilon: Term that keeps the division by sqrt(v) finite.
    """

    second: Tensor
    step: int
    betas: tuple[float, float]
    epsilon: float

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        first, second = self._advance(rows, rows.square(), columns)
        beta1, beta2 = self.betas
        steps = self.step + 1
        return first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt() + self.epsilon + floor)

    def floor(self, mean_square: Tensor) -> Tensor:
        beta2 = self.betas[1]
        second = beta2 * self.second.mean() + (1 - beta2) * mean_square
        return NOISE * (second / (1 - beta2 ** (self.step + 1))).sqrt().unsqueeze(-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> AdamMoments:
        first, second = self._advance(mean, mean_square, ALL)
        return dataclasses.replace(self, first=first, second=second, step=self.step + 1)

    def _advance(self, gradient: Tensor, square: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        first = beta1 * self.first[columns] + (1 - beta1) * gradient
        second = beta2 * self.second[columns] + (1 - beta2) * square
        return first, second


@dataclass(frozen=True, slots=True)
class SgdMoments(_Averaged):
    """SGD's momentum. The update is ``b m + g``, of the arbitrary size of gradients.

    It is scaled by a power of two, the same for all rows of a step, which changes no comparison.

    Attributes:
        first: ``[d]`` m.
        momentum: b.
        scale: The power of two, from `fitted`.
    """

    step: int
    momentum: float
    scale: float | Tensor = 1.0

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        return (self.momentum * self.first[columns] + rows) * self.scale

    def learn(self, mean: Tensor, mean_square: Tensor) -> SgdMoments:
        return SgdMoments(self.momentum * self.first + mean, self.step + 1, self.momentum)

    def fitted(self, largest: Tensor) -> SgdMoments:
        most = self.momentum * self.first.abs().max() + (largest.max() if len(largest) else 0.0)
        exponent = torch.frexp(most.clamp(min=1e-30)).exponent
        return dataclasses.replace(self, scale=LARGEST * power_of_two(-exponent))


@dataclass(frozen=True, slots=True)
class LionMoments(_Averaged):
    """Lion's momentum (Chen et al. 2023, algorithm 2). The update is ``sign(b1 m + (1 - b1) g)``.

    L1 distances all but count the entries whose signs differ: in the columns with the largest mean, all candidates of a
    source agree. Those of a source of up to ``1 + log2(d / h)`` candidates with independent gradients differ by the
    floor alone.

    Attributes:
        first: ``[d]`` m, with decay b2.
        betas: b1 and b2.
    """

    step: int
    betas: tuple[float, float]

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        beta1 = self.betas[0]
        ahead = beta1 * self.first[columns] + (1 - beta1) * rows
        return ahead / (ahead.abs() + floor).clamp(min=torch.finfo(ahead.dtype).tiny)

    def floor(self, mean_square: Tensor) -> Tensor:
        beta1 = self.betas[0]
        square = beta1**2 * self.first.square().mean() + (1 - beta1) ** 2 * mean_square
        return NOISE * square.sqrt().unsqueeze(-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> LionMoments:
        beta2 = self.betas[1]
        return dataclasses.replace(self, first=beta2 * self.first + (1 - beta2) * mean, step=self.step + 1)


@dataclass(frozen=True, slots=True)
class AdafactorMoments(Moments):
    """Adafactor's factored second moment (Shazeer and Stern 2018, algorithm 4, without its relative step size).

    The update is ``g / sqrt(R C / mean(R))``, scaled down if its root mean square is above 1; R and C are averages of
    the mean squares of the gradient's rows and columns, including those of the example itself.

    With one zeroth-order probe, ``|f(c)|`` stands for the update's root mean square; with standard normal ``z`` the
    difference is below a percent.

    Attributes:
        rows: ``[sum of d_out]`` R of each probe tensor.
        columns: ``[sum of r]`` C.
        step: Step count, which sets the decay.
        shapes: Shapes of the probe tensors.
        epsilon: Least mean(R); its square is the least second moment.
    """

    rows: Tensor
    columns: Tensor
    step: int
    shapes: Shapes
    epsilon: float
    whole_rows = True

    @property
    def size(self) -> int:
        return sum(d_out * r for d_out, r in self.shapes)

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        updates = []
        for g, of_rows, of_columns in zip(_matrices(rows, self.shapes), *self._advanced(rows.square())):
            second = of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)
            second = second / of_rows.mean(-1).clamp(min=self.epsilon)[..., None, None]
            u = g.flatten(-2) / (second.clamp(min=self.epsilon**2).sqrt().flatten(-2) + floor)
            updates.append(u / u.square().mean(-1, keepdim=True).sqrt().clamp(min=1))
        return torch.cat(updates, dim=-1)

    def floor(self, mean_square: Tensor) -> Tensor:
        weight = self._weight
        return NOISE * ((1 - weight) * self.rows.mean() + weight * mean_square).sqrt().unsqueeze(-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> AdafactorMoments:
        rows, columns = (torch.cat(averages) for averages in self._advanced(mean_square))
        return dataclasses.replace(self, rows=rows, columns=columns, step=self.step + 1)

    @property
    def _weight(self) -> float:
        """Of the next gradient in the averages."""
        return float((self.step + 1) ** -ADAFACTOR_DECAY)

    def _advanced(self, square: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return R ``[*, d_out]`` and C ``[*, r]`` of each probe tensor after a gradient with ``square`` ``[*, d]``."""
        weight = self._weight
        before = zip(*(old.split(sizes) for old, sizes in zip((self.rows, self.columns), zip(*self.shapes))))
        after = [
            ((1 - weight) * rows + weight * own.mean(-1), (1 - weight) * columns + weight * own.mean(-2))
            for own, (rows, columns) in zip(_matrices(square, self.shapes), before)
        ]
        return [rows for rows, _ in after], [columns for _, columns in after]


@dataclass(frozen=True, slots=True)
class MuonMoments(_Averaged):
    """Muon's momentum (Jordan et al. 2024): the update is the orthogonalised ``(1 - b) g + b (b m + (1 - b) g)``.

    Each example's matrix is orthogonalised by the iteration of torch.optim.Muon, in the type of the rows instead of
    bfloat16. That costs about ``20 r d`` operations per example, little compared with the forward of a model.

    Attributes:
        first: ``[d]`` m.
        shapes: Shapes of the probe tensors, which are orthogonalised separately.
        momentum: b.
    """

    step: int
    shapes: Shapes
    momentum: float
    whole_rows = True

    def normalise(self, rows: Tensor, columns: Columns = ALL, floor: Tensor = NO_FLOOR) -> Tensor:
        ahead = rows.lerp(self.first.to(rows).lerp(rows, 1 - self.momentum), self.momentum)
        updates = [
            _orthogonalised(matrix) * (MUON_SCALE * max(matrix.shape[-2:]) ** 0.5)
            for matrix in _matrices(ahead, self.shapes)
        ]
        return torch.cat([update.flatten(-2) for update in updates], dim=-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> MuonMoments:
        return dataclasses.replace(self, first=self.first.lerp(mean, 1 - self.momentum), step=self.step + 1)


def _matrices(rows: Tensor, shapes: Shapes) -> Iterator[Tensor]:
    """Split ``rows`` ``[*, d]`` into the part ``[*, d_out, r]`` of each probe tensor."""
    parts = rows.split([d_out * r for d_out, r in shapes], dim=-1)
    return (part.unflatten(-1, shape) for part, shape in zip(parts, shapes))


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Bring the singular values of ``[*, d_out, r]`` that are not 0 to between about 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
