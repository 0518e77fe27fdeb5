"""Frozen records that the stages of a step hand to each other.

Shape legend, used in every file of the package:

    n   candidates of a step, over all ranks        b   size of the coreset (the budget)
    s   candidates that are sketched (s <= n)       Q   sources in the training data
    W   ranks                                       h   columns of the candidate matrix
    r   rank of the LoRA adapters                   d   numbers in the probe tensor, d_out * r
    K   probes of the zeroth-order estimator        T   padded tokens of a micro-batch

A *position* is an index into the step's candidates, 0..n-1. An *index* is an index into the training examples that
survived tokenisation. An *id* is the row's position in the training data as the user gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
Json = dict[str, Any]
"""A JSON object, not yet validated."""
Shares = tuple[tuple[tuple[int, ...], ...], ...]
"""``shares[rank][j]`` is a micro-batch, a tuple of positions among the candidates."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The large mini-batch of one optimizer step. Equal on every rank; all tensors are int64 on the CPU.

    Attributes:
        step: The optimizer step, from 1.
        indices: ``[n]`` indices of the training examples.
        ids: ``[n]`` rows of the user's training data.
        sources: ``[n]`` source of each candidate, 0..Q-1.
        lengths: ``[n]`` tokens of each candidate.
        protected: ``[n]`` bool, candidates that enter the coreset whatever their source; None if there are none.
    """

    step: int
    indices: Tensor
    ids: Tensor
    sources: Tensor
    lengths: Tensor
    protected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def protected_mask(self) -> Tensor:
        """``[n]`` bool, `protected` even if there are none."""
        return torch.zeros_like(self.sources, dtype=torch.bool) if self.protected is None else self.protected


@dataclass(frozen=True, slots=True)
class Quota:
    """Division of the budget before anything is ranked (docs/method.md, Select).

    Attributes:
        kept: ``[k]`` positions that enter the coreset whatever their sketch, ascending.
        per_source: ``[Q]`` number of candidates to pick from each source that is not kept.
        overflow: Kept candidates that did not fit into the budget.
    """

    kept: Tensor
    per_source: Tensor
    overflow: int = 0

    @property
    def kept_weight(self) -> float:
        """Weight of a kept candidate if it also represents the candidates that overflowed."""
        return 1 + self.overflow / max(1, len(self.kept))

    def to_sketch(self, sources: Tensor) -> Tensor:
        """Find the positions ``[s]`` whose sketch can change the selection: not kept, and of a source with a quota.

        A source whose quota takes all its candidates needs no ranking, but its rows still update the moments, so it is
        sketched too.
        """
        wanted = self.per_source[sources] > 0
        wanted[self.kept] = False
        return wanted.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class SketchPlan:
    """Assignment of the candidates to sketch to ranks and micro-batches. Equal on every rank.

    Attributes:
        positions: ``[s]`` candidates to sketch, ascending.
        groups: ``[s]`` 0..num_groups-1, one group per ranked source: its candidates are compared with each other, in
            the same columns. -1 if the source's quota takes all its candidates.
        num_groups: Number of groups that are ranked.
        shares: ``shares[rank][j]`` is a micro-batch, a tuple of positions; an empty one stands for a forward whose
            result is dropped, so that every rank runs the same number. A position in none of them is not forwarded,
            because its sketch is reused.
    """

    positions: Tensor
    groups: Tensor
    num_groups: int
    shares: Shares

    def rows_of(self, *ranks: int) -> Tensor:
        """Rows of the candidate matrix that ``ranks`` compute, in their order of computation."""
        shares = chain.from_iterable(map(self.shares.__getitem__, ranks))
        mine = long_tensor([*chain.from_iterable(shares)])
        row_of = torch.empty(int(self.positions.max()) + 1 if len(self.positions) else 0, dtype=torch.int64)
        row_of[self.positions] = torch.arange(len(self.positions))
        return row_of[mine]

    @classmethod
    def of_nobody(cls, ranks: int) -> SketchPlan:
        """Make the plan of a method that sketches no candidate."""
        return cls(long_tensor([]), long_tensor([]), 0, ((),) * ranks)

    @property
    def forwarded(self) -> Tensor:
        """``[s]`` bool, the rows of the candidate matrix that some rank computes."""
        computed = torch.zeros(len(self.positions), dtype=torch.bool)
        computed[self.rows_of(*range(len(self.shares)))] = True
        return computed

    @property
    def counts(self) -> Tensor:
        """``[W]`` int64 number of candidates that each rank sketches."""
        return long_tensor([sum(map(len, share)) for share in self.shares])


@dataclass(frozen=True, slots=True)
class CandidateMatrix:
    """The all-gathered sketches, in the compared coordinates: rows of the optimizer's update. On the CPU.

    Attributes:
        positions: ``[s]`` the candidate of each row, ascending.
        rows: ``[s, h]`` float32; each row has the h columns of its source. Rows that are not ``valid`` are zero.
        valid: ``[s]`` bool; False where a candidate's loss or sketch was not finite (it is never selected).
        losses: ``[s]`` float32 mean token loss of each sketched candidate.
        device: The device that compares rows in pairs.
    """

    positions: Tensor
    rows: Tensor
    valid: Tensor
    losses: Tensor
    device: torch.device = CPU

    @classmethod
    def fetched(cls, positions: Tensor, rows: Tensor, valid: Tensor, losses: Tensor) -> CandidateMatrix:
        """Make the matrix from tensors on the device; the host waits for it once, here."""
        rows_, losses_, valid_ = on_host([rows, losses, valid.to(rows.dtype)])
        return cls(positions, rows_, valid_ > 0, losses_, rows.device)

    @classmethod
    def without_rows(cls) -> CandidateMatrix:
        """Make the matrix of a step without sketches."""
        nothing = torch.zeros(0)
        return cls(long_tensor([]), nothing.view(0, 0), nothing.bool(), nothing)


@dataclass(frozen=True, slots=True)
class Selection:
    """The coreset of one step.

    Attributes:
        positions: ``[b]`` int64 candidates to train on: kept ones first, then source by source.
        weights: ``[b]`` float32, positive weights of their losses.
        kept: Number of leading positions that were kept rather than picked.
        overflow: Kept-source candidates left out because they alone exceed the budget.
        invalid: Candidates left out because their loss or sketch was not finite.
    """

    positions: Tensor
    weights: Tensor
    kept: int = 0
    overflow: int = 0
    invalid: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def picked(self) -> Tensor:
        """``[b - kept]`` positions that were picked rather than kept; the moments learn from their rows."""
        return self.positions[self.kept :]


REASONS = ("kept", "protected", "selected", "passed over", "no quota", "overflow", "invalid")
"""Outcomes of a candidate. Trained on: its source is kept, it is protected, or it was picked. Not trained on: others of
its source were picked, its source had no quota, not all kept or protected candidates fitted into the budget, or its
loss or sketch was not finite."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The reason why each candidate of a step was trained on or not.

    Attributes:
        reasons: ``[n]`` uint8, indices into `REASONS`.
        scores: ``[n]`` float32, the selection's score of each (`colm_scale.selection.audit`); nan if it had none.
        losses: ``[n]`` float32 mean token loss at its sketch; nan if it was not sketched.
    """

    reasons: Tensor
    scores: Tensor
    losses: Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Assignment of the coreset to ranks and micro-batches. Equal on every rank.

    Attributes:
        micro_batches: ``micro_batches[rank][j]`` is a tuple of positions; every rank has the same number of
            micro-batches, and an empty tuple stands for a zero-weight one that only keeps the collectives in step.
        reused: Number of leading micro-batches of each rank that start from block inputs held by the sketch.
        work: ``work[rank]`` cost of the rank's share in tokens, those with a reused forward counted as `REUSED`.
        tokens: ``tokens[rank]`` real tokens (without padding) each rank trains on.
        padded_tokens: The same with padding, the computed tokens.
    """

    micro_batches: Shares
    reused: int
    work: tuple[float, ...]
    tokens: tuple[int, ...]
    padded_tokens: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean; 1.0 is perfect balance."""
        total = sum(self.work)
        return max(self.work) * len(self.work) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Targets:
    """The label tokens of a micro-batch. Found on the CPU, so that their number needs no sync with the device.

    Attributes:
        rows: ``[N]`` int64, index of the token before each among the micro-batch's tokens, row by row.
        tokens: ``[N]`` int64, the label predicted there.
        slots: ``[N]`` int64, ``example * most + number``, with number counting the targets of an example from 0.
        counts: ``[B]`` int64, targets of each example.
        most: The largest of ``counts``, at least 1.
    """

    rows: Tensor
    tokens: Tensor
    slots: Tensor
    counts: Tensor
    most: int


@dataclass(frozen=True, slots=True)
class Packing:
    """Places of the examples in the single row of a packed micro-batch.

    Attributes:
        position_ids: ``[1, T]`` int64, counted from 0 in each example.
        offsets: ``[B + 1]`` int32, the start of each example, and T.
        places: ``[T]`` int64, ``example * longest + position`` of each token.
        longest: Tokens of the longest example.
    """

    position_ids: Tensor
    offsets: Tensor
    places: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of B examples on the device: one row each, padded on the right, or all packed into one row.

    Attributes:
        input_ids: ``[B, T]`` int64, or ``[1, T]`` if packed.
        attention_mask: ``[B, T]`` int64, 1 on real tokens; None if packed.
        targets: The label tokens.
        positions: ``[B]`` int64 on the CPU, the candidate of each example; empty in a batch that only keeps the
            collectives in step.
        lengths: Tokens of each example.
        packing: Places of the examples if they are packed.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    targets: Targets
    positions: Tensor
    lengths: tuple[int, ...]
    packing: Packing | None = None

    @property
    def starts(self) -> tuple[int, ...]:
        """The start of each example among all tokens, row by row."""
        if self.packing is None:
            return tuple(range(0, self.input_ids.numel(), self.input_ids.shape[1]))
        return (0, *accumulate(self.lengths[:-1]))

    def by_example(self, values: Tensor) -> Tensor:
        """Reshape values per token ``[..., c]``, in their order, to ``[B, longest, c]``; if packed, padding is 0."""
        if self.packing is None:
            return values.reshape(*self.input_ids.shape, -1)
        packing, values = self.packing, values.flatten(0, -2)
        examples = len(packing.offsets) - 1
        padded = values.new_zeros(examples * packing.longest, values.shape[-1])
        return padded.index_copy(0, packing.places, values).view(examples, packing.longest, -1)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A batch to train on.

    Attributes:
        shares: ``[B]`` weight of each loss; zero in a batch that only keeps the collectives in step.
        reuses_forward: Whether it starts from block inputs held by the sketch.
    """

    batch: Batch
    shares: Tensor
    reuses_forward: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """Results of a step: one row of metrics.jsonl and one of selection.jsonl."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    candidates: Candidates
    selection: Selection
    seconds: dict[str, float]
    """Seconds per phase on the slowest rank."""
    peak_bytes: tuple[int, ...]
    """Peak memory of the step on each rank."""
    phase_peak_bytes: dict[str, dict[str, tuple[int, ...]]]
    """Peak memory by kind (``device``, ``allocator`` or ``resident``; the headline's first) and phase, on each rank."""
    exchanged_bytes: dict[str, int]
    """Bytes that the selection's collectives sent per rank, by phase; gradients are not among them."""
    imbalance: float
    padding_share: dict[str, float] = field(default_factory=dict)
    """Share of computed tokens that are padding, by phase (sketch, train)."""
    applied: bool = True
    """False if float16's loss scale was too large: the step changed only the scale."""
    loss_scale: float = 1.0
    telemetry: dict[str, float] = field(default_factory=dict)
    """Figures of the selection, by name (`colm_scale.selection.telemetry`)."""
    noise: dict[str, float] = field(default_factory=dict)
    """Noise and signal of the gradient, by name (`colm_scale.step.noise`)."""
    source_noise: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    """``[Q', 2]`` variance and squared mean of the gradients of each source up to the last; nan where unknown."""
    gradient_bytes: int = 0
    """Bytes of gradients that each rank passed to the engine's reductions; 0 if another library trains."""
    floor: float | None = None
    """Step seconds / bare-floor seconds on the same tokens, in the steps that measure it."""
    audit: Audit | None = None
    """On the first rank, if the run keeps an audit."""


def last_of_each(values: Tensor) -> Tensor:
    """``[k]`` ascending places of the last occurrence of each of the k different numbers in ``values`` ``[n]``."""
    ordered, places = values.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return places[is_last].sort().values


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device, through pinned memory, so that the host does not wait for earlier work."""
    if device.type in ("cpu", "meta") or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one type from the device to the CPU; the host waits for it once."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    together = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def long_tensor(values: Tensor | Sequence[int]) -> Tensor:
    """Make a CPU int64 tensor of ``values``."""
    if isinstance(values, Tensor):
        return values.long()
    return torch.from_numpy(np.array(values, np.int64))  # several times as quick as torch with long lists
