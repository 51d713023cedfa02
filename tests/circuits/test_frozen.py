"""The frozen network: conservation, exact forward, and effects equal to real edits, in every family (I1 to I4, I8)."""

import pytest
import torch

from circuits.edges import Neurons, direct_effects
from circuits.linearize import LinearizeError, linearize
from circuits.relp import Ledger, relp
from circuits.rules import SECANTS, Rules, RulesError, secant
from shared.hooks import edit
from shared.interventions import Add


def one_row(problem, index=0):
    keep = problem.network.real_BT[index].nonzero()[:, 0]
    return problem.network.row(index), problem.metric.row(index, keep)


def all_neurons(network):
    return Neurons.from_mask(torch.ones_like(torch.stack(network.neurons, 1)[0], dtype=torch.bool))


def test_embeddings_and_biases_sum_to_the_metric(any_model, problem_of):
    problem = problem_of(any_model)
    ledger = relp(problem.network, problem.metric).ledger
    assert ledger.error() < 1e-10
    torch.testing.assert_close(ledger.value_BK, problem.metric.value(problem.network.logits_BTV))


def test_bias_nodes_carry_weight_where_the_family_has_biases(any_model, problem_of):
    problem = problem_of(any_model)
    ledger = relp(problem.network, problem.metric).ledger
    family = any_model.architecture.family
    assert bool(ledger.attn_bias_BKLT.any()) == (family in ("qwen2", "qwen2_moe", "gpt2", "gpt_neox"))
    assert bool(ledger.mlp_bias_BKLT.any()) == (family in ("gpt2", "gpt_neox"))
    assert bool(ledger.position_BKT.any()) == (family == "gpt2")


@pytest.mark.parametrize(
    ("value", "embed", "error"),
    [
        (1.0, [3.0, -1.9], 0.1),  # of the value, not of the 4.9 that cancel in it
        (-1.0, [-3.0, 1.9], 0.1),
        (0.1, [5.0, -4.8], 0.1 / 9.8),  # a value that is itself the rest of a cancellation
        (0.0, [0.0, 0.0], 0.0),
    ],
)
def test_conservation_error_is_relative_to_the_value(value, embed, error):
    embed_BKT, layers_BKLT = torch.tensor([[embed]]), torch.zeros(1, 1, 1, 2)
    ledger = Ledger(
        value_BK=torch.tensor([[value]]),
        embed_BKT=embed_BKT,
        position_BKT=torch.zeros_like(embed_BKT),
        attn_bias_BKLT=layers_BKLT,
        neuron_bias_BKLT=layers_BKLT,
        mlp_bias_BKLT=layers_BKLT,
        logit_bias_BK=torch.zeros(1, 1),
        rest_BK=torch.zeros(1, 1),
    )
    assert ledger.error() == pytest.approx(error, rel=1e-5)


def test_float32_conserves_to_1e_4(problem_of):
    from shared.models import load

    problem = problem_of(load("random:llama"))
    assert relp(problem.network, problem.metric).ledger.error() < 1e-4


def test_without_the_half_rule_conservation_breaks(llama, problem_of):
    error = {}
    for rules in (Rules(), Rules(half=False), Rules(gate="detached")):
        problem = problem_of(llama, rules=rules)
        error[rules] = relp(problem.network, problem.metric).ledger.error()
    assert error[Rules(half=False)] > 1e-2
    assert error[Rules()] < 1e-10
    assert error[Rules(gate="detached")] < 1e-10


def test_direct_effects_sum_to_the_activation_of_every_target(any_model, problem_of):
    network, metric = one_row(problem_of(any_model))
    effects = direct_effects(network, all_neurons(network), metric)
    scale = effects.neuron_Sn.abs().sum(1) + effects.embed_ST.abs().sum(1) + effects.own_S.abs()
    scale = scale.clamp_min(1e-30)  # neurons of an expert that was not chosen: nothing flows in
    assert float(((effects.inflow() - effects.value_S).abs() / scale).max()) < 1e-10
    assert float((effects.remainder().abs() / scale).max()) < 1e-10  # every neuron is a source


def test_total_effects_follow_from_direct_effects(any_model, problem_of, relative):
    network, metric = one_row(problem_of(any_model))
    neurons = all_neurons(network)
    effects = direct_effects(network, neurons, metric)
    unit_Kn = relp(network, metric).sensitivity_BKLTN[0][
        :, neurons.layer_n, neurons.position_n, neurons.index_n
    ]
    total_Kn = unit_Kn * neurons.gather(torch.stack(network.neurons, 1)[0])
    n = len(neurons)
    recursive_Kn = effects.neuron_Sn[n:] + unit_Kn @ effects.neuron_Sn[:n]
    assert relative(recursive_Kn, total_Kn) < 1e-10


def test_frozen_forward_is_the_model(any_model, problem_of, relative):
    problem = problem_of(any_model)
    network = problem.network
    seen = {}
    residual = network.forward(
        network.embed_BTD[:, None], on_neurons=lambda layer, a: seen.setdefault(layer, a)
    )
    value_BK = network.value(
        residual.expand(-1, problem.metric.positions_BK.shape[1], -1, -1), problem.metric
    )
    assert relative(value_BK, problem.metric.value(network.logits_BTV)) < 1e-10
    for layer, neurons_BTN in enumerate(network.neurons):
        real = network.real_BT
        assert relative(seen[layer][:, 0][real], neurons_BTN[real]) < 1e-10


def test_direct_edge_is_the_effect_of_a_real_edit(any_model, problem_of):
    """Change one neuron in the frozen network while every other neuron is held: each target moves by the edge."""
    network, metric = one_row(problem_of(any_model))
    acts_LTN = torch.stack(network.neurons, 1)[0]
    layer, position = 0, 1
    index = int(acts_LTN[layer, position].abs().argmax())
    neurons = all_neurons(network)
    source = int(
        ((neurons.layer_n == layer) & (neurons.position_n == position) & (neurons.index_n == index)).nonzero()
    )
    effects = direct_effects(network, neurons, metric)
    factor, computed = 1.7, []

    def hold_all_but_the_source(level, a_BKTN):
        computed.append(a_BKTN[0, 0])
        held_BKTN = acts_LTN[level][None, None].clone()
        if level == layer:
            held_BKTN[0, 0, position, index] *= factor
        return held_BKTN

    residual = network.forward(network.embed_BTD[:, None], on_neurons=hold_all_but_the_source)
    moved_n = neurons.gather(torch.stack(computed)) - neurons.gather(acts_LTN)
    n_targets = metric.positions_BK.shape[1]
    value_K = network.value(residual.expand(-1, n_targets, -1, -1), metric)[0]
    moved_S = torch.cat([moved_n, value_K - metric.value(network.logits_BTV)[0]])
    edge_S = (factor - 1) * effects.neuron_Sn[:, source]
    assert float(edge_S.abs().max()) > 0
    assert float((moved_S - edge_S).abs().max() / acts_LTN.abs().max()) < 1e-10


def test_total_effect_is_the_effect_of_a_real_edit(llama, problem_of, relative):
    network, metric = one_row(problem_of(llama))
    unit_KLTN = relp(network, metric).sensitivity_BKLTN[0]
    for layer, position, index in [(0, 0, 3), (1, 4, 50), (2, 6, 95)]:

        def shift(level, a_BKTN, node=(layer, position, index)):
            a_BKTN = a_BKTN.clone()
            if level == node[0]:
                a_BKTN[:, :, node[1], node[2]] += 0.5
            return a_BKTN

        residual = network.forward(network.embed_BTD[:, None], on_neurons=shift).expand(-1, 2, -1, -1)
        change_K = network.value(residual, metric)[0] - metric.value(network.logits_BTV)[0]
        expected_K = 0.5 * unit_KLTN[:, layer, position, index]
        assert float((change_K - expected_K).abs().max()) < 1e-10 * float(
            metric.value(network.logits_BTV).abs().max()
        )


def test_token_maps_forward_equal_backward(llama, problem_of, relative):
    """Forward mode: one token's embedding alone through the frozen network; its sum over tokens is the activation."""
    network, metric = one_row(problem_of(llama))
    n_positions = network.embed_BTD.shape[1]
    eye_TT = torch.eye(n_positions, dtype=torch.float64)
    alone_BKTD = (eye_TT[:, :, None] * network.embed_BTD[0])[None]  # K = the token, alone at its position
    maps = []
    network.forward(alone_BKTD, bias=False, on_neurons=lambda layer, a: (maps.append(a[0]), a)[1])
    maps_KLTN = torch.stack(maps, dim=1)
    assert relative(maps_KLTN.sum(0), torch.stack(network.neurons, 1)[0]) < 1e-10
    neurons = all_neurons(network)
    effects = direct_effects(network, neurons, metric)
    n = len(neurons)
    acts_n = neurons.gather(torch.stack(network.neurons, 1)[0])
    # total effect of tokens on neurons by the recursion over direct edges, layer by layer
    total_nT = effects.embed_ST[:n].clone()
    for layer in range(1, len(network.blocks)):
        here, before = neurons.layer_n == layer, neurons.layer_n < layer
        total_nT[here] += effects.neuron_Sn[:n][here][:, before] @ (total_nT[before] / acts_n[before, None])
    forward_nT = torch.stack([neurons.gather(token_LTN) for token_LTN in maps_KLTN], dim=1)
    assert relative(forward_nT, total_nT) < 1e-9


def test_nothing_reaches_queries_keys_or_norms(llama, problem_of, relative):
    """I7: the frozen forward is linear, so an edit of twice the size has exactly twice the effect."""
    network, _ = one_row(problem_of(llama))
    base = network.forward(network.embed_BTD[:, None])
    delta = torch.randn(
        network.embed_BTD.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )[:, None]
    once = network.forward(network.embed_BTD[:, None] + delta) - base
    twice = network.forward(network.embed_BTD[:, None] + 2 * delta) - base
    assert relative(twice, 2 * once) < 1e-12
    assert relative(network.forward(delta, bias=False), once) < 1e-12


def test_later_tokens_do_not_reach_earlier_targets(llama, problem_of):
    """I6: relevance of an early target is zero at every later position, and changing them changes nothing."""
    rows = [[1, 40, 77, 9, 120], [1, 40, 77, 9, 33]]
    problem = problem_of(llama, rows)
    problem.metric.positions_BK[:] = 3
    relevance = relp(problem.network, problem.metric)
    assert not relevance.sensitivity_BKLTN[:, :, :, 4].any()
    assert not relevance.ledger.embed_BKT[:, :, 4].any()
    assert torch.equal(problem.network.logits_BTV[0, :4], problem.network.logits_BTV[1, :4])


@pytest.mark.parametrize("name", sorted(set(SECANTS) - {"linear"}))
def test_secants_times_input_are_the_activation(name):
    from transformers.activations import ACT2FN

    z = torch.cat([torch.linspace(-8, 8, 101, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(secant(name, z) * z, ACT2FN[name](z), rtol=1e-7, atol=1e-12)


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(RulesError, match="mish"):
        secant("mish", torch.zeros(1))


def test_a_forward_pass_that_does_not_close_is_refused(llama, problem_of):
    """An edit inside the MLP leaves neurons that their pre-activations do not explain."""
    batch = problem_of(llama).batch
    vector = torch.ones(llama.architecture.n_neurons, dtype=torch.float64)
    with (
        edit(llama, Add("blocks.1.neurons", vector)),
        pytest.raises(LinearizeError, match=r"blocks\.1\.neurons"),
    ):
        linearize(llama, batch)
