"""`preft adapter`: what it says about folders, what it writes, and every fault that it names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import CONFIGS, stir
from safetensors.torch import load_file, save_file

from preft.adapter_check import check_folder
from preft.adapter_summary import summarise
from preft.adapters import Adapter, AdapterConfig
from preft.cli import main
from preft.formats import WEIGHTS_FILE, load_adapter, save_adapter
from shared.models import Model

MODEL = "random:llama"


def command(*arguments: Any) -> int:
    return main(["adapter", *map(str, arguments)])


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or, with None, remove) the tensors whose names end so."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for suffix, value in changes.items():
        [name] = [name for name in tensors if name.endswith(suffix.replace("__", "."))]
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_states_what_was_saved(
    adapters: dict[str, Adapter], folders: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS[name]
    assert command("inspect", folders[name], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["phase"]) == (config.method, config.phase.value)
    assert found["ranks"] == {str(config.rank): len(adapters[name].paths)}
    assert sum(found["modules"].values()) == len(adapters[name].paths)
    assert list(map(float, found["scales"])) == [pytest.approx(config.scale)]
    assert found["parameters"] == adapters[name].n_parameters()
    assert found["bytes"] == sum(path.stat().st_size for path in folders[name].iterdir())
    assert found["strict"] == (name != "lora_all")
    assert command("inspect", folders[name]) == 0
    text = capsys.readouterr().out
    assert f"{config.method}, phase {config.phase.value}" in text
    assert found["digest"] in text


def test_inspect_counts_ranks_by_module(model: Model, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, target_modules=("q_proj", "v_proj"), rank_pattern={r".*\.0\..*": 9})
    summary = summarise(save_adapter(Adapter.create(model.hf, config), tmp_path / "a", fingerprint="ab"))
    assert summary.ranks == {4: 4, 9: 2}
    assert summary.scales == {8 / 9: 2, 2.0: 4}
    assert summary.modules == {"q_proj": 3, "v_proj": 3}
    assert summary.base_model_fingerprint == "ab"


def test_conversions_keep_the_adapter(
    model: Model, adapters: dict[str, Adapter], folders: dict[str, Path], tmp_path: Path
) -> None:
    """preft -> peft -> preft with a phase -> half precision without strict names."""
    assert command("convert", folders["lora_all"], tmp_path / "peft", "--to", "peft") == 0
    assert "preft" not in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert command("convert", tmp_path / "peft", tmp_path / "p", "--phase", "prefill") == 0
    assert summarise(tmp_path / "p").strict
    assert command("convert", tmp_path / "p", tmp_path / "half", "--no-strict", "--dtype", "bfloat16") == 0
    assert not summarise(tmp_path / "half").strict
    for folder, phase in (("peft", "all"), ("p", "prefill"), ("half", "prefill")):
        loaded = load_adapter(tmp_path / folder, model.hf)
        assert loaded.config.phase == phase
        for ours, first in zip(loaded.parameters(), adapters["lora_all"].parameters()):
            assert torch.equal(ours, first.bfloat16().float() if folder == "half" else first)
    assert command("convert", folders["reft_p_1"], tmp_path / "reft", "--no-strict") == 0
    again = load_adapter(tmp_path / "reft", model.hf)
    assert again.config == load_adapter(folders["reft_p_1"], model.hf).config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora_p_0", ["--to", "peft"], "peft has no place for a lora adapter of phase 'prefill'"),
        ("reft_all", ["--to", "peft"], "peft has no place for a direft adapter of phase 'all'"),
        ("lora_p_0", ["--phase", "decode"], "states its phase, 'prefill'"),
        ("lora_p_0", ["--positions", "prompt"], "needs --model and --positions"),
        ("lora_p_0", ["--positions", "prompt", "--model", MODEL, "--to", "peft"], "becomes a preft folder"),
        ("lora_p_0", ["--positions", "prompt", "--model", MODEL], "is no pyreft checkpoint"),
    ],
)
def test_conversions_that_would_change_the_meaning_are_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    name: str,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("convert", folders[name], tmp_path / "out", *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_not_written_over(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("convert", folders["lora_all"], tmp_path) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sound_adapter_is_ok(
    folders: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", folders[name], "--model", MODEL) == 0
    assert "ok: " in capsys.readouterr().out


def test_every_fault_of_an_adapter_is_named(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AdapterConfig(rank=4, target_modules=("q_proj",))
    folder = save_adapter(stir(Adapter.create(model.hf, config), 1), tmp_path / "a", fingerprint="0" * 16)
    edit(
        folder,
        layers__0__self_attn__q_proj__preft_A__weight=None,
        layers__1__self_attn__q_proj__preft_A__weight=torch.ones(2, 3),
        layers__2__self_attn__q_proj__preft_A__weight=torch.full((4, 128), torch.nan),
    )
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {"base_model.model.extra.preft_A.weight": torch.ones(1)}, folder / WEIGHTS_FILE)
    assert command("check", folder, "--model", MODEL, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    faults = "\n".join(found["faults"])
    for fault in (
        "fingerprint 0000000000000000",
        "layers.0.self_attn.q_proj.lora_A.weight is missing",
        "layers.1.self_attn.q_proj.lora_A.weight has shape (2, 3), expected (4, 128)",
        "extra.lora_A.weight is not in the model",
        "layers.2.self_attn.q_proj.lora_A.weight holds values that are not finite",
    ):
        assert fault in faults
    assert len(found["faults"]) == 5


def test_a_model_without_weights_will_do(model: Model, folders: dict[str, Path], tmp_path: Path) -> None:
    with torch.device("meta"):
        bare = type(model.hf)(model.hf.config)
    for folder in folders.values():
        assert check_folder(folder, bare).ok
        load_adapter(folder, bare)
    folder = save_adapter(Adapter.create(model.hf, CONFIGS["reft_p_0"]), tmp_path / "a", fingerprint="0" * 16)
    edit(folder, layers__1__residual_edit__preft_B__weight=torch.zeros(128, 4))
    [other, flat] = check_folder(folder, bare, "f" * 16).faults
    assert "with fingerprint 0000000000000000, this one has ffffffffffffffff" in other
    assert "the rows of R are not orthonormal" in flat


def test_what_cannot_be_served_is_a_fault(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = AdapterConfig(rank=4, target_modules=("q_proj",), rank_pattern={r".*\.1\..*": 513})
    folder = save_adapter(Adapter.create(model.hf, large), tmp_path / "large")
    assert command("check", folder, "--model", MODEL) == 1
    assert "fault: rank 513 is above 512" in capsys.readouterr().out
    assert command("check", tmp_path, "--model", MODEL) == 1
    assert "has no adapter_config.json" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["direft", "loreft", "nodireft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_r_that_are_not_orthonormal_are_a_fault(
    model: Model, tmp_path: Path, method: Any, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = stir(Adapter.create(model.hf, AdapterConfig(method, rank=16)), 1)
    sound = save_adapter(adapter, tmp_path / "sound", dtype=dtype)
    assert command("check", sound, "--model", MODEL) == 0
    capsys.readouterr()
    with torch.no_grad():
        adapter.deltas[1].R_RD.mul_(1.2)
    folder = save_adapter(adapter, tmp_path / "unsound", dtype=dtype)
    assert command("check", folder, "--model", MODEL) == (0 if method == "nodireft" else 1)
    text = capsys.readouterr().out
    assert ("layers.1.residual_edit.lora_B.weight: the rows of R are not orthonormal" in text) == (
        method != "nodireft"
    )


def test_a_pyreft_checkpoint_is_pointed_at_its_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "intkey_x.bin").write_bytes(b"")
    assert command("convert", tmp_path, tmp_path / "out") == 2
    assert "is a pyreft checkpoint: give the model and the positions" in capsys.readouterr().err
