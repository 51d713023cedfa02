"""Tokens a second of TinyWorld: the Hugging Face loop, in batches and one request at a time, against vLLM.

Every round runs all sides, one after the other, on the same requests; a first round warms up and is not counted. The
sides must give the same tokens, or the comparison is void. Prefix caching is off: rounds repeat the same prompts.

    python benchmarks/generation.py [--requests 32] [--rounds 3]
"""

import argparse
import statistics
import time
from typing import Any

from _results import write_results

from shared.generation import Completion, Generator, HFGenerator, Request, Sampling, VLLMGenerator
from shared.models import load
from shared.tinyworld.social import instrument, sample_turns

CLAIM = "vLLM in process against Hugging Face, greedy, float32: generated tokens a second, equal tokens on all sides."


def main() -> None:
    """Measure, check that the tokens agree, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    turns = sample_turns(arguments.requests, seed=0, split="test")
    requests = [Request([{"role": "user", "content": instrument(turn.text)}]) for turn in turns]
    sampling = Sampling(max_tokens=arguments.max_tokens, logprobs=None)
    model = load("tinyworld")
    with VLLMGenerator("tinyworld", enable_prefix_caching=False) as vllm:
        sides: dict[str, Generator] = {
            "hf_one_at_a_time": HFGenerator(model, batch_size=1),
            "hf_batches_of_32": HFGenerator(model, batch_size=32),
            "vllm": vllm,
        }
        rounds = [measure(sides, requests, sampling) for _ in range(arguments.rounds + 1)][1:]
    page = write_results("generation", CLAIM, table(rounds), vars(arguments) | {"model": "tinyworld"}, rounds)
    print(page.read_text())


def measure(
    sides: dict[str, Generator], requests: list[Request], sampling: Sampling
) -> dict[str, dict[str, Any]]:
    """One round: seconds and generated tokens of every side; SystemExit when their tokens differ."""
    answers: dict[str, list[list[Completion]]] = {}
    result = {}
    for name, generator in sides.items():
        start = time.perf_counter()
        answers[name] = generator.generate(requests, sampling)
        seconds = time.perf_counter() - start
        tokens = sum(len(answer.token_ids) for [answer] in answers[name])
        result[name] = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    reference = [answer.token_ids for [answer] in answers["vllm"]]
    for name, completions in answers.items():
        if [answer.token_ids for [answer] in completions] != reference:
            raise SystemExit(f"{name} and vllm gave different tokens: their speeds cannot be compared")
    return result


def table(rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a side: median and range of its speed, and of its ratio to Hugging Face in batches, round by round."""
    rows = []
    for name in rounds[0]:
        speeds = [measured[name]["tokens_per_second"] for measured in rounds]
        ratios = [
            measured[name]["tokens_per_second"] / measured["hf_batches_of_32"]["tokens_per_second"]
            for measured in rounds
        ]
        rows.append(
            {
                "side": name,
                "tokens/s (median)": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "times HF in batches (median)": statistics.median(ratios),
                "tokens a round": rounds[0][name]["tokens"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
