"""What a run's selection was worth: means of the steps' telemetry, and whether it can be told from random."""

from __future__ import annotations

import math
from collections.abc import Mapping

from colm_scale.records import Json

_TOLD_APART = 1.96
"""Standard deviations beyond which a sign test is significant, two-sided at 5 %."""
_ENOUGH = 6
"""Steps that the sign test needs to reach that even if all agree."""


class Worth:
    """Adds up `StepReport.telemetry`. A number that is not finite does not count."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._signs = [0, 0]

    def add(self, telemetry: Mapping[str, float]) -> None:
        """Add one step."""
        for name, value in telemetry.items():
            if math.isfinite(value):
                total = self._sums.setdefault(name, [0, 0.0])
                total[0] += 1
                total[1] += value
        own, drawn = (telemetry.get(f"sketch_error{end}", 0.0) for end in ("", "_stratified"))
        self._signs[0] += own < drawn
        self._signs[1] += own > drawn

    def state(self) -> Json:
        """All that was added up, as plain JSON."""
        return {"sums": self._sums, "signs": self._signs}

    def load(self, state: Json) -> None:
        """Go on from what `state` returned."""
        self._sums, self._signs = state["sums"], state["signs"]

    def means(self) -> dict[str, float]:
        """Mean of each number over the steps that have it."""
        return {name: total / count for name, (count, total) in self._sums.items()}

    def rows(self) -> dict[str, str]:
        """Lines of the closing table, by name."""
        means = self.means()
        found = {}
        if "effective_sources" in means:
            sources, of_candidates = means.pop("effective_sources"), means.pop("effective_sources_candidates")
            found["effective number of sources"] = f"{sources:.1f} ({of_candidates:.1f} of the candidates)"
        if "rank" in means:
            found["effective rank of the sketches"] = f"{means.pop('rank'):.1f}"
        if "overlap" in means:
            shared, chance = means.pop("overlap"), means.pop("overlap_by_chance")
            found["picks in common with a random draw"] = f"{shared:.1%} (any selection: {chance:.1%} on average)"
        for what in ("error", "cosine"):
            if (key := f"sketch_{what}") in means:
                own, drawn = means.pop(key), means.pop(f"{key}_stratified")
                found[f"{what} to the candidates' mean, by sketches"] = f"{own:.3f} (random: same quotas {drawn:.3f})"
        return found | {name.replace("_", " "): f"{value:.3g}" for name, value in means.items()}

    def sentences(self) -> list[str]:
        """Whether the selection is nearer to the candidates' mean than a random draw with the same quotas is.

        By a sign test over the steps, in each of which either is nearer with the same chance if the selection is but
        such a draw itself. (The share of picks in common cannot tell: a random draw has as many in common with any
        selection.)
        """
        means, (nearer, farther) = self.means(), self._signs
        steps = nearer + farther
        if steps < _ENOUGH:
            return []
        own, drawn = means["sketch_error"], means["sketch_error_stratified"]
        if (abs(nearer - farther) - 1) / math.sqrt(steps) <= _TOLD_APART:
            verdict = "cannot be told from a random draw with the same quotas"
        else:
            than = "nearer to" if nearer > farther else "farther from"
            verdict = f"is {than} the candidates' mean than a random draw with the same quotas"
        return [
            f"By sketches the selection {verdict}: relative error {own:.3f} against {drawn:.3f}, nearer in {nearer} of "
            f"{steps} steps."
        ]
