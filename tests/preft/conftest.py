"""A tiny random Llama, adapters for it in memory and on disk, and the checker of `preft_cases`."""

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helper module; the import mode adds nothing

from preft_cases import COMPOSED, CONFIGS, Checker, stir

from preft.adapters import Adapter
from preft.composition import Composition, compose
from preft.formats import save_adapter
from shared.models import Model, ModelConfig, load


@pytest.fixture(scope="session")
def plugin() -> None:
    """vLLM imported (its import warns about its own dependencies) and the plugin registered, without an engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import LLM  # noqa: F401

        from preft.vllm.plugin import register

        register()


@pytest.fixture(scope="session")
def model() -> Model:
    return load(ModelConfig("random:llama"))


@pytest.fixture(scope="session")
def adapters(model: Model) -> dict[str, Adapter]:
    return {
        name: stir(Adapter.create(model.hf, config, seed=i), seed=100 + i)
        for i, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="session")
def composed(adapters: dict[str, Adapter]) -> Composition:
    return compose([(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)])


@pytest.fixture(scope="session")
def composed_folder(composed: Composition, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return composed.save(tmp_path_factory.mktemp("composed") / COMPOSED)


@pytest.fixture(scope="session")
def folders(adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(adapter, root / name) for name, adapter in adapters.items()}


@pytest.fixture(scope="session")
def model_folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def checker(model: Model, adapters: dict[str, Adapter], composed: Composition) -> Checker:
    return Checker(model, adapters | {COMPOSED: composed})
