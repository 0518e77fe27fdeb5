"""Telemetry of a run's selections: how near the coreset's mean is to the candidates', compared with a random draw.

The draw has the same quotas. Distances are between means of sketches (`colm_scale.selection.telemetry`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from colm_scale.records import Json

TITLES = {
    "effective_sources": "effective number of sources",
    "rank": "effective rank of the sketches",
    "overlap": "picks shared with a random draw",
    "sketch_error": "relative error of the coreset's mean sketch",
    "sketch_cosine": "cosine between mean sketches of coreset and candidates",
}
"""Titles of the numbers, by name; others are shown under their own names."""
_SIGNIFICANT = 1.96
"""Standard deviations beyond which a sign test is significant, two-sided at 5 %."""
_FEWEST_STEPS = 6
"""Steps below which the sign test is never significant."""


class Nearness:
    """Accumulates `StepReport.telemetry`, skipping numbers that are not finite."""

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
        """The accumulated sums, as plain JSON."""
        return {"sums": self._sums, "signs": self._signs}

    def load(self, state: Json) -> None:
        """Continue from `state`."""
        self._sums, self._signs = state["sums"], state["signs"]

    def means(self) -> dict[str, float]:
        """Mean of each number over the steps that have it."""
        return {name: total / count for name, (count, total) in self._sums.items()}

    def rows(self) -> dict[str, str]:
        """Rows of the closing table, by title."""
        means = self.means()
        found = {}
        if "effective_sources" in means:
            sources, of_candidates = means.pop("effective_sources"), means.pop("effective_sources_candidates")
            found[TITLES["effective_sources"]] = f"{sources:.1f} (candidates: {of_candidates:.1f})"
        if "rank" in means:
            found[TITLES["rank"]] = f"{means.pop('rank'):.1f}"
        if "overlap" in means:
            shared, chance = means.pop("overlap"), means.pop("overlap_by_chance")
            found[TITLES["overlap"]] = f"{shared:.1%} (expected by chance: {chance:.1%})"
        for key in ("sketch_error", "sketch_cosine"):
            if key in means:
                own, drawn = means.pop(key), means.pop(f"{key}_stratified")
                found[TITLES[key]] = f"{own:.3f} (random draw with the same quotas: {drawn:.3f})"
        return found | {name.replace("_", " "): f"{value:.3g}" for name, value in means.items()}

    def sentences(self) -> list[str]:
        """State if the coreset is nearer to the candidates' mean than a random draw; empty after too few steps.

        By a sign test over the steps: if the selection were such a draw itself, either would be nearer with the same
        probability. (The share of common picks is no test: a random draw shares as many with any selection.)
        """
        means, (nearer, farther) = self.means(), self._signs
        steps = nearer + farther
        if steps < _FEWEST_STEPS:
            return []
        own, drawn = means["sketch_error"], means["sketch_error_stratified"]
        if (abs(nearer - farther) - 1) / math.sqrt(steps) <= _SIGNIFICANT:
            verdict = "cannot be told apart from that of a random draw with the same quotas"
        else:
            than = "nearer to" if nearer > farther else "farther from"
            verdict = f"is {than} the candidates' mean than that of a random draw with the same quotas"
        return [
            f"The coreset's mean sketch {verdict}: relative error {own:.3f} against {drawn:.3f}, nearer in {nearer} of "
            f"{steps} steps."
        ]


def nearness(telemetry: Mapping[str, float]) -> list[str]:
    """Relative error of the coreset and of a random draw in one step, in a few words; empty without sketches."""
    if "sketch_error" not in telemetry:
        return []
    return [f"sketch error {telemetry['sketch_error']:.2f} (random {telemetry['sketch_error_stratified']:.2f})"]
