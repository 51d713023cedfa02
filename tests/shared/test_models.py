"""Loading: every way in, and one clear error for every way it can fail."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Scale
from shared.models import ModelConfig, load


@pytest.mark.parametrize("family", list(FAMILIES))
def test_random_models_are_seeded_and_survive_saving(family, tmp_path):
    model = load(ModelConfig(f"random:{family}", seed=3))
    assert model.fingerprint == load(ModelConfig(f"random:{family}", seed=3)).fingerprint
    assert model.fingerprint != load(ModelConfig(f"random:{family}", seed=4)).fingerprint
    again = load(ModelConfig(str(model.save(tmp_path / family))))
    assert again.fingerprint == model.fingerprint
    assert again.path == tmp_path / family
    chat = [[{"role": "user", "content": "hi"}], "text"]
    batch = model.encode(chat)
    assert torch.equal(again.encode(chat).input_ids_BT, batch.input_ids_BT)
    with torch.no_grad():
        assert torch.equal(model(batch), again(batch))
    assert model.architecture.head_dim == 64
    assert not model.hf.training


def test_the_dtype_is_the_config_s_or_the_checkpoint_s_and_not_the_fingerprint_s(tmp_path):
    half = load(ModelConfig("random:llama", dtype="bfloat16"))
    assert half.dtype is torch.bfloat16
    half.save(tmp_path)
    folder = str(tmp_path)
    assert load(ModelConfig(folder, dtype="auto")).dtype is torch.bfloat16
    full = load(ModelConfig(folder))
    assert full.dtype is torch.float32
    assert full.fingerprint == half.fingerprint
    assert load("random:llama").fingerprint == half.fingerprint
    batch = half.encode(["text"])
    with torch.no_grad(), capture(half, ["blocks.0.q"]) as acts, edit(half, Scale("blocks.1.output", 2.0)):
        assert half(batch).dtype is torch.bfloat16
    assert acts["blocks.0.q"].dtype is torch.bfloat16


def test_gemma2_computes_its_soft_cap():
    """transformers' SDPA path leaves the cap on attention scores out; the loader must not."""
    assert load("random:gemma2").hf.config._attn_implementation == "eager"
    assert load("random:llama").hf.config._attn_implementation == "sdpa"
    assert (
        load(ModelConfig("random:llama", attn_implementation="eager")).hf.config._attn_implementation
        == "eager"
    )


REMOTE = """
import torch
from shared.hooks import capture, edit, forward_inputs, make_plan, traced
from shared.interventions import Scale
from shared.models import load

model = load("random:llama")
batch = model.encode(["some text"])
with torch.no_grad(), capture(model, ["blocks.1.output"]) as acts, edit(model, Scale("blocks.0.output", 2.0)):
    expected = model(batch)
    plan = make_plan(model.architecture, model.active, batch)
    kept, output = traced(model.lm, plan, forward_inputs(batch), remote="local")
assert torch.equal(output.logits, expected)
assert torch.equal(kept["blocks.1.output"], acts["blocks.1.output"])
"""


def test_a_trace_survives_the_serialisation_of_remote_execution():
    """nnsight's local simulation of NDIF; a process of its own, since checked signatures cannot be serialised."""
    done = subprocess.run([sys.executable, "-c", REMOTE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ERRORS = {
    "family": (ModelConfig("random:bert"), "Unknown family 'bert'.*llama"),
    "folder": (ModelConfig("./no/such/folder"), "no model folder"),
    "hub": (ModelConfig("nobody/nothing"), "Could not load 'nobody/nothing'.*Ways out.*name=tinyworld"),
    "dtype": (ModelConfig("random:llama", dtype="float31"), "Unknown dtype 'float31'"),
    "quantization": (ModelConfig("random:llama", quantization="3bit"), "Unknown quantization '3bit'"),
    "remote": (ModelConfig("random:llama", remote=True), "needs a Hugging Face id"),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_one_clear_error_names_the_ways_out(name):
    config, message = ERRORS[name]
    with pytest.raises(UserError, match=message):
        load(config)


def test_a_folder_that_is_no_model_and_an_unsupported_family_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert' is not supported. Supported families: llama"):
        load(str(tmp_path))


def damaged(folder, change):
    """A saved model whose tensors went through `change`."""
    path = load("random:llama").save(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return str(folder)


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


INCOMPLETE = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight\. "),
    "head": (lambda t: t.pop("lm_head.weight"), r"missing tensors: lm_head\.weight\. "),
    "shape": (
        lambda t: shorten(t, "model.norm.weight"),
        r"another shape: model\.norm\.weight \(\[127\] in the checkpoint, \[128\] in the model\)",
    ),
    "many": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1" in name],
        r"model\.layers\.1\..* and 1 more",
    ),
}


@pytest.mark.parametrize("name", list(INCOMPLETE))
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(name, tmp_path):
    change, message = INCOMPLETE[name]
    with pytest.raises(UserError, match=message):
        load(damaged(tmp_path, change))


def test_a_tied_unembedding_is_not_missing(tmp_path):
    model = load("random:gpt2")
    assert "lm_head.weight" not in load_file(model.save(tmp_path) / "model.safetensors")
    assert load(str(tmp_path)).fingerprint == model.fingerprint


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"x" * 40])
def test_a_damaged_safetensors_file_is_refused(damage, tmp_path):
    path = load("random:llama").save(tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged or cut short .*Copy or download it again"):
        load(str(tmp_path))


def test_the_embedded_model_without_weights_names_the_make_target(tmp_path, monkeypatch):
    import shared.tinyworld

    monkeypatch.setitem(shared.tinyworld.EMBEDDED, "tinyworld", tmp_path)
    with pytest.raises(UserError, match="make tinyworld"):
        load("tinyworld")
