"""Small line charts as SVG elements with the fonts and colours of their page.

The output of matplotlib is edited: colours become CSS variables, so that a chart fits the light and the dark page, and
each line gets the class of its run and a title, which browsers show as a tooltip.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_SIZE_INCHES = (3.0, 1.75)
_WIDE_INCHES = (6.2, 2.1)
_LEFT_INCHES, _BOTTOM_INCHES, _TOP_INCHES = 0.4, 0.32, 0.06
"""Margins for the numbers, equal in all panels to align their steps."""
_FEWEST_POINTS = 3
_FAR = 5
"""Ratio of highest to lowest value beyond which a logarithmic axis has ticks at 1, 2, 5, 10, ..."""
_INK, _FAINT = "ink-2", "rule"
_DASHES = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.6))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line or area over steps.

    Attributes:
        x, y: ``[P]`` steps and values; NaN is a gap.
        colour: CSS variable without dashes, such as ``run-1``.
        label: Text of the tooltip; for an area, with its value.
        down_to: ``[P]`` lower edge of an area; empty for a line.
        points: Mark each point.
        faint: Draw the line thin and pale.
    """

    x: np.ndarray
    y: np.ndarray
    colour: str
    label: str
    style: Literal["solid", "dashed", "dotted"] = "solid"
    down_to: np.ndarray = field(default_factory=lambda: np.zeros(0))
    points: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A panel.

    Attributes:
        title: Heading.
        what: Quantity and unit, for the alternative text.
        percent: Values are percentages.
        ratios: Use a logarithmic axis if all values are positive.
        from_zero: Start the axis at zero.
        top: End of the axis; 0 fits it to the values.
        wide: Use the width of two panels.
    """

    title: str
    what: str
    lines: Sequence[Line]
    percent: bool = False
    ratios: bool = False
    from_zero: bool = False
    top: float = 0.0
    wide: bool = False

    @property
    def drawn(self) -> bool:
        """True if a line has enough points for a chart; fewer are in the tables."""
        return any(np.count_nonzero(~np.isnan(line.y)) >= _FEWEST_POINTS for line in self.lines)

    @property
    def alt(self) -> str:
        """Alternative text: the first and last value of each line."""
        said = [_said(line, self.percent) for line in self.lines if not line.faint]
        return f"{self.what}, {self.title}. {'; '.join(filter(None, said))}."

    def svg(self, salt: str) -> str:
        """Draw the chart; ``salt`` must differ between the charts of a page, to keep ids unique."""
        colours = {name: f"#{number:06x}" for number, name in enumerate(self._colours(), 0x10203)}
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 8}):
            width, height = _WIDE_INCHES if self.wide else _SIZE_INCHES
            figure = Figure(figsize=(width, height))
            left, bottom, top = _LEFT_INCHES / width, _BOTTOM_INCHES / height, 1 - _TOP_INCHES / height
            axes = figure.add_axes((left, bottom, 0.99 - left, top - bottom))
            for number, line in enumerate(self.lines):
                _draw(axes, line, colours[line.colour], number)
            self._dress(axes, colours)
            written = io.StringIO()
            figure.savefig(written, format="svg", transparent=True)
        return _part_of_page(written.getvalue(), colours, self.lines, self.percent)

    def _colours(self) -> list[str]:
        return list(dict.fromkeys([_INK, _FAINT, *(line.colour for line in self.lines)]))

    def _dress(self, axes: Axes, colours: dict[str, str]) -> None:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(colours[_FAINT])
        axes.grid(axis="y", color=colours[_FAINT], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=colours[_INK], length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        self._scale(axes)
        axes.set_xlabel("step", loc="right", color=colours[_INK], labelpad=1)
        axes.margins(x=0.02)

    def _scale(self, axes: Axes) -> None:
        low, high = axes.dataLim.intervaly
        ratios = self.ratios and 0 < low <= high  # without data, the limits are infinity and minus infinity
        if ratios:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        far = ratios and high / low > _FAR
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6) if far else MaxNLocator(4))
        unit = "%" if self.percent else ""
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{unit}"))
        if self.from_zero:
            axes.set_ylim(bottom=0)
        if self.top:
            axes.set_ylim(top=self.top)


def binned(x: np.ndarray, y: np.ndarray, most: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring steps to at most ``most`` points, each at its last step; NaN is left out."""
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    width = max(1, -(-len(x) // most))
    starts = np.arange(0, len(x), width)
    ends = np.minimum(starts + width, len(x))
    return x[ends - 1], np.add.reduceat(y, starts) / (ends - starts) if len(x) else y


def number(value: float | None, percent: bool = False) -> str:
    """Format a number; ``-`` for None and NaN."""
    if value is None or np.isnan(value):
        return "-"
    if percent:
        return f"{value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.001 and value else f"{value:.3f}"


def _said(line: Line, percent: bool) -> str:
    if len(line.down_to):
        return line.label
    known = np.flatnonzero(~np.isnan(line.y))
    if not len(known):
        return ""
    first, last = known[0], known[-1]
    ends = dict.fromkeys((first, last))
    values = ", ".join(f"{number(line.y[end], percent)} at step {line.x[end]}" for end in ends)
    return f"{line.label}: {values}"


def _draw(axes: Axes, line: Line, colour: str, number: int) -> None:
    if len(line.down_to):
        artist: Artist = axes.fill_between(line.x, line.down_to, line.y, facecolor=colour, linewidth=0)
    else:
        marker = "o" if line.points or np.count_nonzero(~np.isnan(line.y)) == 1 else None
        width = 0.8 if line.faint else 1.5 if line.style == "solid" else 1.1
        (artist,) = axes.plot(
            line.x, line.y, color=colour, linewidth=width, linestyle=_DASHES[line.style], marker=marker, markersize=2.6
        )
    artist.set_gid(f"series-{number}")


def _part_of_page(svg: str, colours: dict[str, str], lines: Sequence[Line], percent: bool) -> str:
    """Turn an SVG file into an element of a page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    root = ElementTree.fromstring(text)
    names = {shade: f"var(--{name})" for name, shade in colours.items()}
    for element in root.iter():
        _name_series(element, lines, percent)
        style = re.sub(r"font-family: [^;]*;? ?", "", element.get("style", ""))
        style = re.sub(r"#[0-9a-f]{6}", lambda found: names.get(found[0], found[0]), style)
        if style:
            element.set("style", style)
        element.tail = None
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
    root.remove(next(root.iter("defs")))  # a style sheet for a whole document
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("aria-hidden", "true")  # its figure has an alternative text
    return ElementTree.tostring(root, encoding="unicode")


def _name_series(element: ElementTree.Element, lines: Sequence[Line], percent: bool) -> None:
    """Give a series the class of its colour and a title, and remove unused ids."""
    name = element.get("id", "")
    if name.startswith("series-"):
        line = lines[int(name.removeprefix("series-"))]
        element.set("class", f"series {line.colour}{' faint' if line.faint else ''}")
        title = ElementTree.Element("title")
        title.text = _said(line, percent)
        element.insert(0, title)
    if element.tag == "g":
        element.attrib.pop("id", None)
