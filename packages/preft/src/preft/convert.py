"""Adapter folders from one format to another: peft's, pyreft's, this project's (strict or not), in any float type.

What a format cannot say is asked for, never guessed: a peft folder states no phase, a pyreft folder no positions. What
a format cannot hold is refused: peft knows neither ReFT nor phases.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from preft.adapter_config import AdapterError
from preft.adapter_files import (
    FORMAT_VERSION,
    SavedAdapter,
    factors_by_path,
    is_ordinary,
    read_adapter,
    read_tensors,
    write_folder,
)
from preft.formats import save_adapter
from preft.pyreft_files import is_pyreft, load_pyreft
from preft.vllm.identity import CONFIG_FILE
from shared.models import Model
from shared.tokens import Phase

Format = Literal["preft", "peft"]


def convert(
    source: Path | str,
    target: Path | str,
    to: Format = "preft",
    *,
    phase: Phase | None = None,
    strict: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a peft or preft folder anew, in another format or type; returns the new folder.

    `phase` is for a folder that states none (peft's; without it, all tokens). AdapterError where the target format
    cannot hold the adapter.
    """
    _check_target(target)
    if is_pyreft(source) and not (Path(source) / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{source} is a pyreft checkpoint: give the model and the positions it was trained with"
        )
    saved, tensors = read_adapter(source), read_tensors(source)
    config = saved.config
    if phase is not None:
        if saved.format_version is not None:
            raise AdapterError(f"{source} states its phase, {config.phase.value!r}; leave the phase out")
        config = replace(config, phase=phase)
    paths = factors_by_path(tensors, config)
    if to == "preft":
        new = replace(
            saved, config=config, format_version=FORMAT_VERSION, strict=strict and not is_ordinary(config)
        )
    elif is_ordinary(config):
        new = SavedAdapter(config, None, saved.base_model)
    else:
        raise AdapterError(
            f"peft has no place for a {config.method} adapter of phase {config.phase.value!r}: it knows LoRA on every "
            "token. Serve the folder with this project's vLLM plugin"
        )
    return write_folder(target, new, paths, tensors, dtype)


def convert_pyreft(
    source: Path | str,
    target: Path | str,
    model: Model,
    positions: str,
    *,
    strict: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a pyreft checkpoint of this model as an adapter folder; `positions` as `preft.pyreft_files` says."""
    _check_target(target)
    adapter = load_pyreft(source, model.hf, positions)
    name = model.config.name
    return save_adapter(adapter, target, name, model.fingerprint, strict=strict, dtype=dtype)


def _check_target(target: Path | str) -> None:
    if Path(target).exists():
        raise AdapterError(f"{target} is there already: name a new folder")
