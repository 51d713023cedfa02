"""The architecture table against what tiny random models of every family compute."""

from dataclasses import replace

import pytest
import torch

from shared.architecture import ArchitectureError, SiteError
from shared.checks import block_identities, check
from shared.families import FAMILIES
from shared.hooks import capture
from shared.models import load


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return load(f"random:{request.param}")


def test_every_block_identity_holds_on_a_padded_batch(model):
    batch = model.encode(["A first text", "another one that is longer than the sliding window of 16"])
    with torch.no_grad(), capture(model, model.architecture.sites()) as acts:
        model(batch)
    for layer in range(model.architecture.n_layers):
        for name, got, expected in block_identities(model.architecture, layer, acts):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4, msg=name)


def test_residual_sites_are_hugging_faces_hidden_states(model):
    batch = model.encode(["one text", "a second text, longer"])
    sites = ["embed", *model.architecture.sites("output"), "final_norm", "logits"]
    with torch.no_grad(), capture(model, sites) as acts:
        model(batch)
        output = model.hf(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            output_hidden_states=True,
        )
    expected = output.hidden_states
    assert torch.equal(acts["embed"], expected[0])
    for layer in range(model.architecture.n_layers - 1):
        assert torch.equal(acts[f"blocks.{layer}.output"], expected[layer + 1])
    assert torch.equal(acts["final_norm"], expected[-1])
    assert torch.equal(acts["logits"], output.logits)


def test_unknown_sites_are_refused_by_name(model):
    with pytest.raises(SiteError, match=r"blocks\.1\.neurons"):
        model.architecture.slot("blocks.1.neuron")
    with pytest.raises(SiteError, match=r"3 blocks"):
        model.architecture.slot("blocks.3.output")


def test_the_self_check_names_a_wrong_row(model):
    right = model.architecture.row
    wrong_rows = {"residual in block 0": replace(right, o=right.down, down=right.o)}
    if right.experts:
        wrong_rows = {
            "attn_norm in block 0": replace(right, attn_norm=right.mlp_norm, mlp_norm=right.attn_norm)
        }
    if right.fused == "none":
        wrong_rows["heads in block 0"] = replace(right, k=right.v, v=right.k)
    if right.fused == "per_head":
        wrong_rows = {"heads in block 0": replace(right, fused="stacked")}
    if model.architecture.gated and not right.fused_gate_up and not right.experts:
        wrong_rows["neurons in block 0"] = replace(right, gate=right.up, up=right.gate)
    if right.attn_norm:
        other = "rms_plus_one" if right.norm == "rms" else "rms"
        wrong_rows["attn_norm in block 0"] = replace(right, norm=other)
    for name, row in wrong_rows.items():
        model.architecture.row = row
        try:
            with pytest.raises(ArchitectureError, match=rf"check '({name}|order|shapes)' failed"):
                check(model)
        finally:
            model.architecture.row = right
    check(model)
