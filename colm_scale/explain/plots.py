"""Plots of an explanation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colm_scale.errors import UserError
from colm_scale.explain.explain import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 8
"""Most sources drawn over time, the largest ones."""
_POINTS = 60


def check_drawable() -> None:
    """Raise a UserError if matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        raise UserError(
            "the plots need matplotlib: pip install 'colm_scale[report]', or leave them out with --plots false"
        )


def draw(found: Explanation, folder: Path) -> list[Path]:
    """Write all plots; return their files.

    Raises:
        OSError: They cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, plot, height in (
        ("coverage", _coverage, 1 + 0.3 * len(found.sources)),
        ("times_trained", _times_trained, 4),
        ("over_time", _over_time, 4),
    ):
        files.append(folder / f"{name}.png")
        with matplotlib.rc_context({"text.parse_math": False}):  # a source's name may hold dollar signs
            figure = Figure(figsize=(8, height), layout="constrained")
            plot(found, figure.add_subplot())
            figure.savefig(files[-1], dpi=120)
    return files


def _coverage(found: Explanation, axes: Axes) -> None:
    sources = found.sources[::-1]
    names = [source.name for source in sources]
    known = [source.known or 1 for source in sources]
    candidates = [100 * source.candidates / size for source, size in zip(sources, known)]
    axes.barh(names, candidates, color="lightgrey", label="were candidates")
    axes.barh(names, [100 * source.trained / size for source, size in zip(sources, known)], label="were trained on")
    axes.set(xlabel="% of the source's examples, at least once", xlim=(0, 100))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def _times_trained(found: Explanation, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    times = np.arange(found.histogram.shape[1])
    axes.bar(times - 0.2, found.histogram[0], 0.4, label="this run")
    axes.bar(times + 0.2, found.histogram[1], 0.4, color="lightgrey", label="random picks, the same number per source")
    axes.set(xlabel="times trained on", ylabel="examples that were candidates")
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)  # matplotlib's default
    locator.set_params(integer=True)
    axes.legend(frameon=False)


def _over_time(found: Explanation, axes: Axes) -> None:
    """Draw each source's share of the coreset, and dotted of the candidates, over equal stretches of steps."""
    stretches = np.array_split(np.arange(found.steps), min(_POINTS, found.steps))
    centres = [float(stretch.mean()) + 1 for stretch in stretches]
    for place in np.argsort(-found.tally.candidates.sum(0), kind="stable")[:_MOST_LINES]:
        shares = [
            [of[stretch, place].sum() / of[stretch].sum() for stretch in stretches]
            for of in (found.tally.trained, found.tally.candidates)
        ]
        (line,) = axes.plot(centres, shares[0], marker=".", label=found.tally.names[place])
        axes.plot(centres, shares[1], ":", color=line.get_color())
    axes.set(xlabel="step", ylabel="share of the coreset (dotted: of the candidates)", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
