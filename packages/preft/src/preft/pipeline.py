"""The adapter_serving pipeline: users' chats -> adapters -> one vLLM engine -> completions, speed, report.

1. Every user gets three adapters, trained on the user's own chats: LoRA on all tokens, LoRA-P and DiReFT-P.
2. Held-out loss of each, and of the base model, on the user's held-out chats.
3. One stock vLLM engine, with this package's plugin, serves base, LoRA, LoRA-P and ReFT-P requests in one batch; each
   answer must equal the masked Hugging Face reference token for token (in half precision: up to a near tie).
4. Throughput of the four kinds, interleaved in the same engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from preft.adapters import Adapter, AdapterConfig, AdapterError
from preft.evaluate import heldout_loss
from preft.formats import load_adapter, save_adapter
from preft.mixed_batch import MixedRequest, Outcome, match_rate, run_mixed
from preft.pages import write_pages
from preft.throughput import Speed, ThroughputConfig, measure
from preft.train import TrainConfig, train_adapter
from preft.vllm.precision import check_precision, near_tie
from shared.history import History
from shared.models import Model, ModelConfig, load
from shared.runs import Pipeline, Run
from shared.serialize import plain
from shared.tokens import Message, Phase

KINDS = ("lora", "lora_p", "reft_p")


@dataclass(frozen=True)
class AdapterServingConfig:
    """Users, adapters, training and serving of the pipeline; chats are counted per user."""

    users: int = 4
    train_chats: int = 200
    heldout_chats: int = 40
    served_chats: int = 3
    max_tokens: int = 48
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    reft: AdapterConfig = field(default_factory=lambda: AdapterConfig("direft"))
    train: TrainConfig = field(default_factory=TrainConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    engine: dict[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM

    def __post_init__(self) -> None:
        for key in {"dtype", "lora_dtype"} & set(self.engine):
            raise AdapterError(
                f"engine.{key}: the engine computes in the model's type, or its answers could not be compared with "
                "the reference's; set model.dtype"
            )
        for name, adapter in (("lora", self.lora), ("reft", self.reft)):
            if adapter.history is not History.RECOMPUTE:
                raise AdapterError(
                    f"{name}.history: {adapter.history.value!r} is trained but not served here (its requests do not "
                    "say where the turns of a prompt begin); set it to recompute"
                )

    def adapter(self, kind: str) -> AdapterConfig:
        """The adapter of a kind: lora on all tokens, lora_p and reft_p on the phase of their settings."""
        return {"lora": replace(self.lora, phase=Phase.ALL), "lora_p": self.lora, "reft_p": self.reft}[kind]


@dataclass(frozen=True)
class UserData:
    """One user's chats, and the preferences that the base model cannot know."""

    name: str
    preferences: dict[str, str]
    train: list[list[Message]]
    heldout: list[list[Message]]


def user_data(config: AdapterServingConfig, seed: int) -> list[UserData]:
    """Users of TinyWorld with their training and held-out chats."""
    from shared.tinyworld.users import make_users

    users = []
    for user in make_users(config.users, seed):
        train: Any = user.rows("train", config.train_chats)
        heldout: Any = user.rows("test", config.heldout_chats)
        users.append(UserData(user.name, user.preferences._asdict(), train, heldout))
    return users


def train_users(
    model: Model, users: list[UserData], config: AdapterServingConfig, run: Run
) -> dict[str, Path]:
    """Train every user's adapters that the run folder does not hold yet; folders by adapter name (user-kind)."""
    jobs = [(user, kind) for user in users for kind in KINDS]
    folders = {}
    for user, kind in run.progress(jobs, "training adapters"):
        name = f"{user.name}-{kind}"
        stage = run.stage(f"adapters/{name}")
        if not stage.done:
            train = replace(config.train, seed=config.train.seed + run.seed)
            adapter, losses = train_adapter(
                model.hf, model.tokenizer, user.train, config.adapter(kind), train
            )
            with stage as folder:
                save_adapter(adapter, folder, model.config.name, model.fingerprint)
            run.log(len(losses), **{f"train_loss.{name}": mean(losses[-5:])})
        folders[name] = stage.path
    return folders


def heldout_losses(model: Model, users: list[UserData], adapters: dict[str, Adapter]) -> list[dict[str, Any]]:
    """One row a user: held-out loss (nats a response token) of the base model and of each kind of adapter."""
    rows = []
    for user in users:
        losses = {"base": heldout_loss(model.hf, model.tokenizer, None, user.heldout)}
        for kind in KINDS:
            losses[kind] = heldout_loss(
                model.hf, model.tokenizer, adapters[f"{user.name}-{kind}"], user.heldout
            )
        rows.append({"user": user.name, **losses})
    return rows


def serve(
    model: Model,
    users: list[UserData],
    folders: dict[str, Path],
    adapters: dict[str, Adapter],
    config: AdapterServingConfig,
    run: Run,
) -> tuple[list[Outcome], dict[str, Speed]]:
    """One engine: the mixed batch against the reference, then the throughput of every kind."""
    from shared.generation.vllm_engine import VLLMGenerator

    slots = max(2, min(config.throughput.adapters, 16))
    room = config.throughput.adapters * len(KINDS) + len(folders)
    engine = {"max_loras": slots, "max_cpu_loras": room, "disable_log_stats": True} | config.engine
    # "auto" may mean one type to transformers and another to vLLM: the engine gets the reference's.
    served = replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    with VLLMGenerator(served, adapters=folders, **engine) as generator:
        requests = list(mixed_requests(users, config))
        outcomes = run_mixed(generator, model, adapters, requests, config.max_tokens, run.seed)
        arms = {"base": [], **{kind: copies(folders, kind, config.throughput.adapters) for kind in KINDS}}
        speeds = measure(generator.llm, arms, config.throughput, model.architecture.vocab_size)
    return outcomes, speeds


def mixed_requests(users: list[UserData], config: AdapterServingConfig) -> Iterator[MixedRequest]:
    """For every user and held-out chat, the same question to the base model and to each of the user's adapters."""
    for user in users:
        for chat in user.heldout[: config.served_chats]:
            for kind in ("base", *KINDS):
                adapter = None if kind == "base" else f"{user.name}-{kind}"
                yield MixedRequest(user.name, kind, adapter, chat[:-1], chat[-1]["content"])


def copies(folders: dict[str, Path], kind: str, count: int) -> list[Any]:
    """`count` vLLM requests for adapters of a kind: the trained ones, loaded as often as needed.

    Their ids follow those of the generator's own adapters, 1 to len(folders), kind after kind.
    """
    from vllm.lora.request import LoRARequest

    paths = [path for name, path in folders.items() if name.endswith(f"-{kind}")]
    first = 1 + len(folders) + KINDS.index(kind) * count
    return [
        LoRARequest(f"{kind}-copy{i}", first + i, str(paths[i % len(paths)].resolve())) for i in range(count)
    ]


def run_pipeline(config: AdapterServingConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the pipeline in its folder; returns match_rate, heldout_loss and throughput (tokens/s) by kind."""
    model = run.use_model(load(model_config))
    # Where a GPU is visible vLLM runs on it, whatever the reference's device.
    check_precision(model.dtype, model.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    users = user_data(config, run.seed)
    folders = train_users(model, users, config, run)
    adapters = {name: load_adapter(folder, model.hf, model.fingerprint) for name, folder in folders.items()}
    losses = run.json_stage("heldout_loss.json", lambda: heldout_losses(model, users, adapters))
    outcomes, speeds = serve(model, users, folders, adapters, config, run)
    with run.stage("served.jsonl") as path:
        path.write_text("".join(f"{_json(outcome)}\n" for outcome in outcomes), encoding="utf-8")
    tolerance = near_tie(model.dtype)
    metrics = {
        "match_rate": match_rate(outcomes, tolerance),
        "requests_compared": len(outcomes),
        "near_ties": {"requests": sum(one.near_tie(tolerance) for one in outcomes), "tolerance": tolerance},
        "heldout_loss": {kind: mean(row[kind] for row in losses) for kind in ("base", *KINDS)},
        "throughput": {kind: speed.median for kind, speed in speeds.items()},
        "throughput_spread": {kind: [speed.low, speed.high] for kind, speed in speeds.items()},
    }
    write_pages(run.report, config, users, adapters, losses, outcomes, speeds, tolerance)
    return metrics


def _json(value: Any) -> str:
    import json

    return json.dumps(plain(value))


PIPELINE = Pipeline("adapter_serving", AdapterServingConfig, run_pipeline)
