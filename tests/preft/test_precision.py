"""Types that vLLM's GPU operators cannot take are refused before an engine or a training starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preft import pipeline
from preft.adapters import AdapterError
from preft.pipeline import AdapterServingConfig, run_pipeline
from preft.vllm import runner
from preft.vllm.precision import check_precision
from shared.models import ModelConfig, load
from shared.runs import start_run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_served_everywhere(dtype: torch.dtype) -> None:
    for device in ("cuda", "cpu"):
        check_precision(dtype, dtype, device)


def test_a_cpu_takes_float32() -> None:
    check_precision(torch.float32, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),  # the activations stay float32
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_gpu_does_not_take_what_its_kernels_assert_against(model: torch.dtype, lora: torch.dtype) -> None:
    with pytest.raises(AdapterError, match=r"Set model\.dtype=bfloat16 \(vllm serve: --dtype bfloat16\)"):
        check_precision(model, lora, "cuda")


@pytest.mark.usefixtures("plugin")
def test_the_engine_asks_before_it_makes_room_for_adapters() -> None:
    made: list[Any] = []

    def with_room(_: Any, model: torch.nn.Module, *arguments: Any) -> torch.nn.Module:
        made.append(arguments)
        return model

    load = runner.load_lora_model(with_room)
    lora_config = SimpleNamespace(lora_dtype=torch.float32, target_modules=[])
    config = SimpleNamespace(
        lora_config=lora_config, model_config=SimpleNamespace(dtype=torch.float32), quant_config=None
    )
    load(SimpleNamespace(), torch.nn.Module(), config, torch.device("cpu"))
    assert len(made) == 1
    with pytest.raises(AdapterError, match="the model is in float32"):
        load(SimpleNamespace(), torch.nn.Module(), config, torch.device("cuda"))
    assert len(made) == 1


def test_the_pipeline_asks_before_it_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = load(ModelConfig("random:llama", device="cpu"))  # before: transformers remembers the first answer
    monkeypatch.setattr(pipeline, "load", lambda _: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def train(*_: Any) -> None:
        pytest.fail("trained before the check")

    monkeypatch.setattr(pipeline, "train_users", train)
    with (
        pytest.raises(AdapterError, match=r"model\.dtype=bfloat16"),
        start_run(tmp_path / "run", AdapterServingConfig()) as run,
    ):
        run_pipeline(AdapterServingConfig(), ModelConfig("random:llama", device="cpu"), run)


@pytest.mark.parametrize("key", ["dtype", "lora_dtype"])
def test_the_engine_has_no_precision_of_its_own(key: str) -> None:
    with pytest.raises(AdapterError, match=rf"engine\.{key}: .* set model\.dtype"):
        AdapterServingConfig(engine={key: "bfloat16"})
