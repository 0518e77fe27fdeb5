"""Gradient noise scale of a run, and what it says about the size of a step.

The noise scale is the batch at which the variance of the step's gradient equals the squared length of the mean
(McCandlish et al. 2018). Far below it, doubling the batch saves nearly half of the steps; far above it, none. Noise and
signal are averaged over steps before they are divided, since the signal of a single step may be negative
(`colm_scale.step.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from colm_scale.records import Json

_CONFIDENCE = 1.96
"""Standard deviations of the 95 % interval."""
_FEWEST_STEPS = 6
"""Steps below which no interval is given."""
_RECENT = 20
"""Steps over which the figure of the progress line is averaged."""
_NOTHING = dict.fromkeys(("steps", "noise", "signal", "noise2", "signal2", "product", "trained", "worth"), 0.0)
_NO_SOURCES = torch.zeros(0, 2)
TITLE = "gradient noise scale"


class NoiseScale:
    """Accumulates `StepReport.noise` and `StepReport.source_noise`."""

    def __init__(self) -> None:
        self._sums, self._recent = dict(_NOTHING), [0.0, 0.0]
        self._by_source: dict[str, list[float]] = {}

    def add(self, noise: Mapping[str, float], by_source: Tensor = _NO_SOURCES) -> None:
        """Add one step; ``by_source`` ``[Q', 2]`` is the variance and the squared mean of each source."""
        known = by_source.isfinite().all(1).nonzero().flatten().tolist()
        for source, row in zip(known, by_source[known].tolist()):
            total = self._by_source.setdefault(str(source), [0.0, 0.0])
            total[:] = [before + value for before, value in zip(total, row)]
        if not all(map(math.isfinite, (noise.get(name, math.nan) for name in ("noise", "signal")))):
            return
        variance, signal = noise["noise"], noise["signal"]
        of_step = {"noise2": variance**2, "signal2": signal**2, "product": variance * signal, "steps": 1.0, **noise}
        self._sums = {name: total + of_step[name] for name, total in self._sums.items()}
        self._recent = [(1 - 1 / _RECENT) * old + new for old, new in zip(self._recent, (variance, signal))]

    def state(self) -> Json:
        """The accumulated sums, as plain JSON."""
        return {"sums": self._sums, "recent": self._recent, "by_source": self._by_source}

    def load(self, state: Json) -> None:
        """Continue from `state`; an older checkpoint has none."""
        self._sums = state.get("sums", dict(_NOTHING))
        self._recent, self._by_source = state.get("recent", [0.0, 0.0]), state.get("by_source", {})

    @property
    def scale(self) -> float:
        """Noise over signal; infinite if no signal was found."""
        return _ratio(self._sums["noise"], self._sums["signal"])

    @property
    def trained(self) -> float:
        """Mean number of equally weighted examples of a step."""
        return self._sums["trained"] / max(1.0, self._sums["steps"])

    @property
    def worth(self) -> float:
        """Random examples of the same sources that the coreset is worth, in the mean."""
        return self._sums["worth"] / max(1.0, self._sums["steps"])

    def interval(self) -> tuple[float, float]:
        """95 % interval of the noise scale (Fieller's, of a ratio of means over steps); open where the signal may be 0.

        Neighbouring steps count as independent.
        """
        steps = self._sums["steps"]
        noise, signal = self._sums["noise"] / steps, self._sums["signal"] / steps

        def spread(name: str, product: float) -> float:
            """Squared confidence in a product of two means."""
            return _CONFIDENCE**2 * (self._sums[name] / steps - product) / (steps - 1)

        a = signal**2 - spread("signal2", signal**2)
        b = noise * signal - spread("product", noise * signal)
        c = noise**2 - spread("noise2", noise**2)
        root = math.sqrt(max(0.0, b * b - a * c))
        if a > 0 and signal > 0:
            return max(0.0, (b - root) / a), (b + root) / a
        return max(0.0, (b - root) / a) if a else 0.0, math.inf

    def of_sources(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Column of the table of sources: the noise scale of each whose gradients were read, by name."""
        found = {names[int(source)]: _examples(_ratio(*total)) for source, total in self._by_source.items()}
        return {"noise scale": found} if found else {}

    def recent(self) -> list[str]:
        """The noise scale of the last steps, in a few words; empty if it is unknown."""
        return [f"noise scale {_examples(_ratio(*self._recent))}"] if self._sums["steps"] else []

    def rows(self) -> dict[str, str]:
        """Rows of the closing table, by title."""
        if self._sums["steps"] < _FEWEST_STEPS:
            return {}
        low, high = self.interval()
        found = {TITLE: f"{_examples(self.scale)} examples (95 %: {_examples(low)} to {_examples(high)})"}
        if round(self.worth) != round(self.trained):
            found["a step's examples are worth"] = f"{self.worth:.1f} random ones ({self.trained:.1f} were trained on)"
        return found

    def sentences(self) -> list[str]:
        """State whether a larger batch can still help; empty after too few steps."""
        if self._sums["steps"] < _FEWEST_STEPS:
            return []
        (low, high), size = self.interval(), self.worth
        worth = f"{self.trained:.0f} examples"
        if round(size) != round(self.trained):
            worth = f"{self.trained:.0f} chosen examples, by their sketches worth {size:.0f} random ones"
        if low > size:
            verdict = "less: a larger batch, or a coreset of one, can still help"
        elif high < size:
            verdict = "more: a larger batch, or a coreset of one, can hardly help; more and smaller steps would"
        else:
            verdict = "about as many: neither a larger batch nor smaller steps would help much"
        return [
            f"The gradient's noise equals its signal at a batch of {_examples(self.scale)} examples (95 %: "
            f"{_examples(low)} to {_examples(high)}). A step trains on {worth}. That is {verdict}."
        ]


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf


def _examples(count: float) -> str:
    """A number of examples, to two digits."""
    return f"{float(f'{count:.2g}'):,g}" if math.isfinite(count) else "∞"
