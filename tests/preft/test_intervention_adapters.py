"""Saved interventions as adapters: brute force on random activations, names, strengths, and refusals by name."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from preft.adapters import Adapter, AdapterError, Factors
from preft.intervention_adapters import affine, read_interventions
from preft.materialise import materialised
from preft.vllm.identity import read_identity
from preft.vllm.mapping import KINDS, Kind
from preft.vllm.requests import Term, adapter_folder, folders_in, parse
from shared.interventions import (
    Ablate,
    Add,
    Interchange,
    Intervention,
    LowRank,
    Scale,
    Set,
    save_interventions,
)
from shared.models import Model
from shared.tokens import Phase

SITE = "blocks.1.output"
D = 12
WIDTH = 128  # of the tiny model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


EDITS: dict[str, Callable[[int], Intervention]] = {
    "add": lambda d: Add(SITE, noise(d), 0.7),
    "add some": lambda d: Add(SITE, noise(3), 2.0, indices=[4, 0, 7]),
    "add some of all": lambda d: Add(SITE, noise(d), indices=[4, 0, 7]),
    "low rank": lambda d: LowRank(SITE, noise(3, d), noise(d, 3), strength=0.5),
    "low rank and bias": lambda d: LowRank(SITE, noise(3, d), noise(d, 3), noise(d), strength=-0.5),
    "loreft": lambda d: LowRank.loreft(SITE, noise(2, d), noise(2, d, seed=1), noise(2)),
    "scale": lambda d: Scale(SITE, 1.5),
    "scale some": lambda d: Scale(SITE, noise(2), indices=[9, 3]),
    "set": lambda d: Set(SITE, noise(d), indices=[1, 5]),
    "set number": lambda d: Set(SITE, 0.25, indices=[1, 5]),
    "ablate": lambda d: Ablate(SITE, indices=[2, 3, 4]),
    "ablate to mean": lambda d: Ablate(SITE, mean=noise(d), indices=[2, 3, 4]),
}


def served(factors: Factors, h: torch.Tensor) -> torch.Tensor:
    return h + torch.cat([h, torch.ones(len(h), 1)], dim=1) @ factors.A.T @ factors.B.T


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_is_a_low_rank_update(name: str) -> None:
    edit = EDITS[name](D)
    h = noise(5, D, seed=3)
    expected = edit.apply(h[None], torch.ones(1, 5, dtype=torch.bool))[0]
    torch.testing.assert_close(served(affine(edit, D, name), h), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phases", [(Phase.ALL, Phase.ALL), (Phase.PREFILL, Phase.DECODE_BOUNDARY)])
def test_edits_of_one_block_act_in_order(model: Model, tmp_path: Path, phases: tuple[Phase, Phase]) -> None:
    width = model.architecture.width
    first = LowRank(SITE, noise(2, width) / 4, noise(width, 2) / 4, noise(width), phase=phases[0])
    second = Set(SITE, 0.5, indices=[3, 4], phase=phases[1])
    third = LowRank(SITE, noise(3, width) / 4, noise(width, 3) / 4, phase=phases[0])
    edits = [first, second, third]
    source = read_interventions(save_interventions(tmp_path, edits, model))
    h = noise(4, width, seed=5)
    for kind in Kind:
        expected = h[None]
        for edit in edits:
            expected = edit.apply(expected, torch.full((1, 4), KINDS[Phase(edit.phase)][kind]))
        [factors] = source.by_kind[kind].values()
        torch.testing.assert_close(served(factors, h), expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Add("blocks.1.mlp_out", noise(WIDTH)), "only edits of blocks.0.output"),
        (Add(SITE, noise(WIDTH), positions=[-1]), r"Add at blocks.1.output\): edits at chosen positions"),
        (Interchange(SITE, noise(1, 3, WIDTH)), "Interchange at .* not a function of the token's own"),
        (Ablate(SITE, mean=noise(3, WIDTH)), "Ablate at .* not a function of the token's own"),
    ],
    ids=["site", "positions", "interchange", "mean by position"],
)
def test_what_is_not_served_is_named(model: Model, tmp_path: Path, edit: Intervention, message: str) -> None:
    assert model.architecture.width == WIDTH
    folder = save_interventions(tmp_path / "edits", [edit], model)
    with pytest.raises(AdapterError, match=message):
        read_interventions(folder)
    with pytest.raises(ValueError, match=message):  # as the engine sees it, before a request enters
        read_identity(folder)


def test_too_many_coordinates_are_refused() -> None:
    from preft.intervention_adapters import _check_ranks

    with pytest.raises(AdapterError, match="need rank 600 at one block"):
        _check_ranks([{"block": affine(Scale(SITE, 2.0), 600, "edit")}])


@pytest.fixture
def calm(model: Model, tmp_path: Path) -> Path:
    edits = [Add(SITE, noise(model.architecture.width), phase=Phase.DECODE)]
    return save_interventions(tmp_path / "calm", edits, model)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestIdentity:
    def test_interventions_are_an_adapter_of_their_phase(self, model: Model, calm: Path) -> None:
        identity = read_identity(calm)
        assert identity.phase is Phase.DECODE
        assert [part is not None for part in identity.parts or ()] == [False, False, True]
        assert identity.shape == (model.architecture.n_layers, model.architecture.width)
        assert identity.fingerprint == model.fingerprint

    def test_a_changed_file_is_noticed(self, model: Model, calm: Path) -> None:
        before = read_identity(calm)
        save_interventions(calm, [Add(SITE, noise(WIDTH), 2.0, phase=Phase.DECODE)], model)
        after = read_identity(calm)
        assert after.stamp != before.stamp
        assert after.parts != before.parts

    def test_nothing_is_no_part(self, model: Model, tmp_path: Path) -> None:
        folder = save_interventions(tmp_path / "none", [Add(SITE, noise(0), indices=[])], model)
        assert read_identity(folder).parts == (None, None, None)


KNOWN = {"alice": "a", "calm": "c", "odd+name:2": "o"}


class TestNames:
    @pytest.mark.parametrize(
        ("name", "terms"),
        [
            ("alice", [("alice", 1.0)]),
            ("calm:0.5", [("calm", 0.5)]),
            ("alice+calm:-2", [("alice", 1.0), ("calm", -2.0)]),
            ("calm:1e-2+alice:3", [("calm", 0.01), ("alice", 3.0)]),
            ("odd+name:2", [("odd+name:2", 1.0)]),
        ],
    )
    def test_terms(self, name: str, terms: list[tuple[str, float]]) -> None:
        assert parse(name, KNOWN) == [Term(*term) for term in terms]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("bob", r"no adapter named 'bob'; known: alice, calm"),
            ("alice+bob:2", r"no adapter named 'bob' \(in 'alice\+bob:2'\)"),
            ("calm:loud", "'loud' in 'calm:loud' is no strength"),
            ("calm:nan", "is no strength"),
            ("calm:", "is no strength"),
            ("../calm", "no adapter named"),
            ("", "no adapter named ''"),
        ],
    )
    def test_refusals(self, name: str, message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            parse(name, KNOWN)

    def test_folders_are_found_by_name(self, folders: dict[str, Path], calm: Path) -> None:
        assert folders_in(calm.parent) == {"calm": calm}
        assert folders_in(folders["lora_p_0"].parent) == folders


class TestMaterialised:
    def test_an_adapter_by_its_name_is_its_folder(self, folders: dict[str, Path]) -> None:
        assert adapter_folder("lora_p_0", folders) == folders["lora_p_0"]
        assert adapter_folder("lora_p_0:1", folders) == folders["lora_p_0"]

    def test_a_strength_scales_the_update(
        self, adapters: dict[str, Adapter], folders: dict[str, Path]
    ) -> None:
        from preft.parts import read_source

        half = read_source(adapter_folder("reft_p_0:0.5", folders))
        whole = read_source(folders["reft_p_0"])
        for module, factors in whole.by_kind[Kind.PROMPT].items():
            assert torch.equal(half.by_kind[Kind.PROMPT][module].A, factors.A)
            assert torch.equal(half.by_kind[Kind.PROMPT][module].B, factors.B * 0.5)
        assert not half.by_kind[Kind.GENERATED]

    def test_a_folder_is_made_once_for_a_content(
        self, folders: dict[str, Path], calm: Path, cache: Path, model: Model
    ) -> None:
        known = folders | {"calm": calm}
        first = adapter_folder("lora_p_0+calm:0.5", known)
        stamp = (first / "adapter_config.json").stat().st_mtime_ns
        assert adapter_folder("lora_p_0:1.0+calm:0.50", known) == first
        assert (first / "adapter_config.json").stat().st_mtime_ns == stamp
        assert adapter_folder("lora_p_0+calm:0.25", known) != first
        save_interventions(calm, [Add(SITE, noise(WIDTH), phase=Phase.PREFILL)], model)
        assert adapter_folder("lora_p_0+calm:0.5", known) != first
        assert first.parent == cache

    def test_many_makers_leave_one_whole_folder(self, folders: dict[str, Path], cache: Path) -> None:
        terms = [(folders["lora_p_0"], 0.5), (folders["lora_decode"], 1.0)]
        with ThreadPoolExecutor(8) as pool:
            made = {future.result() for future in [pool.submit(materialised, terms) for _ in range(8)]}
        assert len(made) == 1
        assert read_identity(made.pop()).parts
        assert len(list(cache.iterdir())) == 1
