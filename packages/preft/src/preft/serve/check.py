"""Is this folder an adapter that this server can serve?

Asked before vLLM hears of the adapter, since its manager takes what it is given: a missing tensor is skipped silently,
a misshapen one fails halfway through filling a slot. Everything happens in the front process against the model without
its weights (on torch's meta device); the engine is not involved.

1. What the files state, before anything of that size is made: ranks, the model it was made for; of an upload also that
   its names are names, for a regular expression may take for ever and holds up the whole process meanwhile.
2. An adapter is loaded once, strictly, by `preft.formats`. Compositions and interventions have no such form.
3. The update that it makes at every module (`preft.parts`): the module's shape, the rank, finite with its scale.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapters import AdapterError
from preft.formats import load_adapter
from preft.parts import Shape, Source, Update, highest_rank, read_source
from preft.targets import is_linear
from preft.vllm.identity import (
    COMPOSITION,
    CONFIG_FILE,
    PHASE_SECTION,
    AdapterIdentity,
    holds_interventions,
    read_identity,
)
from preft.vllm.residual import SITE
from shared.architecture import Architecture, features
from shared.errors import UserError
from shared.intervention_files import JSON_NAME
from shared.models import ModelConfig

LARGEST_FINGERPRINTED = 4_000_000_000  # parameters; above, the operator gives the fingerprint or does without
LARGEST_JSON = 4 * 2**20  # bytes
LITERAL = re.compile(r"[\w.-]+")  # nothing in it repeats, so that it is matched at once


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

    def __call__(self, folder: Path, uploaded: bool = False) -> Checked:
        """Check the folder; AdapterError with the reasons why it cannot be served."""
        try:
            return self._checked(folder, uploaded)
        except Exception as error:
            # Whatever strange files bring about is a verdict on them. Clients see it without the server's paths.
            raise AdapterError(_reason(error).replace(f"{folder}/", "")) from error

    def _checked(self, folder: Path, uploaded: bool) -> Checked:
        if holds_interventions(folder):
            model = _read_json(folder / JSON_NAME)["model"]
            self._check_model(model["fingerprint"], Shape(model["n_layers"], model["width"]))
        else:
            configs = list(_configs(folder))
            for config in configs:
                self._check_config(config, uploaded)
            if not _is_composition(configs[0]):
                load_adapter(folder, self.hf, self.fingerprint)
        source = read_source(folder)
        self._check_model(source.fingerprint, source.shape)
        rank = highest_rank(source)
        self._check_rank(rank)
        _check_updates(self.hf, source)
        return Checked(read_identity(folder), rank)

    def _check_model(self, fingerprint: str | None, shape: Shape | None) -> None:
        """AdapterError unless this is the model that the files name, as far as they do."""
        architecture = Architecture(self.hf)
        served = Shape(architecture.n_layers, architecture.width)
        if shape not in (None, served):
            raise AdapterError(f"it was made for a model of {shape}; this one has {served}")
        if self.fingerprint and fingerprint not in (None, self.fingerprint):
            raise AdapterError(
                f"it was made for the model with fingerprint {fingerprint}; this one has {self.fingerprint}"
            )

    def _check_config(self, config: dict[str, Any], uploaded: bool) -> None:
        ranks = config.get("rank_pattern") or {}
        for rank in [config["r"], *ranks.values()]:
            self._check_rank(rank)
        if _is_composition(config) and (config["r"], ranks) != (
            config["lora_alpha"],
            config["alpha_pattern"],
        ):
            raise AdapterError(
                f"{CONFIG_FILE}: the weights of a composition hold its scale, so every alpha is its rank"
            )
        if uploaded and (wrong := [name for name in _patterns(config) if not LITERAL.fullmatch(name)]):
            raise AdapterError(
                f"{CONFIG_FILE} holds the expression {wrong[0]!r}; an upload names its modules: list them in "
                "target_modules, rank_pattern and alpha_pattern"
            )

    def _check_rank(self, rank: Any) -> None:
        if not isinstance(rank, int) or rank > self.max_rank:
            raise AdapterError(
                f"it has rank {rank!r}, and this server holds ranks up to {self.max_rank}; start it with a higher "
                "--max-lora-rank"
            )


def _check_updates(hf: Any, source: Source) -> None:
    """AdapterError names the modules that the model lacks, and those at which shape or values are unusable."""
    sizes = _sizes(hf)
    faults: list[str] = []
    for update in {id(update): update for update in source.by_kind}.values():  # kinds share theirs
        faults += _faults(update, sizes)
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AdapterError(f"it does not fit the model: {'; '.join(faults[:8])}{more}")


def _faults(update: Update, sizes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for module, (A, B) in update.items():
        found = A.shape[1], B.shape[0]
        if module not in sizes:
            yield f"{module} is not in the model"
        elif found != sizes[module]:
            yield f"{module} has inputs and outputs {found}, expected {sizes[module]}"
        elif not (A.isfinite().all() and B.isfinite().all()):
            yield f"{module} holds values that are not finite, or a scale that makes them so"


def _sizes(hf: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the update at every module that an adapter may act on."""
    architecture = Architecture(hf)
    sizes = {}
    for block in map(architecture.block_path, range(architecture.n_layers)):
        sizes[f"{block}.{SITE}"] = architecture.width + 1, architecture.width
        for name, module in hf.get_submodule(block).named_modules():
            if is_linear(module):
                sizes[f"{block}.{name}"] = features(module)
    return sizes


def _configs(folder: Path) -> Iterator[dict[str, Any]]:
    """The configuration of the folder, and those of its parts."""
    yield _read_json(folder / CONFIG_FILE)
    for path in sorted(folder.glob(f"part-*/{CONFIG_FILE}")):
        yield _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise AdapterError(f"{path} has {size} bytes; an adapter's says what it is in a few thousand")
    return json.loads(path.read_text(encoding="utf-8"))


def _is_composition(config: dict[str, Any]) -> bool:
    return config.get(PHASE_SECTION, {}).get("method") == COMPOSITION


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    """What is matched with the model's modules as a regular expression."""
    if isinstance(config.get("target_modules"), str):
        yield config["target_modules"]
    for section in (config, config.get(PHASE_SECTION, {})):
        for key in ("rank_pattern", "alpha_pattern"):
            yield from section.get(key) or {}


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return f"its configuration cannot be used: {what or type(error).__name__}"


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
