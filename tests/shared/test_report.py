"""The report: self-contained, well-formed, escaped."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from shared.plots import subplots
from shared.report import Report, figure_svg, table_html

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Balanced(HTMLParser):
    """Fails on an element that is closed out of order; collects what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def drawn():
    figure, axes = subplots(1, 2)
    axes[0].plot([0, 1, 2], [0, 1, 4], label="square")
    axes[0].set(title="A < B", xlabel="dose", ylabel="score")
    axes[0].legend()
    axes[1].bar(["a", "b"], [1, 2])
    return figure


@pytest.fixture
def figure():
    return drawn()


def written(report, tmp_path, **extra):
    return report.write(tmp_path / "report.html", **extra).read_text(encoding="utf-8")


def test_the_page_is_balanced_and_fetches_nothing(figure, tmp_path):
    report = Report("Title")
    report.text("# Head\n\nText with `code`, a [link](#x) and a table\n\n|a|b|\n|-|-|\n|1|2|\n")
    report.table([{"name": "x", "value": 1.23456}, {"name": "y", "other": True}], "caption")
    report.figure(figure, "a figure")
    report.html("<section><p>own</p></section>")
    page = written(report, tmp_path, metrics={"a": {"b": 0.5}}, manifest={"status": "finished"})
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(source.startswith(("#", "data:")) for source in parser.sources), parser.sources
    assert not re.search(r"url\((?!['\"]?(#|data:))|@import|<script[^>]+src|<link", page)
    assert page.index("Head") < page.index(">caption") < page.index("a figure") < page.index("own")
    for expected in ("1.235", "yes", "a.b", "prefers-color-scheme: dark", '<th scope="col">other</th>'):
        assert expected in page


def test_text_and_cells_are_escaped(tmp_path):
    report = Report("<b>title</b>")
    report.text("<script>alert(1)</script>")
    report.table([{"<i>": "<img src=x onerror=alert(1)>"}])
    page = written(report, tmp_path, manifest={"status": "failed", "error": "<u>"})
    assert "<script>" not in page
    assert "<img" not in page
    assert "<b>title" not in page
    assert "&lt;u&gt;" in page


def test_figures_follow_the_pages_colours_and_are_well_formed(figure):
    svg = figure_svg(figure)
    ET.fromstring(svg.replace("xlink:href", "href"))
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg
    assert "0072b2" in svg.lower()


def test_the_same_figure_gives_the_same_bytes():
    assert figure_svg(drawn()) == figure_svg(drawn())


def test_a_huge_figure_becomes_a_bitmap():
    figure, axes = subplots()
    rng = np.random.default_rng(0)
    axes.scatter(*rng.normal(size=(2, 15_000)))
    image = figure_svg(figure)
    assert image.startswith('<img alt="" src="data:image/png;base64,')
    assert len(image) < 1_500_000


def test_a_failed_run_is_announced(tmp_path):
    page = written(Report("x"), tmp_path, manifest={"status": "failed", "error": "ValueError: no"})
    assert "This run failed: ValueError: no" in page
    assert "This run failed" not in written(Report("x"), tmp_path, manifest={"status": "finished"})


def test_columns_are_the_union_in_order_of_appearance():
    assert re.findall('<th scope="col">(.)</th>', table_html([{"b": 1}, {"a": 2, "b": 3}])) == ["b", "a"]
