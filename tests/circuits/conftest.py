"""Tiny random models in float64, one of each family, and the small trained model where it is at hand."""

from pathlib import Path

import pytest
import torch

from circuits.attribution import Problem, pose
from circuits.metric import top_logits
from shared.architecture import FAMILIES
from shared.models import Model, ModelConfig, load
from shared.tokens import pad

STORIES = Path(__file__).parents[2] / ".." / "shared" / "models" / "stories260k"
ROWS = [[1, 40, 77, 9, 120, 33, 201], [1, 90, 13, 55, 7]]


@pytest.fixture(scope="session")
def random_models() -> dict[str, Model]:
    """Filled on demand: loading all ten families takes seconds."""
    return {}


@pytest.fixture(params=list(FAMILIES))
def any_model(request: pytest.FixtureRequest, random_models: dict[str, Model]) -> Model:
    return _cached(random_models, request.param)


@pytest.fixture
def llama(random_models: dict[str, Model]) -> Model:
    return _cached(random_models, "llama")


def _cached(models: dict[str, Model], family: str) -> Model:
    if family not in models:
        models[family] = load(ModelConfig(f"random:{family}", dtype="float64"))
    return models[family]


@pytest.fixture(scope="session")
def stories() -> Model:
    if not STORIES.is_dir():
        pytest.skip("the trained 260K model is not beside this checkout (../shared/models/stories260k)")
    return load(ModelConfig(str(STORIES)))


@pytest.fixture
def problem_of():
    def make(model: Model, rows=None, padding_side: str = "right", k: int = 2, **options) -> Problem:
        rows = ROWS if rows is None else rows
        batch = pad(rows, [len(row) for row in rows], 0, padding_side)
        return pose(model, batch, lambda logits, at: top_logits(logits, at, k), **options)

    return make


@pytest.fixture
def relative():
    """Largest difference, relative to the largest expected value."""

    def measure(got: torch.Tensor, expected: torch.Tensor) -> float:
        return float((got - expected).abs().max() / expected.abs().max())

    return measure
