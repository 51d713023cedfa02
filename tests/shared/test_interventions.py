"""Edits as tensor functions, and their file format: round trip, and refusal with the reason."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.hooks import capture, edit
from shared.interventions import (
    Ablate,
    Add,
    Interchange,
    InterventionError,
    LowRank,
    Scale,
    Set,
    load_interventions,
    save_interventions,
)
from shared.models import load
from shared.tokens import Phase

SITE = "blocks.1.output"


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


@pytest.fixture
def x_BTX():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_token(x_BTX, mask_BT, indices, rule):
    """The slow reference: token by token, coordinate by coordinate."""
    out = x_BTX.clone()
    for b, t in mask_BT.nonzero().tolist():
        new = rule(x_BTX[b, t], b, t)
        for i in range(x_BTX.shape[-1]) if indices is None else indices:
            out[b, t, i] = new[i]
    return out


def cases():
    v, source, mean_TX = draw(8), draw(2, 5, 8, seed=2), draw(5, 8, seed=3)
    A, B, bias = draw(3, 8), draw(8, 3, seed=4), draw(8, seed=5)
    some = [6, 1]
    return {
        "add": (Add(SITE, v, 2.5), lambda x, b, t: x + 2.5 * v),
        "add_some": (Add(SITE, v[some], indices=some), lambda x, b, t: x + v),
        "low_rank": (LowRank(SITE, A, B, bias, strength=0.5), lambda x, b, t: x + 0.5 * (B @ (A @ x) + bias)),
        "scale": (Scale(SITE, -1.0, indices=some), lambda x, b, t: -x),
        "scale_each": (Scale(SITE, v), lambda x, b, t: x * v),
        "set": (Set(SITE, 3.0), lambda x, b, t: torch.full((8,), 3.0)),
        "set_some": (Set(SITE, v, indices=some), lambda x, b, t: v),
        "zero": (Ablate(SITE, indices=some), lambda x, b, t: torch.zeros(8)),
        "mean": (Ablate(SITE, mean=v), lambda x, b, t: v),
        "mean_by_position": (Ablate(SITE, mean=mean_TX, indices=some), lambda x, b, t: mean_TX[t]),
        "interchange": (Interchange(SITE, source), lambda x, b, t: source[b, t]),
        "interchange_some": (Interchange(SITE, source, indices=some), lambda x, b, t: source[b, t]),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_every_edit_equals_its_rule_token_by_token(name, x_BTX):
    intervention, rule = cases()[name]
    before = x_BTX.clone()
    got = intervention.apply(x_BTX, MASK)
    torch.testing.assert_close(got, by_token(x_BTX, MASK, intervention.indices, rule))
    assert torch.equal(got[~MASK], x_BTX[~MASK])
    assert torch.equal(x_BTX, before)


@pytest.mark.parametrize(
    "intervention",
    [
        Add(SITE, draw(8), indices=[]),
        Scale(SITE, 2.0, indices=[]),
        Scale(SITE, draw(8), indices=[]),
        Set(SITE, 3.0, indices=[]),
        Ablate(SITE, indices=[]),
        Ablate(SITE, mean=draw(5, 8), indices=[]),
        Interchange(SITE, draw(2, 5, 8), indices=[]),
    ],
    ids=lambda intervention: type(intervention).__name__,
)
def test_no_indices_at_all_is_a_no_op(intervention, x_BTX):
    assert torch.equal(intervention.apply(x_BTX, MASK), x_BTX)


def test_a_source_of_another_size_is_refused_with_both_sizes(model):
    batch = model.encode(["ab", "cd", "ef"])
    width, tokens = 128, batch.input_ids_BT.shape[1]
    with torch.no_grad():
        with edit(model, Interchange(SITE, draw(2, tokens, width))):
            with pytest.raises(InterventionError, match="source has 2 rows but the batch has 3"):
                model(batch)
        with edit(model, Interchange(SITE, draw(3, tokens + 1, width))):
            with pytest.raises(
                InterventionError, match=f"has {tokens + 1} tokens but the batch has {tokens}"
            ):
                model(batch)
        with edit(model, Interchange(SITE, draw(1, tokens, width))), capture(model, [SITE]) as acts:
            model(batch)
    assert torch.equal(acts[SITE], draw(1, tokens, width).expand(3, -1, -1))


def test_low_rank_constructors_follow_the_equations(x_BTX):
    R, W, b = draw(3, 8), draw(3, 8, seed=2), draw(3, seed=3)
    all_tokens = torch.ones(2, 5, dtype=torch.bool)
    direft = x_BTX + (x_BTX @ W.T + b) @ R
    loreft = x_BTX + (x_BTX @ W.T + b - x_BTX @ R.T) @ R
    torch.testing.assert_close(LowRank.direft(SITE, R, W, b).apply(x_BTX, all_tokens), direft)
    torch.testing.assert_close(LowRank.loreft(SITE, R, W, b).apply(x_BTX, all_tokens), loreft)
    torch.testing.assert_close(LowRank.noreft(SITE, R, W, b).apply(x_BTX, all_tokens), loreft)


def test_a_clamp_sets_projections_and_leaves_the_rest():
    R = torch.linalg.qr(draw(128, 3))[0].T.contiguous()
    targets = torch.tensor([1.0, -2.0, 0.5])
    x_BTX = draw(2, 5, 128, seed=4)
    clamped = LowRank.clamp(SITE, R, targets).apply(x_BTX, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(clamped @ R.T, targets.expand(2, 5, 3), atol=1e-4, rtol=0)
    rest = torch.eye(128) - R.T @ R
    torch.testing.assert_close(clamped @ rest, x_BTX @ rest, atol=1e-4, rtol=0)
    with pytest.raises(InterventionError, match="orthonormal"):
        LowRank.clamp(SITE, 2 * R, targets)


@pytest.mark.parametrize("form", ["direft", "loreft", "noreft"])
def test_a_fresh_edit_is_an_exact_no_op(model, form):
    fresh = [LowRank.fresh(f"blocks.{layer}.output", 128, 4, form, seed=layer) for layer in range(3)]
    torch.testing.assert_close(fresh[0].B_DR.T @ fresh[0].B_DR, torch.eye(4))
    assert not torch.equal(fresh[0].B_DR, fresh[1].B_DR)
    batch = model.encode(["some text", "other"])
    with torch.no_grad():
        expected = model(batch)
        with edit(model, fresh):
            assert torch.equal(model(batch), expected)


def every_kind():
    return [
        Add(SITE, draw(128), 0.5, phase="prefill", positions=[0, -1]),
        LowRank.loreft("blocks.0.output", draw(4, 128), draw(4, 128, seed=2), draw(4), phase=Phase.DECODE),
        Scale("blocks.2.neurons", 0.5, indices=[3, 9]),
        Scale("blocks.2.up", draw(96)),
        Set("blocks.1.neurons", draw(2), indices=[4, 5], phase="decode_boundary"),
        Set("blocks.1.gate", 1.5),
        Ablate("blocks.0.neurons", indices=[0]),
        Ablate("blocks.0.heads", mean=draw(256)),
        Interchange("embed", draw(1, 7, 128), phase="prefill"),
    ]


def test_saved_interventions_act_the_same(model, tmp_path):
    save_interventions(tmp_path / "edits", every_kind(), model)
    loaded = load_interventions(tmp_path / "edits", load("random:llama"))
    batch = model.encode(["abcdef"])
    outputs = []
    for edits in (every_kind(), loaded):
        with edit(model, edits):
            outputs.append(model.generate(batch, max_new_tokens=3))
    assert outputs[0].tokens == outputs[1].tokens
    torch.testing.assert_close(torch.tensor(outputs[0].logprobs), torch.tensor(outputs[1].logprobs))
    assert [type(a) for a in loaded] == [type(a) for a in every_kind()]
    assert loaded[0].positions == (0, -1)
    assert loaded[1].phase is Phase.DECODE


def half_written(path, *_, **__):
    path.write_bytes(b"x" * 40)
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("writer", "fails"),
    [
        ("safetensors.torch.save_file", lambda tensors, path: half_written(path)),
        ("pathlib.Path.write_text", half_written),
    ],
)
def test_saving_that_fails_leaves_the_former_files_whole(writer, fails, model, tmp_path, monkeypatch):
    save_interventions(tmp_path, [Scale(SITE, draw(128))], model)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(writer, fails)
        save_interventions(tmp_path, [Scale(SITE, draw(128, seed=2))], model)
    [kept] = load_interventions(tmp_path, model)
    assert torch.equal(kept.factor, draw(128))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "interventions.json",
        "interventions.safetensors",
    ]


def test_the_json_is_put_in_place_last(model, tmp_path, monkeypatch):
    placed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (placed.append(Path(new).name), replace(old, new)))
    save_interventions(tmp_path, every_kind(), model)
    assert placed == ["interventions.safetensors", "interventions.json"]


def rewrite(folder, change):
    path = folder / "interventions.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def retensor(folder, change):
    path = folder / "interventions.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "version": (lambda f: rewrite(f, lambda d: d.update(version=2)), "format version 2"),
    "format": (lambda f: rewrite(f, lambda d: d.update(format="other")), "not a file of interventions"),
    "json": (lambda f: (f / "interventions.json").write_text("{"), "not valid JSON"),
    "no_json": (lambda f: (f / "interventions.json").unlink(), "holds no interventions"),
    "no_tensors": (lambda f: (f / "interventions.safetensors").unlink(), "tensors of these interventions"),
    "cut_tensors": (lambda f: (f / "interventions.safetensors").write_bytes(b"x" * 40), "is damaged"),
    "width": (lambda f: rewrite(f, lambda d: d["model"].update(width=64)), "width 64; this model has 128"),
    "fingerprint": (lambda f: rewrite(f, lambda d: d["model"].update(fingerprint="0")), "allow_other=True"),
    "block": (
        lambda f: rewrite(f, lambda d: d["interventions"][0].update(site="blocks.7.output")),
        "Intervention 0 does not fit.*blocks.7.output",
    ),
    "kind": (lambda f: rewrite(f, lambda d: d["interventions"][2].update(kind="zap")), "unknown kind 'zap'"),
    "key": (
        lambda f: rewrite(f, lambda d: d["interventions"][2].update(colour=1)),
        r"unknown fields \['colour'\]",
    ),
    "required": (
        lambda f: rewrite(f, lambda d: d["interventions"][2].pop("factor")),
        r"missing \['factor'\]",
    ),
    "phase": (lambda f: rewrite(f, lambda d: d["interventions"][0].update(phase="x")), "'x'"),
    "missing": (lambda f: retensor(f, lambda t: t.pop("1.A_RD")), r"tensors missing \['A_RD'\]"),
    "extra": (lambda f: retensor(f, lambda t: t.update({"0.other": draw(2)})), r"unexpected \['other'\]"),
    "stray": (
        lambda f: retensor(f, lambda t: t.update({"17.vector_D": draw(2)})),
        "no intervention: 17.vector_D",
    ),
    "shape": (
        lambda f: retensor(f, lambda t: t.update({"0.vector_D": draw(64)})),
        r"shape \[64\], expected \[128\]",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_what_does_not_fit_is_refused_with_the_reason(model, tmp_path, name):
    damage, message = DAMAGE[name]
    save_interventions(tmp_path, every_kind(), model)
    damage(tmp_path)
    with pytest.raises(InterventionError, match=message):
        load_interventions(tmp_path, model)


def test_another_model_is_refused_unless_allowed(model, tmp_path):
    from shared.models import ModelConfig

    save_interventions(tmp_path, every_kind(), model)
    other = load(ModelConfig("random:llama", seed=1))
    with pytest.raises(InterventionError, match="fingerprint"):
        load_interventions(tmp_path, other)
    assert len(load_interventions(tmp_path, other, allow_other=True)) == len(every_kind())
    with pytest.raises(InterventionError, match="family 'llama'; this model has 'gpt2'"):
        load_interventions(tmp_path, load("random:gpt2"), allow_other=True)


def test_misfits_are_refused_when_made(model):
    with pytest.raises(InterventionError, match="distinct"):
        Ablate(SITE, indices=[1, 1])
    with pytest.raises(InterventionError, match="rank 0"):
        LowRank.fresh(SITE, 8, 0)
    with pytest.raises(InterventionError, match="made for size 96"), edit(model, Scale(SITE, draw(96))):
        pass


def test_the_rank_that_serves_saved_edits_adds_up_at_each_site(tmp_path):
    from shared.generation.vllm_arguments import adapter_rank

    model = load("random:llama")
    width = model.architecture.width
    R = torch.linalg.qr(draw(width, 2))[0].T.contiguous()
    first, second = "blocks.0.output", "blocks.1.output"
    edits = [
        Add(first, draw(width)),
        LowRank.clamp(first, R, torch.zeros(2)),
        Scale(second, 2.0, indices=[1, 2]),
    ]
    folder = save_interventions(tmp_path / "edits", edits, model)
    assert adapter_rank("x", folder) == 1 + 3
    with pytest.raises(UserError, match="no adapter_config"):
        adapter_rank("x", tmp_path)
