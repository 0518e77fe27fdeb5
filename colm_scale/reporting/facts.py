"""What is told before the first step about what the selection can and cannot do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.data.recorded_selection import SelectionRecord
from colm_scale.selection.quota import expected_share
from colm_scale.sketch.zeroth_order import PERTURBATION
from colm_scale.step.source_refresh import Drift


def method_fact(selection: SelectionConfig, record: SelectionRecord | None) -> str:
    """How many of how many are trained on; of a replay, what it trains."""
    if record is not None:
        return f"method replay: the selections of {record.file}, {record.steps} steps"
    trained = selection.candidates if selection.method == "full" else selection.budget
    return f"method {selection.method}: {trained} of {selection.candidates} candidates per step"


def kept_facts(
    selection: SelectionConfig, names: Sequence[str], sizes: Tensor, kept: Tensor, protected: Tensor
) -> list[str]:
    """Which sources are kept, how many examples are protected, and whether there is room for them.

    Args:
        names: ``[Q]`` of the sources.
        sizes: ``[Q]`` training examples of each.
        kept: ``[Q]`` bool.
        protected: ``[Q]`` protected examples of each.
    """
    by_source = ", ".join(f"{name} {count:,}" for name, count in zip(names, protected.tolist()) if count)
    marked = [f"protected examples: {int(protected.sum()):,} ({by_source})"] if by_source else []
    if selection.method == "random":
        return [f"{fact}; --selection.method random does not protect them" for fact in marked]
    if selection.method in ("full", "replay"):
        return []
    if selection.coverage_floor:
        marked.append(f"coverage floor: {selection.coverage_floor:.0%} of each source's candidates, in every pass")
    names_kept = [name for name, is_kept in zip(names, kept.tolist()) if is_kept]
    facts = [f"kept sources ({len(names_kept)}): {', '.join(names_kept) or 'none'}", *marked]
    limits = selection.candidates, selection.budget, selection.coverage_floor
    share = expected_share(sizes, kept, protected, *limits)
    if share < 1:
        what = "kept and protected candidates" if by_source else "candidates of kept sources"
        facts.append(
            f"warning: about {share:.0%} of the {what} enter, for an average step has more than there is room for: "
            f"give a larger --selection.budget, or keep less"
        )
    return facts


def update_facts(config: RunConfig) -> list[str]:
    """What the optimizer's update leaves of the differences between candidates, where that is next to nothing."""
    selection, optimizer = config.selection, config.train.optimizer
    one_probe = selection.estimator == "zeroth_order" and selection.num_probes == 1
    if selection.method != "colm" or not one_probe or optimizer not in ("lion", "muon"):
        return []
    return [
        f"warning: along one probe an update of --train.optimizer {optimizer} is one of two, by the sign of the "
        f"derivative, and most candidates are alike: give a larger --selection.num_probes, or --selection.estimator "
        f"last_layer"
    ]


def rounding_facts(config: RunConfig) -> list[str]:
    """A warning, where finite differences of the loss are mostly rounding."""
    rounding = _rounding(config)
    if rounding is None:
        return []
    return [
        f"warning: finite differences of step {PERTURBATION:g} are mostly rounding with {rounding}, or use "
        f"--selection.estimator last_layer"
    ]


def _rounding(config: RunConfig) -> str | None:
    """What makes finite differences of the loss mostly rounding, and what would not, if anything does."""
    selection = config.selection
    if selection.method != "colm" or selection.estimator != "zeroth_order":
        return None
    if config.train.dtype == "float32":
        return None
    if config.model.quantize != "none":
        return f"--model.quantize {config.model.quantize} in {config.train.dtype}: give --train.dtype float32"
    return None


def drift_line(drift: Drift) -> str:
    """What has become of the sources, in one line."""
    said = f"sources found anew after step {drift.step}: {drift.moved:,} of {drift.examples:,} examples seen have moved"
    for what, names in (("new", drift.new), ("now kept", drift.kept), ("no longer kept", drift.no_longer_kept)):
        if names:
            said += f"; {what}: {', '.join(names)}"
    return f"{said} ({drift.seconds:.2f} s)"
