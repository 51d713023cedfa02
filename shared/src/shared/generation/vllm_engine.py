"""Completions from vLLM in this process: continuous batching, paged keys and values, adapters, JSON schemas.

Prompts are turned into token ids by the same functions as for Hugging Face, so both engines read the same ids; each
draw carries its own seed. A JSON schema is enforced through a grammar (`shared.generation.json_grammar`).
"""

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.generation.process_state import (
    ProcessState,
    model_classes_kept,
    random_state_kept,
    third_party_warnings_ignored,
)
from shared.generation.prompts import check_lengths, prompt_ids
from shared.generation.requests import Completion, Draw, EngineBase, Sampling
from shared.generation.vllm_arguments import (
    adapter_arguments,
    completion,
    model_arguments,
    platform_arguments,
    sampling_params,
)
from shared.models import ModelConfig

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


class VLLMGenerator(EngineBase):
    """vLLM over the model of `config`; `engine` holds further arguments of `vllm.LLM` and wins over the defaults.

    `adapters` maps the names requests use to folders with an adapter_config.json. Without a GPU the engine runs
    eagerly and in this process, with 1 GiB for keys and values unless VLLM_CPU_KVCACHE_SPACE or
    `kv_cache_memory_bytes` says otherwise. Several can be open at once; what they hold is freed when the last closes.
    """

    def __init__(
        self, config: ModelConfig | str, *, adapters: Mapping[str, str | Path] | None = None, **engine: Any
    ) -> None:
        config = ModelConfig(name=config) if isinstance(config, str) else config
        folders = {name: Path(folder).resolve() for name, folder in (adapters or {}).items()}
        on_gpu = _gpu_is_there()
        defaults = platform_arguments(on_gpu) | adapter_arguments(folders, on_gpu)
        self._llm: LLM | None = None
        self._cleanup = ExitStack()
        try:
            scratch = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="innerworks-"))
            with random_state_kept():
                arguments = model_arguments(config, Path(scratch)) | defaults | engine
                _import_vllm(on_gpu)
                self._acquire()
                self._llm = _build(arguments)
        except BaseException:
            self.close()
            raise
        self._loras = _lora_requests(folders)
        self.tokenizer = self._llm.get_tokenizer()

    @property
    def llm(self) -> "LLM":
        """The engine itself; UserError once closed."""
        if self._llm is None:
            raise UserError("this VLLMGenerator is closed: build a new one")
        return self._llm

    def use_adapter(self, name: str, lora_request: "LoRARequest") -> None:
        """From now on requests that name this adapter carry `lora_request`, as for one loaded into a running engine.

        The engine must have been started for adapters (`enable_lora=True`, which `adapters` implies).
        """
        self._loras[name] = lora_request

    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        llm = self.llm
        loras: Any = [self._lora(draw.request.adapter) for draw in draws]
        prompts: Any = [
            {"prompt_token_ids": prompt_ids(self.tokenizer, draw.request.prompt)} for draw in draws
        ]
        check_lengths([len(p["prompt_token_ids"]) for p in prompts], llm.model_config.max_model_len)
        params = [sampling_params(draw, sampling) for draw in draws]
        with third_party_warnings_ignored():
            try:
                outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
            except ValueError as error:  # a verdict on the request, say a schema that no grammar can express
                raise UserError(f"vLLM refused a request: {error}") from error
        return [completion(output, sampling.logprobs or 0) for output in outputs]

    def _lora(self, name: str | None) -> "LoRARequest | None":
        if name is None:
            return None
        if name not in self._loras:
            known = ", ".join(self._loras) or "none"
            raise UserError(
                f"no adapter named {name!r} (given at construction: {known}); pass adapters={{name: folder}}"
            )
        return self._loras[name]

    def close(self) -> None:
        """Shut the engine down and put the process back as it was; harmless when repeated."""
        self._cleanup.close()

    def _acquire(self) -> None:
        ProcessState.acquire()
        self._cleanup.callback(self._release)

    def _release(self) -> None:
        shutdown = None if self._llm is None else self._llm.llm_engine.engine_core.shutdown
        self._llm = None
        ProcessState.release(shutdown)


def _lora_requests(folders: Mapping[str, Path]) -> "dict[str, LoRARequest]":
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(name, i, str(folder)) for i, (name, folder) in enumerate(folders.items(), 1)}


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def _import_vllm(on_gpu: bool) -> None:
    """Import vLLM quietly; without a GPU, with the engine in this process. Variables already set are left alone."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not on_gpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with third_party_warnings_ignored():
        from vllm import LLM  # noqa: F401


def _build(arguments: dict[str, Any]) -> "LLM":
    with third_party_warnings_ignored():
        from vllm import LLM

        with model_classes_kept() if arguments.get("enforce_eager") else nullcontext():
            return LLM(**arguments)
