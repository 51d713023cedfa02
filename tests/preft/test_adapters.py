"""Adapters on the masked forward: exact no-op when fresh, right tokens, no trace left, invariant to padding."""

from dataclasses import replace

import pytest
import torch
from preft_cases import CONFIGS, prompt, stir

from preft.adapters import Adapter, AdapterConfig, AdapterError, orthonormal_rows, target_paths
from preft.forward import masked_logits, masked_loss
from preft.reference import greedy_reference
from shared.models import Model, ModelConfig, load
from shared.random_models import random_model
from shared.tokens import Phase, TokenBatch, TrainingRow, collate, pack, pad

METHODS = [AdapterConfig(rank=4), AdapterConfig("direft", rank=4), AdapterConfig("loreft", rank=4)]


def batch_of(lengths: list[tuple[int, int]], side: str = "right") -> TokenBatch:
    """Rows of (prompt, total) tokens."""
    rows = [prompt(total, i) for i, (_, total) in enumerate(lengths)]
    return pad(rows, [n for n, _ in lengths], 0, side)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_a_fresh_adapter_changes_no_bit(model: Model, config: AdapterConfig, phase: Phase) -> None:
    batch = batch_of([(5, 9), (3, 12)])
    adapter = Adapter.create(model.hf, replace(config, phase=phase), seed=3)
    assert torch.equal(masked_logits(model.hf, adapter, batch), masked_logits(model.hf, None, batch))


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_equations_of_the_paper(model: Model, config: AdapterConfig) -> None:
    adapter = stir(Adapter.create(model.hf, config), seed=1)
    path, delta = next(adapter.parts())
    if config.method == "lora":
        x = torch.randn(3, delta.A_RI.shape[1])
        expected = torch.stack([config.scale * delta.B_OR @ (delta.A_RI @ row) for row in x])
    else:
        x = torch.randn(3, model.architecture.width)
        inner = delta.W_RD if config.method == "direft" else delta.W_RD - delta.R_RD
        expected = torch.stack([delta.R_RD.T @ (inner @ row + delta.b_R) for row in x])
        torch.testing.assert_close(delta.R_RD @ delta.R_RD.T, torch.eye(config.rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(delta(x), expected, atol=1e-5, rtol=1e-5)
    ones = torch.ones(3, 1)
    a, b = delta.factors()  # as served: x -> s B A x, for ReFT on (h, 1)
    inputs = x if config.method == "lora" else torch.cat([x, ones], 1)
    torch.testing.assert_close(inputs @ a.T @ b.T * config.scale, expected, atol=1e-5, rtol=1e-5)
    assert path in target_paths(model.hf, config)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_only_tokens_of_the_phase_are_adapted(model: Model, adapters: dict[str, Adapter], name: str) -> None:
    """At the first adapted module, the output differs exactly where the mask is true."""
    adapter = adapters[name]
    batch = batch_of([(5, 9), (3, 12)], side="left")
    seen: list[torch.Tensor] = []
    module = model.hf.get_submodule(adapter.paths[0])
    mask_BT = batch.phase_mask(adapter.config.phase)

    def spy() -> None:
        with_spy = module.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone()))
        try:
            model.hf(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
        finally:
            with_spy.remove()

    spy()
    with adapter.applied(model.hf, mask_BT):
        spy()
    differs_BT = (seen[0] != seen[1]).any(-1)
    assert torch.equal(differs_BT, mask_BT)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_padding_and_batching_change_nothing(model: Model, adapters: dict[str, Adapter], name: str) -> None:
    lengths = [(5, 9), (3, 12), (1, 4)]
    singles = [batch_of(lengths).rows()[i] for i in range(3)]
    alone = [
        masked_logits(model.hf, adapters[name], pad([row], [n], 0))[0]
        for row, (n, _) in zip(singles, lengths, strict=True)
    ]
    for side in ("left", "right"):
        batch = batch_of(lengths, side)
        together = masked_logits(model.hf, adapters[name], batch)
        for row, expected in enumerate(alone):
            real = together[row][batch.attention_mask_BT[row].bool()]
            torch.testing.assert_close(real, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora_p_0", "reft_p_0", "lora_decode"])
def test_packing_changes_no_loss(model: Model, adapters: dict[str, Adapter], name: str) -> None:
    rows = []
    for i, (n, total) in enumerate([(5, 9), (3, 12), (2, 6)]):
        ids = list(prompt(total, i))
        rows.append(TrainingRow(ids, [-100] * n + ids[n:], n, [False] * total))
    padded = masked_loss(model.hf, adapters[name], collate(rows, 0))
    packed = masked_loss(model.hf, adapters[name], pack(rows, 0, max_length=32))
    assert packed.tokens == padded.tokens
    torch.testing.assert_close(packed.total, padded.total, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_cached_reference_equals_one_masked_forward(
    model: Model, adapters: dict[str, Adapter], name: str
) -> None:
    """Teacher forcing on the reference's own tokens, without cache, must predict them again."""
    ids = list(prompt(17, 2))
    tokens = greedy_reference(model.hf, adapters[name], ids, 10).tokens
    batch = pad([ids + tokens], [len(ids)], 0)
    predicted = masked_logits(model.hf, adapters[name], batch)[0, len(ids) - 1 : -1].argmax(-1)
    assert predicted.tolist() == tokens


def test_the_boundary_pair(model: Model, adapters: dict[str, Adapter]) -> None:
    """A decode-only adapter leaves generated token 0 to the base model; a prefill-only one computes it."""
    batch = pad([prompt(12)], [12], 0)
    base = masked_logits(model.hf, None, batch)[0, -1]
    assert torch.equal(masked_logits(model.hf, adapters["lora_decode"], batch)[0, -1], base)
    for name in ("lora_p_0", "reft_p_0", "lora_boundary"):
        assert not torch.allclose(masked_logits(model.hf, adapters[name], batch)[0, -1], base)


def test_nothing_stays_on_the_model_after_an_exception(model: Model, adapters: dict[str, Adapter]) -> None:
    batch = batch_of([(5, 9)])
    before = masked_logits(model.hf, None, batch)
    with pytest.raises(KeyError), adapters["lora_p_0"].applied(model.hf, batch.phase_mask(Phase.ALL)):
        raise KeyError
    assert torch.equal(masked_logits(model.hf, None, batch), before)
    assert not any(module._forward_hooks for module in model.hf.modules())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("config", METHODS[:2], ids=lambda config: config.method)
def test_other_families(family: str, config: AdapterConfig) -> None:
    hf, _ = random_model(family)
    hf = hf.eval()
    batch = batch_of([(5, 9)])
    fresh = Adapter.create(hf, config)
    base = masked_logits(hf, None, batch)
    assert torch.equal(masked_logits(hf, fresh, batch), base)
    assert not torch.allclose(masked_logits(hf, stir(fresh, 1), batch), base)


def test_retraction_restores_orthonormal_rows_and_leaves_them_be() -> None:
    rows = orthonormal_rows(torch.randn(4, 16))
    torch.testing.assert_close(orthonormal_rows(rows), rows, atol=1e-6, rtol=0)
    torch.testing.assert_close(orthonormal_rows(rows * 2.0), rows, atol=1e-6, rtol=0)


def test_wrong_configurations_are_refused(model: Model) -> None:
    with pytest.raises(AdapterError, match="rank must be at least 1"):
        AdapterConfig(rank=0)
    with pytest.raises(AdapterError, match="belong to lora"):
        AdapterConfig("direft", alpha=4.0)
    with pytest.raises(AdapterError, match=r"target_modules \['qproj'\] are not in this model"):
        Adapter.create(model.hf, AdapterConfig(target_modules=("qproj",)))
    with pytest.raises(AdapterError, match=r"layers \[9\] are not in this model"):
        Adapter.create(model.hf, AdapterConfig(layers=(9,)))
    with pytest.raises(AdapterError, match="does not fit a width"):
        Adapter.create(model.hf, AdapterConfig("direft", rank=1000))


def test_a_model_loaded_twice_takes_the_same_adapter(adapters: dict[str, Adapter], model: Model) -> None:
    again = load(ModelConfig("random:llama"))
    batch = batch_of([(5, 9)])
    for name in ("lora_p_0", "reft_p_1"):
        first = masked_logits(model.hf, adapters[name], batch)
        assert torch.equal(masked_logits(again.hf, adapters[name], batch), first)


def test_a_model_on_several_devices_is_refused() -> None:
    spread = random_model("llama")[0]
    spread.model.layers[1].to("meta")
    with pytest.raises(AdapterError, match="spread over cpu, meta; .* without device_map"):
        Adapter.create(spread, AdapterConfig())
