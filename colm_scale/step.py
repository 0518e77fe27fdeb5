"""One optimizer step: sample, sketch, gather, select, broadcast, route, train, report (DESIGN section 2).

Data flows one way, in frozen records. What runs on this rank alone and what all ranks do together is the business of
the estimator, the exchange and the engine; nothing here asks how many ranks there are or what shards the model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_scale.config import RunConfig
from colm_scale.data.batching import collate_share, weighted
from colm_scale.data.sampler import Sampler
from colm_scale.distributed.engine import Engine
from colm_scale.distributed.estimators import Estimator
from colm_scale.distributed.exchange import share_selection
from colm_scale.distributed.follow import Drift, Follower
from colm_scale.distributed.group import Group
from colm_scale.distributed.observer import Observer
from colm_scale.finite import check_losses, check_sketches, check_update
from colm_scale.modeling.probe import without_dropout
from colm_scale.modeling.replay import BlockInputs
from colm_scale.profiling.spans import Spans, over_ranks
from colm_scale.randomness import generator, global_draws
from colm_scale.records import (
    Audit,
    Batch,
    CandidateMatrix,
    Candidates,
    MicroBatch,
    Quota,
    Route,
    Selection,
    SketchPlan,
    StepReport,
)
from colm_scale.selection import baselines, telemetry
from colm_scale.selection.audit import audit
from colm_scale.selection.recent import RecentSources
from colm_scale.selection.route import padding_share, route
from colm_scale.selection.rule import SelectionRule, loss_shares
from colm_scale.sketch.plan import kept_on, plan_sketch

PHASES = ("sample", "sketch", "gather", "select", "broadcast", "learn", "route", "train", "optimizer", "report")


@dataclass(frozen=True, slots=True)
class Work:
    """The batches of a step on this rank, kept so that the bare floor can run the same tokens again."""

    sketched: list[Batch]
    trained: list[MicroBatch]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a step will do, as far as that is known before anything is computed. Equal on every rank.

    Attributes:
        plan: Who will be sketched where; None if nothing is.
        drawn: A coreset with the step's quotas, drawn at random where the step would rank.
        routed: Who would train it.
    """

    candidates: Candidates
    quota: Quota
    plan: SketchPlan | None
    drawn: Selection
    routed: Route


class CoresetStep:
    """Everything one step needs; call it with the step's number (from 1) and learning rate."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        rule: SelectionRule,
        estimator: Estimator | None,
        observer: Observer,
        engine: Engine,
        group: Group,
        spans: Spans,
        pad_id: int,
        inputs: BlockInputs | None = None,
        follower: Follower | None = None,
    ):
        self.estimator, self.observer, self.follower = estimator, observer, follower
        self._config, self._sampler, self._rule = config, sampler, rule
        self._engine, self._group, self._spans = engine, group, spans
        self._pad_id, self._inputs = pad_id, inputs

    def __call__(self, step: int, learning_rate: float) -> tuple[StepReport, Work]:
        """Train one step.

        Raises:
            TrainingError: On every rank: ranks disagree, no sketch is finite, a loss of the coreset is not (names step
                and ids), or the gradient is not. The weights have not changed.
        """
        spans, group, estimator = self._spans, self._group, self.estimator
        rule = self._current_rule()
        budget_tokens = self._config.train.micro_batch_tokens
        matrix, plan, sketched, kept = None, None, [], None

        group.take_traffic()  # what was exchanged between steps is not the step's
        with spans("sample"):
            candidates = self._candidates(step)
            quota = rule.quota(candidates, self.observer.coverage)
            if estimator is not None:
                plan = self._plan(estimator, candidates, quota)
                sketched = self._batches(candidates, plan.shares[group.rank], self._engine.module.packs)
        if estimator is not None and plan is not None:
            with spans("sketch"):
                kept = self._sketch(estimator, candidates, plan, sketched)
            with spans("gather"):
                matrix = estimator.gather()
        with spans("select"):
            selection = rule.select(candidates, quota, matrix) if group.is_first else None
        with spans("broadcast"):
            selection = share_selection(selection, rule.most_selected, candidates, group)
        if estimator is not None and plan is not None:
            check_sketches(plan, selection, step)
            with spans("learn"):
                estimator.learn(selection)
        with spans("route"):
            packed, shares = self._engine.module.packs, self._shares(candidates, selection)
            routed = route(
                candidates.lengths, selection.positions, group.world_size, budget_tokens, packed=packed, kept_on=kept
            )
            trained = self._micro_batches(candidates, shares, routed)
            if self._inputs is not None:
                self._inputs.arrange([micro_batch.batch for micro_batch in trained if micro_batch.replayed])
        with spans("train"), global_draws(group.device, self._config.train.seed, "dropout", step, group.rank):
            losses = self._train(trained, candidates)
            check_losses(candidates, selection, losses)
        with spans("optimizer"):
            update = self._engine.step(learning_rate)
            renewed = self.observer.after(candidates, selection, update.applied)
            if renewed and estimator is not None:
                estimator.moments = estimator.moments.fresh()
        check_update(update, step)

        with spans("report"):
            worth = self._worth(candidates, selection, matrix) | self._facts(selection, kept)
            audited = self._audit(candidates, quota, selection, matrix, rule)
        seconds, phase_peak_bytes = over_ranks(*spans.finish(), group)
        report = StepReport(
            step=step,
            loss=float((losses * shares).sum()),
            learning_rate=learning_rate,
            gradient_norm=update.norm,
            applied=update.applied,
            loss_scale=update.loss_scale,
            candidates=candidates,
            selection=selection,
            seconds=seconds,
            peak_bytes=next(iter(phase_peak_bytes.values()))["step"],
            phase_peak_bytes=phase_peak_bytes,
            exchanged_bytes=group.take_traffic(),
            imbalance=routed.imbalance,
            padding_share=self._padding(candidates, plan, routed),
            telemetry=worth,
            audit=audited,
        )
        return report, Work(sketched, trained)

    def preview(self, step: int) -> Preview:
        """What the step will do; of what it changes, only the sampler goes on."""
        rule = self._current_rule()
        candidates = self._candidates(step)
        quota = rule.quota(candidates, self.observer.coverage)
        if self.estimator is None:
            plan, drawn = None, rule.select(candidates, quota, None)
        else:
            plan = self._plan(self.estimator, candidates, quota)
            drawn = baselines.stratified(candidates.sources, quota, generator(rule.seed, "preview", step))
        budget_tokens, packed = self._config.train.micro_batch_tokens, self._engine.module.packs
        routed = route(candidates.lengths, drawn.positions, self._group.world_size, budget_tokens, packed=packed)
        return Preview(candidates, quota, plan, drawn, routed)

    def _plan(self, estimator: Estimator, candidates: Candidates, quota: Quota) -> SketchPlan:
        known, packed = estimator.known(candidates), self._engine.module.packs
        ranks, budget_tokens = self._group.world_size, self._config.train.micro_batch_tokens
        return plan_sketch(candidates, quota, ranks, budget_tokens, known, packed)

    def follow(self, step: int) -> Drift | None:
        """After a step: re-cluster the sources if due, and go by them from then on."""
        if self.follower is None:
            return None
        drift = self.follower.refresh(step)
        if drift is not None:
            self.observer.recent = RecentSources.beginning(self.follower.kept)
        return drift

    def _current_rule(self) -> SelectionRule:
        shares = self._rule.shares if self.follower is None else self.follower.shares
        return dataclasses.replace(self._rule, kept=self.observer.recent.kept, shares=shares)

    def _candidates(self, step: int) -> Candidates:
        candidates = self._sampler(step)
        return candidates if self.follower is None else self.follower.relabelled(candidates)

    def _looking(self) -> AbstractContextManager[None]:
        """A block whose forwards tell what the sources are found by."""
        return nullcontext() if self.follower is None else self.follower.looking()

    def _sketch(
        self, estimator: Estimator, candidates: Candidates, plan: SketchPlan, batches: list[Batch]
    ) -> Tensor | None:
        """Sketch this rank's share; ``[n]`` the rank that has kept a candidate's block inputs, if that is done."""
        if self._inputs is None:
            with self._looking():
                estimator.sketch(plan, batches)
            return None
        most = self._config.train.forward_reuse_gib * 2**30 // self._inputs.bytes_per_token
        kept, counts = kept_on(plan, candidates.lengths, most)
        with self._inputs.keeping(counts[self._group.rank]), self._looking():
            estimator.sketch(plan, batches)
        return kept

    def _padding(self, candidates: Candidates, plan: SketchPlan | None, routed: Route) -> dict[str, float]:
        """Share of the computed tokens that is padding, by phase."""
        found = {"train": 1 - sum(routed.tokens) / max(1, sum(routed.padded_tokens))}
        if plan is not None:
            found["sketch"] = 0.0 if self._engine.module.packs else padding_share(candidates.lengths, plan.shares)
        return found

    def bare_floor_seconds(self, work: Work, sketch: Callable[[Batch], object] | None = None) -> float:
        """Seconds of the slowest rank for the least any implementation must do with a step's tokens (DESIGN section 3).

        One forward of the sketched candidates, then forward, backward and optimizer of the coreset, without a hook of
        ours; afterwards the adapters and the optimizer are as they were.

        Args:
            sketch: In place of the bare forward of a sketched micro-batch; an estimator's own for its floor.
        """
        restore = self._engine.snapshot()
        self._group.barrier()
        started = self._now()
        module = self._engine.module
        with nullcontext() if sketch else torch.no_grad(), without_dropout(module):
            for batch in work.sketched:
                (sketch or module)(batch)
        with global_draws(self._group.device, self._config.train.seed, "floor"):
            for number, micro_batch in enumerate(work.trained, 1):
                losses = self._engine.forward(micro_batch.batch)
                self._engine.backward((losses * micro_batch.shares).sum(), last=number == len(work.trained))
        self._engine.step(0.0)
        seconds = torch.tensor([self._now() - started], dtype=torch.float64, device=self._group.device)
        restore()
        slowest = self._group.all_reduce(seconds, "floor", largest=True)
        self._group.take_traffic()
        return float(slowest)

    def _facts(self, selection: Selection, kept: Tensor | None) -> dict[str, float]:
        facts = {} if self.estimator is None else dict(self.estimator.facts)
        if kept is not None:
            facts["replayed_share"] = float((kept[selection.positions] >= 0).double().mean())
        if self._config.selection.coverage_floor:
            facts["coverage_owed"] = float(self.observer.coverage.examples_owed)
        return facts

    def _audit(
        self,
        candidates: Candidates,
        quota: Quota,
        selection: Selection,
        matrix: CandidateMatrix | None,
        rule: SelectionRule,
    ) -> Audit | None:
        if not (self._config.audit and self._group.is_first):
            return None
        return audit(candidates, quota, selection, matrix, rule.kept, rule.config)

    def _train(self, micro_batches: Sequence[MicroBatch], candidates: Candidates) -> Tensor:
        """Forward and backward of the coreset; ``[n]`` the losses of all ranks' examples, zero where not trained."""
        losses = torch.zeros(len(candidates), device=self._group.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            with self._replaying(micro_batch), self._looking():
                own = self._engine.forward(micro_batch.batch)
            self._engine.backward((own * micro_batch.shares).sum(), last=number == len(micro_batches))
            positions = micro_batch.batch.positions
            losses[positions.to(losses.device)] = own.detach()[: len(positions)]
        if self.follower is not None:
            self.follower.remember(candidates)
        return self._group.all_reduce(losses, "report").cpu()

    def _replaying(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        if self._inputs is None or not micro_batch.replayed:
            return nullcontext()
        return self._inputs.replaying(micro_batch.batch)

    def _worth(
        self, candidates: Candidates, selection: Selection, matrix: CandidateMatrix | None
    ) -> dict[str, float]:
        """What the selection was worth beside a random draw with its quotas; on other ranks than the first, nothing."""
        if not self._group.is_first:
            return {}
        eligible = telemetry.could_be_picked(candidates, selection, matrix)
        draws = generator(self._config.train.seed, "telemetry", candidates.step)
        draw = telemetry.stratified_like(selection, candidates.sources, eligible, draws)
        return telemetry.worth(candidates, selection, matrix, draw)

    def _shares(self, candidates: Candidates, selection: Selection) -> Tensor:
        """``[n]`` what each candidate's loss counts for; zero where it is not selected."""
        label_tokens = self._sampler.examples.label_counts(candidates.indices[selection.positions])
        shares = torch.zeros(len(candidates))
        shares[selection.positions] = loss_shares(selection, label_tokens, self._config.train.loss)
        return shares

    def _micro_batches(self, candidates: Candidates, shares: Tensor, routed: Route) -> list[MicroBatch]:
        batches = self._batches(candidates, routed.micro_batches[self._group.rank], self._engine.module.packs)
        return weighted(batches, shares, self._group.device, routed.replayed)

    def _batches(self, candidates: Candidates, share: Sequence[tuple[int, ...]], packed: bool) -> list[Batch]:
        return collate_share(self._sampler.examples, candidates, share, self._pad_id, self._group.device, packed=packed)

    def _now(self) -> float:
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        return time.perf_counter()
