"""One protocol over Hugging Face in process, vLLM in process and any OpenAI-compatible server.

    with VLLMGenerator("tinyworld") as generator:
        [[answer]] = generator.generate([Request("The dogs")], Sampling(max_tokens=8))

A sample is a function of prompt, sampling and seed: it does not depend on the batch it is in.
"""

from shared.generation.hf import HFGenerator
from shared.generation.openai_server import OpenAIGenerator
from shared.generation.replicas import VLLMReplicas
from shared.generation.requests import Completion, Generator, PartFailedError, Request, Sampling
from shared.generation.streaming import Piece, stream
from shared.generation.vllm_engine import VLLMGenerator

__all__ = [
    "Completion",
    "Generator",
    "HFGenerator",
    "OpenAIGenerator",
    "PartFailedError",
    "Piece",
    "Request",
    "Sampling",
    "VLLMGenerator",
    "VLLMReplicas",
    "stream",
]
