"""Compositions: what several adapters compute together, and the folders they are saved as."""

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preft_cases import prompt

from preft.adapter_files import read_tensors
from preft.adapters import Adapter, AdapterConfig, AdapterError, Factors, LoRADelta
from preft.composition import Composition, compose
from preft.forward import masked_logits
from preft.parts import Source, read_source, save_source, sum_sources
from preft.reference import greedy_reference
from preft.vllm.fit import check_served
from preft.vllm.identity import AdapterRegistry, part_id, read_identity
from preft.vllm.mapping import KINDS, Kind
from preft.vllm.residual import SITE
from shared.history import History
from shared.models import Model
from shared.tokens import Phase, TokenBatch, pad

SUMS = {
    "two of a phase": {"lora_p_0": 0.7, "lora_p_2": 0.5},
    "lora and reft": {"lora_p_0": 1.0, "reft_p_0": 0.5},
    "two edits of a block": {"reft_p_0": 1.0, "reft_p_1": -0.5},
    "prefill and decode": {"lora_p_0": 1.0, "lora_decode": 1.0},
    "both at the boundary": {"reft_p_0": 1.0, "lora_boundary": 0.5},
    "all over": {"lora_all": 0.5, "reft_p_1": 1.0, "lora_decode": 0.3},
}


@pytest.fixture(params=SUMS.values(), ids=list(SUMS))
def composition(request: pytest.FixtureRequest, adapters: dict[str, Adapter]) -> Composition:
    return compose([(adapters[name], weight) for name, weight in request.param.items()])


def batch() -> TokenBatch:
    return pad([prompt(9, 0), prompt(12, 1)], [5, 1], 0, "left")


def by_hand(model: Model, composition: Composition, tokens: TokenBatch) -> torch.Tensor:
    """The formula, module by module, with every token's own sum of updates."""
    handles = []
    for path in {path for adapter, _ in composition.adapters for path in adapter.paths}:

        def hook(_: object, args: tuple, output: torch.Tensor, path: str = path) -> torch.Tensor:
            result = output.clone()
            for adapter, weight in composition.adapters:
                for own, delta in adapter.parts():
                    if own != path:
                        continue
                    update = delta(args[0] if isinstance(delta, LoRADelta) else output)
                    for b, t in tokens.phase_mask(adapter.config.phase).nonzero().tolist():
                        result[b, t] += weight * update[b, t]
            return result

        handles.append(model.hf.get_submodule(path).register_forward_hook(hook))
    try:
        return masked_logits(model.hf, None, tokens)
    finally:
        for handle in handles:
            handle.remove()


def test_it_is_the_sum_of_the_updates(model: Model, composition: Composition) -> None:
    expected = by_hand(model, composition, batch())
    torch.testing.assert_close(masked_logits(model.hf, composition, batch()), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(masked_logits(model.hf, None, batch()), expected)


def test_the_order_does_not_matter(model: Model, composition: Composition) -> None:
    turned = Composition(composition.adapters[::-1])
    found, expected = (masked_logits(model.hf, one, batch()) for one in (turned, composition))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora_p_3", "reft_p_1", "lora_boundary"])
def test_one_adapter_is_itself(model: Model, adapters: dict[str, Adapter], name: str) -> None:
    alone = compose([(adapters[name], 1.0)])
    expected = greedy_reference(model.hf, adapters[name], list(prompt(20)), 8)
    assert greedy_reference(model.hf, alone, list(prompt(20)), 8) == expected


def test_weight_zero_changes_no_bit(model: Model, adapters: dict[str, Adapter]) -> None:
    nothing = compose([(adapters["lora_p_0"], 0.0), (adapters["reft_all"], 0.0)])
    assert torch.equal(masked_logits(model.hf, nothing, batch()), masked_logits(model.hf, None, batch()))


def merged_at(folder: Path, kind: Kind, module: str) -> Factors | None:
    """A and B that the folder serves on tokens of a kind, scale included."""
    identity = read_identity(folder)
    parts = identity.parts or tuple(folder if acts else None for acts in KINDS[identity.phase])
    if parts[kind] is None:
        return None
    part = Path(getattr(parts[kind], "folder", folder))
    tensors, config = (
        read_tensors(part),
        json.loads((part / "adapter_config.json").read_text()),
    )
    names = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]
    if names[0] not in tensors:
        return None
    rank = config["rank_pattern"].get(module, config["r"])
    assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank == len(tensors[names[0]])
    return Factors(*(tensors[name] for name in names))


def test_the_saved_parts_are_the_sum_on_every_kind_of_token(
    model: Model, composition: Composition, tmp_path: Path
) -> None:
    folder = composition.save(tmp_path / "sum", "base", "0123456789abcdef")
    for kind in Kind:
        for path in {path for adapter, _ in composition.adapters for path in adapter.paths}:
            edits = path.rpartition(".")[2].isdecimal()
            found = merged_at(folder, kind, f"{path}.{SITE}" if edits else path)
            expected = torch.zeros(())
            for adapter, weight in composition.adapters:
                if KINDS[adapter.config.phase][kind] and path in adapter.paths:
                    delta = dict(adapter.parts())[path]
                    a, b = delta.factors()
                    expected = expected + weight * getattr(delta, "scale", 1.0) * b @ a
            product = torch.zeros(()) if found is None else found.B @ found.A
            torch.testing.assert_close(product, expected.detach(), atol=1e-5, rtol=1e-4)


def test_saved_and_read_and_saved_is_the_same(composition: Composition, tmp_path: Path) -> None:
    first = composition.save(tmp_path / "first", "base", "0123456789abcdef")
    again = save_source(read_source(first), tmp_path / "again")
    assert read_identity(again).digest == read_identity(first).digest


def test_one_phase_is_an_ordinary_folder_and_several_have_parts(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    one = compose([(adapters["lora_p_0"], 1.0), (adapters["reft_p_0"], 1.0)]).save(tmp_path / "one")
    assert read_identity(one).phase is Phase.PREFILL
    assert read_identity(one).parts is None
    two = read_identity(
        compose([(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)]).save(tmp_path / "two")
    )
    prompt_part, boundary_part, generated_part = two.parts or ()
    assert prompt_part == boundary_part != generated_part
    meeting = compose([(adapters["lora_p_0"], 1.0), (adapters["lora_boundary"], 1.0)]).save(
        tmp_path / "three"
    )
    assert len(set(read_identity(meeting).parts or ())) == 3


def test_parts_have_ids_by_content(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    pairs = {
        "a": [(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)],
        "b": [(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 0.5)],
    }
    folders = {name: compose(pair).save(tmp_path / name) for name, pair in pairs.items()}
    registry = AdapterRegistry()
    rows = {
        name: registry.by_kind(
            SimpleNamespace(lora_name=name, lora_int_id=i, lora_path=str(folder), load_inplace=False)
        )
        for i, (name, folder) in enumerate(folders.items(), 1)
    }
    assert rows["a"][0].lora_int_id == rows["b"][0].lora_int_id >= 2**62
    assert rows["a"][2].lora_int_id != rows["b"][2].lora_int_id
    assert registry.part_ids(1) == {rows["a"][0].lora_int_id, rows["a"][2].lora_int_id}
    assert registry.part_ids(9) == {9}
    assert part_id("f" * 16) < 2**63


def test_a_speculating_engine_needs_a_slot_for_every_part(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    """It computes the last prompt token and drafts in one chunk; with fewer slots it would wait for ever."""
    pair = [(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)]
    then = read_identity(compose(pair).save(tmp_path / "then"))

    def check(slots: int, speculative_config: Any) -> None:
        text = SimpleNamespace(num_hidden_layers=3, hidden_size=128)
        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_text_config=text),
            additional_config={},
            speculative_config=speculative_config,
            lora_config=SimpleNamespace(max_loras=slots),
        )
        check_served("then", then, config)

    check(1, None)
    check(2, "ngram")
    with pytest.raises(
        ValueError, match="'then' has 2 parts; with speculative decoding it needs max_loras >= 2"
    ):
        check(1, "ngram")


def test_every_file_of_a_part_counts(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    folder = compose([(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)]).save(tmp_path / "sum")
    before = read_identity(folder)
    config = folder / "part-1" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    after = read_identity(folder)
    assert (after.digest, after.stamp) != (before.digest, before.stamp)
    assert after.digest != before.digest
    assert after.stamp != before.stamp


def test_what_cannot_act_together_is_refused(model: Model, adapters: dict[str, Adapter]) -> None:
    sticky = Adapter.create(model.hf, AdapterConfig(rank=2, history=History.STICKY))
    with pytest.raises(AdapterError, match="do not agree on what earlier answers are"):
        compose([(adapters["lora_p_0"], 1.0), (sticky, 1.0)])
    assert compose([(adapters["lora_all"], 1.0), (sticky, 1.0)]).history is History.STICKY
    with pytest.raises(AdapterError, match="at least one adapter"):
        compose([])
    with pytest.raises(AdapterError, match="finite"):
        compose([(adapters["lora_p_0"], float("nan"))])
    one = {"m": Factors(torch.zeros(2, 4), torch.zeros(4, 2))}
    other = {"m": Factors(torch.zeros(2, 5), torch.zeros(5, 2))}
    for left, right in combinations([one, other], 2):
        with pytest.raises(AdapterError, match="different shapes at m"):
            sum_sources([(Source((update,) * 3), 1.0) for update in (left, right)])
    with pytest.raises(AdapterError, match="different base models"):
        sum_sources([(Source((one,) * 3, fingerprint=name), 1.0) for name in ("a", "b")])


def test_a_damaged_composition_is_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    folder = compose([(adapters["lora_p_0"], 1.0), (adapters["lora_decode"], 1.0)]).save(tmp_path / "sum")
    config = folder / "adapter_config.json"
    raw = json.loads(config.read_text())
    for parts, message in [
        ([{"folder": "part-9", "tokens": ["prompt"]}], "part 'part-9' is no adapter folder"),
        ([{"folder": "../sum", "tokens": ["prompt"]}], "is no adapter folder"),
        ([{"folder": "part-0", "tokens": ["tail"]}], "tokens 'tail' are unknown"),
        ([{"folder": f"part-{i}", "tokens": ["prompt"]} for i in (0, 1)], "have two parts"),
    ]:
        raw["preft"]["parts"] = parts
        config.write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=message):
            read_identity(folder)
