"""Elicitation of nine scores a second: vLLM against a loop of Hugging Face's own `generate` in batches of 8.

vLLM runs once as one engine in this process and once as replicas, each in a process with its share of the cores or
GPUs (`VLLMReplicas`); `vllm_over_hf` is the replicas' ratio, `one_engine_over_hf` the other.
Every round runs all sides one after the other on messages that no side has seen, through the same `elicit`: prompts,
generation, parsing and the answer file. A first round warms up and is not counted. The baseline is what a script with
transformers does: sort by length, pad on the left, `generate` greedily, eight messages at a time. Sides must read the
same scores from at least 98% of the messages (a near tie may fall either way), or the comparison is void.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from assumptions.chats import Chat
from assumptions.dimensions import NAMES
from assumptions.elicitation import Elicitation, ElicitationSettings, elicit
from assumptions.instruments import instrument
from assumptions.sources import load_messages
from shared.generation import (
    Completion,
    Generator,
    HFGenerator,
    Request,
    Sampling,
    VLLMGenerator,
    VLLMReplicas,
)
from shared.generation.prompts import prompt_ids
from shared.generation.text import decode_new
from shared.models import Model, load
from shared.stats import bootstrap_interval

CLAIM = "Elicited messages a second, greedy, float32, nine scores: vLLM over a Hugging Face loop of batch 8."
KEYS = ("vllm_over_hf",)
SETTINGS = ElicitationSettings(guided=False, max_tokens=96, batch_size=512)
BATCH = 8


class TransformersLoop:
    """The baseline: `generate` of transformers over batches of 8 prompts of like length, padded on the left."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete `requests` greedily."""
        prompts = [prompt_ids(self.model.tokenizer, request.prompt) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers: dict[int, list[Completion]] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            new = self._batch([prompts[i] for i in chosen], sampling.max_tokens)
            for i, tokens in zip(chosen, new, strict=True):
                text = decode_new(self.model.tokenizer, prompts[i], tokens).text
                answers[i] = [Completion(text, tokens, [], "stop")]
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        pad = self.model.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.hf.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad
        )
        return [row[width:].tolist() for row in out]

    def close(self) -> None:
        """Nothing is held."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--messages", type=int, default=192, help="messages a side and round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--replicas", type=int, default=2, help="vLLM processes that share the machine")
    parser.add_argument(
        "--elicited-model", default="tinyworld", help="a folder or Hugging Face id, or tinyworld"
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every side in every round, and the ratio of vLLM to the loop with its interval over rounds."""
    model = load(arguments.elicited_model)
    asked = instrument("tinyworld_nine" if arguments.elicited_model == "tinyworld" else "nine_scores")
    per_round = arguments.messages
    chats = load_messages("tinyworld", per_round * (arguments.rounds + 1), seed=3, columns={}).chats
    rounds = []
    with (
        VLLMGenerator(arguments.elicited_model) as vllm,
        VLLMReplicas(arguments.elicited_model, arguments.replicas) as replicas,
        tempfile.TemporaryDirectory() as folder,
    ):
        sides: dict[str, Generator] = {
            "transformers_generate_batch_8": TransformersLoop(model),
            "hf_generator_batch_8": HFGenerator(model, batch_size=BATCH),
            "vllm": vllm,
            "vllm_replicas": replicas,
        }
        for number in range(arguments.rounds + 1):
            part = chats[number * per_round : (number + 1) * per_round]
            seconds = {}
            read: dict[str, Elicitation] = {}
            for name, generator in sides.items():
                path = Path(folder) / f"{number}-{name}.jsonl"
                start = time.perf_counter()
                read[name] = elicit(generator, asked, part, path, SETTINGS, model=name)
                seconds[name] = time.perf_counter() - start
            _check_equal(read, part)
            rounds.append(seconds)
            print(f"round {number}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()), flush=True)
    counted = rounds[1:]
    measured = {"seconds": counted, "messages": per_round}
    for key, side in (("vllm_over_hf", "vllm_replicas"), ("one_engine_over_hf", "vllm")):
        ratios = [one["transformers_generate_batch_8"] / one[side] for one in counted]
        interval = bootstrap_interval(ratios, statistic=_median)
        measured |= {key: statistics.median(ratios), f"{key}_interval": [interval.low, interval.high]}
    return measured


def _median(values: Any) -> Any:
    import numpy as np

    return np.median(values, axis=-1)


def _check_equal(read: dict[str, Elicitation], chats: Sequence[Chat]) -> None:
    """SystemExit when the sides read different scores from more than 2% of the messages."""
    ids = [chat.id for chat in chats]
    tables = {name: result.scores(ids, NAMES) for name, result in read.items()}
    reference = tables["vllm"]
    for name, table in tables.items():
        equal = ((table == reference) | ((table != table) & (reference != reference))).all(axis=1).mean()
        if equal < 0.98:
            raise SystemExit(f"{name} and vllm read equal scores from {equal:.0%} of the messages only")


def table(measured: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a side: median messages a second, and the times of the loop of batch 8."""
    rows = []
    for name in measured["seconds"][0]:
        speeds = [measured["messages"] / one[name] for one in measured["seconds"]]
        times = [one["transformers_generate_batch_8"] / one[name] for one in measured["seconds"]]
        rows.append(
            {
                "side": name,
                "messages/s (median)": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "times the loop of batch 8 (median)": statistics.median(times),
            }
        )
    return rows
