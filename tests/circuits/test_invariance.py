"""Padding, order and chunks change nothing; the model is bit-identical afterwards (I5, I9)."""

import pytest
import torch

from circuits.attribution import attribute
from circuits.edges import Neurons, direct_effects
from circuits.layers import FrozenAttention
from circuits.linearize import LinearizeError
from circuits.relp import relp
from shared.architecture import FAMILIES
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


@pytest.mark.parametrize("estimator", ["relp", "atp", "ig_activations", "random"])
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
    attribute(problem_of(llama), estimator)
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
    }  # fmt: skip
