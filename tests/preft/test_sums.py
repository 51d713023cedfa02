"""Strengths and sums in `preft serve`: what they mean follows what their terms mean, and there is an end to them."""

import asyncio
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_serve import Engine, Models, upload

from preft.materialise import CACHE_VARIABLE
from preft.parts import read_source
from preft.serve import catalog as catalog_module
from preft.serve.catalog import Catalog
from preft.serve.check import AdapterCheck, bare_model
from preft.serve.guard import guard
from preft.serve.store import Store
from preft.serve.sums import Sums
from shared.models import Model, ModelConfig

pytestmark = pytest.mark.xdist_group(__name__)


@pytest.fixture
def catalog(
    plugin: None, model: Model, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Catalog]:
    """A catalog over stand-ins for vLLM's engine and table that answers for sums, with no grace."""
    monkeypatch.setattr(catalog_module, "GRACE", 0.0)
    monkeypatch.setattr(catalog_module, "POLL", 0.005)
    check = AdapterCheck(bare_model(ModelConfig(str(model_folder))), model.fingerprint, 16)
    with Store(tmp_path / "store") as store:
        monkeypatch.setenv(CACHE_VARIABLE, str(store.sums))
        catalog = Catalog(Models(), Engine(), check, store)
        guard(catalog, tmp_path)
        yield catalog


async def settled(catalog: Catalog) -> None:
    while catalog.retiring:
        await asyncio.sleep(0.005)


def same(found: Any, folder: Path, strength: float) -> bool:
    """Whether a request's folder holds `strength` times an adapter."""
    updates = zip(read_source(found.lora_path).by_kind, read_source(folder).by_kind)
    return all(
        got.keys() == want.keys()
        and all(
            torch.allclose(got[name].B @ got[name].A, strength * want[name].B @ want[name].A) for name in want
        )
        for got, want in updates
    )


def test_a_sum_follows_what_its_terms_mean(catalog: Catalog, folders: dict[str, Path]) -> None:
    sums = Sums(catalog)

    async def play() -> None:
        await upload(catalog, "a", folders["lora_p_0"])
        await upload(catalog, "b", folders["lora_p_2"])
        old, other = await sums.resolve("a:0.5"), await sums.resolve("b:0.5")
        both = await sums.resolve("a+b")
        assert same(old, folders["lora_p_0"], 0.5)
        assert await sums.resolve("a:0.5") is old
        catalog.engine.run("one", old, prefilling=True)

        await upload(catalog, "a", folders["lora_p_1"])
        assert catalog.models.lora_requests.keys() == {"a", "b", "b:0.5"}
        new = await sums.resolve("a:0.5")
        assert same(new, folders["lora_p_1"], 0.5)
        assert new.lora_int_id not in (old.lora_int_id, both.lora_int_id)
        await asyncio.sleep(0.05)
        assert old.lora_int_id in catalog.engine.loaded, "a request reads its prompt under it"
        assert Path(old.lora_path).is_dir()
        catalog.engine.output_processor.request_states.clear()
        await settled(catalog)
        assert not Path(old.lora_path).exists()

        await catalog.remove("a")
        assert catalog.models.lora_requests == {"b": catalog.models.lora_requests["b"], "b:0.5": other}
        assert (await sums.resolve("a:0.5")).error.code == HTTPStatus.NOT_FOUND
        await settled(catalog)
        assert {path.name for path in catalog.store.sums.iterdir()} == {Path(other.lora_path).name}

    asyncio.run(play())


def test_a_term_replaced_while_its_sum_is_made(
    catalog: Catalog, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = Sums(catalog)

    async def play() -> None:
        await upload(catalog, "a", folders["lora_p_0"])
        load = catalog.engine.add_lora

        async def replacing_meanwhile(request: Any) -> bool:
            monkeypatch.setattr(catalog.engine, "add_lora", load)
            await upload(catalog, "a", folders["lora_p_1"])
            return await load(request)

        monkeypatch.setattr(catalog.engine, "add_lora", replacing_meanwhile)
        assert same(await sums.resolve("a:0.5"), folders["lora_p_1"], 0.5)
        await settled(catalog)
        assert len(catalog.engine.loaded) == 2
        assert len(list(catalog.store.sums.iterdir())) == 1

    asyncio.run(play())


def test_one_folder_under_two_names_is_kept_for_the_second(
    catalog: Catalog, folders: dict[str, Path]
) -> None:
    sums = Sums(catalog)

    async def play() -> None:
        await upload(catalog, "a", folders["lora_p_0"])
        one, two = await sums.resolve("a:0.5"), await sums.resolve("a:.5")
        whole = await sums.resolve("a:1")
        assert one.lora_path == two.lora_path
        await catalog.remove("a:0.5")
        await catalog.remove("a:1")
        await settled(catalog)
        assert Path(two.lora_path).is_dir()
        assert Path(whole.lora_path).is_dir(), "it is the adapter's own"

    asyncio.run(play())


def test_what_clients_can_make_is_bounded(
    catalog: Catalog, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "MOST_SUMS", 2)
    sums = Sums(catalog)

    async def play() -> None:
        await upload(catalog, "a", folders["lora_p_1"])
        for strength in range(2, 6):
            await sums.resolve(f"a:{strength}")
        assert catalog.models.lora_requests.keys() == {"a", "a:4", "a:5"}
        await settled(catalog)
        assert len(list(catalog.store.sums.iterdir())) == 2
        for name, reason in [("a+a+a", "the sum has rank 24"), ("+".join("a" * 17), "at most 16 terms")]:
            refused = (await sums.resolve(name)).error
            assert (refused.code, reason in refused.message) == (HTTPStatus.BAD_REQUEST, True)
        catalog.engine.refuses = "no room"
        assert "no room" in (await sums.resolve("a:6")).error.message
        assert len(list(catalog.store.sums.iterdir())) == 2

    asyncio.run(play())


def test_only_names_lead_to_folders(
    catalog: Catalog, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "there").symlink_to(folders["lora_p_0"])
    (tmp_path / "open" / "broken").mkdir()
    (tmp_path / "open" / "broken" / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(tmp_path / "open"))
    sums = Sums(catalog)

    async def play() -> None:
        assert same(await sums.resolve("there:2"), folders["lora_p_0"], 2.0)
        for name in ("nobody", "../open/there", str(folders["lora_p_0"]), "there:loud", ""):
            assert (await sums.resolve(name)).error.code == HTTPStatus.NOT_FOUND
        assert (await sums.resolve("broken")).error.code == HTTPStatus.BAD_REQUEST

    asyncio.run(play())


def test_loading_in_place_gives_another_id(
    catalog: Catalog, folders: dict[str, Path], tmp_path: Path
) -> None:
    def load(kind: str, in_place: bool) -> Any:
        folder = tmp_path / kind
        if not folder.exists():
            folder.symlink_to(folders[kind])
        request = SimpleNamespace(lora_name="v", lora_path=str(folder), load_inplace=in_place)
        return catalog.models.load_lora_adapter(request)

    async def play() -> None:
        guard(catalog, folders["lora_p_0"].parent)
        await load("lora_p_0", in_place=False)
        old = catalog.models.lora_requests["v"]
        catalog.engine.run("one", old, prefilling=True)
        assert (await load("lora_p_1", in_place=False)).error.code == HTTPStatus.CONFLICT
        assert "successfully" in await load("lora_p_1", in_place=True)
        new = catalog.models.lora_requests["v"]
        assert new.lora_int_id != old.lora_int_id
        assert not new.load_inplace, "or every request would read the files again"
        assert catalog.engine.loaded == {old.lora_int_id, new.lora_int_id}
        catalog.engine.output_processor.request_states.clear()
        await settled(catalog)
        assert catalog.engine.loaded == {new.lora_int_id}
        assert folders["lora_p_0"].is_dir()

    asyncio.run(play())
