"""The first half of a step, for a training loop that is not colm_scale's: candidates in, micro-batches to train on out.

The parts, and so ids and losses, are those of `colm_scale.step.step`; what differs is who trains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from colm_scale.checkpoint.selection_state import SelectionState
from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.data.batching import Batching
from colm_scale.data.examples import Examples
from colm_scale.distributed.examples import gather_examples
from colm_scale.distributed.group import Group, connect
from colm_scale.engines.base import Update
from colm_scale.estimators.estimators import make_estimator
from colm_scale.estimators.reuse import reusing
from colm_scale.integrations.candidates import Columns, as_examples, rows_of
from colm_scale.integrations.model import prepare
from colm_scale.integrations.options import LOOP, as_run
from colm_scale.modeling.causal import CausalModel
from colm_scale.modeling.forward_reuse import NoBlockInputs
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, MicroBatch, Route, Selection, StepReport, long_tensor
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.shares import check_shares, source_shares
from colm_scale.sketch.tap import Tap
from colm_scale.step.checks import check_losses
from colm_scale.step.measure import Measurement, Trained
from colm_scale.step.select import Chosen, SelectionStage
from colm_scale.step.sketch import EstimatorStage, NoSketchStage, SketchStage
from colm_scale.step.source_refresh import FixedSources
from colm_scale.step.source_state import SourceState
from colm_scale.step.train import Routed, route_coreset


@dataclass(frozen=True, slots=True)
class Coreset:
    """What to train on in one step.

    Attributes:
        candidates: Of all ranks; with one rank in the order of the batch, but for examples without a token to learn.
        selection: Positions among them, and weights.
        micro_batches: This rank's, as many as on every other; each loss by `CoresetSelector.loss`.
        route: Which rank trains which.
        dropped: Examples per source that have no token to learn, so were no candidates.
    """

    candidates: Candidates
    selection: Selection
    micro_batches: tuple[MicroBatch, ...]
    route: Route
    dropped: Mapping[str, int]


class CoresetSelector:
    """Selects what a training loop trains on. All ranks make one, and call it, together.

    Args:
        model: A causal language model with LoRA adapters (of any kind with a method other than colm), without what
            trains it (DDP, an engine), but in shards if it is to be.
        coreset: The options of the selection; or a run's, of which ``selection`` and some of ``data`` and ``train``
            count.
        sources: Training examples of each source, by name.
        group: The ranks; by default those that a launcher has started.

    Attributes:
        names: ``[Q]`` the sources, sorted.
        step: How many steps have been selected for.

    Raises:
        UserError: An option has no effect here, a kept source is none, or the model has no probe.
    """

    def __init__(
        self,
        model: CausalModel,
        coreset: SelectionConfig | RunConfig,
        sources: Mapping[str, int],
        group: Group | None = None,
    ):
        self.config = config = as_run(coreset, LOOP)
        self.group = group or dataclasses.replace(connect(), device=next(model.parameters()).device)
        self.names = tuple(sorted(sources))
        self.columns = Columns(config.data.column("source"), config.data.column("protected"), self.names)
        self.sizes = long_tensor([sources[name] for name in self.names])
        selection, refreshed = config.selection, config.sources.refresh_every > 0
        kept = kept_sources(self.sizes, self.names, selection.kept_sources)
        check_shares(selection, self.names, kept, refreshed=refreshed)
        shares = source_shares(selection.shares, self.names, self.sizes)
        self._module, tap = prepare(model, config, self.group.device)
        pad_id = self._module.causal_model.config.get_text_config().pad_token_id or 0
        self._batching = Batching(pad_id, config.train.micro_batch_tokens, self._module.packs, self.group.device)
        self.meter = memory_meter(self.group.device)
        self._spans, self._training = Spans(self.group.device, self.meter), ExitStack()
        rule = SelectionRule(selection, kept, config.train.seed, shares)
        state = SourceState(kept, shares, config)
        self._select = SelectionStage(rule, self._sketch_stage(tap), state, self.group, self._spans)
        self.state = SelectionState(self._select.sketch.estimator, state, self.group)
        seed, packed = config.train.seed, self._batching.packed
        self._measure = Measurement(self.group, self._spans, seed, packed=packed, audits=config.audit)
        self._open: _Open | None = None
        self.step = 0

    @property
    def padded_because(self) -> str | None:
        """Why micro-batches are padded; None if they are packed."""
        return self._module.padded_because

    def select(
        self,
        batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples],
        *,
        step: int | None = None,
        micro_batches: int | None = None,
        learning_rate: float = math.nan,
    ) -> Coreset:
        """Select among a batch of candidates, or of each rank's; ends the step before (`finish`).

        Fewer candidates than `SelectionConfig.candidates`, at the end of an epoch, have a budget in proportion.

        Args:
            batch: What a collator makes: ``input_ids`` and ``labels`` ``[B, T]``, and ``attention_mask`` if there is
                padding; with the names of the sources as ``source``, and as ``coreset_id`` ids, if there are any. Or
                parts of examples, see `gather_examples`.
            step: From 1; by default the one after the last.
            micro_batches: How many every rank is to get; by default as many as ``train.micro_batch_tokens`` demands.
            learning_rate: Of the step, for its report.
        """
        self.finish()
        self.step = self.step + 1 if step is None else step
        chosen = self._select(partial(self._draw, batch))
        with self._spans("route"):
            routed = route_coreset(
                chosen, self._batching, self.config.train.loss, self.group, micro_batches=micro_batches
            )
        losses = torch.zeros(2, len(chosen.candidates), device=self.group.device)
        self._open = _Open(chosen, routed, losses, learning_rate)
        self._training.enter_context(self._spans("train"))
        dropped = chosen.examples.dropped
        return Coreset(chosen.candidates, chosen.selection, tuple(routed.micro_batches), routed.route, dropped)

    def loss(self, micro_batch: MicroBatch, through: nn.Module | None = None) -> Tensor:
        """A micro-batch's part of the loss of the step, which is the weighted mean over the coreset's examples; the sum
        over all micro-batches and ranks is that loss, so where ranks' gradients are averaged it is to be multiplied
        by their number.

        Args:
            through: What is called in place of the model that it wraps: DDP's wrapper, an engine.
        """
        assert self._open is not None
        losses: Tensor = self._module(micro_batch.batch, through)
        positions = micro_batch.batch.positions
        at = positions.to(self.group.device)
        self._open.losses[0, at], self._open.losses[1, at] = losses.detach()[: len(positions)], 1.0
        return (losses * micro_batch.shares).sum()

    def finish(self) -> StepReport | None:
        """End the step that is under way, if one is, and report it. All ranks call it together. The report has no loss
        unless every loss came from `loss`."""
        if self._open is None:
            return None
        self._training.close()
        done, self._open = self._open, None
        chosen, selection = done.chosen, done.chosen.selection
        losses, known = self.group.all_reduce(done.losses, "report").cpu()
        if known[selection.positions].all():
            check_losses(chosen.candidates, selection, losses, updated=True)
        else:
            losses = torch.full_like(losses, math.nan)
        self._select.conclude(chosen, applied=True)
        update = Update(norm=math.nan, applied=True, loss_scale=1.0)
        trained = Trained(done.routed, losses, update, done.learning_rate)
        return self._measure(chosen, trained, self._select.facts(chosen))

    def _sketch_stage(self, tap: Tap | None) -> SketchStage:
        if tap is None:
            return NoSketchStage(self.group.world_size)
        selection, train = self.config.selection, self.config.train
        estimator = make_estimator(tap, selection, train, self.group)
        estimator = reusing(estimator, selection, int(self.sizes.sum()))
        return EstimatorStage(estimator, self._batching, NoBlockInputs(), FixedSources(), self.group, self._spans)

    def _draw(self, batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples]) -> tuple[Candidates, Examples]:
        """The candidates of all ranks; ids that are not given count the candidates."""
        examples = gather_examples(self._parts(batch), self.group)
        number = torch.arange(len(examples))
        ids = torch.where(examples.ids < 0, (self.step - 1) * self.config.selection.candidates + number, examples.ids)
        protected = examples.protected if examples.protected.any() else None
        return Candidates(self.step, number, ids, examples.sources, examples.lengths, protected), examples

    def _parts(self, batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples]) -> Sequence[Examples]:
        if not isinstance(batch, Mapping):
            return batch
        rows = rows_of(batch)
        return [as_examples(rows, rows, self.columns)]


@dataclass(frozen=True, slots=True)
class _Open:
    """A step that is under way; ``losses`` ``[2, n]`` are those known on this rank, and which they are."""

    chosen: Chosen
    routed: Routed
    losses: Tensor
    learning_rate: float
