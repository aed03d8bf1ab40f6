from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.report.figures import HEAT_STEPS, Bar, Curve, bars, heat_map, largest_error, line_chart, rug, scatter

NAMES = st.lists(st.text(max_size=30), min_size=1, max_size=25)
RATES = st.floats(0, 1) | st.just(math.nan)


def parse(svg: str) -> ElementTree.Element:
    """The drawing as a tree; every coordinate in it is a finite number."""
    tree = ElementTree.fromstring(svg)
    for element in tree.iter():
        for key, value in element.attrib.items():
            if key in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "viewBox"):
                assert re.fullmatch(r"(-?\d+(\.\d+)?[ ,]?)+", value), (key, value)
    return tree


def by_class(tree: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in tree.iter(tag) if kind in e.get("class", "").split()]


def test_a_bar_and_its_whisker_stand_at_their_rates():
    tree = parse(bars([Bar(rate=0.523, lower=0.481, upper=0.564, look="worst")]))
    (bar,) = by_class(tree, "rect", "worst")
    assert float(bar.get("width")) == pytest.approx(52.3)
    whisker = by_class(tree, "line", "whisker")[0]
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == pytest.approx((48.1, 56.4))


def test_a_class_without_images_has_no_bar():
    absent = Bar(rate=math.nan, lower=math.nan, upper=math.nan)
    tree = parse(bars([absent, Bar(rate=1.0, lower=0.5, upper=1.0, before=True)]))
    assert len(by_class(tree, "rect", "bar")) == len(by_class(tree, "rect", "before")) == 1


def test_rug_has_a_tick_a_class_and_one_for_the_average():
    tree = parse(rug([0.2, math.nan, 0.8], average=0.5, worst=(0,), label='"worst" 20 %'))
    assert len(by_class(tree, "line", "tick")) == 3
    assert float(by_class(tree, "line", "worst")[0].get("x1")) == 20
    assert tree.get("aria-label") == '"worst" 20 %'


@pytest.mark.parametrize("size", [1, 2, 10, 20, 21, 100])
def test_heat_map_has_every_error_and_every_class(size):
    counts = [[7 if p == t else (t % 3) * (p == (t + 1) % size) for t in range(size)] for p in range(size)]
    names = [f"class {c}" for c in range(size)]
    tree = parse(heat_map(counts, names))
    errors = sum(counts[p][t] > 0 for p in range(size) for t in range(size) if p != t)
    shaded = [g for g in tree.iter("g") if re.fullmatch(r"h\d", g.get("class"))]
    assert len(shaded) == errors
    assert len(by_class(tree, "g", "diagonal")) == size
    assert bool(by_class(tree, "text", "value")) == (size <= 20)
    titles = {title.text for title in tree.iter("title")}
    assert set(names) <= titles
    assert {text.text for text in tree.iter("text")} >= {"true", "predicted"}


def test_heat_map_cells_say_count_and_share():
    tree = parse(heat_map([[3, 0, 0], [1, 2, 0], [0, 0, 0]], ["cat", "dog", "owl"]))
    (wrong,) = by_class(tree, "g", f"h{HEAT_STEPS}")
    assert wrong.find("title").text == "true cat, predicted dog: 25.0 % (1 of 4)"
    assert [v.text for v in by_class(tree, "text", "value")] == ["75.0", "25.0", "100.0"]
    assert "owl: no images" in {title.text for title in tree.iter("title")}


def test_heat_map_rows_are_predictions_and_columns_are_true():
    tree = parse(heat_map([[0, 0], [5, 5]], ["a", "b"]))
    wrong = next(g for g in tree.iter("g") if g.get("class").startswith("h")).find("rect")
    right = [g.find("rect") for g in by_class(tree, "g", "diagonal")]
    assert float(wrong.get("x")) < float(right[1].get("x"))
    assert float(wrong.get("y")) > float(right[0].get("y"))


def test_largest_error_by_hand():
    assert largest_error([[3, 1], [1, 1]]) == 0.5
    assert largest_error([[3, 0], [0, 0]]) == 0.0


@settings(max_examples=50, deadline=None)
@given(NAMES, st.data())
def test_scatter_draws_every_present_class_and_covers_no_label(names, data):
    names = ["".join(letter for letter in name if letter.isprintable()) for name in names]
    size = len(names)
    x = data.draw(st.lists(st.floats(0.01, 100), min_size=size, max_size=size))
    y = data.draw(st.lists(RATES, min_size=size, max_size=size))
    present = [rate for rate in y if not math.isnan(rate)]
    tree = parse(scatter(x, y, names, worst=(), x_label="head norm", y_label="clean"))
    assert len(by_class(tree, "circle", "point")) == len(present)
    assert len(by_class(tree, "text", "name")) <= len(present)


def test_scatter_marks_and_names_the_worst_class():
    tree = parse(scatter([1, 2, 3], [0.9, 0.1, 0.5], ["a", "b", "c"], worst=(1,), x_label="norm", y_label="robust"))
    assert [t.text for t in by_class(tree, "text", "worst")] == ["b"]
    assert {t.text for t in by_class(tree, "text", "name")} == {"a", "b", "c"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(RATES | st.none(), min_size=4, max_size=4), min_size=1, max_size=12),
    st.booleans(),
)
def test_line_chart_draws_any_values(rows, share):
    curves = [Curve(name=f"curve {i}", y=row, labelled=i < 4) for i, row in enumerate(rows)]
    tree = parse(line_chart([1, 2, 3, 4], curves, title="t", share=share))
    drawn = sum(any(v is not None and not math.isnan(v) for v in row) for row in rows)
    assert len(by_class(tree, "polyline", "curve")) + len(by_class(tree, "circle", "point")) == drawn
    heights = sorted(float(t.get("y")) for t in by_class(tree, "text", "name"))
    assert all(b - a > 11.9 for a, b in itertools.pairwise(heights))


def test_line_chart_of_one_epoch_and_of_none():
    one = parse(line_chart([1], [Curve(name="loss", y=[2.0])], title="Loss", share=False))
    assert len(by_class(one, "circle", "point")) == 1
    assert not by_class(parse(line_chart([], [], title="Loss", share=False)), "polyline", "curve")


def test_line_chart_tells_its_numbers_to_a_screen_reader():
    curves = [Curve(name="worst", y=[0.1, None, 0.25], look="worst", dashed=True)]
    tree = parse(line_chart([1, 2, 3], curves, title="Accuracy", share=True))
    assert tree.get("aria-label") == "Accuracy over 3 epochs. worst 10.0 % to 25.0 %"


def test_names_are_escaped():
    name = "<script>&\"'"
    for svg in (
        heat_map([[1]], [name]),
        scatter([1.0], [0.5], [name], worst=(0,), x_label=name, y_label=name),
        line_chart([1, 2], [Curve(name=name, y=[0.1, 0.2])], title=name, share=True),
        rug([0.5], average=0.5, worst=(0,), label=name),
    ):
        assert "<script" not in svg
        parse(svg)
