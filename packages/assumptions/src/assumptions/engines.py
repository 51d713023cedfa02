"""Engines that answer under edits: Hugging Face in this process, and vLLM serving one adapter a condition.

For vLLM the edits of every condition are saved as interventions (`shared.interventions`), and each request names the
condition it runs under, so requests of different conditions share a batch. Serving such folders needs a plugin in
vLLM that reads them; the one in this repository does. Greedy replies are those of Hugging Face; sampled ones draw from
other random numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assumptions.conditions import Condition
from shared.generation import (
    Completion,
    Generator,
    HFGenerator,
    Request,
    Sampling,
    VLLMGenerator,
    VLLMReplicas,
)
from shared.interventions import save_interventions
from shared.models import Model


@dataclass(frozen=True)
class HFEngine:
    """The model in this process, `batch_size` rows at a time."""

    model: Model
    batch_size: int = 64

    def complete(
        self, condition: Condition, requests: Sequence[Request], acts: Sequence[bool], sampling: Sampling
    ) -> list[list[Completion]]:
        """Complete the requests in order, with the condition's edits on those where `acts` holds."""
        answers: list[list[Completion]] = [[] for _ in requests]
        for edited in (True, False):
            rows = [i for i, acting in enumerate(acts) if acting is edited]
            edits = condition.edits if edited else ()
            generator = HFGenerator(self.model, edits, batch_size=self.batch_size)
            found = generator.generate([requests[i] for i in rows], sampling)
            for i, completions in zip(rows, found, strict=True):
                answers[i] = completions
        return answers


@dataclass(frozen=True)
class ServedEngine:
    """A generator that serves every condition's edits as an adapter under the condition's key."""

    generator: Generator

    def complete(
        self, condition: Condition, requests: Sequence[Request], acts: Sequence[bool], sampling: Sampling
    ) -> list[list[Completion]]:
        """Complete the requests in order, with the condition's edits on those where `acts` holds."""
        named = [
            replace(request, adapter=condition.key) if acting else request
            for request, acting in zip(requests, acts, strict=True)
        ]
        return self.generator.generate(named, sampling)


@contextmanager
def served(
    model: Model, conditions: Sequence[Condition], folder: Path, replicas: int = 1, **engine: Any
) -> Iterator[ServedEngine]:
    """Save the edits of every condition under `folder` and serve them on vLLM, one adapter each."""
    adapters = {
        condition.key: save_interventions(folder / condition.key, condition.edits, model)
        for condition in conditions
        if condition.edits
    }
    with _vllm(model, replicas, adapters=adapters, **engine) as generator:
        yield ServedEngine(generator)


def start_engine(engine: str, model: Model, replicas: int = 1) -> Generator:
    """The engine "hf" or "vllm" without edits; vLLM in `replicas` processes."""
    return _vllm(model, replicas) if engine == "vllm" else HFGenerator(model)


def _vllm(model: Model, replicas: int, **engine: Any) -> VLLMGenerator | VLLMReplicas:
    if replicas == 1:
        return VLLMGenerator(model.config, **engine)
    return VLLMReplicas(model.config, replicas, **engine)
