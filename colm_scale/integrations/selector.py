"""Selection for another library's training loop: candidates in, micro-batches to train on out.

The stages, and so ids and losses, are those of `colm_scale.step.step`; only the training is the loop's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from colm_scale.checkpoint.selection_state import SelectionState
from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.data.batching import Batching
from colm_scale.data.examples import Examples
from colm_scale.distributed.connect import connect
from colm_scale.distributed.examples import gather_examples
from colm_scale.distributed.group import Group
from colm_scale.engines.base import Update
from colm_scale.errors import UserError
from colm_scale.estimators.make import make_estimator
from colm_scale.estimators.reuse import reusing
from colm_scale.integrations.candidates import Columns, as_examples, rows_of
from colm_scale.integrations.options import LOOP, as_run
from colm_scale.modeling.attention import PACKED, PACKED_SDPA
from colm_scale.modeling.causal import CausalModel, moved
from colm_scale.modeling.forward_reuse import BlockInputs
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.modeling.probe import find_probe, of_sample, sample_of_model, trial_batch, without_dropout
from colm_scale.profiling.memory import memory_meter
from colm_scale.profiling.spans import Spans
from colm_scale.records import Candidates, MicroBatch, Route, Selection, StepReport, long_tensor, on_device
from colm_scale.selection.quota import kept_sources
from colm_scale.selection.rule import SelectionRule
from colm_scale.selection.shares import check_shares, source_shares
from colm_scale.sketch.tap import Tap
from colm_scale.step.measure import Measurement
from colm_scale.step.select import Chosen, SelectionStage
from colm_scale.step.sketch import EstimatorStage, SketchStage
from colm_scale.step.source_refresh import SourceRefresh
from colm_scale.step.source_state import SourceState
from colm_scale.step.train import Routed, Trained, check_losses, route_coreset


@dataclass(frozen=True, slots=True)
class Coreset:
    """The coreset of one step.

    Attributes:
        candidates: Candidates of all ranks; with one rank in the order of the batch, without the examples that have no
            token to learn.
        selection: Positions among the candidates, and weights.
        micro_batches: This rank's; every rank has the same number. `CoresetSelector.loss` gives the loss of each.
        route: The rank that trains each selected candidate.
        dropped: Number of examples per source that have no token to learn.
    """

    candidates: Candidates
    selection: Selection
    micro_batches: tuple[MicroBatch, ...]
    route: Route
    dropped: Mapping[str, int]


class CoresetSelector:
    """Selects the examples that a training loop trains on. All ranks create it and call it together.

    Args:
        model: A causal language model with LoRA adapters (optional unless the method is colm), without the wrapper that
            trains it (DDP, an engine), but already sharded if it will be.
        coreset: The options of the selection; or a run's, of which ``selection`` and some of ``data`` and ``train``
            have an effect.
        sources: Training examples of each source, by name.
        group: The ranks; by default those that the launcher started.

    Attributes:
        names: ``[Q]`` the sources, sorted.
        step: Number of the last step.

    Raises:
        UserError: An option has no effect here, a kept source does not exist, or the model has no probe.
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
        selection, train, refresh_every = config.selection, config.train, config.sources.refresh_every
        kept = kept_sources(self.sizes, self.names, selection.kept_sources)
        check_shares(selection, self.names, kept, refreshed=refresh_every > 0)
        shares = source_shares(selection.shares, self.names, self.sizes)
        self._module, tap = _prepare(model, selection, train.packing, self.group.device)
        packed = self._module.packs
        pad_id = self._module.causal_model.config.get_text_config().pad_token_id or 0
        self._batching = Batching(pad_id, train.micro_batch_tokens, packed, self.group.device)
        self.meter = memory_meter(self.group)
        self._spans, self._training = Spans(self.group.device, self.meter), ExitStack()
        rule = SelectionRule(selection, kept, train.seed, shares)
        fed_back = selection.feedback_columns(tap.size) if tap else 0
        state = SourceState(kept, shares, selection, refresh_every, fed_back)
        self._select = SelectionStage(rule, self._sketch_stage(tap), state, self.group, self._spans)
        self.state = SelectionState(self._select.sketch.estimator, state, self.group)
        self._measure = Measurement(self.group, self._spans, train.seed, packed=packed, audits=config.audit)
        self._open: _Open | None = None
        self.step = 0

    @property
    def padded_because(self) -> str:
        """Why micro-batches are padded; empty if they are packed."""
        return self._module.padded_because

    def select(
        self,
        batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples],
        *,
        step: int | None = None,
        micro_batches: int | None = None,
        learning_rate: float = math.nan,
    ) -> Coreset:
        """Select among the candidates in each rank's batch. Ends the previous step (`finish`).

        With fewer candidates than `SelectionConfig.candidates`, at the end of an epoch, the budget is proportional.

        Args:
            batch: Output of a collator: ``input_ids`` and ``labels`` ``[B, T]``, and ``attention_mask`` if there is
                padding; names of the sources as ``source``, and optional ids as ``coreset_id``. Or parts of examples,
                see `gather_examples`.
            step: Its number, from 1; by default the one after the last.
            micro_batches: Number per rank; by default as many as ``train.micro_batch_tokens`` requires.
            learning_rate: For the report.
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
        """A micro-batch's part of the loss of the step.

        The sum over all micro-batches and ranks is the weighted mean loss of the coreset. Where ranks average their
        gradients, multiply it by their number.

        Args:
            through: Called in place of the model that it wraps: DDP's wrapper, an engine.
        """
        assert self._open is not None
        losses: Tensor = self._module(micro_batch.batch, through)
        positions = micro_batch.batch.positions
        at = on_device(positions, self.group.device)
        self._open.losses[0, at], self._open.losses[1, at] = losses.detach()[: len(positions)], 1.0
        return (losses * micro_batch.shares).sum()

    def finish(self, *, applied: bool = True) -> StepReport | None:
        """End the current step, if there is one, and report it. All ranks call it together.

        The report has no loss (NaN) unless every loss came from `loss`.

        Args:
            applied: False if the loop's optimizer skipped the step, as it does in float16 after an overflow.
        """
        if self._open is None:
            return None
        self._training.close()
        done, self._open = self._open, None
        chosen, selection = done.chosen, done.chosen.selection
        with self._spans("report"):
            described = self._measure.describe(chosen)
        losses, known = self.group.all_reduce(done.losses, "report").cpu()
        if known[selection.positions].all():
            check_losses(chosen.candidates, selection, losses, updated=True)
        else:
            losses = torch.full_like(losses, math.nan)
        self._select.conclude(chosen, applied=applied)
        update = Update(norm=math.nan, applied=applied, loss_scale=1.0)
        trained = Trained(done.routed, losses, update, done.learning_rate)
        return self._measure(chosen, trained, described, self._select.facts(chosen))

    def _sketch_stage(self, tap: Tap | None) -> SketchStage:
        if tap is None:
            return SketchStage(self.group.world_size)
        selection, train = self.config.selection, self.config.train
        estimator = make_estimator(tap, selection, train, self.group)
        estimator = reusing(estimator, selection, int(self.sizes.sum()))
        return EstimatorStage(estimator, self._batching, BlockInputs(), SourceRefresh(), self.group, self._spans)

    def _draw(self, batch: Mapping[str, Tensor | Sequence[object]] | Sequence[Examples]) -> tuple[Candidates, Examples]:
        """The candidates of all ranks. Missing ids are replaced by the running number of the candidate."""
        if isinstance(batch, Mapping):
            rows = rows_of(batch)
            batch = [as_examples(rows, rows, self.columns)]
        examples = gather_examples(batch, self.group)
        number = torch.arange(len(examples))
        ids = torch.where(examples.ids < 0, (self.step - 1) * self.config.selection.candidates + number, examples.ids)
        protected = examples.protected if examples.protected.any() else None
        return Candidates(self.step, number, ids, examples.sources, examples.lengths, protected), examples


@dataclass(frozen=True, slots=True)
class _Open:
    """The step between `select` and `finish`; ``losses`` ``[2, n]``: this rank's, and 1 where they are known."""

    chosen: Chosen
    routed: Routed
    losses: Tensor
    learning_rate: float


def _prepare(
    model: CausalModel, selection: SelectionConfig, packing: str, device: torch.device
) -> tuple[ExampleLoss, Tap | None]:
    """The loss around a model that already has adapters and may be sharded, and the tap if the method is colm.

    All ranks call it together. Packing and the probe are tried out on a sample of the model.

    Raises:
        UserError: It is not a model of transformers, or has no adapter at the probe.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"{type(base).__name__} is not a model of transformers; load one with transformers")
    module = ExampleLoss(model, whole=True)
    own = base.config._attn_implementation
    packs = own in ("sdpa", PACKED, PACKED_SDPA)
    sample = moved(sample_of_model(base, "sdpa" if packs else "eager"), base.dtype)
    if packs:
        module.padded_because, module.sdpa_because = use_packing(sample, packing, device)
        base.config._attn_implementation = sample.config._attn_implementation
    if selection.method != "colm":
        # The first forward may run twice (`ExampleLoss`), and one that a backward follows must not.
        with torch.no_grad(), without_dropout(module):
            module(trial_batch([torch.arange(1, 8)], device))
        return module, None
    if model is base:
        raise UserError(
            "method colm compares gradients of a LoRA adapter, and this model has none: add adapters with peft, or "
            "use SelectionConfig(method='stratified'), which compares nothing"
        )
    probe = find_probe(sample, selection.probe)
    return module, Tap(module, of_sample(sample, probe, base))
