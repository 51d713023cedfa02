"""`preft rl`: train an adapter by reinforcement, in a run folder with report, curves and the adapter.

    preft rl --out runs/rl --task user --steps 30
    preft rl --out runs/rl --model MODEL --data train.jsonl --heldout-data test.jsonl --reward exact_match

Run again with the same settings, a stopped run continues. Every setting of `GRPOConfig` is an option.
"""

import argparse
from dataclasses import MISSING, fields
from typing import Any

from preft.rl.config import CHOICES, GRPOConfig
from shared.commands import output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", required=True, type=output_folder, help="run folder")
    parser.add_argument(
        "--model", default="tinyworld", help="name, folder or Hugging Face id (default: tinyworld)"
    )
    parser.add_argument("--dtype", default="float32", help="of trainer and server (default: float32)")
    parser.add_argument(
        "--task", default="user", help="user, addition or capitals of TinyWorld (default: user)"
    )
    parser.add_argument("--data", help="JSONL or CSV file of rows: prompt or messages, answer, facts")
    parser.add_argument("--heldout-data", help="the same, to judge the adapter before and after")
    parser.add_argument("--reward", help="name of the reward (default: the task's)")
    parser.add_argument("--train-prompts", type=int, default=200)
    parser.add_argument("--heldout-prompts", type=int, default=40)
    parser.add_argument("--sampler", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--method", choices=("lora", "direft", "loreft", "noreft"), default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--phase", choices=("prefill", "all", "decode", "decode_boundary"), default="prefill")
    group = parser.add_argument_group("GRPO", "names and meanings are trl's where it has them")
    for setting in fields(GRPOConfig):
        assert setting.default is not MISSING
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=setting.default,
            type=_reader(setting.default),
            choices=CHOICES.get(setting.name),
            help=f"default: {setting.default}",
        )


def _reader(default: Any) -> Any:
    """What turns an option's text into a value like its default; settings that may be None read "none" as that."""
    if isinstance(default, bool):
        return _truth
    if isinstance(default, int | str):
        return type(default)
    return _number_or_none


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text == "true"


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def main(arguments: argparse.Namespace) -> int:
    """Run the pipeline in the folder and print what came of it."""
    from preft.adapters import AdapterConfig
    from preft.rl.pipeline import AdapterRLConfig, run_pipeline
    from shared.models import ModelConfig
    from shared.runs import start_run
    from shared.tokens import Phase

    config = AdapterRLConfig(
        task=arguments.task,
        data=arguments.data,
        heldout_data=arguments.heldout_data,
        reward=arguments.reward,
        train_prompts=arguments.train_prompts,
        heldout_prompts=arguments.heldout_prompts,
        sampler=arguments.sampler,
        adapter=AdapterConfig(arguments.method, arguments.rank, Phase(arguments.phase)),
        grpo=GRPOConfig(**{setting.name: getattr(arguments, setting.name) for setting in fields(GRPOConfig)}),
    )
    with start_run(arguments.out, config) as run:
        metrics = run_pipeline(config, ModelConfig(arguments.model, dtype=arguments.dtype), run)
        run.metrics(metrics)
    for when in ("before", "after"):
        print(f"held-out reward {when}: {metrics['heldout_reward'][when]['sampled']:.3f}")
    print(f"largest difference of log-probabilities: {metrics['logprob_gap_max']:.1e} nats")
    print(f"adapter and report in {arguments.out}")
    return 0
