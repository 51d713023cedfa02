"""What `preft serve` takes for an adapter: each fault is refused with its reason, alone."""

import asyncio
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from preft import compose
from preft.adapters import Adapter, AdapterError
from preft.serve import command
from preft.serve.check import AdapterCheck, bare_model
from preft.serve.command import adapter_folders, check_stored, engine_rank
from preft.serve.store import Store
from preft.serve.upload import _stage
from shared.interventions import Add, Intervention, Scale, save_interventions
from shared.models import Model, ModelConfig
from shared.tokens import Phase

pytestmark = pytest.mark.xdist_group(__name__)
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def check(model: Model, model_folder: Path) -> AdapterCheck:
    return AdapterCheck(bare_model(ModelConfig(str(model_folder))), model.fingerprint, 16)


@pytest.fixture
def kinds(
    model: Model, adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """A folder of each kind that is no single adapter."""
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "kinds"
    edits: list[Intervention] = [Add("blocks.1.output", torch.ones(128), phase=Phase.DECODE)]

    def saved(name: str, *terms: str) -> Path:
        both = compose([(adapters[term], 0.5) for term in terms])
        return both.save(root / name, fingerprint=model.fingerprint)

    return {
        "sum": saved("sum", "lora_p_0", "reft_p_0"),
        "parts": saved("parts", "lora_p_0", "lora_decode"),
        "calm": save_interventions(root / "calm", edits, model),
    }


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with another configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    change(config)
    (to / CONFIG).write_text(json.dumps(config))
    return to


def test_compositions_and_interventions_pass(check: AdapterCheck, kinds: dict[str, Path]) -> None:
    found = {name: check(folder, uploaded=True) for name, folder in kinds.items()}
    assert {name: checked.rank for name, checked in found.items()} == {"sum": 4, "parts": 4, "calm": 1}
    assert [part is not None for part in found["parts"].identity.parts or ()] == [True] * 3
    assert adapter_folders([str(kinds["sum"].parent)]) == kinds
    assert adapter_folders([f"x={kinds['calm']}"]) == {"x": kinds["calm"]}
    assert engine_rank(None, kinds) == 16


def test_what_they_state_must_suit_the_model(
    check: AdapterCheck, model: Model, kinds: dict[str, Path], tmp_path: Path
) -> None:
    document = json.loads((kinds["calm"] / "interventions.json").read_text())
    document["model"]["width"] = 10**6  # squared it fits no memory
    (kinds["calm"] / "interventions.json").write_text(json.dumps(document))
    wide: list[Intervention] = [Scale("blocks.0.output", 2.0)]
    rescaled = changed(kinds["sum"], tmp_path / "rescaled", lambda config: config.update(lora_alpha=99))
    other = AdapterCheck(check.hf, "0" * 16, 16)
    for one, folder, reason in [
        (check, kinds["calm"], "width=1000000"),
        (check, save_interventions(tmp_path / "wide", wide, model), "rank 128.*--max-lora-rank"),
        (check, rescaled, "every alpha is its rank"),
        (AdapterCheck(check.hf, None, 2), kinds["parts"], "--max-lora-rank"),
        (other, kinds["sum"], "fingerprint"),
        (other, save_interventions(tmp_path / "other", wide, model), "fingerprint"),
    ]:
        with pytest.raises(AdapterError, match=reason):
            one(folder)


def test_a_composition_of_another_model_is_refused(
    check: AdapterCheck, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = compose([(adapters["lora_p_0"], 1.0)]).save(tmp_path / "sum")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if name.endswith("_A.weight"))
    for change, reason in [
        ({first: tensors[first][:, :-1].clone()}, "inputs and outputs"),
        (
            {name.replace("layers.0", "layers.9"): values.clone() for name, values in tensors.items()},
            "not in the model",
        ),
    ]:
        save_file(tensors | change, weights)
        with pytest.raises(AdapterError, match=reason):
            check(folder)


def test_a_scale_beyond_all_numbers_and_a_bottomless_file_are_refused(
    check: AdapterCheck, folders: dict[str, Path], tmp_path: Path
) -> None:
    for i, alpha in enumerate([float("inf"), 1e300]):
        new = partial(dict.update, lora_alpha=alpha)
        folder = changed(folders["lora_p_0"], tmp_path / str(i), new)
        with pytest.raises(AdapterError, match="finite"):
            check(folder)
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="cannot be used"):
        check(folder)
    (folder / CONFIG).write_text(" " * 2**23 + "{}")
    with pytest.raises(AdapterError, match="bytes"):
        check(folder)


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_upload_brings_no_expressions(
    check: AdapterCheck, folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    value = ".*(q|k)_proj" if key == "target_modules" else {".*(q|k)_proj": 4}
    folder = changed(folders["lora_all"], tmp_path / "own", lambda config: config.update({key: value}))
    with pytest.raises(AdapterError, match="names its modules"):
        check(folder, uploaded=True)
    if key != "target_modules":  # whose tensors this one lacks; the operator's own may hold expressions
        assert check(folder).rank == 4


def test_an_upload_that_no_longer_fits_stays_out_of_the_way(
    check: AdapterCheck, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(tmp_path / "store") as store:
        for name in ("lora_p_0", "lora_p_1"):
            staged = store.stage()
            shutil.copytree(folders[name], staged, dirs_exist_ok=True)
            store.set_current(name, store.number(staged), 1)
        assert list(check_stored(AdapterCheck(check.hf, check.fingerprint, 4), store)) == ["lora_p_0"]
        assert set(store.current) == {"lora_p_0", "lora_p_1"}
    assert "'lora_p_1'" in (said := capsys.readouterr().err)
    assert "--max-lora-rank" in said
    tiny, other = (Namespace(store=None, model=name) for name in ("tinyworld", "org/model"))
    assert command.store_folder(tiny) != command.store_folder(other)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    def fails(file: str, to: Path) -> None:
        if file == "b":
            raise OSError("disk full")
        to.write_text("")

    with Store(tmp_path / "store") as store:
        with pytest.raises(OSError, match="disk full"):
            asyncio.run(_stage(store, ("a", "b"), fails))
        assert not [path for path in store.folder.iterdir() if path.is_dir()]


def test_no_resolver_joins_a_name_to_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that what the command sets is undone
    monkeypatch.delenv("VLLM_PLUGINS")
    command._allow_plugins()
    assert command.UNSAFE not in os.environ["VLLM_PLUGINS"].split(",")
    assert "preft" in os.environ["VLLM_PLUGINS"].split(",")
