"""vLLM's server finds strengths and sums of adapters by the model's name; nothing else is reachable through a name."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preft.vllm import resolver, scheduling
from preft.vllm.identity import read_identity
from shared.interventions import Add, save_interventions
from shared.models import Model
from shared.tokens import Phase

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]


@pytest.fixture(autouse=True)
def known(model: Model, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has loaded two adapters; `calm` lies in the resolver's folder."""
    import vllm.envs as envs

    save_interventions(
        tmp_path / "served" / "calm", [Add("blocks.1.output", torch.ones(128), phase=Phase.DECODE)], model
    )
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(tmp_path / "served"))
    monkeypatch.setattr(resolver, "loaded", {})
    monkeypatch.setattr(scheduling, "loaded", resolver.loaded)
    assert str(tmp_path / "served") == envs.VLLM_LORA_RESOLVER_CACHE_DIR
    add = scheduling.refreshing(lambda engine, lora_request: True)
    for number, name in enumerate(["lora_p_0", "lora_decode"], 1):
        add(
            None,
            SimpleNamespace(
                lora_name=name, lora_int_id=number, lora_path=str(folders[name]), load_inplace=False
            ),
        )


def resolve(name: str) -> Any:
    from vllm.lora.resolver import LoRAResolverRegistry

    found = LoRAResolverRegistry.get_resolver(resolver.NAME)
    return asyncio.run(found.resolve_lora("base", name))


def test_names_of_known_adapters_resolve() -> None:
    found = resolve("lora_p_0:0.5+calm:2")
    assert found.lora_name == "lora_p_0:0.5+calm:2"
    identity = read_identity(Path(found.lora_path))
    assert [part is not None for part in identity.parts or ()] == [True, True, True]
    assert len(set(identity.parts or ())) == 2
    assert resolve("calm").lora_path != resolve("calm:0.5").lora_path
    assert resolve("lora_p_0:0.5+calm:2").lora_path == found.lora_path


@pytest.mark.parametrize(
    "name", ["nobody", "lora_p_1", "../served/calm", "calm:loud", "calm+nobody", "/etc", ""]
)
def test_other_names_are_no_model(name: str) -> None:
    assert resolve(name) is None


def test_what_does_not_add_up_is_a_bad_request(tmp_path: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    from shared.models import ModelConfig, load

    other = load(ModelConfig("random:qwen3", seed=3))
    edits = [Add("blocks.0.output", torch.ones(other.architecture.width))]
    save_interventions(tmp_path / "served" / "foreign", edits, other)
    with pytest.raises(VLLMValidationError, match="different base models"):
        resolve("calm+foreign")


def test_an_unloaded_adapter_is_forgotten() -> None:
    scheduling.forgetting(lambda engine, lora_id: True)(None, 1)
    assert resolve("lora_p_0:0.5") is None
    assert resolve("lora_decode:0.5") is not None
