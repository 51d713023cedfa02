"""Configurations of adapters: the names and scales peft and vLLM would choose, and fresh ones that change nothing."""

import random
import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preft_cases import prompt, stir

from preft.adapters import Adapter, AdapterConfig, AdapterError, target_paths
from preft.forward import masked_logits
from shared.families import FAMILIES
from shared.models import Model
from shared.random_models import random_model
from shared.tokens import Phase, pad

DENSE = sorted(name for name, row in FAMILIES.items() if not row.experts)
EXPERTS = sorted(set(FAMILIES) - set(DENSE))


@cache
def tiny(family: str) -> Any:
    return random_model(family)[0].eval()


@cache
def linear_names(family: str) -> list[str]:
    paths = target_paths(tiny(family), AdapterConfig())
    return sorted({path.rpartition(".")[2] for path in paths})


def lora_config(family: str, indices: list[int], form: int, settings: dict[str, Any]) -> AdapterConfig:
    """A LoRA whose targets are some of the family's linear layers, in one of the forms that name them."""
    known = linear_names(family)
    names = sorted({known[i % len(known)] for i in indices})
    target = (None, "all-linear", tuple(names), rf".*\.({'|'.join(names)})")[form]
    if form == 3:
        settings = settings | {"layers": None}
    patterns = {"rank_pattern": {names[0]: 5}, "alpha_pattern": {rf".*{names[-1]}": 7.0}} if form % 2 else {}
    return AdapterConfig(target_modules=target, **patterns, **settings)


LAYERS = st.none() | st.lists(st.integers(0, 2), min_size=1, unique=True).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(DENSE),
    method=st.sampled_from(["lora", "direft", "loreft", "nodireft", "noreft"]),
    common=st.fixed_dictionaries(
        {"rank": st.integers(1, 12), "phase": st.sampled_from(list(Phase)), "layers": LAYERS}
    ),
    scale=st.fixed_dictionaries({"alpha": st.none() | st.floats(0.5, 64), "rslora": st.booleans()}),
    indices=st.lists(st.integers(0, 11), min_size=1),
    form=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_fresh_adapter_of_any_configuration_changes_no_bit(
    family: str, method: Any, common: Any, scale: Any, indices: list[int], form: int, seed: int
) -> None:
    if method == "lora":
        config = lora_config(family, indices, form, common | scale)
    else:
        first = 0 if common["layers"] is None else min(common["layers"])
        pattern = {rf"\w+\.{first}": 3} if form % 2 else {}
        config = AdapterConfig(method, rank_pattern=pattern, **common)
    hf = tiny(family)
    batch = pad([prompt(9), prompt(6, 1)], [5, 3], 0)
    adapter = Adapter.create(hf, config, seed)
    base = masked_logits(hf, None, batch)
    assert torch.equal(masked_logits(hf, adapter, batch), base)
    assert not torch.equal(masked_logits(hf, stir(adapter, seed), batch), base)


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts_are_adapted_in_attention_and_the_stream(family: str) -> None:
    batch, attention = pad([prompt(9), prompt(6, 1)], [5, 3], 0), ("q_proj", "k_proj", "v_proj", "o_proj")
    for config in (AdapterConfig(target_modules=attention), AdapterConfig("loreft")):
        hf = tiny(family)
        base, adapter = masked_logits(hf, None, batch), Adapter.create(hf, config)
        assert torch.equal(masked_logits(hf, adapter, batch), base)
        assert not torch.equal(masked_logits(hf, stir(adapter, 0), batch), base)
    with pytest.raises(AdapterError, match="'experts'.* not in this model"):
        Adapter.create(tiny(family), AdapterConfig(target_modules=("experts",)))
    if family == "qwen2_moe":
        with pytest.raises(AdapterError, match="shared_expert.* inside a mixture of experts.*o_proj"):
            Adapter.create(tiny(family), AdapterConfig())


@pytest.mark.parametrize("family", DENSE)
def test_all_linear_means_what_it_means_in_peft(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    ours = target_paths(tiny(family), AdapterConfig())
    theirs = get_peft_model(
        random_model(family)[0], LoraConfig(r=1, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    )
    assert ours == theirs.base_model.targeted_module_names
    shuffled = random.Random(0).sample(ours, len(ours))
    assert target_paths(tiny(family), AdapterConfig(target_modules=tuple(shuffled))) == ours


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "at least 1 and whole, not 0"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1 and whole, not 0"),
        ({"rank_pattern": {"q_(proj": 2}}, "is no regular expression"),
        ({"target_modules": "q_(proj"}, "is no regular expression"),
        ({"target_modules": ".*q_proj", "layers": (0,)}, "exclude each other"),
        ({"method": "direft", "alpha_pattern": {"q_proj": 2.0}}, "belong to lora"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        AdapterConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "q_proj"}, "no linear layer (a single name is given as a list) of this model"),
        (
            {"target_modules": ("q_proj", "c_attn")},
            "target_modules ['c_attn'] are not in this model; it has down",
        ),
        (
            {"target_modules": ("q_proj",), "rank_pattern": {"v_proj": 2}},
            "rank_pattern ['v_proj'] match none",
        ),
        ({"alpha_pattern": {"proj": 2.0}}, "alpha_pattern ['proj'] match none"),
        ({"layers": ()}, "layers must name blocks once each"),
        ({"layers": (1, 1)}, "layers must name blocks once each"),
    ],
)
def test_places_that_the_model_lacks_are_refused(
    model: Model, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        Adapter.create(model.hf, AdapterConfig(**settings))
