"""The committed weights: every floor on held-out data, size on disk, and a README that shows what was measured."""

import json

import pytest

from shared.tinyworld import MODEL_DIR
from shared.tinyworld.evaluate import DESCRIPTIONS, FLOORS, evaluate, readme

pytestmark = pytest.mark.xdist_group("abilities")  # one worker measures


@pytest.fixture(scope="module")
def table():
    return evaluate(n=100, quick=True)


@pytest.mark.parametrize("ability", FLOORS)
def test_floor(table, ability):
    assert table[ability] >= FLOORS[ability]


def test_weights_are_small():
    size = sum(f.stat().st_size for f in MODEL_DIR.rglob("*") if f.is_file())
    assert size <= 16 * 2**20


def test_readme_shows_the_recorded_evaluation():
    recorded = json.loads((MODEL_DIR / "evaluation.json").read_text(encoding="utf-8"))
    assert (MODEL_DIR / "README.md").read_text(encoding="utf-8") == readme(recorded)
    assert set(DESCRIPTIONS) <= set(recorded)
    assert all(recorded[name] >= floor for name, floor in FLOORS.items())
