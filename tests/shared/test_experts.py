"""Mixture-of-experts MLPs as one wide MLP: against transformers' own code, loops over tokens, and edited weights."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.architecture import ArchitectureError, family_of
from shared.checks import check
from shared.errors import UserError
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Ablate, Interchange, Scale, Set
from shared.models import ModelConfig, load
from shared.random_models import random_model

SPARSE = [name for name, row in FAMILIES.items() if row.experts]
TEXTS = ["The first text", "and a second one, which is a good deal longer"]


@pytest.fixture(scope="module", params=SPARSE)
def model(request):
    return load(ModelConfig(f"random:{request.param}", dtype="float64"))


def sparse_layers(model):
    return [layer for layer in range(model.architecture.n_layers) if model.architecture.experts(layer)]


def mlp_of(model, layer):
    return model.hf.model.layers[layer].mlp


def run(model, batch, sites, edits=()):
    with torch.no_grad(), capture(model, sites) as acts, edit(model, list(edits)):
        logits_BTV = model(batch)
    return logits_BTV, dict(acts)


def test_families_have_the_blocks_they_are_here_for():
    """Dense and sparse blocks beside each other, either of them the wider one, and a shared expert."""
    qwen2, qwen3 = (load(f"random:{family}").architecture for family in ("qwen2_moe", "qwen3_moe"))
    assert [qwen2.n_neurons_of(layer) for layer in range(3)] == [104, 96, 104]
    assert [qwen3.n_neurons_of(layer) for layer in range(3)] == [96, 64, 96]
    assert (qwen2.experts(0).n_routed, qwen3.experts(1).n_routed) == (5, 4)
    assert qwen2.sites("routing") == ["blocks.0.routing", "blocks.2.routing"]
    assert all(qwen2.site_width(site) == 104 for site in qwen2.sites("neurons"))


def test_without_a_hook_the_model_is_transformers_own():
    for family in SPARSE:
        hf, _ = random_model(family)
        model = load(f"random:{family}")
        batch = model.encode(TEXTS)
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        with torch.no_grad():
            expected = hf.eval()(**inputs, position_ids=batch.position_ids_BT).logits
            assert torch.equal(model(batch), expected)
        assert list(model.hf.state_dict()) == list(hf.state_dict())


def test_through_the_taps_it_is_transformers_eager_code(model):
    layers = sparse_layers(model)
    kinds = ("mlp_norm", "neurons", "mlp_out")
    sites = [f"blocks.{layer}.{kind}" for layer in layers for kind in kinds]
    batch = model.encode(TEXTS)
    _, acts = run(model, batch, sites)
    for layer in layers:
        mlp, x_BTD = mlp_of(model, layer), acts[f"blocks.{layer}.mlp_norm"]
        assert mlp.experts.config._experts_implementation == "eager"
        with torch.no_grad():
            expected = type(mlp).forward(mlp, x_BTD)
        torch.testing.assert_close(acts[f"blocks.{layer}.mlp_out"], expected, rtol=1e-12, atol=1e-12)


def test_gradients_through_the_taps_are_those_of_transformers(model):
    batch, mlp = model.encode(TEXTS), mlp_of(model, sparse_layers(model)[0])
    wanted = [mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj]
    found = []
    for sites in ([], model.architecture.sites("neurons")):
        with capture(model, sites):
            value = model(batch)[0, -1].logsumexp(-1)
        found.append(torch.autograd.grad(value, wanted))
    for tapped, own in zip(*found, strict=True):
        assert own.abs().max() > 0
        # norms and the router's softmax are float32 inside
        assert (tapped - own).abs().max() < 1e-6 * own.abs().max()


def test_sites_are_what_a_loop_over_tokens_and_experts_computes(model):
    batch = model.encode(TEXTS[:1])
    kinds = ("mlp_norm", "routing", "gate", "up", "neurons")
    sites = [f"blocks.{layer}.{kind}" for layer in sparse_layers(model) for kind in kinds]
    _, acts = run(model, batch, sites)
    for layer in sparse_layers(model):
        mlp, sizes = mlp_of(model, layer), model.architecture.experts(layer)
        x_TD, routing_TR, gate_TN, up_TN, neurons_TN = (acts[f"blocks.{layer}.{kind}"][0] for kind in kinds)
        assert ((routing_TR[:, : sizes.n_experts] != 0).sum(1) == 2).all()
        expected = torch.zeros(3, *neurons_TN.shape, dtype=torch.float64)
        with torch.no_grad():
            _, weight_Tk, expert_Tk = mlp.gate(x_TD)
            for token, x_D in enumerate(x_TD):
                for weight, e in zip(weight_Tk[token], expert_Tk[token].tolist(), strict=True):
                    assert routing_TR[token, e] == weight
                    z, u = (mlp.experts.gate_up_proj[e] @ x_D).split(sizes.n_neurons)
                    expected[:, token, e * sizes.n_neurons : (e + 1) * sizes.n_neurons] = torch.stack(
                        [z, u, weight * torch.nn.functional.silu(z) * u]
                    )
                if sizes.n_shared:
                    start = sizes.n_experts * sizes.n_neurons
                    z, u = mlp.shared_expert.gate_proj(x_D), mlp.shared_expert.up_proj(x_D)
                    weight = torch.sigmoid(mlp.shared_expert_gate(x_D))
                    assert routing_TR[token, -1] == weight
                    expected[:, token, start : start + sizes.n_shared] = torch.stack(
                        [z, u, weight * torch.nn.functional.silu(z) * u]
                    )
        torch.testing.assert_close(
            torch.stack([gate_TN, up_TN, neurons_TN]), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", ["gate", "up", "neurons"])
def test_scaling_a_site_equals_scaling_its_weights(model, kind):
    layer = sparse_layers(model)[-1]
    sizes, total = model.architecture.experts(layer), model.architecture.experts(layer).total
    scaled = load(model.config)
    mlp = mlp_of(scaled, layer)
    factor = torch.linspace(0.5, 3.0, model.architecture.n_neurons, dtype=torch.float64)
    routed = factor[: sizes.n_experts * sizes.n_neurons].unflatten(0, (sizes.n_experts, -1))
    shared = factor[sizes.n_experts * sizes.n_neurons : total]
    halves = {"gate": slice(None, sizes.n_neurons), "up": slice(sizes.n_neurons, None)}
    with torch.no_grad():
        if kind == "neurons":
            mlp.experts.down_proj *= routed[:, None]
        else:
            mlp.experts.gate_up_proj[:, halves[kind]] *= routed[..., None]
        if sizes.n_shared and kind == "neurons":
            mlp.shared_expert.down_proj.weight *= shared
        elif sizes.n_shared:
            getattr(mlp.shared_expert, f"{kind}_proj").weight *= shared[:, None]
        batch = model.encode(TEXTS)
        with edit(model, Scale(f"blocks.{layer}.{kind}", factor)):
            got = model(batch)
        expected, base = scaled(batch), model(batch)
    real_BT = batch.attention_mask_BT.bool()  # no edit touches padding
    torch.testing.assert_close(got[real_BT], expected[real_BT], rtol=1e-5, atol=1e-6)
    assert (got - base)[real_BT].abs().max() > 1e-3


def test_an_expert_can_be_taken_out_by_its_routing_weight(model):
    layer, expert = sparse_layers(model)[0], 1
    without = load(model.config)
    with torch.no_grad():
        mlp_of(without, layer).experts.down_proj[expert] = 0
    batch = model.encode(TEXTS)
    with torch.no_grad(), edit(model, Ablate(f"blocks.{layer}.routing", indices=[expert])):
        got = model(batch)
    with torch.no_grad():
        expected, base = without(batch), model(batch)
    real_BT = batch.attention_mask_BT.bool()  # no edit touches padding
    torch.testing.assert_close(got[real_BT], expected[real_BT], rtol=1e-5, atol=1e-6)
    assert (got - base)[real_BT].abs().max() > 1e-3


def test_an_expert_that_was_not_chosen_can_be_brought_in(model):
    layer = sparse_layers(model)[0]
    at, sizes = f"blocks.{layer}.", model.architecture.experts(layer)
    batch = model.encode(TEXTS[:1])
    sites = [at + kind for kind in ("mlp_norm", "routing", "mlp_out")]
    _, acts = run(model, batch, sites)
    expert = int((acts[at + "routing"][0, -1] == 0).nonzero()[0])
    edited = run(model, batch, sites, [Set(at + "routing", 0.5, indices=[expert], positions=[-1])])[1]
    experts = mlp_of(model, layer).experts
    with torch.no_grad():
        z, u = (experts.gate_up_proj[expert] @ acts[at + "mlp_norm"][0, -1]).split(sizes.n_neurons)
        added_D = 0.5 * experts.down_proj[expert] @ (torch.nn.functional.silu(z) * u)
    moved_TD = (edited[at + "mlp_out"] - acts[at + "mlp_out"])[0]
    torch.testing.assert_close(moved_TD[-1], added_D, rtol=1e-10, atol=1e-10)
    assert not moved_TD[:-1].any()


def test_a_neuron_of_an_expert_that_was_not_chosen_writes_its_column(model):
    """By an edit, and by its gradient."""
    layer = sparse_layers(model)[0]
    at, sizes = f"blocks.{layer}.", model.architecture.experts(layer)
    batch = model.encode(TEXTS[:1])
    _, acts = run(model, batch, [at + "routing", at + "neurons", at + "mlp_out"])
    expert = int((acts[at + "routing"][0, -1] == 0).nonzero()[0])
    index = expert * sizes.n_neurons + 3
    column_D = mlp_of(model, layer).experts.down_proj[expert][:, 3].detach()
    assert torch.equal(model.architecture.block(layer).W_down[:, index], column_D)
    assert acts[at + "neurons"][0, -1, index] == 0
    edited = run(model, batch, [at + "mlp_out"], [Set(at + "neurons", 2.0, indices=[index], positions=[-1])])[
        1
    ]
    moved_TD = (edited[at + "mlp_out"] - acts[at + "mlp_out"])[0]
    torch.testing.assert_close(moved_TD[-1], 2.0 * column_D, rtol=1e-10, atol=1e-10)
    leaf = acts[at + "neurons"].clone().requires_grad_()
    with capture(model, [at + "mlp_out"]) as seen, edit(model, Interchange(at + "neurons", leaf)):
        model(batch)
    (gradient,) = torch.autograd.grad(seen[at + "mlp_out"][0, -1] @ column_D, leaf)
    torch.testing.assert_close(gradient[0, -1, index], column_D @ column_D)


def test_neurons_beyond_a_narrower_block_do_nothing(model):
    a, batch = model.architecture, model.encode(TEXTS)
    for layer in range(a.n_layers):
        width = a.n_neurons_of(layer)
        site = f"blocks.{layer}.neurons"
        expected, acts = run(model, batch, [site])
        assert acts[site].shape[-1] == a.n_neurons
        assert not acts[site][..., width:].any()
        if width < a.n_neurons:
            changed, _ = run(model, batch, [site], [Set(site, 3.0, indices=list(range(width, a.n_neurons)))])
            assert torch.equal(changed, expected)


def test_a_copy_of_the_module_is_independent(model):
    batch, twin = model.encode(TEXTS), copy.deepcopy(model.hf)
    with torch.no_grad():
        expected = model(batch)
        mlp_of(model, sparse_layers(model)[0]).taps.live = True
        try:
            got = twin(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
            ).logits
        finally:
            mlp_of(model, sparse_layers(model)[0]).taps.live = False
    assert torch.equal(got, expected)


def test_taps_are_closed_after_an_exception(model):
    batch = model.encode(TEXTS)

    class Explodes(Scale):
        def edited(self, x):
            raise RuntimeError("boom")

    with (
        pytest.raises(RuntimeError, match="boom"),
        edit(model, Explodes(f"blocks.{sparse_layers(model)[0]}.up", 2.0)),
    ):
        model(batch)
    assert not any(mlp_of(model, layer).taps.live for layer in sparse_layers(model))


def test_a_saved_model_is_read_by_transformers(model, tmp_path):
    folder, batch = model.save(tmp_path), model.encode(TEXTS[:1])
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(hf(input_ids=batch.input_ids_BT).logits, model(batch))
    again = load(ModelConfig(str(folder), dtype="float64"))
    assert again.fingerprint == model.fingerprint
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


def test_the_self_check_names_experts_that_compute_something_else(model, monkeypatch):
    layer = sparse_layers(model)[0]
    kind = type(mlp_of(model, layer))
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.01 * own(self, x))
    with pytest.raises(ArchitectureError, match=f"check 'experts in block {layer}' failed"):
        check(model)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "jetmoe"])
def test_other_mixtures_are_refused_by_name(model_type):
    with pytest.raises(ArchitectureError, match=f"{model_type}.*Supported mixture.*mixtral.*qwen3_moe"):
        family_of(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("option", [{"quantization": "8bit"}, {"remote": True}])
def test_experts_whose_neurons_cannot_be_read_are_refused_before_loading(option, tmp_path):
    folder = load("random:mixtral").save(tmp_path)
    with pytest.raises(UserError, match=f"mixture of experts.*without {next(iter(option))}"):
        load(ModelConfig(str(folder), **option))
