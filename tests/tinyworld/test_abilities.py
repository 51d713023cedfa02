"""The committed weights: every floor on held-out data, size on disk, and a README that shows what was measured."""

import json

import pytest

from shared.tinyworld import EMBEDDED, MODEL_DIR, READABLE_DIR
from shared.tinyworld.evaluate import DESCRIPTIONS, FLOORS, evaluate, readme

pytestmark = pytest.mark.xdist_group("abilities")  # one worker measures


@pytest.fixture(scope="module")
def table():
    return evaluate(n=100, quick=True)


@pytest.mark.parametrize("ability", FLOORS)
def test_floor(table, ability):
    assert table[ability] >= FLOORS[ability]


def test_weights_are_small():
    files = [f for folder in EMBEDDED.values() for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20


def test_readme_shows_the_recorded_evaluation():
    recorded = json.loads((MODEL_DIR / "evaluation.json").read_text(encoding="utf-8"))
    assert (MODEL_DIR / "README.md").read_text(encoding="utf-8") == readme(recorded)
    assert set(DESCRIPTIONS) <= set(recorded)
    assert all(recorded[name] >= floor for name, floor in FLOORS.items())


def test_the_readable_model_answers_and_does_not_follow_its_directions():
    """Its recorded evaluation: it reads and answers like the first, and steering along its directions is noise."""
    recorded = json.loads((READABLE_DIR / "evaluation.json").read_text(encoding="utf-8"))
    assert (READABLE_DIR / "README.md").read_text(encoding="utf-8") == readme(recorded, "social")
    assert all(recorded[name] >= floor for name, floor in FLOORS.items() if name in recorded)
    assert min(recorded["pinned_r2_worst"], recorded["elicited_r2_worst"]) >= 0.95
    assert abs(recorded["steering_slope_mean"]) <= recorded["steering_random_largest"]
