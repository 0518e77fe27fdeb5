"""What the stages of one step hand to each other: one frozen record per arrow.

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
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]
"""A JSON object: nested, and checked by whoever reads it."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The large mini-batch of one optimizer step. Equal on every rank; all tensors are int64 on the CPU.

    Attributes:
        step: The optimizer step, from 1.
        indices: ``[n]`` indices of the training examples.
        ids: ``[n]`` rows of the user's training data.
        sources: ``[n]`` source of each candidate, 0..Q-1.
        lengths: ``[n]`` tokens of each candidate.
        protected: ``[n]`` bool, candidates that enter the coreset whatever their source; None if none does.
    """

    step: int
    indices: Tensor
    ids: Tensor
    sources: Tensor
    lengths: Tensor
    protected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Quota:
    """How the budget is shared out before anything is ranked (DESIGN: kept sources, then quotas).

    Attributes:
        kept: ``[k]`` positions that enter the coreset whatever their sketch says, ascending.
        per_source: ``[Q]`` how many to pick from each source that is not kept.
        overflow: Kept candidates that did not fit into the budget.
    """

    kept: Tensor
    per_source: Tensor
    overflow: int = 0

    @property
    def kept_weight(self) -> float:
        """What a kept candidate counts for, if also for those that overflowed and have no other chance."""
        return 1 + self.overflow / max(1, len(self.kept))

    def to_sketch(self, sources: Tensor) -> Tensor:
        """Positions ``[s]`` whose sketch can change the selection: not kept, and of a source with a quota.

        A source whose quota equals the candidates it has needs no ranking, yet its rows still move the moments,
        so it is sketched.
        """
        wanted = self.per_source[sources] > 0
        wanted[self.kept] = False
        return wanted.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class SketchPlan:
    """Who is sketched where. Equal on every rank.

    Attributes:
        positions: ``[s]`` candidates to sketch, ascending.
        groups: ``[s]`` 0..num_groups-1, the same for candidates that are compared with each other, hence in the same
            columns: those of a source. -1 where a source's quota takes all.
        num_groups: How many groups are ranked.
        shares: ``shares[rank][j]`` is a micro-batch, a tuple of positions; an empty one stands for a forward whose
            result is dropped, so that every rank runs as many. A position in none of them is not forwarded: what is to
            be known of it is known already.
    """

    positions: Tensor
    groups: Tensor
    num_groups: int
    shares: tuple[tuple[tuple[int, ...], ...], ...]

    def rows_of(self, rank: int) -> Tensor:
        """Rows of the candidate matrix that ``rank`` computes, in the order in which it does."""
        mine = long_tensor([position for micro_batch in self.shares[rank] for position in micro_batch])
        return torch.searchsorted(self.positions, mine)

    @classmethod
    def of_nobody(cls, ranks: int) -> SketchPlan:
        """The plan of a method that sketches no candidate."""
        return cls(long_tensor([]), long_tensor([]), 0, ((),) * ranks)

    @property
    def forwarded(self) -> Tensor:
        """``[s]`` bool, the rows of the candidate matrix that some rank computes."""
        computed = torch.zeros(len(self.positions), dtype=torch.bool)
        for rank in range(len(self.shares)):
            computed[self.rows_of(rank)] = True
        return computed

    @property
    def most_rows(self) -> int:
        """The largest number of candidates that any rank sketches."""
        return max((sum(map(len, share)) for share in self.shares), default=0)


@dataclass(frozen=True, slots=True)
class CandidateMatrix:
    """The all-gathered sketches, in the coordinates that are compared: rows of the Adam-like update.

    Attributes:
        positions: ``[s]`` the candidate of each row, ascending.
        rows: ``[s, h]`` float32; row i holds its source's h columns. Rows that are not ``valid`` are zero.
        valid: ``[s]`` bool; False where a candidate's loss or sketch was not finite (it is never selected).
        losses: ``[s]`` float32 mean token loss of each sketched candidate.
    """

    positions: Tensor
    rows: Tensor
    valid: Tensor
    losses: Tensor

    @classmethod
    def without_rows(cls) -> CandidateMatrix:
        """The matrix of a step in which nobody was sketched."""
        nothing = torch.zeros(0)
        return cls(long_tensor([]), nothing.view(0, 0), nothing.bool(), nothing)


@dataclass(frozen=True, slots=True)
class Selection:
    """The coreset of one step.

    Attributes:
        positions: ``[b]`` int64 candidates to train on: kept ones first, then source by source.
        weights: ``[b]`` float32, positive; what each one's loss counts for.
        kept: How many of the leading positions were kept rather than picked.
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
        """``[b - kept]`` positions that were selected rather than kept: the rows the moments learn from."""
        return self.positions[self.kept :]


REASONS = ("kept", "protected", "selected", "passed over", "no quota", "overflow", "invalid")
"""What can become of a candidate: trained on because its source is kept, because it is protected, or because it was
picked; or not, though others of its source were picked, because its source had no picks, because there was no room for
all that are kept or protected, or because its loss or sketch was not finite."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Why each candidate of a step was trained on or not.

    Attributes:
        reasons: ``[n]`` uint8, numbers of `REASONS`.
        scores: ``[n]`` float32, what the selection compared it by (`colm_scale.selection.audit`); nan where nothing.
        losses: ``[n]`` float32 mean token loss at its sketch; nan where it was not sketched.
    """

    reasons: Tensor
    scores: Tensor
    losses: Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Which rank trains which candidate, in which micro-batch. Equal on every rank.

    Attributes:
        micro_batches: ``micro_batches[rank][j]`` is a tuple of positions; every rank has the same number of
            micro-batches, and an empty tuple stands for a zero-weight one that only keeps the collectives in step.
        reused: How many of each rank's micro-batches, the first ones, start from block inputs that the sketch holds.
        work: ``work[rank]`` what each rank's share costs: its tokens, one that starts so counted as `REUSED`.
        tokens: ``tokens[rank]`` real tokens (without padding) each rank trains on.
        padded_tokens: The same with padding, which is what is computed.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
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
    """Which tokens of a micro-batch carry loss. Found on the CPU, so that a device is never asked how many there are.

    Attributes:
        rows: ``[N]`` int64, the token before each: its place among the micro-batch's tokens, row by row.
        tokens: ``[N]`` int64, what is to be predicted there.
        slots: ``[N]`` int64, ``example * most + number``, where number counts the example's own targets from 0.
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
    """Where the examples of a packed micro-batch are in its one row of tokens.

    Attributes:
        position_ids: ``[1, T]`` int64, 0, 1, 2, ... anew for each example.
        offsets: ``[B + 1]`` int32, where each example begins, and T.
        places: ``[T]`` int64, ``example * longest + position`` of each token.
        longest: Tokens of the longest example.
    """

    position_ids: Tensor
    offsets: Tensor
    places: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of B examples on the device: a row for each, padded on the right, or all packed into one row.

    Attributes:
        input_ids: ``[B, T]`` int64, or ``[1, T]`` if packed.
        attention_mask: ``[B, T]`` int64, 1 on real tokens; None if packed.
        targets: Where the loss is.
        positions: ``[B]`` int64 on the CPU, the candidate of each example; empty in a batch that only keeps step.
        lengths: Tokens of each example.
        packing: Where the examples are, if they are packed.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    targets: Targets
    positions: Tensor
    lengths: tuple[int, ...]
    packing: Packing | None = None

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each example begins among all tokens, row by row."""
        if self.packing is None:
            return tuple(range(0, self.input_ids.numel(), self.input_ids.shape[1]))
        return (0, *accumulate(self.lengths[:-1]))

    def by_example(self, values: Tensor) -> Tensor:
        """What belongs to the tokens, ``[..., c]`` in their order, as ``[B, longest, c]``; if packed, padding is 0."""
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
        shares: ``[B]`` what each of its losses counts for; zero in one that only keeps step.
        reuses_forward: Whether it starts from block inputs that the sketch holds.
    """

    batch: Batch
    shares: Tensor
    reuses_forward: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step leaves behind: one row of metrics.jsonl and one of selection.jsonl."""

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
    """Peak memory by kind (the headline's first: ``nvml``, ``allocator`` or ``resident``) and phase, on each rank."""
    exchanged_bytes: dict[str, int]
    """Bytes each collective of the selection put on the wire per rank, by phase; the gradient reduction excluded."""
    imbalance: float
    padding_share: dict[str, float] = field(default_factory=dict)
    """Share of computed tokens that are padding, by phase (sketch, train)."""
    applied: bool = True
    """False where float16's loss scale was too large for the step: it has changed nothing but the scale."""
    loss_scale: float = 1.0
    telemetry: dict[str, float] = field(default_factory=dict)
    """Figures of the selection, by name (`colm_scale.selection.telemetry`)."""
    floor: float | None = None
    """Measured step seconds / bare-floor seconds on the same tokens, on the steps where it was taken."""
    audit: Audit | None = None
    """On the first rank, if the run keeps an audit."""


def long_tensor(values: Tensor | Sequence[int]) -> Tensor:
    """A CPU int64 tensor of ``values``."""
    return torch.as_tensor(values, dtype=torch.int64)
