"""Activations on disk: what comes back is what memory holds; captures go on where they stopped; ridges stream."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from assumptions.chats import Chat
from assumptions.evaluation import evaluate_probes
from assumptions.features import capture_features
from assumptions.organism import plant
from assumptions.probes import fit_probes
from assumptions.ridge import Factors, Unresolved, ridge_path
from assumptions.rows import InMemory, gather
from assumptions.selection import choose
from assumptions.splits import Split, group_split
from assumptions.store import ActivationStore, Origin, capture_to_store
from shared.errors import UserError
from shared.models import load

ORIGIN = Origin(("blocks.0.output", "blocks.1.output"), "user", "rendering", "fingerprint")
NAMES9 = tuple(f"d{k}" for k in range(9))


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


def chats(count):
    return [
        Chat(str(i), f"about my {'rent' if i % 2 else 'job'}, " + "well, " * (i % 7) + str(i))
        for i in range(count)
    ]


def stored(folder, *matrices, shard_rows=37, origin=ORIGIN):
    """A store of the matrices, one a site."""
    store = ActivationStore(folder, replace(origin, sites=origin.sites[: len(matrices)]))
    for start in range(0, len(matrices[0]), shard_rows):
        part = [matrix[start : start + shard_rows] for matrix in matrices]
        store.append(part, [f"{i:016x}" for i in range(start, start + len(part[0]))])
    return store


class TestStore:
    def test_rows_come_back_as_written_in_any_chunking(self, tmp_path):
        first, second = torch.randn(100, 6), torch.randn(100, 6)
        stored(tmp_path, first, second)
        store = ActivationStore(tmp_path)
        assert len(store) == 100
        rows = [0, 3, 36, 37, 38, 73, 74, 99]
        for site, matrix in zip(store.sites, (first, second)):
            assert gather(store.at([site]), rows).equal(matrix[rows].double())
        both = store.at(store.sites)
        assert both.width == 12
        assert gather(both, rows).equal(torch.cat([first, second], dim=1)[rows].double())

    def test_half_precision_halves_the_disk_and_rounds_once(self, tmp_path):
        matrix = torch.randn(64, 256)
        store = stored(tmp_path / "half", matrix, origin=replace(ORIGIN, dtype="bfloat16"))
        assert gather(store.at(store.sites), range(64)).equal(matrix.bfloat16().double())
        sizes = [
            sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            for folder in (tmp_path / "half", stored(tmp_path / "whole", matrix).folder)
        ]
        assert sizes[0] < 0.6 * sizes[1]

    def test_what_does_not_belong_is_refused(self, tmp_path):
        matrix = torch.randn(80, 4)
        store = stored(tmp_path / "a", matrix)
        with pytest.raises(UserError, match="holds no activations"):
            ActivationStore(tmp_path / "b")
        with pytest.raises(UserError, match="fingerprint 'fingerprint', asked for 'other'"):
            ActivationStore(tmp_path / "a", replace(store.origin, fingerprint="other"))
        with pytest.raises(ValueError, match="each of 1 sites"):
            store.append([matrix, matrix], ["x"] * 80)
        with pytest.raises(ValueError, match="ascending"):
            list(store.at(store.sites).chunks([3, 1]))
        with pytest.raises(IndexError):
            list(store.at(store.sites).chunks([80]))
        with pytest.raises(UserError, match=r"nothing was read at blocks\.7\.output"):
            store.at(["blocks.7.output"])
        (tmp_path / "a" / "rows-000000037.safetensors").write_bytes(b"torn")
        with pytest.raises(UserError, match="damaged"):
            len(ActivationStore(tmp_path / "a"))
        (tmp_path / "a" / "rows-000000037.safetensors").unlink()
        with pytest.raises(UserError, match="the shard with row 37 is missing"):
            len(ActivationStore(tmp_path / "a"))


class TestCapture:
    @pytest.mark.parametrize("form", ["chat", "raw"])
    def test_a_store_holds_what_memory_holds(self, model, tmp_path, form):
        rows = chats(23)
        store = capture_to_store(tmp_path, model, rows, shard_rows=10, batch_size=4, form=form)
        features = capture_features(model, rows, form=form)
        for name in ("sites", "span", "form", "row_hashes", "rendering", "fingerprint"):
            assert getattr(store, name) == getattr(features, name)
        for site in features.sites:
            torch.testing.assert_close(
                gather(store.at([site]), range(23)),
                gather(features.at([site]), range(23)),
                atol=1e-5,
                rtol=1e-4,
            )

    def test_a_killed_capture_goes_on_and_a_longer_one_reads_the_new_rows_alone(self, model, tmp_path):
        rows = chats(30)

        def killed(starts):
            yield starts[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture_to_store(tmp_path, model, rows[:25], shard_rows=8, progress=killed)
        (tmp_path / ".rows-000000008.safetensors.1.partial").write_bytes(b"half a shard")
        read = []
        handle = model.hf.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        try:
            assert len(capture_to_store(tmp_path, model, rows[:25], shard_rows=8)) == 25
            assert sum(read) == 25 - 8
            assert len(capture_to_store(tmp_path, model, rows, shard_rows=8)) == 30
            assert sum(read) == 30 - 8
            assert len(capture_to_store(tmp_path, model, rows, shard_rows=8)) == 30
            assert sum(read) == 30 - 8
        finally:
            handle.remove()
        whole = capture_features(model, rows).at(["blocks.1.output"])
        torch.testing.assert_close(
            gather(ActivationStore(tmp_path).at(["blocks.1.output"]), range(30)),
            gather(whole, range(30)),
            atol=1e-5,
            rtol=1e-4,
        )
        with pytest.raises(UserError, match="other chats, or in another order"):
            capture_to_store(tmp_path, model, rows[::-1])
        with pytest.raises(UserError, match="span 'user', asked for 'last'"):
            capture_to_store(tmp_path, model, rows, span="last")


class TestStreamedRidge:
    def test_probes_from_disk_are_those_from_memory(self, model, tmp_path):
        rows = chats(90)
        features = capture_features(model, rows)
        store = ActivationStore(
            tmp_path,
            Origin(features.sites, features.span, features.rendering, features.fingerprint),
        )
        for start in range(0, 90, 16):
            store.append(
                list(features.pooled_LBD[:, start : start + 16]), features.row_hashes[start : start + 16]
            )
        labels = torch.rand(90, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        split = group_split(rows)
        candidates = [("blocks.0.output",), ("blocks.1.output",), features.sites[:2]]
        walked = []

        def progress(sources):
            for source in sources:
                walked.append(source.width)
                yield source

        streamed, chosen = fit_probes(
            store, labels, NAMES9, split, "made", candidates=candidates, progress=progress
        )
        width = features.pooled_LBD.shape[2]
        assert walked == [width, width, 2 * width]
        held, _ = fit_probes(features, labels, NAMES9, split, "made", candidates=candidates)
        for name in NAMES9:
            one, other = streamed.probes[name], held.probes[name]
            assert (one.sites, one.strength) == (other.sites, other.strength)
            torch.testing.assert_close(one.weight_D, other.weight_D, atol=1e-9, rtol=1e-7)
            torch.testing.assert_close(one.pattern_D, other.pattern_D, atol=1e-9, rtol=1e-7)
            assert one.projection_sd == pytest.approx(other.projection_sd)
            assert one.score(store).numpy() == pytest.approx(other.score(features).numpy(), abs=1e-7)
        figures = [
            evaluate_probes(read, labels, probes, chosen, split, rows, shuffles=1, candidates=candidates)
            for read, probes in ((store, streamed), (features, held))
        ]
        for name in NAMES9:
            one, other = (scores[name] for scores in figures)
            for figure in ("r2", "r2_shuffled", "partial_r2", "calibration_error"):
                assert getattr(one, figure) == pytest.approx(getattr(other, figure), abs=1e-6)
            assert one.stability == pytest.approx(other.stability, abs=1e-6)

    @pytest.mark.parametrize(("rows", "width"), [(400, 30), (60, 90)])
    def test_a_stream_of_shards_equals_sklearn_on_all_rows(self, tmp_path, rows, width):
        """Also with a mean a thousand times the spread, where squares without a provisional mean would cancel."""
        planted = plant(rows, width, seed=1)
        moved = planted.resid_BD + 1000.0
        store = stored(tmp_path, moved.float(), shard_rows=17)
        train = [i for i in range(rows) if i % 5]
        matrix = moved.float().double()[train].numpy()
        for strength, read in ridge_path(
            store.at(store.sites), train, planted.latents_BK[train], (0.01, 1.0, 100.0)
        ):
            expected = Ridge(alpha=strength, solver="svd").fit(matrix, planted.latents_BK[train].numpy())
            np.testing.assert_allclose(read.weight_DK.T.numpy(), expected.coef_, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(
                read.predict(torch.from_numpy(matrix)).numpy(), expected.predict(matrix), atol=1e-7
            )

    def test_a_strength_that_cannot_be_resolved_is_refused_not_replaced(self):
        copies = torch.ones(50, 1, dtype=torch.float64) * 1e8 * torch.randn(50, 1, dtype=torch.float64)
        place, targets = InMemory(copies.repeat(1, 8)), torch.rand(50, 1, dtype=torch.float64)
        with pytest.raises(Unresolved, match="take a larger one"):
            Factors(place, range(50), targets).solve(1e-3)
        assert [strength for strength, _ in ridge_path(place, range(50), targets, (1e-3, 1e6))] == [1e6]
        split = Split(list(range(30)), list(range(30, 40)), list(range(40, 50)))
        with pytest.raises(UserError, match="no strength of ridge"):
            choose([place], targets, split, strengths=(1e-3,))
        with pytest.raises(UserError, match="must be positive"):
            Factors(place, range(50), targets).solve(0.0)
