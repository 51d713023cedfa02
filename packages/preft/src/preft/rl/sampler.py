"""Where rollouts come from: Hugging Face under the adapter, or a running vLLM that gets every update from memory.

Both speak the protocol of `shared.generation` (requests with their own seeds in, completions with log-probabilities of
the model itself out) and add `update(adapter)`: from then on requests are sampled under the adapter as it is now.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from preft.adapters import Adapter
from preft.rl.prefix import SharedPrompts
from shared.decoding import choose
from shared.generation import Completion, Request, Sampling
from shared.generation.prompts import prompt_ids
from shared.generation.requests import Draw, EngineBase
from shared.generation.text import decode_new
from shared.models import Model

if TYPE_CHECKING:
    from shared.generation.vllm_engine import VLLMGenerator

POLICY = "policy"


@runtime_checkable
class Sampler(Protocol):
    """A generator whose adapter can be exchanged."""

    def update(self, adapter: Adapter) -> None:
        """Sample under this adapter, as it is now, from the next request on."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests`: one list a request, of `sampling.n` completions with their log-probabilities."""
        ...


class HFSampler(EngineBase):
    """Sampling in Hugging Face; the adapted prompt of the samples of a request is computed once.

    `batch_prompts` requests are sampled together.
    """

    def __init__(self, model: Model, batch_prompts: int = 8) -> None:
        self.model, self.batch_prompts = model, batch_prompts
        self.adapter: Adapter | None = None

    def update(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @torch.no_grad()
    def _complete(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        size = self.batch_prompts * sampling.n
        batches = [draws[start : start + size] for start in range(0, len(draws), size)]
        return [completion for batch in batches for completion in self._sample(batch, sampling)]

    def _sample(self, draws: list[Draw], sampling: Sampling) -> list[Completion]:
        tokenizer = self.model.tokenizer
        prompts = [prompt_ids(tokenizer, draw.request.prompt) for draw in draws[:: sampling.n]]
        pad_id = tokenizer.pad_token_id or 0
        shared = SharedPrompts(self.model.hf, self.adapter, prompts, sampling.n, pad_id)
        generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]
        stops = torch.tensor(sorted(self.model.eos_token_ids), device=self.model.device)
        logits_SV = shared.prompt_logits_SV
        alive_S = torch.ones(len(draws), dtype=torch.bool, device=self.model.device)
        tokens: list[list[int]] = [[] for _ in draws]
        logprobs: list[list[float]] = [[] for _ in draws]
        for step in range(sampling.max_tokens):
            chosen_S, logprobs_S = choose(logits_SV, sampling.temperature, sampling.top_p, generators)
            for row in alive_S.nonzero()[:, 0].tolist():
                tokens[row].append(int(chosen_S[row]))
                logprobs[row].append(float(logprobs_S[row]))
            alive_S = alive_S & ~torch.isin(chosen_S, stops)
            if not alive_S.any() or step + 1 == sampling.max_tokens:
                break
            # Rows that have ended go on as real tokens nobody looks at: padding is for the right end only.
            logits_SV = shared.read(chosen_S[:, None], torch.ones_like(alive_S)[:, None])[:, -1]
        ended = alive_S.logical_not().tolist()
        return [
            self._completion(prompts[i // sampling.n], tokens[i], logprobs[i], ended[i])
            for i in range(len(draws))
        ]

    def _completion(
        self, prompt: list[int], tokens: list[int], logprobs: list[float], ended: bool
    ) -> Completion:
        shown = tokens[:-1] if ended else tokens
        text = decode_new(self.model.tokenizer, prompt, shown).text
        return Completion(text, tokens, logprobs, "stop" if ended else "length")


class VLLMSampler:
    """Sampling in a running vLLM (`VLLMGenerator` with `enable_lora=True`); an update is a push from memory.

    The policy is pinned, so that other adapters of the engine do not evict it during a rollout.
    """

    def __init__(self, generator: "VLLMGenerator") -> None:
        self.generator = generator

    def update(self, adapter: Adapter) -> None:
        from preft.vllm.memory import push

        self.generator.use_adapter(POLICY, push(self.generator.llm, POLICY, adapter, pin=True))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return self.generator.generate([replace(r, adapter=POLICY) for r in requests], sampling)
