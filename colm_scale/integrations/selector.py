"""The first half of a step, for a training loop that is not colm_scale's: candidates in, micro-batches to train on out.

The parts, and so ids and losses, are those of `colm_scale.step`; what differs is who trains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colm_scale.checkpoint.selection_state import SelectionState
from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.data.batching import collate_share, weighted
from colm_scale.data.examples import Examples
from colm_scale.distributed.estimators import make_estimator
from colm_scale.distributed.exchange import share_selection
from colm_scale.distributed.group import Group, connect
from colm_scale.distributed.observer import Observer
from colm_scale.distributed.reuse import reusing
from colm_scale.distributed.rows import gather_examples
from colm_scale.finite import check_sketches
from colm_scale.integrations.candidates import Columns, as_examples, rows_of
from colm_scale.integrations.model import prepare
from colm_scale.integrations.options import LOOP, as_run
from colm_scale.modeling.causal import CausalModel
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans, over_ranks
from colm_scale.randomness import generator
from colm_scale.records import CandidateMatrix, Candidates, MicroBatch, Quota, Route, Selection, StepReport, long_tensor
from colm_scale.selection import telemetry
from colm_scale.selection.allocation import check_shares, source_shares
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.route import route
from colm_scale.selection.rule import SelectionRule, loss_shares
from colm_scale.sketch.plan import plan_sketch


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
        selection = config.selection
        kept = kept_sources(self.sizes, self.names, selection.kept_sources)
        check_shares(selection, self.names, kept, refreshed=config.sources.refresh_every > 0)
        shares = source_shares(selection.shares, self.names, self.sizes)
        self._rule = SelectionRule(selection, kept, config.train.seed, shares)
        self._module, tap = prepare(model, config, self.group.device)
        self._estimator = None
        if tap is not None:
            estimator = make_estimator(tap, selection, config.train, self.group)
            self._estimator = reusing(estimator, selection, int(self.sizes.sum()))
        self._observer = Observer(kept, config)
        self.state = SelectionState(self._estimator, self._observer, self.group)
        self.meter = memory_meter(self.group.device)
        self._spans, self._training = Spans(self.group.device, self.meter), ExitStack()
        self._pad_id = self._module.causal_model.config.get_text_config().pad_token_id or 0
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
        spans, group = self._spans, self.group
        group.take_traffic()
        with spans("sample"):
            examples = gather_examples(self._parts(batch), group)
            candidates = self._candidates(examples)
            rule = self._rule_for(len(candidates))
            quota = rule.quota(candidates, self._observer.coverage)
        matrix = self._sketch(examples, candidates, quota)
        with spans("select"):
            selection = rule.select(candidates, quota, matrix) if group.is_first else None
        with spans("broadcast"):
            selection = share_selection(selection, rule.most_selected, candidates, group)
        if self._estimator is not None:
            check_sketches(self._plan, selection, self.step)
            with spans("learn"):
                self._estimator.learn(selection)
        with spans("route"):
            coreset, shares = self._deal(examples, candidates, selection, micro_batches)
            worth = self._worth(candidates, selection, matrix)
        losses = torch.zeros(2, len(candidates), device=group.device)
        self._open = _Open(coreset, shares, losses, learning_rate, worth)
        self._training.enter_context(spans("train"))
        return coreset

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
        candidates, selection = done.coreset.candidates, done.coreset.selection
        losses, known = self.group.all_reduce(done.losses, "report").cpu()
        of_selected = losses[selection.positions]
        told = bool(known[selection.positions].all()) and bool(of_selected.isfinite().all())
        loss = float((losses * done.shares).sum()) if told else math.nan
        renewed = self._observer.after(candidates, selection, applied=True)
        if renewed and self._estimator is not None:
            self._estimator.moments = self._estimator.moments.fresh()
        seconds, peaks = over_ranks(*self._spans.finish(), self.group)
        return StepReport(
            step=candidates.step,
            loss=loss,
            learning_rate=done.learning_rate,
            gradient_norm=math.nan,
            candidates=candidates,
            selection=selection,
            seconds=seconds,
            peak_bytes=next(iter(peaks.values()))["step"],
            phase_peak_bytes=peaks,
            exchanged_bytes=self.group.take_traffic(),
            imbalance=done.coreset.route.imbalance,
            padding_share={"train": _padding(done.coreset.route)},
            telemetry=done.worth,
        )

    def _parts(self, batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples]) -> Sequence[Examples]:
        if not isinstance(batch, Mapping):
            return batch
        rows = rows_of(batch)
        return [as_examples(rows, rows, self.columns)]

    def _candidates(self, examples: Examples) -> Candidates:
        """Ids that are not given count the candidates."""
        number = torch.arange(len(examples))
        ids = torch.where(examples.ids < 0, (self.step - 1) * self.config.selection.candidates + number, examples.ids)
        protected = examples.protected if examples.protected.any() else None
        return Candidates(self.step, number, ids, examples.sources, examples.lengths, protected)

    def _rule_for(self, count: int) -> SelectionRule:
        config = self._rule.config
        budget = math.ceil(config.budget * min(1, count / config.candidates))
        config = dataclasses.replace(config, candidates=count, budget=budget)
        return dataclasses.replace(self._rule, config=config, kept=self._observer.recent.kept)

    def _sketch(self, examples: Examples, candidates: Candidates, quota: Quota) -> CandidateMatrix | None:
        if self._estimator is None:
            return None
        config, group, packed = self.config, self.group, self._module.packs
        with self._spans("sketch"):
            known, budget_tokens = self._estimator.known(candidates), config.train.micro_batch_tokens
            self._plan = plan_sketch(candidates, quota, group.world_size, budget_tokens, known, packed)
            share = self._plan.shares[group.rank]
            batches = collate_share(examples, candidates, share, self._pad_id, group.device, packed=packed)
            self._estimator.sketch(self._plan, batches)
        with self._spans("gather"):
            return self._estimator.gather()

    def _deal(
        self, examples: Examples, candidates: Candidates, selection: Selection, count: int | None
    ) -> tuple[Coreset, Tensor]:
        """The coreset, and ``[n]`` what each candidate's loss counts for."""
        group, train, packed = self.group, self.config.train, self._module.packs
        shares = torch.zeros(len(candidates))
        label_tokens = examples.label_counts(selection.positions)
        shares[selection.positions] = loss_shares(selection, label_tokens, train.loss)
        routed = route(
            candidates.lengths,
            selection.positions,
            group.world_size,
            train.micro_batch_tokens,
            packed=packed,
            count=count,
        )
        own = routed.micro_batches[group.rank]
        batches = collate_share(examples, candidates, own, self._pad_id, group.device, packed=packed)
        micro_batches = tuple(weighted(batches, shares, group.device))
        return Coreset(candidates, selection, micro_batches, routed, examples.dropped), shares

    def _worth(
        self, candidates: Candidates, selection: Selection, matrix: CandidateMatrix | None
    ) -> dict[str, float]:
        """As in a run: on the first rank, what the selection was worth beside a random draw with its quotas."""
        if not self.group.is_first:
            return {}
        draws = generator(self.config.train.seed, "telemetry", candidates.step)
        eligible = telemetry.could_be_picked(candidates, selection, matrix)
        draw = telemetry.stratified_like(selection, candidates.sources, eligible, draws)
        found = telemetry.worth(candidates, selection, matrix, draw)
        return found if self._estimator is None else found | dict(self._estimator.facts)


@dataclass(frozen=True, slots=True)
class _Open:
    """A step that is under way; ``losses`` ``[2, n]`` are those known on this rank, and which they are."""

    coreset: Coreset
    shares: Tensor
    losses: Tensor
    learning_rate: float
    worth: dict[str, float]


def _padding(routed: Route) -> float:
    return 1 - sum(routed.tokens) / max(1, sum(routed.padded_tokens))
