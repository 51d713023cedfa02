"""pyreft checkpoints: written here as pyreft's own classes would, read back as adapters that compute the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preft_cases import prompt
from torch import Tensor, nn

from preft.adapters import AdapterError
from preft.cli import main
from preft.formats import load_adapter, save_adapter
from preft.forward import masked_logits
from preft.pyreft_files import is_pyreft, load_pyreft
from shared.models import Model
from shared.tokens import Phase, pad

WIDTH = 128


class Rotation(nn.Module):
    """h -> R h, with an orthogonal weight of D x R."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, rank))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


class Intervention(nn.Module):
    """One of pyreft's interventions, by its definition."""

    def __init__(self, kind: str, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("embed_dim", torch.tensor(WIDTH))
        self.learned_source = nn.Linear(WIDTH, rank)
        if kind in ("Loreft", "Direft"):
            self.rotate_layer = nn.utils.parametrizations.orthogonal(Rotation(rank))
            with torch.no_grad():  # as after training: away from the start of the parametrisation
                self.rotate_layer.parametrizations.weight.original.add_(torch.randn(WIDTH, rank))
        else:
            self.proj_layer = nn.Linear(WIDTH, rank, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        source = self.learned_source(h)
        if self.kind == "Loreft":
            return h + (source - self.rotate_layer(h)) @ self.rotate_layer.weight.T
        if self.kind == "Direft":
            return h + source @ self.rotate_layer.weight.T
        if self.kind == "Noreft":
            return h + (source - self.proj_layer(h)) @ self.proj_layer.weight
        return h + source @ self.proj_layer.weight

    def state(self) -> dict[str, Tensor]:
        if self.kind == "Loreft":  # pyreft saves the rotation itself
            rotation = self.rotate_layer.weight.detach().clone()
            return {**self.learned_source.state_dict(), "rotate_layer": rotation}
        return self.state_dict()


def write(folder: Path, interventions: dict[int, Intervention], named: bool = False, **changes: Any) -> Path:
    folder.mkdir()
    keys = [f"layer.{layer}.comp.block_output.unit.pos.nunit.1#0" for layer in interventions]
    fields = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension")
    rows: list[Any] = [[layer, "block_output", "pos", 1, 2, None, None] for layer in interventions]
    config = {
        "representations": [dict(zip(fields, row)) for row in rows] if named else rows,
        "intervention_types": [
            f"<class 'pyreft.interventions.{x.kind}Intervention'>" for x in interventions.values()
        ],
        "sorted_keys": keys,
        "mode": "parallel",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    for key, intervention in zip(keys, interventions.values()):
        torch.save(intervention.state(), folder / f"intkey_{key}.bin")
    return folder


def edited_logits(
    model: Model, interventions: dict[int, Intervention], ids: Tensor, prompt_length: int
) -> Tensor:
    """Logits with the interventions on the first `prompt_length` tokens, by hooks of their own."""

    def hook(intervention: Intervention) -> Any:
        def edit(_: nn.Module, __: Any, h: Tensor) -> Tensor:
            return torch.cat([intervention(h[:, :prompt_length]), h[:, prompt_length:]], dim=1)

        return edit

    blocks = {layer: model.hf.get_submodule(model.architecture.block_path(layer)) for layer in interventions}
    handles = [blocks[layer].register_forward_hook(hook(x)) for layer, x in interventions.items()]
    try:
        return model.hf(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("positions", ["prompt", "all"])
@pytest.mark.parametrize("kind", ["Loreft", "Direft", "Noreft", "Nodireft"])
def test_a_checkpoint_computes_what_it_computed_in_pyreft(
    model: Model, tmp_path: Path, kind: str, positions: str
) -> None:
    interventions = {2: Intervention(kind, rank=2), 0: Intervention(kind, rank=3, bias=False)}
    folder = write(tmp_path / "pyreft", interventions, named=positions == "all")
    assert is_pyreft(folder)
    adapter = load_pyreft(folder, model.hf, positions)
    assert adapter.config.method == kind.lower()
    assert adapter.config.phase == (Phase.ALL if positions == "all" else Phase.PREFILL)
    batch = pad([prompt(20)], [12], 0)
    expected = edited_logits(model, interventions, batch.input_ids_BT, 20 if positions == "all" else 12)
    base = masked_logits(model.hf, None, batch)
    assert not torch.allclose(expected, base, atol=1e-2)
    torch.testing.assert_close(masked_logits(model.hf, adapter, batch), expected, atol=2e-4, rtol=1e-4)
    again = load_adapter(save_adapter(adapter, tmp_path / "ours"), model.hf)
    torch.testing.assert_close(masked_logits(model.hf, again, batch), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "positions", "message"),
    [
        ({}, "f7+l7", "edits single tokens of the prompt"),
        ({"act_fn": "relu"}, "prompt", "uses act_fn='relu'"),
        ({"representations": [[0, "mlp_output", "pos", 1, 2]]}, "prompt", "acts on mlp_output by pos"),
        ({"representations": [[0, "block_output", "h", 1, 2]]}, "prompt", "acts on block_output by h"),
        (
            {"intervention_types": ["<class 'pyreft.interventions.ConsreftIntervention'>"]},
            "prompt",
            "a ConsreftInterv",
        ),
        (
            {"intervention_types": ["<class 'pyreft.interventions.NoreftIntervention'>"]},
            "prompt",
            "tensors of its kind",
        ),
        ({"sorted_keys": ["layer.9"]}, "prompt", r"has no file intkey_layer\.9\.bin"),
        ({"sorted_keys": []}, "prompt", "is no pyreft checkpoint"),
    ],
)
def test_what_no_adapter_does_is_refused(
    model: Model, tmp_path: Path, changes: dict[str, Any], positions: str, message: str
) -> None:
    folder = write(tmp_path / "pyreft", {0: Intervention("Loreft", rank=2)}, **changes)
    with pytest.raises(AdapterError, match=message):
        load_pyreft(folder, model.hf, positions)


def test_a_file_with_code_in_it_is_not_run(model: Model, tmp_path: Path) -> None:
    folder = write(tmp_path / "pyreft", {0: Intervention("Loreft", rank=2)})
    torch.save({"weight": nn.Linear(2, 2)}, next(folder.glob("*.bin")))
    with pytest.raises(AdapterError, match="holds more than tensors"):
        load_pyreft(folder, model.hf, "prompt")


def test_a_checkpoint_is_converted_by_the_command(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interventions = {1: Intervention("Noreft", rank=2)}
    source, target = write(tmp_path / "pyreft", interventions), tmp_path / "ours"
    options = ["--model", "random:llama", "--positions", "prompt"]
    assert main(["adapter", "convert", str(source), str(target), *options]) == 0
    assert main(["adapter", "check", str(target), "--model", "random:llama"]) == 0
    batch = pad([prompt(20)], [12], 0)
    expected = edited_logits(model, interventions, batch.input_ids_BT, 12)
    found = masked_logits(model.hf, load_adapter(target, model.hf, model.fingerprint), batch)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert main(["adapter", "convert", str(source), str(tmp_path / "x"), *options[:3], "f1+l1"]) == 2
    assert "edits single tokens of the prompt" in capsys.readouterr().err
