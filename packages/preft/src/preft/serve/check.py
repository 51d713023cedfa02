"""Is this folder an adapter that this server can serve?

Asked before vLLM hears of the adapter, since its manager takes what it is given: a missing tensor is skipped silently,
a misshapen one fails halfway through filling a slot. So every adapter is loaded once, strictly, by `preft.formats` for
the model without its weights (on torch's meta device), in the front process; the engine is not involved.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapter_files import WEIGHTS_FILE, read_tensors
from preft.adapters import AdapterError
from preft.formats import load_adapter
from preft.vllm.identity import CONFIG_FILE, AdapterIdentity, read_identity
from shared.models import ModelConfig

LARGEST_FINGERPRINTED = 4_000_000_000  # parameters; above, the operator gives the fingerprint or does without


@dataclass(frozen=True)
class Checked:
    """An adapter folder that fits the model."""

    identity: AdapterIdentity
    rank: int


@dataclass(frozen=True)
class AdapterCheck:
    """The model without weights, its fingerprint (None: adapters of any base model with fitting shapes are taken),
    and the highest rank that the engine has buffers for."""

    hf: Any
    fingerprint: str | None
    max_rank: int

    def __call__(self, folder: Path) -> Checked:
        """Load the folder strictly; AdapterError with every reason why it cannot be served."""
        try:
            return self._checked(folder)
        except (AdapterError, AttributeError, KeyError, TypeError, ValueError) as error:
            # Clients see the reason: it names the files, not where the server keeps them.
            raise AdapterError(_reason(error).replace(f"{folder}/", "")) from error

    def _checked(self, folder: Path) -> Checked:
        identity, rank = read_identity(folder), self._rank(folder)
        load_adapter(folder, self.hf, self.fingerprint)
        if wrong := [name for name, values in read_tensors(folder).items() if not values.isfinite().all()]:
            raise AdapterError(f"{WEIGHTS_FILE} holds values that are not finite, in {', '.join(wrong[:8])}")
        return Checked(identity, rank)

    def _rank(self, folder: Path) -> int:
        """The highest rank the configuration states, within the engine's buffers: nothing is allocated before that."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        if not isinstance(rank, int) or rank > self.max_rank:
            raise AdapterError(
                f"{CONFIG_FILE} states rank {rank!r}, and this server holds ranks up to {self.max_rank}; "
                "start it with a higher --max-lora-rank"
            )
        return rank


def _reason(error: Exception) -> str:
    if isinstance(error, AdapterError):
        return str(error)
    what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return f"{CONFIG_FILE} cannot be used: {what}"


def bare_model(config: ModelConfig) -> Any:
    """The Hugging Face model of a folder or hub id on the meta device: all modules and shapes, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = config.trust_remote_code
    hf_config = AutoConfig.from_pretrained(config.name, revision=config.revision, trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust)


def fingerprint_of(config: ModelConfig, hf: Any) -> str | None:
    """A model's fingerprint, or None where reading all of its weights would take too much memory."""
    from shared.fingerprint import fingerprint
    from shared.loading import load_hf

    if sum(parameter.numel() for parameter in hf.parameters()) > LARGEST_FINGERPRINTED:
        return None
    return fingerprint(load_hf(config)[0])
