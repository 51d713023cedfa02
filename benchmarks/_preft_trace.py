"""Request traces of the serving benchmark: random ones, and JSONL files of the kinds `vllm bench serve` replays.

A line of a file is either of its timed traces ({"timestamp": seconds, "input_length": n, "output_length": n,
"hash_ids": [...]}, equal hashes meaning equal blocks of 16 tokens; without hash_ids the prompt is random) or of its
custom data sets ({"prompt": text or token ids, "output_tokens": n}). Models here have random weights and no tokenizer,
so a text becomes one token a UTF-8 byte: its length, not its meaning, is what the trace keeps.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from shared.errors import UserError

Popularity = Literal["distinct", "uniform", "zipf"]
HASH_BLOCK = 16  # tokens a hash of a timed trace stands for, as in vLLM's reader
ZIPF_EXPONENT = 1.1


class Item(NamedTuple):
    """One request of a trace: prompt, tokens to generate, which adapter of the arm, seconds after the start."""

    prompt: list[int]
    new_tokens: int
    adapter: int = 0
    at: float = 0.0


def random_trace(
    requests: int, prompt_tokens: int, new_tokens: int, adapters: Sequence[int], vocabulary: int, seed: int
) -> list[Item]:
    """Requests that all arrive at once, with random prompts of one length; request i uses `adapters[i]`."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, vocabulary, size=(requests, prompt_tokens)).tolist()
    return [Item(prompt, new_tokens, adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]


def popularity(kind: Popularity, requests: int, adapters: int, turn: int, seed: int = 0) -> list[int]:
    """The adapter of every request: all in turn (going on where the last `turn` ended), or drawn."""
    if kind == "distinct":
        return [(turn * requests + i) % adapters for i in range(requests)]
    rng = np.random.default_rng([seed, turn])
    weights = np.ones(adapters) if kind == "uniform" else np.arange(1, adapters + 1) ** -ZIPF_EXPONENT
    return rng.choice(adapters, size=requests, p=weights / weights.sum()).tolist()


def read_trace(path: Path, vocabulary: int, seed: int = 0) -> list[Item]:
    """The requests of a JSONL file, by arrival; UserError names the line that is neither kind."""
    rng = np.random.default_rng(seed)
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            items.append(_item(json.loads(line), vocabulary, rng))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}: neither a timed trace (timestamp, input_length, output_length) nor a custom "
                f"data set (prompt, output_tokens) of vLLM: {error!r}"
            ) from error
    if not items:
        raise UserError(f"{path} holds no request")
    return sorted(items, key=lambda item: item.at)


def _item(row: dict, vocabulary: int, rng: np.random.Generator) -> Item:
    if "prompt" in row:
        prompt = list(row["prompt"].encode()) if isinstance(row["prompt"], str) else row["prompt"]
        ids, new_tokens, at = [2 + token % (vocabulary - 2) for token in prompt], row["output_tokens"], 0.0
    else:
        ids = _hashed(row.get("hash_ids"), row["input_length"], vocabulary, rng)
        new_tokens, at = row["output_length"], row["timestamp"]
    if not ids or int(new_tokens) < 1:
        raise ValueError("prompt and output must hold at least one token")
    return Item(ids, int(new_tokens), at=float(at))


def _hashed(hashes: list[int] | None, length: int, vocabulary: int, rng: np.random.Generator) -> list[int]:
    if hashes is None:
        return rng.integers(2, vocabulary, size=length).tolist()
    blocks = [np.random.default_rng(h).integers(2, vocabulary, size=HASH_BLOCK).tolist() for h in hashes]
    tokens = [token for block in blocks for token in block][:length]
    if len(tokens) < length:
        raise ValueError(f"{len(hashes)} hash_ids cover {len(tokens)} of {length} tokens")
    return tokens
