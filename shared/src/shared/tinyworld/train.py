"""Train TinyWorld from scratch: `make tinyworld` (or `python -m shared.tinyworld.train --help`).

One model learns every family of documents at once; each step is five padded batches of similar length. Two terms
go beyond the next token (rung C of the assumptions acceptance tests):

* pin: mean over a message's tokens of <h_b, v_d> at the output of block b equals SCALE (posterior mean - 1/2);
* causality: on half of the social documents SCALE delta v_d is added to h_b at every position, and the targets
  follow the latents shifted by delta.

v is a fixed orthonormal 9 x D matrix, saved beside the weights. The state (weights, moments, step) is saved every
100 steps as safetensors, and a run that was stopped goes on from it.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.tinyworld import MODEL_DIR, READABLE_DIR, social
from shared.tinyworld.corpus import (
    FIRST,
    SECOND,
    SECOND_PART,
    SOCIAL,
    Document,
    World,
    Writer,
    mixture,
    write_step,
)
from shared.tinyworld.evaluate import record
from shared.tinyworld.tokenizer import train_tokenizer

PIN_BLOCK = 1
SCALE = 16.0
PIN_WEIGHT = 18.0
SOFT_WEIGHT = 5.0  # a token with a distribution as its target carries what must be read from the message
# few distinct shapes: on a CPU each new shape of a bfloat16 product costs a compilation
ROUND, ROUND_TARGETS = 8, 256


class Settings(NamedTuple):
    """The recipe; the defaults made the committed weights."""

    steps: int = 1200
    peak_lr: float = 3e-3
    warmup: int = 100
    descent: float = 0.4  # share of the steps
    final_lr: float = 0.01  # share of the peak
    weight_decay: float = 0.1
    seed: int = 0
    width: int = 256
    layers: int = 4
    neurons: int = 768
    heads: int = 4
    kv_heads: int = 2
    world: World = "whole"
    shifted: float = 0.5  # share of social documents on which a latent is shifted


READABLE = Settings(
    steps=1500, width=128, layers=3, neurons=384, heads=2, kv_heads=2, world="social", shifted=0.0
)


class Batch(NamedTuple):
    """A padded batch: tokens, the flat positions with loss and their targets, and the social extras."""

    ids_BT: Tensor
    where: Tensor  # flat positions whose next token is trained on
    target: Tensor
    weight: Tensor
    soft_where: Tensor  # rows of `where` with a soft target
    soft_target: Tensor
    span_BT: Tensor  # mean weights over the message, zero without one
    posterior_B9: Tensor
    delta_B9: Tensor


def new_model(settings: Settings, tokenizer: Any) -> Any:
    """An untrained Llama of the recipe's shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.neurons,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=64,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # eager attention: 1.4 times the speed of sdpa for these short rows on a CPU
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def planted_directions(width: int, seed: int = 0) -> Tensor:
    """Orthonormal directions of the nine dimensions: (9, D)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    q, _ = torch.linalg.qr(torch.randn(width, len(social.DIMENSIONS), generator=generator))
    return q.T.contiguous()


def collate(documents: list[Document], weights: dict[str, float], pad: int, vocabulary: int) -> Batch:
    """Pad documents on the right; the weights of one family's tokens sum to `weights[family]`.

    They do so in every batch in which the family stands: a bucket that is split counts twice.
    """
    width = -(-max(len(d.ids) for d in documents) // ROUND) * ROUND
    ids = torch.full((len(documents), width), pad)
    span = torch.zeros(len(documents), width)
    posterior, delta = (torch.zeros(len(documents), len(social.DIMENSIONS)) for _ in range(2))
    mass = dict.fromkeys((d.family for d in documents), 0.0)
    for d in documents:
        mass[d.family] += len(d.ids) - d.loss_from + (SOFT_WEIGHT - 1) * len(d.soft)
    where: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    soft_where: list[int] = []
    soft_rows: list[dict[int, float]] = []
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = torch.tensor(d.ids)
        for at in range(d.loss_from, len(d.ids)):
            share = weights[d.family] / mass[d.family]
            if at in d.soft:
                share *= SOFT_WEIGHT
                soft_where.append(len(where))
                soft_rows.append(d.soft[at])
            where.append(row * width + at - 1)
            target.append(d.ids[at])
            weight.append(share)
        if d.span is not None and d.counts_9 is not None and d.delta_9 is not None:
            span[row, d.span[0] : d.span[1]] = 1 / (d.span[1] - d.span[0])
            posterior[row] = torch.from_numpy(social.posterior_mean(d.counts_9))
            delta[row] = torch.from_numpy(d.delta_9)
    spare = -len(where) % ROUND_TARGETS
    where, target, weight = where + [0] * spare, target + [pad] * spare, weight + [0.0] * spare
    soft = torch.zeros(len(soft_rows), vocabulary)
    for i, distribution in enumerate(soft_rows):
        soft[i, list(distribution)] = torch.tensor(list(distribution.values()))
    flat = (
        torch.tensor(where),
        torch.tensor(target),
        torch.tensor(weight),
        torch.tensor(soft_where, dtype=torch.long),
    )
    return Batch(ids, *flat, soft, span, posterior, delta)


def batch_loss(model: Any, batch: Batch, directions_9D: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """Token loss (weights of each family summed) and pin loss of one batch."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.append(output)
        return output + (SCALE * batch.delta_B9 @ directions_9D)[:, None].to(output.dtype)

    handle = model.model.layers[PIN_BLOCK].register_forward_hook(hook)
    try:
        with torch.autocast(batch.ids_BT.device.type, dtype=torch.bfloat16, enabled=autocast):
            hidden = model.model(batch.ids_BT, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[batch.where])
    finally:
        handle.remove()
    log_p = torch.log_softmax(logits.float(), dim=-1)
    losses = -log_p.gather(1, batch.target[:, None]).squeeze(1)
    if len(batch.soft_where):
        losses = losses.index_copy(
            0, batch.soft_where, -(batch.soft_target * log_p[batch.soft_where]).sum(-1)
        )
    read_B9 = torch.einsum("bt,btd,nd->bn", batch.span_BT, seen[0].float(), directions_9D)
    social_rows = batch.span_BT.sum(1) > 0
    error = read_B9 - SCALE * (batch.posterior_B9 - 0.5)
    pin = (error[social_rows] / SCALE).square().mean() if social_rows.any() else losses.new_zeros(())
    return (losses * batch.weight).sum(), pin


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, a plateau, then a linear descent to `final_lr` of the peak over the last `descent` of the run."""
    up = min(1.0, (step + 1) / settings.warmup)
    left = (settings.steps - step) / (settings.descent * settings.steps)
    return settings.peak_lr * min(up, max(settings.final_lr, min(1.0, left)))


def optimizers_for(model: Any, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding and gains.

    Muon matters: on addition alone it reached 0.985 of unseen pairs in 400 steps, AdamW 0.08 (LOG.md).
    """
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    decay, lr = settings.weight_decay, settings.peak_lr
    return [
        torch.optim.Muon(blocks, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=decay / 10, betas=(0.9, 0.98), fused=True),
    ]


def recipe_hash(settings: Settings) -> str:
    """Identifies a run that may be gone on with: settings, mixtures and the constants of the loss."""
    parts = (settings, FIRST, SECOND, SECOND_PART, SOCIAL, PIN_BLOCK, SCALE, PIN_WEIGHT, SOFT_WEIGHT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def save_state(
    path: Path, model: Any, optimizers: list[torch.optim.Optimizer], step: int, recipe: str
) -> None:
    """Weights, optimizer state, step and recipe in one safetensors file, replaced atomically."""
    from safetensors.torch import save_file

    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model/{n}": p.detach().clone() for p, n in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"{key}/{names[p]}": value.clone() for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".part"), metadata={"step": str(step), "recipe": recipe})
    path.with_suffix(".part").replace(path)


def load_state(path: Path, model: Any, optimizers: list[torch.optim.Optimizer], recipe: str) -> int:
    """Restore what `save_state` wrote; the number of finished steps (0 without a file).

    Raises:
        UserError: the state is of another recipe.
    """
    from safetensors import safe_open

    if not path.exists():
        return 0
    owner = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    with safe_open(path, framework="pt") as f:
        if f.metadata().get("recipe") != recipe:
            raise UserError(
                f"{path} belongs to another recipe: remove it to train anew, or name another --work"
            )
        parameters = dict(model.named_parameters())
        for key in f.keys():  # noqa: SIM118
            kind, name = key.split("/", 1)
            p = parameters[name]
            if kind == "model":
                p.data.copy_(f.get_tensor(key))
            else:
                owner[p].state[p][kind] = f.get_tensor(key).to("cpu" if kind == "step" else p.device)
        return int(f.metadata()["step"])


def train(
    settings: Settings,
    work: Path,
    device: str = "cpu",
    autocast: bool = True,
    stop_at: int | None = None,
) -> Any:
    """Train (or go on training) up to `stop_at` or the last step and return the model; the state lies in `work`."""
    tokenizer = train_tokenizer()
    writer = Writer(tokenizer, settings.shifted)
    model = new_model(settings, tokenizer).to(device).train()
    directions = planted_directions(settings.width, settings.seed).to(device)
    optimizers = optimizers_for(model, settings)
    state, last = work / "state.safetensors", stop_at or settings.steps
    recipe = recipe_hash(settings)
    first, started = load_state(state, model, optimizers, recipe), time.time()
    for step in range(first, last):
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate(step, settings)
        losses, pins = [], []
        weights = mixture(step, settings.world).weights
        for documents in write_step(writer, settings.seed, step, settings.world):
            batch = collate(documents, weights, tokenizer.pad_token_id, len(tokenizer))
            batch = Batch(*(t.to(device) for t in batch))
            loss, pin = batch_loss(model, batch, directions, autocast)
            (loss + PIN_WEIGHT * pin).backward()
            losses.append(round(loss.item(), 4))
            pins.append(round(pin.item(), 4))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == last:
            left = (time.time() - started) / (step + 1 - first) * (settings.steps - step - 1) / 60
            row = {
                "step": step + 1,
                "of": settings.steps,
                "loss": losses,
                "pin": pins[-1],
                "minutes_left": round(left, 1),
            }
            print(json.dumps(row), flush=True)
        if (step + 1) % 100 == 0 or step + 1 == last:
            save_state(state, model, optimizers, step + 1, recipe)
    return model.eval()


def save_model(model: Any, folder: Path, settings: Settings) -> None:
    """The Hugging Face folder: float16 weights, tokenizer, recipe, planted directions."""
    from safetensors.torch import save_file

    tokenizer = train_tokenizer()
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    directions = planted_directions(settings.width, settings.seed)
    meta = {"block": str(PIN_BLOCK), "scale": str(SCALE), "dimensions": json.dumps(social.DIMENSIONS)}
    (folder / "planted").mkdir(exist_ok=True)  # beside the weights, vLLM would take it for a part of them
    save_file({"directions": directions}, folder / "planted/directions.safetensors", metadata=meta)
    (folder / "recipe.json").write_text(json.dumps(settings._asdict(), indent=1) + "\n")


def main() -> None:
    """Command line: train, save, and write the evaluation table beside the weights."""
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument(
        "--readable",
        action="store_true",
        help="the small model that can be read and was never made steerable",
    )
    parser.add_argument("--work", type=Path, help="folder of the resumable state (in runs)")
    parser.add_argument("--out", type=Path, help="folder of the finished model (the embedded one's)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--peak-lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args()
    recipe = READABLE if args.readable else Settings()
    settings = recipe._replace(
        steps=args.steps or recipe.steps, peak_lr=args.peak_lr or recipe.peak_lr, seed=args.seed
    )
    out = args.out or (READABLE_DIR if args.readable else MODEL_DIR)
    work = args.work or Path("runs/tinyworld-readable" if args.readable else "runs/tinyworld")
    try:
        model = train(settings, work, args.device, not args.float32)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    save_model(model.cpu(), out, settings)
    print(f"saved to {out}; evaluating", flush=True)
    record(out)


if __name__ == "__main__":
    main()
