"""The report of a step: its losses and costs, and how well its selection represents the candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from colm_scale.distributed.group import Group
from colm_scale.profiling.spans import Spans, over_ranks
from colm_scale.randomness import generator
from colm_scale.records import Audit, Route, StepReport
from colm_scale.selection import telemetry
from colm_scale.selection.audit import audit
from colm_scale.selection.route import padding_share
from colm_scale.step.noise import gradient_noise
from colm_scale.step.select import Chosen
from colm_scale.step.train import Trained


@dataclass(frozen=True, slots=True)
class Described:
    """A selection, on the first rank.

    Attributes:
        telemetry: Comparison with a random selection of the same quotas, by name.
        audit: Why each candidate was selected or not, if the run keeps an audit.
    """

    telemetry: dict[str, float]
    audit: Audit | None


class Measurement:
    """Reports a step. All ranks call it together.

    Args:
        packed: Whether micro-batches are packed, and so without padding.
        audits: Whether to record why each candidate was selected or not (``--audit``).
        seed: Seed of the run, for the random selection that each selection is compared with.
    """

    def __init__(self, group: Group, spans: Spans, seed: int, *, packed: bool, audits: bool):
        self._group, self._spans, self._seed = group, spans, seed
        self._packed, self._audits = packed, audits and group.is_first

    def describe(self, chosen: Chosen) -> Described:
        """Describe a selection. Everything is on the CPU already, so the host need not wait for the device."""
        return Described(self._telemetry(chosen), self._audit(chosen))

    def __call__(
        self, chosen: Chosen, trained: Trained, described: Described, facts: Mapping[str, float]
    ) -> StepReport:
        """Report a step; ``facts`` are further numbers about its selection, by name."""
        seconds, phase_peak_bytes = over_ranks(*self._spans.finish(), self._group)
        routed, update = trained.routed, trained.update
        noise, source_noise = self._noise(chosen, trained, described.telemetry)
        return StepReport(
            step=chosen.candidates.step,
            loss=float((trained.losses * routed.shares).sum()),
            learning_rate=trained.learning_rate,
            gradient_norm=update.norm,
            applied=update.applied,
            loss_scale=update.loss_scale,
            candidates=chosen.candidates,
            selection=chosen.selection,
            seconds=seconds,
            peak_bytes=next(iter(phase_peak_bytes.values()))["step"],
            phase_peak_bytes=phase_peak_bytes,
            exchanged_bytes=self._group.take_traffic(),
            gradient_bytes=trained.gradient_bytes,
            imbalance=routed.route.imbalance,
            padding_share=self._padding(chosen, routed.route),
            telemetry={**described.telemetry, **facts},
            noise=noise,
            source_noise=source_noise,
            audit=described.audit,
        )

    def _telemetry(self, chosen: Chosen) -> dict[str, float]:
        """Compare the selection with a random one of the same quotas, on the first rank."""
        if not self._group.is_first:
            return {}
        candidates, selection, matrix = chosen.candidates, chosen.selection, chosen.sketched.matrix
        eligible = telemetry.could_be_picked(candidates, selection, matrix)
        draws = generator(self._seed, "telemetry", candidates.step)
        draw = telemetry.stratified_like(selection, candidates.sources, eligible, draws)
        return telemetry.measure(candidates, selection, matrix, draw)

    def _noise(
        self, chosen: Chosen, trained: Trained, found: Mapping[str, float]
    ) -> tuple[dict[str, float], Tensor]:
        """Estimate the noise of the gradient, by the telemetry ``found`` of the selection."""
        error, config = 1.0, chosen.rule.config
        # Few derivatives, lengths or words can be matched far better than the gradients, and say little about them.
        if config.estimator == "last_layer" and found.get("sketch_error_stratified"):
            error = (found["sketch_error"] / found["sketch_error_stratified"]) ** 2
        sources, shares = chosen.candidates.sources, trained.routed.shares
        return gradient_noise(trained.gradients, sources, chosen.selection, shares, method=config.method, error=error)

    def _audit(self, chosen: Chosen) -> Audit | None:
        if not self._audits:
            return None
        rule, matrix = chosen.rule, chosen.sketched.matrix
        return audit(chosen.candidates, chosen.quota, chosen.selection, matrix, rule.kept, rule.config)

    def _padding(self, chosen: Chosen, routed: Route) -> dict[str, float]:
        """The share of computed tokens that is padding, by phase."""
        found = {"train": 1 - sum(routed.tokens) / max(1, sum(routed.padded_tokens))}
        if len(chosen.sketched.plan.positions):
            shares = chosen.sketched.plan.shares
            found["sketch"] = 0.0 if self._packed else padding_share(chosen.candidates.lengths, shares)
        return found
