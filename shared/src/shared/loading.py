"""Fetch the Hugging Face module and tokenizer that a `ModelConfig` names, and wrap them for nnsight.

Every failure that a user can mend (no such folder, hub unreachable, gated, unsupported family, missing package, a
checkpoint that is damaged or incomplete) becomes one `UserError` that names the ways out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.architecture import family_of
from shared.errors import UserError
from shared.experts import add_taps
from shared.families import FAMILIES

if TYPE_CHECKING:
    from shared.models import ModelConfig

RANDOM = "random:"


def load_hf(config: ModelConfig) -> tuple[Any, Any, Path | None]:
    """Module, tokenizer and local folder (None where there is none) of a config."""
    if config.name.startswith(RANDOM):
        from shared.random_models import random_model

        hf, tokenizer = random_model(config.name.removeprefix(RANDOM), config.seed)
        hf = hf.to(dtype=_dtype(config), device=_device(config))
        _set_attention(hf, config.attn_implementation)
        return hf, tokenizer, None
    path = local_path(config)
    source = str(path) if path else config.name
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    hf_config = _fetch(config, "AutoConfig", source, common)
    _check_experts(config, hf_config)
    tokenizer = load_tokenizer(config)
    options = {**common, "dtype": _dtype(config), "attn_implementation": _attention(hf_config, config)}
    if config.device_map is not None:
        options["device_map"] = config.device_map
    if config.quantization is not None:
        options["quantization_config"] = _quantization(config)
    # Mismatches come back listed instead of raised, so that one error can name the tensors.
    reported = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    hf, report = _fetch(config, "AutoModelForCausalLM", source, reported)
    _check_complete(config, report)
    if config.device_map is None and config.quantization is None:
        hf = hf.to(_device(config))
    return hf, tokenizer, path


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer that a config names, without its model; UserError names the ways out when it cannot be had."""
    path = local_path(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return _fetch(config, "AutoTokenizer", str(path) if path else config.name, options)


def wrap(hf: Any, tokenizer: Any) -> Any:
    """An nnsight model over the module itself: no copy, no download, inert outside a trace."""
    add_taps(hf, FAMILIES[family_of(hf.config)])
    return _token_model()(hf, task="text-generation", tokenizer=tokenizer)


def load_remote(config: ModelConfig) -> Any:
    """An nnsight model without weights (meta device) whose traces run on NDIF."""
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    _check_experts(config, _fetch(config, "AutoConfig", config.name, source))
    return _token_model()(config.name, task="text-generation", **source)


def _token_model() -> Any:
    from nnsight.modeling.transformers import TransformersModel

    class TokenModel(TransformersModel):
        """A `TransformersModel` whose input is always a ready batch of token ids."""

        def _batch(self, invokes: list, fn: Any) -> tuple:
            # Rows are padded, masked and numbered by `TokenBatch`; collating them again would undo that.
            return invokes[0] if len(invokes) == 1 else super()._batch(invokes, fn)

        def _remoteable_class(self) -> type:
            return TransformersModel

    return TokenModel


def local_path(config: ModelConfig) -> Path | None:
    """Local folder that a config names, or None for a hub id; UserError when there should be one and is not."""
    from shared.tinyworld import EMBEDDED

    if folder := EMBEDDED.get(config.name):
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"The embedded model has no weights in {folder}. Run `make tinyworld` to train it, or choose "
                "another model (model.name=random:llama, a local folder, or a Hugging Face id)."
            )
        return folder
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json: it is not a Hugging Face model folder.")
        return path
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise UserError(f"There is no model folder {path}. Check the path, or give a Hugging Face id.")
    return None


def _check_experts(config: ModelConfig, hf_config: Any) -> None:
    """`UserError` for a family without a row, and for experts where the code that shows their neurons cannot run."""
    if FAMILIES[family_of(hf_config)].experts and (config.remote or config.quantization):
        option = "remote=True" if config.remote else "quantization"
        raise UserError(
            f"{config.name!r} is a mixture of experts, whose neurons are read from its own weights in this process: "
            f"load it without {option}."
        )


def _fetch(config: ModelConfig, auto: str, source: str, options: dict[str, Any]) -> Any:
    import transformers
    from safetensors import SafetensorError

    try:
        return getattr(transformers, auto).from_pretrained(source, **options)
    except SafetensorError as error:
        raise UserError(
            f"A safetensors file of {config.name!r} is damaged or cut short ({error}). Copy or download it again."
        ) from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Could not load {config.name!r}: {reason} Ways out: check the name and revision; if the hub is not "
            "reachable, download the model elsewhere and give its folder as the name; for a gated model run "
            "`hf auth login`; or use the embedded model (name=tinyworld)."
        ) from error


def _check_complete(config: ModelConfig, report: dict[str, Any]) -> None:
    """`UserError` when transformers left a parameter random: absent from the checkpoint, or there in another shape.

    Parameters tied to one that was read (an unembedding tied to the embedding) are not reported as missing.
    """
    missing = sorted(report["missing_keys"])
    mismatched = [
        f"{name} ({list(there)} in the checkpoint, {list(wanted)} in the model)"
        for name, there, wanted in sorted(report["mismatched_keys"])
    ]
    wrong = [
        f"{label}: {_listed(names)}"
        for label, names in (("missing tensors", missing), ("tensors of another shape", mismatched))
        if names
    ]
    if wrong:
        raise UserError(
            f"The checkpoint of {config.name!r} does not fill its model; {'; '.join(wrong)}. The rest would be "
            "random. Save or download the checkpoint again, or mend its config.json."
        )


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _dtype(config: ModelConfig) -> Any:
    if config.dtype == "auto":
        return torch.float32 if config.name.startswith(RANDOM) else "auto"
    return getattr(torch, config.dtype)


def _device(config: ModelConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _attention(hf_config: Any, config: ModelConfig) -> str:
    # transformers' SDPA path ignores the soft cap on attention scores (Gemma 2); only eager computes it.
    capped = getattr(hf_config, "attn_logit_softcapping", None) is not None
    return "eager" if capped and config.attn_implementation == "sdpa" else config.attn_implementation


def _set_attention(hf: Any, implementation: str) -> None:
    capped = getattr(hf.config, "attn_logit_softcapping", None) is not None
    hf.set_attn_implementation("eager" if capped and implementation == "sdpa" else implementation)


def _quantization(config: ModelConfig) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        if config.quantization == "4bit":
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        return BitsAndBytesConfig(load_in_8bit=True)
    except ImportError as error:
        raise UserError(
            f"Quantised loading needs bitsandbytes ({error}). Install it, or drop quantization."
        ) from error
