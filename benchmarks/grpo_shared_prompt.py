"""What reading the prompt once is worth in a GRPO step: forward and backward pass of one group of samples.

Two sides compute the same log-probabilities and gradients: one row a sample, and one prompt with its samples over its
keys and values. Both run in every round, interleaved; the ratio is of the same round. Unequal gradients void the run.

    python benchmarks/grpo_shared_prompt.py [--prompt 512 --completion 256 --samples 8 --rounds 5]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from _preft_models import SHAPES
from _results import write_results

from preft.adapters import Adapter, AdapterConfig
from preft.rl.logprobs import Group, completion_logprobs
from shared.tokens import Phase

CLAIM = (
    "GRPO on a shared prompt against one row a sample: seconds of a forward and a backward pass through the adapter, "
    "equal gradients. `plain_over_shared` is the speed-up of a round."
)
ADAPTERS = {
    "LoRA-P": AdapterConfig(rank=8),
    "LoRA, all tokens": AdapterConfig(rank=8, phase=Phase.ALL),
    "DiReFT-P": AdapterConfig("direft", rank=8),
}


def main() -> None:
    """Measure, check that the gradients agree, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    hf = random_llama()
    group = random_group(arguments.prompt, arguments.completion, arguments.samples)
    rows, raw = [], {}
    for name, config in ADAPTERS.items():
        adapter = random_adapter(hf, config)
        rounds = [one_round(hf, adapter, group) for _ in range(arguments.rounds + 1)][
            1:
        ]  # the first warms up
        raw[name] = rounds
        ratios = [plain / shared for plain, shared in rounds]
        rows.append(
            {
                "adapter": name,
                "plain_s": statistics.median(plain for plain, _ in rounds),
                "shared_s": statistics.median(shared for _, shared in rounds),
                "plain_over_shared": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    settings = vars(arguments) | {
        "model": "random Llama, 25M parameters, float32",
        "threads": torch.get_num_threads(),
    }
    print(write_results("grpo_shared_prompt", CLAIM, rows, settings, raw).read_text())


def random_llama() -> Any:
    """The serving benchmark's model of 25M parameters, frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["25m"].config))
    return hf.eval().requires_grad_(False)


def random_adapter(hf: Any, config: AdapterConfig) -> Adapter:
    """An adapter with no factor zero."""
    adapter = Adapter.create(hf, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    adapter.retract_()
    return adapter


def random_group(prompt: int, completion: int, samples: int) -> Group:
    """One prompt and its samples, all completions of one length."""
    tokens = torch.randint(2, SHAPES["25m"].config["vocab_size"], (prompt + samples * completion,)).tolist()
    rest = tokens[prompt:]
    return Group(tokens[:prompt], [rest[i * completion : (i + 1) * completion] for i in range(samples)])


def one_round(hf: Any, adapter: Adapter, group: Group) -> tuple[float, float]:
    """Seconds of the plain and of the shared side; SystemExit when their gradients differ."""
    seconds, gradients = [], []
    for share in (False, True):
        start = time.perf_counter()
        logprobs_SC = completion_logprobs(hf, adapter, [group], 0, share_prompt=share).tempered_SC
        gradients.append(torch.autograd.grad(logprobs_SC.mean(), list(adapter.parameters())))
        seconds.append(time.perf_counter() - start)
    for plain, shared in zip(*gradients):
        if not torch.allclose(plain, shared, atol=1e-4 * float(plain.abs().max()), rtol=1e-3):
            raise SystemExit("the two sides have different gradients: their speeds cannot be compared")
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
