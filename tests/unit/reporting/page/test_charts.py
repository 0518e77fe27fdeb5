from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from colm_scale.reporting.page.charts import Chart, Line, binned, number


def line(y, **other) -> Line:
    x = np.arange(1, len(y) + 1)
    return Line(**{"x": x, "y": np.array(y, dtype=float), "colour": "run-1", "label": "a run", **other})


def heights(chart: Chart) -> np.ndarray:
    """Heights of the points of the chart's first line."""
    root = ElementTree.fromstring(chart.svg("s"))
    (series,) = (element for element in root.iter("g") if element.get("class") == "series run-1")
    points = np.array(re.findall(r"[\d.]+", series.find("path").get("d")), dtype=float).reshape(-1, 2)
    assert (np.diff(points[:, 0]) > 0).all()
    return -points[:, 1]


def test_bins_are_means_of_equally_many_steps():
    x, y = binned(np.arange(1, 8), np.array([1.0, 3, 5, 7, np.nan, 9, 11]), 3)
    assert x.tolist() == [2, 4, 7]
    assert y.tolist() == [2.0, 6.0, 10.0]


@pytest.mark.parametrize("known", [0, 1, 5])
def test_few_points_stay_as_they_are(known):
    x, y = binned(np.arange(5), np.array([1.0] * known + [np.nan] * (5 - known)), 5)
    assert (x.tolist(), y.tolist()) == (list(range(known)), [1.0] * known)


@pytest.mark.parametrize("points", [1, 7, 80, 81, 160, 1001])
def test_no_more_points_than_asked_for(points):
    x, y = binned(np.arange(points), np.arange(points, dtype=float), 80)
    assert len(x) == len(y) <= 80
    assert x[-1] == points - 1


def test_numbers_for_people():
    assert [number(value) for value in (None, float("nan"), 0.0, 0.12345, 1e-5, 12345.6)] == [
        "-", "-", "0.000", "0.123", "1e-05", "12,346",
    ]
    assert number(12.34, percent=True) == "12.3%"


def test_a_chart_is_well_formed_and_says_what_it_shows():
    chart = Chart(title="a<b> & c", what="Loss", lines=[line([3, 2, 1], label="x<y>")])
    assert chart.alt == "Loss, a<b> & c. x<y>: 3.000 at step 1, 1.000 at step 3."
    root = ElementTree.fromstring(chart.svg("salt"))
    (series,) = (element for element in root.iter("g") if element.get("class") == "series run-1")
    assert series.find("title").text == "x<y>: 3.000 at step 1, 1.000 at step 3"
    assert "stroke: var(--run-1)" in series.find("path").get("style")


def test_points_are_where_the_values_are():
    """A higher value is further up, in proportion; steps go from left to right (`heights`)."""
    up = heights(Chart(title="t", what="w", lines=[line([1, 4, 2])]))
    np.testing.assert_allclose((up - up[0]) / (up[1] - up[0]), [0, 1, 1 / 3], atol=1e-6)


def test_a_line_with_gaps_and_one_without_any_value():
    chart = Chart(title="t", what="w", lines=[line([np.nan, 2, np.nan]), line([np.nan] * 3, label="nothing")])
    assert chart.alt == "w, t. a run: 2.000 at step 2."
    assert "<path" in chart.svg("salt")


def test_charts_have_ids_of_their_own_and_are_the_same_each_time():
    chart = Chart(title="t", what="w", lines=[line([1, 2])])
    ids = [set(re.findall(r'id="([^"]+)"', chart.svg(salt))) for salt in "ab"]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert chart.svg("a") == chart.svg("a")


def test_areas_are_stacked_from_their_lower_edge():
    area = line([2, 2], down_to=np.array([1.0, 1.0]), colour="phase-train", label="train")
    text = Chart(title="t", what="w", lines=[area], from_zero=True, top=4).svg("s")
    assert 'class="series phase-train"' in text
    assert "fill: var(--phase-train)" in text


def test_equal_ratios_are_equally_far_apart():
    ups = np.diff(heights(Chart(title="t", what="w", lines=[line([0.1, 1, 10])], ratios=True)))
    assert ups[0] == pytest.approx(ups[1])
    ups = np.diff(heights(Chart(title="t", what="w", lines=[line([0, 1, 10])], ratios=True)))  # not of zero
    assert ups[1] == pytest.approx(9 * ups[0], rel=1e-4)
