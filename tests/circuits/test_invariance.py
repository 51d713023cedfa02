"""Padding, order and chunks change nothing; the model is bit-identical afterwards (I5, I9)."""

from dataclasses import replace

import pytest
import torch

from circuits.attribution import Settings, attribute, pose
from circuits.edges import Neurons, direct_effects
from circuits.frozen_attention import FrozenAttention
from circuits.linearize import LinearizeError
from circuits.metric import token_logits, top_logits
from circuits.relp import relp
from circuits.selfcheck import check
from shared.families import FAMILIES
from shared.models import ModelConfig, load

LONG, SHORT = [1, 40, 77, 9, 120, 33, 201, 17], [1, 90, 13, 55, 7]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single(any_model, problem_of, relative, side):
    single_precision = any_model.architecture.family == "gemma2" and side == "left"  # see below
    if single_precision:
        any_model = load("random:gemma2")
    tolerance = 5e-5 if single_precision else 1e-10
    batch = problem_of(any_model, [LONG, SHORT], side)
    for index, row in enumerate([LONG, SHORT]):
        single = problem_of(any_model, [row])
        # the top tokens of a padded and of a single run are the same targets
        assert batch.metric.tokens[index] == single.metric.tokens[0]
        columns = batch.network.real_BT[index].nonzero()[:, 0]
        got = relp(batch.network, batch.metric).sensitivity_BKLTN[index][:, :, columns]
        expected = relp(single.network, single.metric).sensitivity_BKLTN[0]
        assert relative(got, expected) < tolerance
        padding = ~batch.network.real_BT[index]
        assert not relp(batch.network, batch.metric).sensitivity_BKLTN[index][:, :, padding].any()


def test_edges_of_a_padded_row_equal_those_of_the_single_prompt(llama, problem_of, relative):
    single = problem_of(llama, [SHORT])
    mask = torch.zeros_like(torch.stack(single.network.neurons, 1)[0], dtype=torch.bool)
    mask[:, :, ::7] = True
    expected = direct_effects(single.network, Neurons.from_mask(mask), single.metric)
    for side in ("left", "right"):
        batch = problem_of(llama, [LONG, SHORT], side)
        keep = batch.network.real_BT[1].nonzero()[:, 0]
        got = direct_effects(batch.network.row(1), Neurons.from_mask(mask), batch.metric.row(1, keep))
        assert relative(got.neuron_Sn, expected.neuron_Sn) < 1e-10
        assert relative(got.embed_ST, expected.embed_ST) < 1e-10


def test_edges_do_not_depend_on_which_other_targets_are_traced(llama, problem_of):
    problem = problem_of(llama, [LONG])
    many = torch.zeros_like(torch.stack(problem.network.neurons, 1)[0], dtype=torch.bool)
    many[:, 2:, ::5] = True
    few = many.clone()
    few[:, :, 10:] = False
    both = [direct_effects(problem.network, Neurons.from_mask(mask), problem.metric) for mask in (many, few)]
    kept = Neurons.from_mask(many).gather(few.double()).bool()
    rows = torch.cat([kept, torch.ones(2, dtype=torch.bool)])
    torch.testing.assert_close(both[0].neuron_Sn[rows][:, kept], both[1].neuron_Sn, rtol=0, atol=1e-12)


def test_attention_in_blocks_of_rows_equals_the_whole(llama, problem_of):
    attention: FrozenAttention = problem_of(llama).network.blocks[1].attention
    generator = torch.Generator().manual_seed(0)
    g_BKTY = torch.randn(2, 3, attention.query_BHTd.shape[2], 256, dtype=torch.float64, generator=generator)
    whole = attention.mix_transpose(g_BKTY)
    for block in (1, 3, 64):
        torch.testing.assert_close(attention.mix_transpose(g_BKTY, block), whole, rtol=0, atol=1e-12)
    # the transpose really is the transpose: <A v, g> = <v, A^T g>
    v_BKTX = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close((attention.mix(v_BKTX) * g_BKTY).sum(), (v_BKTX * whole).sum())


@pytest.mark.parametrize("window", [None, 3])
def test_a_held_pattern_gives_the_same_products_also_of_a_prefix(llama, problem_of, window):
    attention = replace(problem_of(llama, [LONG, SHORT]).network.blocks[1].attention, window=window)
    held = attention.hold()
    assert held.held_BGRTT is not None
    generator = torch.Generator().manual_seed(0)
    for stop in (8, 5):
        keep = slice(0, stop)
        rebuilt, kept = attention.select(slice(None), keep), held.select(slice(None), keep)
        g_BKTY = torch.randn(2, 3, stop, 256, dtype=torch.float64, generator=generator)
        for block in (2, 64):
            products = (one.mix_transpose(g_BKTY, block) for one in (kept, rebuilt))
            torch.testing.assert_close(*products, rtol=0, atol=1e-12)
        torch.testing.assert_close(kept.pattern(1, 4), rebuilt.pattern(1, 4), rtol=0, atol=1e-12)


def test_the_network_of_one_row_and_of_its_first_tokens_copies_nothing(llama, problem_of):
    network = problem_of(llama, [LONG, SHORT]).network
    row = network.row(1)
    assert row.real_BT.all()
    prefix = row.select(slice(None), slice(2))
    storages = [x.blocks[1].neurons_BTN.untyped_storage().data_ptr() for x in (network, row, prefix)]
    assert len(set(storages)) == 1
    first = int(network.real_BT[1].nonzero()[0])
    torch.testing.assert_close(prefix.embed_BTD[0], network.embed_BTD[1, first : first + 2], rtol=0, atol=0)


def test_rebuilt_patterns_equal_the_models_own(any_model, problem_of):
    """Against the weights that the model's eager attention returns (shared.attention)."""
    from shared.attention import attention_patterns

    problem = problem_of(any_model, [LONG])
    with torch.no_grad():
        patterns = attention_patterns(any_model, problem.batch)
    for block, pattern_BHTT in zip(problem.network.blocks, patterns, strict=True):
        torch.testing.assert_close(block.attention.pattern(), pattern_BHTT, rtol=0, atol=1e-6)


def test_gemma2_is_traced_with_its_soft_cap(problem_of):
    """Only eager attention computes the cap, and its float64 form breaks under left padding inside transformers."""
    model = load(ModelConfig("random:gemma2", dtype="float64"))
    assert all(block.attention.soft_cap for block in problem_of(model).network.blocks)
    with pytest.raises(LinearizeError, match="not finite"):
        problem_of(model, [LONG, SHORT], "left")


@pytest.mark.parametrize("estimator", ["relp", "relp_qk_open", "relp_ig", "atp", "conductance", "exact"])
def test_model_is_bit_identical_after_tracing(llama, problem_of, estimator):
    batch = problem_of(llama).batch
    state = {name: value.clone() for name, value in llama.hf.state_dict().items()}
    classes = [type(module) for module in llama.hf.modules()]
    setting = llama.hf.config._attn_implementation
    calls = []
    handle = llama.hf.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(
        lambda *_: calls.append(1)
    )
    with torch.no_grad():
        before = llama(batch)
    attribute(problem_of(llama, [SHORT], basis="heads"), estimator, settings=Settings(steps=2))
    with torch.no_grad():
        after = llama(batch)
    assert torch.equal(before, after)
    assert all(torch.equal(state[name], value) for name, value in llama.hf.state_dict().items())
    assert classes == [type(module) for module in llama.hf.modules()]
    assert llama.hf.config._attn_implementation == setting
    assert all(parameter.grad is None for parameter in llama.hf.parameters())
    seen = len(calls)
    with torch.no_grad():
        llama(batch)
    handle.remove()
    assert len(calls) == seen + 1  # the user's own hook is still there, and fires once a call


def test_every_family_is_covered():
    assert set(FAMILIES) == {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "gpt_neox", "gpt2",
        "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
    }  # fmt: skip


@pytest.fixture(scope="module")
def tinyworld():
    return load("tinyworld")


PROMPTS = ["The cats near the old tree", "The key to the boxes"]


def test_trained_model_conserves_in_float32(tinyworld):
    """I1 on real weights at the digest's float32 tolerance, and the self-check says the same of the model at hand."""
    problem = pose(tinyworld, tinyworld.encode(PROMPTS), lambda logits, at: top_logits(logits, at, 5))
    assert relp(problem.network, problem.metric).ledger.error() < 1e-4
    assert check(tinyworld).conservation_error < 1e-4


def test_trained_model_scores_alike_in_batch_and_alone(tinyworld, relative):
    """I9 in float32: 1e-5 of a layer's largest score, padding on either side."""
    for side in ("left", "right"):
        batch = tinyworld.encode(PROMPTS, padding_side=side)
        padded = pose(tinyworld, batch, lambda logits, at: top_logits(logits, at, 1))
        for row, prompt in enumerate(PROMPTS):
            single = pose(tinyworld, tinyworld.encode([prompt]), lambda logits, at: top_logits(logits, at, 1))
            columns = padded.network.real_BT[row].nonzero()[:, 0]
            got_LTN = attribute(padded)[row, 0][:, columns]
            for layer, expected_TN in enumerate(attribute(single)[0, 0]):
                assert relative(got_LTN[layer], expected_TN) < 1e-5


def test_threads_change_nothing(llama, problem_of):
    before = torch.get_num_threads()
    try:
        scores = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scores.append(attribute(problem_of(llama)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_products_with_patterns_never_need_the_whole_one(llama, problem_of, monkeypatch, window):
    """Blocks of rows with only the keys they see: the same products, and no array of T x T."""
    attention = replace(problem_of(llama, [LONG, SHORT]).network.blocks[1].attention, window=window)
    whole_BHTT = attention.pattern()
    generator = torch.Generator().manual_seed(0)
    value_BKTX = torch.randn(2, 3, 8, 2 * 64, dtype=torch.float64, generator=generator)
    g_BKTY = torch.randn(2, 3, 8, 4 * 64, dtype=torch.float64, generator=generator)
    sizes, scores = [], FrozenAttention.scores

    def noted(self, rows_Q):
        first, found = scores(self, rows_Q)
        sizes.append((len(rows_Q), found.shape[-1]))
        return first, found

    monkeypatch.setattr(FrozenAttention, "scores", noted)
    mixed = attention.mix(value_BKTX, torch.arange(2, 5)), attention.mix_transpose(g_BKTY, 2)
    heads_BKTGd = value_BKTX.unflatten(-1, (2, 64)).repeat_interleave(2, dim=3)
    expected = torch.einsum("bhqt,bkthd->bkqhd", whole_BHTT, heads_BKTGd).flatten(3)
    torch.testing.assert_close(mixed[0], expected[:, :, 2:5])
    back = torch.einsum("bhqt,bkqhd->bkthd", whole_BHTT, g_BKTY.unflatten(-1, (4, 64)))
    torch.testing.assert_close(mixed[1], back.unflatten(3, (2, 2)).sum(4).flatten(3))
    widest = 8 if window is None else window + 2
    assert max(keys for _, keys in sizes) <= widest
    assert sizes[-4:] == [(2, min(2 + 2 * i, 4 if window else 8)) for i in range(4)]


def test_half_precision_models_have_float32_coefficients(problem_of, relative):
    model = load(ModelConfig("random:llama", dtype="bfloat16"))
    full = load(ModelConfig("random:llama"))
    half, single = problem_of(model), problem_of(full)
    assert half.network.logits_BTV.dtype == torch.float32
    assert attribute(half).dtype == attribute(half, "atp").dtype == torch.float32
    assert relp(half.network, half.metric).ledger.error() < 5e-2
    same = [[3, 4], [3, 4]]
    scores = [
        attribute(pose(each, problem.batch, lambda logits, at: token_logits(logits, at, same)))
        for each, problem in ((model, half), (full, single))
    ]
    assert relative(scores[0], scores[1]) < 0.1  # the forward pass is bfloat16's
