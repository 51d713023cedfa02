"""A rebuilt from the model reproduces attention's output, in every family."""

import pytest
import torch

from shared.attention import attention_patterns
from shared.checks import heads_from
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Add
from shared.models import load


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return load(f"random:{request.param}")


def attention_out(model, layer, pattern_BHTT, v_BTX):
    """post_norm(W_O A V + b_O), by the definition."""
    block = model.architecture.block(layer)
    heads_BTX = heads_from(model.architecture, pattern_BHTT, v_BTX)
    out_BTD = torch.nn.functional.linear(heads_BTX, block.W_o, block.b_o)
    return out_BTD if block.attn_post_norm is None else block.attn_post_norm(out_BTD)


def test_patterns_times_values_give_attn_out_also_under_edits(model):
    architecture = model.architecture
    batch = model.encode(["A text of some length, beyond the window", "short"])
    real_BT = batch.attention_mask_BT.bool()
    vector = torch.randn(architecture.width, generator=torch.Generator().manual_seed(1))
    before = model.hf.config._attn_implementation
    with torch.no_grad(), edit(model, Add("blocks.0.output", vector)):
        with capture(model, [*architecture.sites("v"), *architecture.sites("attn_out")]) as acts:
            model(batch)
        patterns = attention_patterns(model, batch)
    assert model.hf.config._attn_implementation == before
    for layer, pattern_BHTT in enumerate(patterns):
        sums_BHT = pattern_BHTT.sum(-1)
        torch.testing.assert_close(
            sums_BHT.transpose(1, 2)[real_BT], torch.ones_like(sums_BHT.transpose(1, 2)[real_BT])
        )
        got = attention_out(model, layer, pattern_BHTT, acts[f"blocks.{layer}.v"])
        expected = acts[f"blocks.{layer}.attn_out"]
        torch.testing.assert_close(got[real_BT], expected[real_BT], atol=2e-5, rtol=1e-4)


def test_windows_are_those_of_the_block_view(model):
    batch = model.encode(["x" * 40])
    with torch.no_grad():
        patterns = attention_patterns(model, batch)
    for layer, pattern_BHTT in enumerate(patterns):
        window = model.architecture.block(layer).sliding_window
        distance_TT = torch.arange(41)[:, None] - torch.arange(41)[None]
        seen_TT = (distance_TT >= 0) if window is None else (distance_TT >= 0) & (distance_TT < window)
        assert (pattern_BHTT[..., ~seen_TT] == 0).all()
        assert (pattern_BHTT[..., seen_TT] > 0).any()
        assert ((pattern_BHTT[0].amax(0) > 0) == seen_TT).all()


def test_the_setting_is_put_back_after_an_exception(model):
    before = model.hf.config._attn_implementation
    batch = model.encode(["abc"])
    broken = batch.to("cpu").__class__(**{**vars(batch), "input_ids_BT": batch.input_ids_BT + 10_000})
    with pytest.raises(IndexError):
        attention_patterns(model, broken)
    assert model.hf.config._attn_implementation == before
