"""The figures and pages of the report: what they hold is what they were given."""

import numpy as np
import pytest

from assumptions.charts import choice_chart, dose_chart, specificity_chart, tradeoff_chart
from assumptions.coherence import Texture
from assumptions.control import Trial
from assumptions.dimensions import NAMES
from assumptions.doses import Curve, Effect
from assumptions.pages import add_costs
from assumptions.steered import Steered
from shared.report import Report
from shared.serialize import plain
from shared.stats import Interval

DOSES = [-1.0, 0.0, 1.0]


def curve(name, kind, slope):
    means = [3 + slope * dose for dose in DOSES]
    lows, highs = ([mean + step for mean in means] for step in (-0.2, 0.2))
    return Curve(name, kind, DOSES, means, lows, highs, 1.0, slope, [0.0] * 3, [1.0] * 3)


def family(name):
    kinds = ("probe", "random", "random", "shuffled", "means", "sycophancy")
    return [curve(f"{name}.{kind}{i}", kind, 0.9 / (i + 1)) for i, kind in enumerate(kinds)]


CURVES = {name: family(name) for name in NAMES[:4]}
WORDS = {NAMES[0]: [Effect("ask", 2.0, Interval(-1.0, -1.2, -0.8), 1.0, 0.0)]}
OWN = [line for lines in CURVES.values() for line in lines[:2]]  # the direction and one random control
SIDE = {
    f"{line.direction}@{dose:g}": plain(Texture(1.0, 9.0, 0.0, 5.0 + abs(dose), 1.0))
    for line in OWN
    for dose in DOSES
}
SIDE |= {
    "none@0": plain(Texture(1.0, 9.0, 0.0, 5.0, 1.0)),
    "ask@0": plain(Texture(1.0, 8.0, 0.0, 7.5, 0.9)),
}


def panels(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def test_dose_response_shows_every_curve_with_its_interval():
    figure = dose_chart(CURVES, "proj_sd", {name: ["validation"] for name in CURVES})
    assert [axis.get_title() for axis in panels(figure)] == [name.replace("_", " ") for name in CURVES]
    first = panels(figure)[0]
    for line, drawn in zip(CURVES[NAMES[0]], first.get_lines(), strict=True):
        assert drawn.get_ydata().tolist() == line.means
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels == ["probe's direction", "random", "shuffled", "means", "sycophancy"]
    assert len(first.collections) == 1 + 3  # a band, and bars of every control but the random ones
    colors = {line.kind: drawn.get_color() for line, drawn in zip(CURVES[NAMES[0]], first.get_lines())}
    assert len(set(colors.values())) == 5


def test_layer_curves_mark_the_block_that_is_steered():
    tried = [Trial(2, -0.1, 0.05, 1.0), Trial(0, 0.4, 0.2, 1.0), Trial(1, float("nan"), 0.1, 1.0)]
    [axis] = panels(choice_chart({"x": tried}, {"x": 0}))
    direction, random, ring = axis.get_lines()
    assert direction.get_xdata().tolist() == [0, 1, 2]
    np.testing.assert_array_equal(direction.get_ydata(), [0.4, np.nan, 0.1])
    assert random.get_ydata().tolist() == [0.2, 0.1, 0.05]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([0], [0.4])


def test_the_specificity_matrix_writes_every_slope():
    slopes = np.array([[0.7, -0.05, 0.0], [0.02, np.nan, 0.6]])
    [axis] = panels(specificity_chart(slopes, ["a_b", "c"], ["x", "y_z", "w"]))
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["0.70", "-0.05", "0.00", "0.02", "nan", "0.60"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a b", "c"]
    low, high = axis.images[0].get_clim()
    assert (low, high) == (-0.7, 0.7)


def test_the_trade_off_puts_sycophancy_beside_its_cost():
    perplexity = {key: one["perplexity"] for key, one in SIDE.items()}
    axis = panels(tradeoff_chart(CURVES, WORDS, perplexity))[0]
    lines = axis.get_lines()
    own = CURVES[NAMES[0]][0]
    drawn = next(line for line in lines if list(line.get_xdata()) == own.means)
    assert drawn.get_ydata().tolist() == [6.0, 5.0, 6.0]
    cross = next(line for line in lines if line.get_marker() == "X")
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([2.0], [7.5])


@pytest.mark.parametrize("words", [WORDS, {}])
def test_the_page_of_costs_holds_words_and_side_effects(words, tmp_path):
    report = Report("x")
    add_costs(report, Steered(CURVES, words, [], [], SIDE))
    page = report.write(tmp_path / "page.html").read_text()
    assert ("In words instead of" in page) == bool(words)
    assert "Side effects" in page
    assert f"{NAMES[0]}.probe0" in page
    assert f"{NAMES[0]}.random2" not in page  # it was not read again
