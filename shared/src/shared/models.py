"""Load a language model by configuration: embedded, local, from the hub, or tiny random weights of any family.

`load` returns a `Model`: the Hugging Face module (eval mode, never changed), an nnsight model over the same module, the
tokenizer, the bound architecture and a fingerprint. Loading checks the architecture table against the model once
(`shared.checks`). Everything that can go wrong ends in one `UserError` that names the ways out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared.architecture import READ_OUT_SITES, Architecture
from shared.errors import UserError
from shared.hooks import ActiveHooks, forward_inputs, run
from shared.tokens import History, Message, TokenBatch, encode_rows

if TYPE_CHECKING:
    from shared.decoding import Generated


@dataclass(frozen=True)
class ModelConfig:
    """What to load.

    `name`: "tinyworld", "random:<family>", a local folder, or a Hugging Face id. `dtype`: a torch dtype's name, or
    "auto" for the checkpoint's. `device`: "auto" (cuda where there is one), "cpu", "cuda:1". `device_map`: passed to
    transformers instead of `device`. `quantization`: "4bit" or "8bit" (bitsandbytes). `remote`: run on NDIF.
    """

    name: str = "tinyworld"
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    quantization: str | None = None
    remote: bool = False
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    seed: int = 0


@dataclass(eq=False)
class Model:
    """A loaded model; `model(batch)` and `model.generate(batch)` run under the active captures and edits."""

    hf: Any
    lm: Any
    tokenizer: Any
    architecture: Architecture
    config: ModelConfig
    path: Path | None = None
    active: ActiveHooks = field(default_factory=ActiveHooks)

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        if self.config.remote:
            return torch.device("cpu")
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the activations."""
        return self.hf.dtype

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify configuration and weights (`shared.fingerprint`)."""
        from shared.fingerprint import fingerprint

        return fingerprint(self.hf)

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a generation: those of the generation config, and the tokenizer's."""
        configured = getattr(self.hf.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [*ids, self.tokenizer.eos_token_id] if i is not None})

    def encode(
        self,
        rows: Sequence[str | list[Message]],
        padding_side: str = "left",
        history: History = History.RECOMPUTE,
    ) -> TokenBatch:
        """Texts and chats as a padded batch on the model's device (`shared.tokens.encode_rows`)."""
        return encode_rows(self.tokenizer, rows, padding_side, history).to(self.device)

    def __call__(self, batch: TokenBatch, last: int | None = None) -> Float[Tensor, "B T V"]:
        """Logits of every token, or of the `last` columns alone; gradients as the caller has set them."""
        batch = batch.to(self.device)
        self.active.begin()
        # Edits and captures behind the last block are of all columns.
        whole = last is None or not self.active.sites().isdisjoint(READ_OUT_SITES)
        kept = {} if whole else {"logits_to_keep": last}
        logits_BTV = run(self, batch, **forward_inputs(batch), **kept).logits
        return logits_BTV if last is None else logits_BTV[:, -last:]

    def generate(
        self,
        batch: TokenBatch,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_logprobs: int = 0,
    ) -> Generated:
        """Continue every row of a left-padded batch (`shared.decoding.generate`)."""
        from shared.decoding import generate

        return generate(self, batch, max_new_tokens, temperature, top_p, seed, stop_token_ids, top_logprobs)

    def save(self, folder: str | Path) -> Path:
        """Write weights, config and tokenizer in Hugging Face format; `load(folder)` reads them back."""
        folder = Path(folder)
        self.hf.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def load(config: ModelConfig | str) -> Model:
    """Load a model; `UserError` names the ways out when it cannot be had."""
    from shared.checks import check
    from shared.loading import load_hf, load_remote, wrap

    config = ModelConfig(name=config) if isinstance(config, str) else config
    _check_config(config)
    if config.remote:
        lm = load_remote(config)
        return Model(lm._module, lm, lm.tokenizer, Architecture(lm._module), config)
    hf, tokenizer, path = load_hf(config)
    hf.eval()
    model = Model(hf, wrap(hf, tokenizer), tokenizer, Architecture(hf), config, path)
    check(model)
    return model


def _check_config(config: ModelConfig) -> None:
    if config.dtype != "auto" and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise UserError(f"Unknown dtype {config.dtype!r}: use float32, bfloat16, float16 or auto.")
    if config.quantization not in (None, "4bit", "8bit"):
        raise UserError(f"Unknown quantization {config.quantization!r}: use 4bit, 8bit or null.")
    if config.remote and (config.name == "tinyworld" or config.name.startswith("random:")):
        raise UserError(f"remote=True needs a Hugging Face id that NDIF serves, not {config.name!r}.")
