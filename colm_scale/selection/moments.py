"""What the user's optimizer would make of each example's gradient alone: the rows that are compared (DESIGN 2.3).

One class per optimizer (``--train.optimizer``) with that optimizer's own averages, as the selection keeps them of the
probe tensors' gradients. In all of them an average learns, after a step, the mean over its picked (not kept) rows of
what it would have become by each row alone.

With one probe of the zeroth-order estimator all gradients are multiples ``c_i z`` of one direction, and so are the
updates: up to the sign pattern of ``z`` (SGD: ``z`` itself, Muon: its orthogonalisation) the update is one number
``f(c_i)``, which the same class computes of a probe tensor of one number. For Lion and Muon that number is a sign.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from colm_scale.config import TrainConfig
from colm_scale.selection.mask import LARGEST

ADAFACTOR_DECAY = 0.8
"""In step t Adafactor's averages keep a share of ``1 - t ** -0.8`` of themselves (Shazeer and Stern, 2018, sec. 7)."""
MUON_SCALE = 0.2
"""Muon's update is scaled to this root mean square, about that of Adam's (Liu et al. 2025, section 2.2)."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

Shapes = tuple[tuple[int, int], ...]
"""``(d_out, r)`` of each probe tensor; together they have the d numbers of a row, one tensor after the other."""


class Moments(Protocol):
    """The averages of one optimizer, float32, and the update that it makes with them. Frozen; part of a checkpoint.

    Attributes:
        step: How many steps have been learned from.
        size: Numbers of a row, d.
        whole_rows: Whether an entry of the update depends on more than the same entry of the gradient, so that
            `normalise` must be given whole rows.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # every optimizer's are a dataclass
    step: int
    whole_rows: bool = False

    @property
    def size(self) -> int: ...

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """The update ``u`` that each row's gradient alone would cause, without the learning rate.

        Args:
            rows: ``[*, c]`` gradients.
            columns: Which of the d entries the rows' columns are: ``[c]``, or the shape of ``rows`` where each row has
                its own; all of them by default, and always where `whole_rows` is set.

        Returns:
            The shape of ``rows``.
        """

    def learn(self, mean: Tensor, mean_square: Tensor) -> Moments:
        """The moments after a step: the mean over its picked (not kept) rows of what each row's own would be.

        Args:
            mean: ``[d]`` mean gradient of the picked rows.
            mean_square: ``[d]`` mean of its entries' squares.
        """

    def skip(self) -> Moments:
        """The moments after a step that picked nothing: the same, and the bias correction does not count the step.

        The published rule is a mean over picked rows and so says nothing here. A decay towards zero would be a
        gradient that nobody measured.
        """
        return self

    def fitted(self, largest: Tensor) -> Moments:
        """Such that `mask.to_fixed` can hold the updates of a step, the entries of whose rows are at most ``largest``
        ``[s]`` in size. Only where an update is as large as its gradient that makes a difference."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def fresh(self) -> Moments:
        """The moments before the first step."""
        return self.with_tensors({name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()}, 0)

    def with_tensors(self, tensors: Mapping[str, Tensor], step: int) -> Moments:
        """With other averages and as many steps."""
        return dataclasses.replace(self, step=step, **tensors)


def make_moments(train: TrainConfig, shapes: Shapes, device: torch.device | str = "cpu") -> Moments:
    """The moments of the user's optimizer before the first step.

    Args:
        shapes: Of the probe tensors; ``((1, 1),)`` for the one number of a single zeroth-order probe.
    """
    d = sum(d_out * r for d_out, r in shapes)
    first = torch.zeros(d, device=device)
    match train.optimizer:
        case "adamw":
            return AdamMoments.zeros(d, train.betas, train.adam_epsilon, device)
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
    """Of sketches that are no gradient and are compared as they are: a loss, a length."""

    step: int = 0
    size = 0

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        return rows

    def learn(self, mean: Tensor, mean_square: Tensor) -> NoMoments:
        return self


@dataclass(frozen=True, slots=True)
class AdamMoments(Moments):
    """Adam's first and second moment (Kingma and Ba 2015, algorithm 1; the paper's).

    Attributes:
        first: ``[d]`` m.
        second: ``[d]`` v.
        step: The bias correction counts it.
        betas: Decay rates of m and v.
        epsilon: What keeps the division by sqrt(v) finite.
    """

    first: Tensor
    second: Tensor
    step: int
    betas: tuple[float, float]
    epsilon: float

    @classmethod
    def zeros(
        cls, d: int, betas: tuple[float, float], epsilon: float, device: torch.device | str = "cpu"
    ) -> AdamMoments:
        """Before the first step, in float32."""
        return cls(torch.zeros(d, device=device), torch.zeros(d, device=device), 0, betas, epsilon)

    @property
    def size(self) -> int:
        return len(self.first)

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        first, second = self._advance(rows, rows.square(), slice(None) if columns is None else columns)
        beta1, beta2 = self.betas
        steps = self.step + 1
        return first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt() + self.epsilon)

    def learn(self, mean: Tensor, mean_square: Tensor) -> AdamMoments:
        first, second = self._advance(mean, mean_square, slice(None))
        return dataclasses.replace(self, first=first, second=second, step=self.step + 1)

    def _advance(self, gradient: Tensor, square: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        first = beta1 * self.first[columns] + (1 - beta1) * gradient
        second = beta2 * self.second[columns] + (1 - beta2) * square
        return first, second


@dataclass(frozen=True, slots=True)
class SgdMoments(Moments):
    """SGD's momentum. The update is ``b m + g``, as large as gradients happen to be.

    So it is compared times a power of two, the same for all rows of a step, which changes no comparison.

    Attributes:
        first: ``[d]`` m.
        momentum: b.
        scale: The power of two, see `fitted`.
    """

    first: Tensor
    step: int
    momentum: float
    scale: float = 1.0

    @property
    def size(self) -> int:
        return len(self.first)

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        return (self.momentum * self.first[slice(None) if columns is None else columns] + rows) * self.scale

    def learn(self, mean: Tensor, mean_square: Tensor) -> SgdMoments:
        return SgdMoments(self.momentum * self.first + mean, self.step + 1, self.momentum)

    def fitted(self, largest: Tensor) -> SgdMoments:
        most = self.momentum * self.first.abs().max() + (largest.max() if len(largest) else 0.0)
        return dataclasses.replace(self, scale=LARGEST * 2.0 ** -math.frexp(max(float(most), 1e-30))[1])


@dataclass(frozen=True, slots=True)
class LionMoments(Moments):
    """Lion's momentum (Chen et al. 2023, algorithm 2). The update is ``sign(b1 m + (1 - b1) g)``.

    So L1 distances count the entries whose signs differ, and ties are common: the columns with the largest mean are
    those in which a source's candidates all agree, and in these no two of them differ. Where gradients are independent,
    a source of no more than ``1 + log2(d / h)`` candidates ties as a whole, and the first of them are picked.

    Attributes:
        first: ``[d]`` m, which decays by b2.
        betas: b1 and b2.
    """

    first: Tensor
    step: int
    betas: tuple[float, float]

    @property
    def size(self) -> int:
        return len(self.first)

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        beta1 = self.betas[0]
        return (beta1 * self.first[slice(None) if columns is None else columns] + (1 - beta1) * rows).sign()

    def learn(self, mean: Tensor, mean_square: Tensor) -> LionMoments:
        beta2 = self.betas[1]
        return dataclasses.replace(self, first=beta2 * self.first + (1 - beta2) * mean, step=self.step + 1)


@dataclass(frozen=True, slots=True)
class AdafactorMoments(Moments):
    """Adafactor's factored second moment (Shazeer and Stern 2018, algorithm 4, without its relative step size).

    The update is ``g / sqrt(R C / mean(R))``, scaled down where its root mean square is above 1; R and C are averages
    of the mean squares of the gradient's rows and columns, those of the example's own included.

    With one zeroth-order probe the update's root mean square counts as ``|f(c)|``, from which ``z`` (standard normal)
    deviates by less than a percent.

    Attributes:
        rows: ``[sum of d_out]`` R of each probe tensor.
        columns: ``[sum of r]`` C.
        step: The decay depends on it.
        shapes: Of the probe tensors.
        epsilon: Least mean(R), and its square the least second moment.
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

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        updates = []
        for g, of_rows, of_columns in zip(_matrices(rows, self.shapes), *self._advanced(rows.square())):
            second = of_rows.unsqueeze(-1) * of_columns.unsqueeze(-2)
            second = second / of_rows.mean(-1).clamp(min=self.epsilon)[..., None, None]
            u = (g * second.clamp(min=self.epsilon**2).rsqrt()).flatten(-2)
            updates.append(u / u.square().mean(-1, keepdim=True).sqrt().clamp(min=1))
        return torch.cat(updates, dim=-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> AdafactorMoments:
        rows, columns = (torch.cat(averages) for averages in self._advanced(mean_square))
        return dataclasses.replace(self, rows=rows, columns=columns, step=self.step + 1)

    def _advanced(self, square: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """R ``[*, d_out]`` and C ``[*, r]`` of each probe tensor after a gradient of such squares ``[*, d]``."""
        weight = (self.step + 1) ** -ADAFACTOR_DECAY
        before = zip(*(old.split(sizes) for old, sizes in zip((self.rows, self.columns), zip(*self.shapes))))
        after = [
            ((1 - weight) * rows + weight * own.mean(-1), (1 - weight) * columns + weight * own.mean(-2))
            for own, (rows, columns) in zip(_matrices(square, self.shapes), before)
        ]
        return [rows for rows, _ in after], [columns for _, columns in after]


@dataclass(frozen=True, slots=True)
class MuonMoments(Moments):
    """Muon's momentum (Jordan et al. 2024): the update is the orthogonalised ``(1 - b) g + b (b m + (1 - b) g)``.

    It is made of each example's own matrix by the same iteration as torch.optim.Muon's, in the type of the rows instead
    of bfloat16, which costs about ``20 r d`` operations an example: little beside the forward of a model.

    Attributes:
        first: ``[d]`` m.
        shapes: Of the probe tensors, each orthogonalised by itself.
        momentum: b.
    """

    first: Tensor
    step: int
    shapes: Shapes
    momentum: float
    whole_rows = True

    @property
    def size(self) -> int:
        return len(self.first)

    def normalise(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        ahead = rows.lerp(self.first.to(rows).lerp(rows, 1 - self.momentum), self.momentum)
        updates = [
            _orthogonalised(matrix) * (MUON_SCALE * max(matrix.shape[-2:]) ** 0.5)
            for matrix in _matrices(ahead, self.shapes)
        ]
        return torch.cat([update.flatten(-2) for update in updates], dim=-1)

    def learn(self, mean: Tensor, mean_square: Tensor) -> MuonMoments:
        return dataclasses.replace(self, first=self.first.lerp(mean, 1 - self.momentum), step=self.step + 1)


def _matrices(rows: Tensor, shapes: Shapes) -> Iterator[Tensor]:
    """Each probe tensor's part ``[*, d_out, r]`` of ``rows`` ``[*, d]``."""
    parts = rows.split([d_out * r for d_out, r in shapes], dim=-1)
    return (part.unflatten(-1, shape) for part, shape in zip(parts, shapes))


def _orthogonalised(matrices: Tensor) -> Tensor:
    """``[*, d_out, r]`` with singular values between about 0.7 and 1.2 in place of any that is not 0."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
