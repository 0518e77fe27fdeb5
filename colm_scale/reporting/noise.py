"""Gradient noise scale of a run, and what it says about the size of a step.

The noise scale B is the batch at which the variance of the step's gradient equals the squared length of the mean. To
reach a loss with batches of b takes 1 + B / b times the fewest steps (of any larger batch) and 1 + b / B times the
fewest examples (of any smaller one; McCandlish et al. 2018, arXiv 1812.06162). Where a step takes time in
proportion to its examples, small steps are therefore fast, and an eighth of B is small enough.

Averaged over steps is its inverse, signal over noise. The signal of a single step is uncertain and may be negative. Its
noise is known better, and averaged over the last few steps where a step has too few examples of one source. Gradients
become smaller in training by orders of magnitude, so that sums of either over a run would be those of its first steps.
The noise scale usually rises. What a run took beyond the fewest examples depends on the mean of 1 / B over all steps,
so early steps, in which small batches do, count as they should.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from colm_scale.records import Json

_CONFIDENCE = 1.96
"""Standard deviations of the 95 % interval."""
_FEWEST_STEPS = 6
"""Steps below which there is no verdict."""
_RECENT = 20
"""Steps over which the figure of the progress line is averaged."""
_SMALL = 1 / 8
"""Batch, of the noise scale, that is advised where time is short: with 1.125 times the fewest examples, a smaller one
could save a ninth of them at most. On three mixtures no loss at a measured size next to it is off zero against the
best, while next to a quarter of B some are on two (benchmarks/README.md)."""
_FEW_STEPS, _FEW_EXAMPLES = 1 / 3, 0.1
"""Savings below which none are promised."""
ENOUGH = 32.0
"""Degrees of freedom with which a variance counts as known. A quotient by one of f degrees is too large by f / (f - 2),
and with one or two it has no mean at all."""
_NO_SOURCES = torch.zeros(0, 2)
TITLE = "gradient noise scale of the run"


class RecentVariance:
    """Averages the variance over the last steps, no more of them than its degrees of freedom require.

    Attributes:
        steps: Variance and degrees of freedom of each of these steps.
    """

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def add(self, variance: float, freedom: float) -> float:
        """Add a step and return the mean; nan as long as there are too few degrees of freedom."""
        self.steps.append([variance, freedom])
        while sum(freedom for _, freedom in self.steps[1:]) >= ENOUGH:
            del self.steps[0]
        total = sum(freedom for _, freedom in self.steps)
        return sum(value * freedom for value, freedom in self.steps) / total if total >= ENOUGH else math.nan


class NoiseScale:
    """Accumulates `StepReport.noise` and `StepReport.source_noise`."""

    def __init__(self) -> None:
        self._variance = RecentVariance()
        self._inverse: list[float] = []
        self._trained, self._worth = 0.0, 0.0
        self._by_source: dict[str, list[float]] = {}

    def add(self, noise: Mapping[str, float], by_source: Tensor = _NO_SOURCES) -> None:
        """Add one step; ``by_source`` ``[Q', 2]`` is the variance and the squared mean of each source."""
        variance, signal = (noise.get(name, math.nan) for name in ("noise", "signal"))
        if not (math.isfinite(signal) and 0 < variance < math.inf):
            return
        variance = self._variance.add(variance, noise.get("freedom", ENOUGH))
        if math.isnan(variance):
            return
        self._inverse.append(signal / variance)
        self._trained, self._worth = self._trained + noise["trained"], self._worth + noise["worth"]
        known = by_source.isfinite().all(1).nonzero().flatten().tolist()
        for source, row in zip(known, (by_source[known] / variance).tolist()):
            total = self._by_source.setdefault(str(source), [0.0, 0.0])
            total[:] = [before + value for before, value in zip(total, row)]

    def state(self) -> Json:
        """Everything accumulated, as plain JSON."""
        sums = {"trained": self._trained, "worth": self._worth}
        return {"inverse": self._inverse, "variance": self._variance.steps, "by_source": self._by_source, **sums}

    def load(self, state: Json) -> None:
        """Continue from `state`; an older checkpoint has none."""
        self._inverse, self._by_source = list(state.get("inverse", [])), state.get("by_source", {})
        self._variance.steps = list(state.get("variance", []))
        self._trained, self._worth = state.get("trained", 0.0), state.get("worth", 0.0)

    @property
    def scale(self) -> float:
        """Examples; infinite if no signal was found."""
        return _inverse(fmean(self._inverse))

    @property
    def trained(self) -> float:
        """Mean number of equally weighted examples of a step."""
        return self._trained / len(self._inverse)

    @property
    def worth(self) -> float:
        """Random examples of the same sources that the coreset is worth, in the mean."""
        return self._worth / len(self._inverse)

    def interval(self) -> tuple[float, float]:
        """95 % interval of `scale`, open if the signal cannot be told from 0. Steps count as independent."""
        middle, half = fmean(self._inverse), _CONFIDENCE * stdev(self._inverse) / math.sqrt(len(self._inverse))
        return _inverse(middle + half), _inverse(middle - half)

    def of_sources(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Column of the table of sources: the noise scale of each whose gradients were read, by name."""
        totals = self._by_source.items()
        found = {names[int(source)]: _examples(_inverse(signal / noise)) for source, (noise, signal) in totals if noise}
        return {"noise scale": found} if found else {}

    def recent(self) -> list[str]:
        """The noise scale of the last steps, in a few words; empty if it is unknown."""
        last = self._inverse[-_RECENT:]
        return [f"noise scale {_examples(_inverse(fmean(last)))}"] if last else []

    def rows(self) -> dict[str, str]:
        """Rows of the closing table, by title."""
        if len(self._inverse) < _FEWEST_STEPS:
            return {}
        low, high = self.interval()
        found = {TITLE: f"{_examples(self.scale)} examples (95 %: {_examples(low)} to {_examples(high)})"}
        if round(self.worth) != round(self.trained):
            trained = f"({self.trained:.1f} were trained on)"
            found["a step's examples are worth"] = f"at most {self.worth:.1f} random ones {trained}"
        return found

    def sentences(self, ranks: int = 1) -> list[str]:
        """State whether a larger batch can still help; empty after too few steps.

        Args:
            ranks: Number in the run, and the least examples that a step is advised to have.
        """
        if len(self._inverse) < _FEWEST_STEPS:
            return []
        (low, high), size = self.interval(), self.worth
        worth = f"{self.trained:.0f} examples"
        if round(size) != round(self.trained):
            worth = f"{self.trained:.0f} chosen examples, by their sketches worth at most {size:.0f} random ones"
        return [
            "Over the run, the gradient's noise equals its signal at a batch of "
            f"{_examples(self.scale)} examples (95 %: {_examples(low)} to {_examples(high)}). A step trains on "
            f"{worth}. {_advice(size, self.scale, ranks)}"
        ]


def _advice(size: float, scale: float, ranks: int) -> str:
    """What larger steps than of ``size`` random examples would save, and what smaller ones."""
    small = max(1, ranks, round(min(_SMALL * scale, size)))
    examples_over_fewest = 1 + size / scale
    steps, examples = 1 / examples_over_fewest, 1 - (1 + small / scale) / examples_over_fewest
    larger = f"can save up to {steps:.0%} of the steps" if steps >= _FEW_STEPS else "can hardly save steps"
    smaller = "smaller steps can hardly save examples"
    if examples >= _FEW_EXAMPLES:
        smaller = f"steps of {_examples(small)} can save about {examples:.0%} of the examples, and so of the time"
    return f"A larger batch, or a coreset of one, {larger}; {smaller}."


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf


def _examples(count: float) -> str:
    """A number of examples, to two digits."""
    return f"{float(f'{count:.2g}'):,g}" if math.isfinite(count) else "∞"
