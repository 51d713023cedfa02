"""What peft and vLLM make of this project's adapters, and it of theirs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS

from preft.adapters import Adapter, AdapterConfig, target_paths
from shared.models import Model

pytestmark = [pytest.mark.xdist_group(__name__), pytest.mark.usefixtures("plugin")]

RANKS = {r"layers\.0\..*q_proj": 2, "q_proj": 6, "mlp.down_proj": 3}
ALPHAS = {"layers.[01].self_attn.v_proj": 3.0, "q_proj": 5.0}


def peft_model(model: Model, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    copy = type(model.hf)(model.hf.config).eval()
    copy.load_state_dict(model.hf.state_dict())
    return get_peft_model(copy, LoraConfig(**settings))


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj",),
        ("self_attn.q_proj", "down_proj"),
        ("model.layers.1.mlp.up_proj", "k_proj"),
        r".*\.layers\.[02]\.(self_attn\.[qv]_proj|mlp\.gate_proj)",
        "all-linear",
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_targets_ranks_and_scales_are_those_of_peft_and_vllm(
    model: Model, targets: Any, rslora: bool
) -> None:
    from peft.tuners.lora import LoraLayer
    from vllm.lora.peft_helper import PEFTHelper

    chosen = list(targets) if isinstance(targets, tuple) else targets
    paths = target_paths(model.hf, AdapterConfig(target_modules=targets))
    ranks, alphas = (
        {
            key: value
            for key, value in pattern.items()
            if any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
        }
        for pattern in (RANKS, ALPHAS)
    )
    patterns: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    config = AdapterConfig(rank=4, alpha=6.0, rslora=rslora, target_modules=targets, **patterns)
    lora = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": chosen} | patterns
    theirs = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in peft_model(model, **lora).named_modules()
        if isinstance(layer, LoraLayer)
    }
    served = PEFTHelper.from_dict(lora)
    assert {path: (config.rank_of(path), config.scale_of(path)) for path in paths} == theirs
    assert {path: served.get_rank_and_scaling(path) for path in paths} == theirs
    for path, delta in Adapter.create(model.hf, config).parts():
        assert (delta.A_RI.shape[0], delta.scale) == theirs[path]


def vllm_loads(folder: Path) -> Any:
    """vLLM's own loading of an adapter folder, with the modules of a Llama."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    helper = PEFTHelper.from_local_dir(str(folder), None)
    return LoRAModel.from_local_checkpoint(
        str(folder), projections, helper, device="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_without_the_plugin_refuses_what_is_not_an_ordinary_lora(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora import lora_model

    stock = lora_model.parse_fine_tuned_lora_name._innerworks_original
    monkeypatch.setattr(lora_model, "parse_fine_tuned_lora_name", stock)
    if name == "lora_all":
        assert vllm_loads(folders[name]).loras
    else:
        with pytest.raises(ValueError, match="is unsupported LoRA weight"):
            vllm_loads(folders[name])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("lora")])
def test_vllm_with_the_plugin_loads_the_same_factors(
    adapters: dict[str, Adapter], folders: dict[str, Path], name: str
) -> None:
    found = vllm_loads(folders[name]).loras
    assert set(found) == set(adapters[name].paths)
    for path, delta in adapters[name].parts():
        assert torch.equal(found[path].lora_a, delta.A_RI)
        assert torch.equal(found[path].lora_b, delta.B_OR)
        assert found[path].scaling == pytest.approx(delta.scale)
