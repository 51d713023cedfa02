"""Adapter files: round trips, peft on both sides, and refusals that name what is wrong."""

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, prompt, stir
from safetensors.torch import load_file, save_file

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.convert import convert
from preft.formats import WEIGHTS_FILE, load_adapter, merged_state, read_adapter, save_adapter
from preft.forward import masked_logits
from preft.vllm.identity import read_identity
from shared.models import Model
from shared.tokens import Phase, pad


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


PATTERNS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["q_proj", "mlp.up_proj"], "use_rslora": True, "layers_to_transform": [0, 2]},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\..*": 7},
        "alpha_pattern": {"v_proj": 3.0},
    },
    {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(q|gate|up)_proj", "rank_pattern": {"q_proj": 2}},
    {
        "target_modules": "all-linear",
        "alpha_pattern": {"self_attn.k_proj": 1.0, r".*2\.mlp.*": 9.0},
        "use_rslora": True,
    },
]


def copy_of(model: Model) -> Any:
    copy = type(model.hf)(model.hf.config).eval()
    copy.load_state_dict(model.hf.state_dict())
    return copy


@pytest.mark.parametrize("settings", PATTERNS, ids=range(len(PATTERNS)))
def test_peft_loads_an_all_token_adapter(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel

    targets = settings["target_modules"]
    ours: dict[str, Any] = {"target_modules": tuple(targets) if isinstance(targets, list) else targets}
    ours |= {name: settings[name] for name in ("rank_pattern", "alpha_pattern") if name in settings}
    layers = tuple(settings["layers_to_transform"]) if "layers_to_transform" in settings else None
    rslora = settings.get("use_rslora", False)
    config = AdapterConfig(rank=4, alpha=6.0, phase=Phase.ALL, rslora=rslora, layers=layers, **ours)
    adapter = stir(Adapter.create(model.hf, config), 1)
    folder = save_adapter(adapter, tmp_path / "adapter")
    batch = pad([prompt(20)], [12], 0)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):  # peft's word on the phase section
        peft_model = PeftModel.from_pretrained(copy_of(model), str(folder))
    found = peft_model(input_ids=batch.input_ids_BT).logits
    torch.testing.assert_close(found, masked_logits(model.hf, adapter, batch), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, masked_logits(model.hf, None, batch), atol=1e-2)


@pytest.mark.parametrize("settings", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_of_peft_acts_on_all_tokens(
    model: Model, tmp_path: Path, settings: dict[str, Any], file: str
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, init_lora_weights=False, **settings)
    peft_model = get_peft_model(copy_of(model), config).eval()
    peft_model.save_pretrained(str(tmp_path))
    if file.endswith(".bin"):  # as older releases of peft wrote it
        torch.save(load_file(tmp_path / WEIGHTS_FILE), tmp_path / file)
        (tmp_path / WEIGHTS_FILE).unlink()
    loaded = load_adapter(tmp_path, model.hf)
    assert loaded.config.phase == "all"
    batch = pad([prompt(20)], [12], 0)
    expected = peft_model(input_ids=batch.input_ids_BT).logits
    torch.testing.assert_close(masked_logits(model.hf, loaded, batch), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, masked_logits(model.hf, None, batch), atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lora_all"])
def test_peft_refuses_what_is_not_an_ordinary_lora(model: Model, folders: dict[str, Path], name: str) -> None:
    from peft import PeftConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for load in (
            PeftConfig.from_pretrained,
            lambda path: PeftModel.from_pretrained(copy_of(model), path),
        ):
            with pytest.raises(KeyError, match="PREFT"):
                load(str(folders[name]))


def test_a_folder_of_format_1_still_loads(
    model: Model, adapters: dict[str, Adapter], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Format 1 wrote every adapter under peft's names and type; `strict=False` still does."""
    batch = pad([prompt(20)], [12], 0)
    for name in ("lora_p_3", "reft_p_0"):
        folder = save_adapter(adapters[name], tmp_path / name, strict=False)
        names = set(load_file(folder / WEIGHTS_FILE))
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        content = json.loads((folder / "adapter_config.json").read_text())
        assert content["peft_type"] == "LORA"
        content["preft"] = {"format_version": 1} | {
            key: value for key, value in content["preft"].items() if key in ("method", "phase", "history")
        }
        old = {key: value for key, value in content.items() if not key.endswith("_pattern")}
        (folder / "adapter_config.json").write_text(json.dumps(old))
        found = masked_logits(model.hf, load_adapter(folder, model.hf), batch)
        assert torch.equal(found, masked_logits(model.hf, adapters[name], batch))
        assert read_adapter(folder).format_version == 1
        assert names.isdisjoint(load_file(folders[name] / WEIGHTS_FILE))


def test_half_precision_files_load(model: Model, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "a", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS_FILE).values()} == {torch.bfloat16}
    for ours, theirs in zip(load_adapter(folder, model.hf).parameters(), adapters["lora_p_0"].parameters()):
        assert torch.equal(ours, theirs.bfloat16().float())


def test_a_type_too_small_for_the_values_is_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    large = copy.deepcopy(adapters["lora_p_0"])
    with torch.no_grad():
        next(large.parameters())[0, 0] = 1e5
    folder = save_adapter(large, tmp_path / "a", dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match=rf"{FIRST} has values above 6.55e\+04, the largest of float16"):
        convert(folder, tmp_path / "b", dtype=torch.float16)
    assert not (tmp_path / "b").exists()


def test_merging(model: Model, adapters: dict[str, Adapter]) -> None:
    copy = copy_of(model)
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
FIRST_STRICT = FIRST.replace("lora_A", "preft_A")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST_STRICT), f"{FIRST} is missing"),
        (
            lambda tensors: tensors.update({"extra.lora_A.weight": torch.ones(1)}),
            "extra.lora_A.weight is not in",
        ),
        (
            lambda tensors: tensors.update({FIRST_STRICT: torch.ones(2, 3)}),
            rf"{FIRST} has shape \(2, 3\), expected",
        ),
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
        ({"target_modules": []}, "names no module"),
        ({"exclude_modules": ["q_proj"]}, "uses exclude_modules"),
        ({"rank_pattern": {"q_proj": -1}}, "at least 1 and whole, not -1"),
        ({"r": 0}, "at least 1 and whole, not 0"),
        ({"preft": {"format_version": 9}}, "is of format 9"),
        ({"preft": {"format_version": "2"}}, "is of format 2"),
        ({"preft": ["prefill"]}, "must hold an object"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must be dict"),
        ({"target_modules": [1, "q_proj"]}, "'target_modules' must be"),
        ({"layers_to_transform": "all"}, "'layers' must be"),
        ({"use_rslora": "no"}, "'rslora' must be bool"),
        ({"lora_alpha": None}, "lora_alpha is not set"),
        ({"lora_alpha": math.nan}, "alpha must be a finite number, not nan"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha must be a finite number, not inf"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="must hold an object"):
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


def test_files_that_are_not_what_they_should_be_are_refused(
    model: Model, adapters: dict[str, Adapter], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_adapter(adapters["lora_p_0"], tmp_path / "adapter")
    weights, config = folder / WEIGHTS_FILE, folder / "adapter_config.json"
    tensors = load_file(weights)
    save_file(tensors | {FIRST: tensors[FIRST_STRICT].clone()}, weights)
    with pytest.raises(AdapterError, match="holds a tensor under both of its names"):
        load_adapter(folder, model.hf)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AdapterError, match="damaged, or holds more than tensors"):
        load_adapter(folder, model.hf)
    weights.unlink()
    with pytest.raises(AdapterError, match="has no adapter_model.safetensors"):
        load_adapter(folder, model.hf)
    torch.save({"weights": adapters["lora_p_0"]}, folder / "adapter_model.bin")  # pickled code
    with pytest.raises(AdapterError, match="damaged, or holds more than tensors"):
        load_adapter(folder, model.hf)
    stripped = {key: value for key, value in json.loads(config.read_text()).items() if key != "preft"}
    config.write_text(json.dumps(stripped))
    with pytest.raises(AdapterError, match="has lost its section"):
        read_adapter(folder)
    with pytest.raises(ValueError, match="has lost its section"):
        read_identity(folder)
    config.write_text("{")
    with pytest.raises(AdapterError, match="is no JSON"):
        read_adapter(folder)
