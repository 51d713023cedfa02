"""Capture and edit: against plain torch hooks, against edited weights, and leaving the model as it was."""

import copy

import pytest
import torch

from shared.architecture import NEURON_SITES, SiteError
from shared.errors import UserError
from shared.families import FAMILIES
from shared.hooks import capture, edit
from shared.interventions import Ablate, Add, Interchange, InterventionError, Scale, Set
from shared.models import load

TEXTS = ["The first text", "and a second one, which is a good deal longer"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_model(request):
    return load(f"random:{request.param}")


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


def state(model):
    """Everything about a module that a hook could leave changed."""
    return (
        {name: tensor.clone() for name, tensor in model.hf.state_dict().items()},
        {
            name: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.hf.named_modules()
        },
        model.hf.config.to_dict(),
        model.hf.training,
    )


def assert_same_state(before, after):
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_capture_equals_plain_torch_hooks(model):
    batch = model.encode(TEXTS)
    seen = {}
    layer = model.hf.model.layers[1]
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.update({"output": output})),
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update({"neurons": args[0]})),
    ]
    with torch.no_grad(), capture(model, ["blocks.1.output", "blocks.1.neurons"]) as acts:
        model(batch)
    for handle in handles:
        handle.remove()
    for kind in ("output", "neurons"):
        assert torch.equal(acts[f"blocks.1.{kind}"], seen[kind])


@pytest.mark.parametrize("kind", ["q", "k", "v", "gate", "up", "neurons", "heads"])
def test_scaling_a_site_equals_scaling_its_weights(any_model, kind):
    """The independent reference for fused weights: scale the weights' columns by hand in a second copy."""
    architecture = any_model.architecture
    if kind not in architecture.block_sites():
        pytest.skip(f"{architecture.family} has no {kind}")
    if architecture.row.experts and kind in NEURON_SITES:
        pytest.skip("the same for experts: test_experts.py")
    scaled = load(f"random:{architecture.family}")
    row, columns = architecture.row, None
    read_by = {"neurons": row.down, "heads": row.o}
    module = scaled.architecture._module(architecture.block_path(1, read_by.get(kind) or getattr(row, kind)))
    if kind not in read_by:
        columns = architecture.columns(kind)
    factor = torch.linspace(0.5, 3.0, architecture.site_width(f"blocks.1.{kind}"))
    conv1d = hasattr(module, "nf")
    with torch.no_grad():
        weight = module.weight.T if conv1d else module.weight  # [out, in]
        if kind in read_by:
            weight *= factor
        else:
            chosen = slice(None) if columns is None else columns
            weight[chosen] *= factor[:, None]
            if module.bias is not None:
                module.bias[chosen] *= factor
        batch = any_model.encode(TEXTS)
        with edit(any_model, Scale(f"blocks.1.{kind}", factor)):
            got = any_model(batch)
        expected, base = scaled(batch), any_model(batch)
    real = batch.attention_mask_BT.bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)
    assert (got - base)[real].abs().max() > 1e-3


def test_interchanging_the_stream_gives_the_other_run(any_model):
    batch, other = any_model.encode(["abcdef", "ghijkl"]), any_model.encode(["mnopqr", "stuvwx"])
    last = any_model.architecture.n_layers - 1
    sites = ["embed", "blocks.1.input", f"blocks.{last}.output", "final_norm", "logits"]
    with torch.no_grad(), capture(any_model, sites) as acts:
        expected = any_model(other)
        sources = dict(acts)
    for site in sites:
        with torch.no_grad(), edit(any_model, Interchange(site, sources[site])):
            assert torch.equal(any_model(batch), expected), site


def test_edits_compose_in_order_and_captures_see_them(model):
    batch = model.encode(TEXTS)
    vector = torch.arange(model.architecture.width) / 100.0
    site = "blocks.1.output"
    with torch.no_grad(), capture(model, [site]) as acts:
        model(batch)
        clean = acts[site]
        with edit(model, [Add(site, vector), Scale(site, 2.0)]):
            with edit(model, Add(site, -vector)):
                model(batch)
    real = batch.attention_mask_BT.bool()
    torch.testing.assert_close(acts[site][real], ((clean + vector) * 2.0 - vector)[real])
    assert torch.equal(acts[site][~real], clean[~real])  # padding is no token of any phase
    with torch.no_grad(), capture(model, [site, "blocks.2.input"]) as acts, edit(model, Set(site, 0.25)):
        model(batch)
    assert (acts[site][real] == 0.25).all()
    assert torch.equal(acts[site], acts["blocks.2.input"])


@pytest.mark.parametrize("site", ["blocks.2.output", "final_norm", "logits"])
def test_the_last_logits_alone_are_those_of_all_columns_under_any_edit(model, site):
    """Also where the site is behind the place at which transformers leaves the other columns out."""
    batch = model.encode(["The first text", "another, longer"], padding_side="right")
    vector = torch.linspace(-1, 1, model.architecture.site_width(site))
    with torch.no_grad(), edit(model, Add(site, vector, positions=[1, -1])), capture(model, [site]) as acts:
        logits_BTV = model(batch)
        seen_BTX = acts[site]
        few_BSV = model(batch, 3)
        assert torch.equal(acts[site], seen_BTX)
    torch.testing.assert_close(few_BSV, logits_BTV[:, -3:])


def test_embed_and_the_first_input_are_one_place(model):
    batch = model.encode(["abc"])
    with torch.no_grad(), capture(model, ["embed", "blocks.0.input"]) as acts:
        with edit(model, [Set("blocks.0.input", 1.0), Scale("embed", 3.0)]):
            model(batch)
    assert (acts["embed"] == 3.0).all()
    assert torch.equal(acts["embed"], acts["blocks.0.input"])


def test_captures_are_in_the_autograd_graph(model):
    batch = model.encode(["some text"])
    site = "blocks.0.neurons"
    with capture(model, [site]) as acts:
        logits_BTV = model(batch)
    (grad,) = torch.autograd.grad(logits_BTV[0, -1, 7], acts[site])
    step = torch.zeros_like(acts[site])
    step[0, 3, 5] = 1e-2
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            with edit(model, Interchange(site, acts[site] + sign * step)):
                values.append(model(batch)[0, -1, 7])
    assert grad[0, 3, 5].item() == pytest.approx(((values[0] - values[1]) / 2e-2).item(), rel=2e-2)
    assert model.hf.model.layers[0].mlp.down_proj.weight.grad is None


def test_gradients_reach_an_edit(model):
    batch = model.encode(["some text"])
    vector = torch.zeros(model.architecture.width, requires_grad=True)
    with edit(model, Add("blocks.1.output", vector, phase="prefill")):
        model(batch)[0, -1].logsumexp(-1).backward()
    assert vector.grad is not None
    assert vector.grad.abs().max() > 0
    model.hf.zero_grad()


def test_the_model_is_bit_identical_afterwards(any_model):
    batch = any_model.encode(TEXTS)
    with torch.no_grad():
        expected, before = any_model(batch), state(any_model)
        sites = any_model.architecture.sites()
        with capture(any_model, sites), edit(any_model, [Scale(site, 0.5) for site in sites]):
            any_model(batch)
            any_model.generate(batch, max_new_tokens=2)
        assert_same_state(before, state(any_model))
        assert torch.equal(any_model(batch), expected)


class Explodes(Add):
    def edited(self, x):
        raise RuntimeError("boom")


def test_an_exception_leaves_nothing_behind(model):
    batch = model.encode(TEXTS)
    vector = torch.ones(model.architecture.width)
    calls = []
    handle = model.hf.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        expected, before = model(batch), state(model)
        for action in (lambda: model(batch), lambda: model.generate(batch, max_new_tokens=3)):
            with pytest.raises(RuntimeError, match="boom"):
                with capture(model, ["logits"]), edit(model, Explodes("blocks.1.output", vector)):
                    action()
        assert model.active.captures == []
        assert model.active.edits == []
        assert_same_state(before, state(model))
        calls.clear()
        with capture(model, ["blocks.0.output"]):
            assert torch.equal(model(batch), expected)
    assert calls == [1]  # a user's own hook survives, and runs under a capture too
    handle.remove()


def test_a_copy_of_the_module_is_independent(model):
    batch = model.encode(TEXTS)
    twin = copy.deepcopy(model.hf)
    with torch.no_grad(), edit(model, Ablate("blocks.1.output")):
        got = twin(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
        ).logits
    with torch.no_grad():
        assert torch.equal(got, model(batch))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single_under_padding(any_model, side):
    vector = torch.randn(any_model.architecture.width, generator=torch.Generator().manual_seed(0))
    edits = [
        Add("blocks.0.output", vector, phase="prefill", positions=[0, 2, -1]),
        Ablate("blocks.1.neurons", indices=[1, 5]),
    ]
    sites = ["blocks.1.output", "blocks.2.q", "logits"]
    batch = any_model.encode(TEXTS, padding_side=side)
    with torch.no_grad(), edit(any_model, edits), capture(any_model, sites) as acts:
        any_model(batch)
        together = dict(acts)
        for row, text in enumerate(TEXTS):
            any_model(any_model.encode([text]))
            for site in sites:
                real = batch.attention_mask_BT[row].bool()
                torch.testing.assert_close(together[site][row, real], acts[site][0], atol=2e-5, rtol=1e-4)


def test_named_positions_count_without_padding(model):
    batch = model.encode(TEXTS, padding_side="left")
    edits = Set("blocks.1.output", 9.0, positions=[0, -1])
    with torch.no_grad(), capture(model, ["blocks.1.output"]) as acts, edit(model, edits):
        model(batch)
    edited = (acts["blocks.1.output"] == 9.0).all(-1)
    first = batch.attention_mask_BT.argmax(1)
    expected = torch.zeros_like(edited)
    expected[torch.arange(2), first] = True
    expected[:, -1] = True
    assert torch.equal(edited, expected)


def test_bad_input_is_refused_before_anything_runs(model):
    with pytest.raises(SiteError, match="Did you mean"), capture(model, ["blocks.1.outputs"]):
        pass
    with pytest.raises(InterventionError, match="size 3"), edit(model, Add("blocks.1.output", torch.ones(3))):
        pass
    with (
        pytest.raises(InterventionError, match="beyond"),
        edit(model, Ablate("blocks.1.neurons", indices=[96])),
    ):
        pass
    with capture(model, ["logits"]) as acts, pytest.raises(UserError, match="not been captured yet"):
        acts["logits"]
    with pytest.raises(KeyError, match="captured are logits"):
        acts["embed"]
    source = torch.zeros(1, 2, model.architecture.width)
    with pytest.raises(InterventionError, match="2 tokens"), edit(model, Interchange("embed", source)):
        model(model.encode(["abcdef"]))
