"""Adapter files: round trips, peft on both sides, and refusals that name what is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, prompt, stir
from safetensors.torch import load_file, save_file

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.formats import load_adapter, merged_state, read_adapter, save_adapter
from preft.forward import masked_logits
from shared.models import Model
from shared.tokens import pad


@pytest.mark.parametrize("name", list(CONFIGS))
def test_round_trip(model: Model, adapters: dict[str, Adapter], folders: dict[str, Path], name: str) -> None:
    loaded = load_adapter(folders[name], model.hf)
    saved = adapters[name].config
    alpha = (
        saved.scale * (saved.rank**0.5 if saved.rslora else saved.rank) if saved.method == "lora" else None
    )
    assert loaded.config == replace(saved, alpha=alpha, target_modules=loaded.config.target_modules)
    assert loaded.config.scale == pytest.approx(saved.scale)
    batch = pad([prompt(20)], [12], 0)
    found, expected = (masked_logits(model.hf, adapter, batch) for adapter in (loaded, adapters[name]))
    if saved.method == "loreft":  # W - R is saved, W restored: equal up to rounding
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(found, expected)


def test_peft_loads_an_all_token_adapter(
    model: Model, adapters: dict[str, Adapter], folders: dict[str, Path]
) -> None:
    from peft import PeftModel

    batch = pad([prompt(20)], [12], 0)
    expected = masked_logits(model.hf, adapters["lora_all"], batch)
    copy = type(model.hf)(model.hf.config).eval()
    copy.load_state_dict(model.hf.state_dict())
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):  # peft's word on the phase section
        peft_model = PeftModel.from_pretrained(copy, str(folders["lora_all"]))
    found = peft_model(input_ids=batch.input_ids_BT).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_peft_acts_on_all_tokens(model: Model, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    copy = type(model.hf)(model.hf.config).eval()
    copy.load_state_dict(model.hf.state_dict())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(copy, config)
    peft_model.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path, model.hf)
    assert loaded.config.phase == "all"
    batch = pad([prompt(20)], [12], 0)
    expected = peft_model(input_ids=batch.input_ids_BT).logits
    torch.testing.assert_close(masked_logits(model.hf, loaded, batch), expected, atol=1e-4, rtol=1e-4)


def test_merging(model: Model, adapters: dict[str, Adapter]) -> None:
    copy = type(model.hf)(model.hf.config).eval()
    copy.load_state_dict(model.hf.state_dict() | merged_state(adapters["lora_all"], model.hf))
    batch = pad([prompt(20)], [12], 0)
    expected = masked_logits(model.hf, adapters["lora_all"], batch)
    torch.testing.assert_close(masked_logits(copy, None, batch), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(AdapterError, match="phase 'prefill' cannot be merged"):
        merged_state(adapters["lora_p_0"], model.hf)
    with pytest.raises(AdapterError, match="no weight to merge"):
        merged_state(adapters["reft_all"], model.hf)


Change = Callable[[dict[str, torch.Tensor]], Any]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), f"{FIRST} is missing"),
        (
            lambda tensors: tensors.update({"extra.lora_A.weight": torch.ones(1)}),
            "extra.lora_A.weight is not in",
        ),
        (lambda tensors: tensors.update({FIRST: torch.ones(2, 3)}), rf"{FIRST} has shape \(2, 3\), expected"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_tensors_that_do_not_fit_are_named(
    model: Model, adapters: dict[str, Adapter], tmp_path: Path, change: Change, message: str
) -> None:
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder, model.hf)


def test_another_base_model_is_refused(model: Model, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "adapter", "m", "0123456789abcdef")
    assert read_adapter(folder).base_model_fingerprint == "0123456789abcdef"
    load_adapter(folder, model.hf, "0123456789abcdef")
    with pytest.raises(AdapterError, match="trained on a base model with fingerprint"):
        load_adapter(folder, model.hf, "ffffffffffffffff")


def test_unknown_configurations_are_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in [
        ({"use_dora": True}, "uses use_dora"),
        ({"alora_invocation_tokens": [5, 6]}, "uses alora_invocation_tokens"),
        ({"lora_bias": True, "use_qalora": True}, "uses lora_bias, use_qalora"),
        ({"init_lora_weights": "pissa_niter_16"}, "uses init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "uses init_lora_weights='olora'"),
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"target_modules": ".*proj"}, "a pattern is not supported"),
        ({"preft": {"format_version": 9}}, "is of format 9"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            read_adapter(folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "lora_ga"])
def test_a_start_that_leaves_the_base_weights_alone_is_read(
    adapters: dict[str, Adapter], tmp_path: Path, start: bool | str
) -> None:
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    assert read_adapter(folder).config.rank == adapters["lora_p_0"].config.rank


def test_loading_leaves_a_loaded_adapter_trainable_from_where_it_was(model: Model, tmp_path: Path) -> None:
    folder = save_adapter(stir(Adapter.create(model.hf, AdapterConfig("direft", rank=3)), 1), tmp_path / "a")
    again = save_adapter(load_adapter(folder, model.hf), tmp_path / "b")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
