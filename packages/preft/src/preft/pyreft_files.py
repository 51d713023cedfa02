"""Checkpoints of pyreft (https://github.com/stanfordnlp/pyreft, saved by pyvene) as adapters.

A folder holds config.json and, for every intervention, intkey_KEY.bin, where KEY is its entry in `sorted_keys`:

    config.json    representations: [layer, component, unit, max_number_of_units, low_rank_dimension, ...] or by name;
                   intervention_types: "<class 'pyreft.interventions.LoreftIntervention'>"
    Loreft         weight (W), bias (b), rotate_layer (R^T, D x R)
    Direft         learned_source.weight, .bias; rotate_layer.parametrizations.weight.* (torch's orthogonal map)
    Noreft         learned_source.weight (W1), .bias (b); proj_layer.weight (W2), .bias (b2, if any)
    Nodireft       as Noreft; its b2 is never used

Every form becomes factors A = [inner | bias], B = R^T (`preft.adapters.Factors`):

    Loreft  W - R, b       Direft  W, b       Noreft  W1 - W2, b - b2       Nodireft  W1, b

The file does not say which tokens were edited (pyreft is told with every batch), nor the activation between the two
maps: the caller states the tokens, and only the linear activation, pyreft's default, is served. Dropout acts in
training only.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preft.adapter_config import AdapterConfig, AdapterError, Method
from preft.adapter_files import read_tensor_file
from preft.adapters import Adapter, Factors
from shared.architecture import Architecture
from shared.tokens import Phase

PYREFT_CONFIG = "config.json"
# What pyreft's position strings are as phases; "f1+l1" and the like are single prompt tokens.
POSITIONS = {"prompt": Phase.PREFILL, "all": Phase.ALL}
_FIELDS = [
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
]
Tensors = dict[str, Tensor]


class Site(NamedTuple):
    """One intervention of a checkpoint: its block, its class, its file."""

    layer: int
    method: Method
    file: Path


def is_pyreft(folder: Path | str) -> bool:
    """Whether a folder looks like a pyreft checkpoint."""
    return (Path(folder) / PYREFT_CONFIG).is_file() and any(Path(folder).glob("intkey_*.bin"))


def phase_of(positions: str) -> Phase:
    """The phase that pyreft's `positions` amount to; AdapterError where they are single tokens."""
    if positions not in POSITIONS:
        raise AdapterError(
            f"positions {positions!r} edits single tokens of the prompt, and an adapter acts on a whole phase: only "
            "'prompt' (every prompt token) and 'all' (generated tokens too) can be converted"
        )
    return POSITIONS[positions]


def load_pyreft(folder: Path | str, hf: nn.Module, positions: str) -> Adapter:
    """A pyreft checkpoint as an adapter of a model; AdapterError where it does something that no adapter does."""
    phase = phase_of(positions)
    sites = _sites(Path(folder))
    methods = sorted({site.method for site in sites})
    if len(methods) > 1:
        raise AdapterError(
            f"{folder} mixes interventions of kinds {', '.join(methods)}; convert them one kind at a time"
        )
    found = {site.layer: _factors(site) for site in sorted(sites)}
    architecture = Architecture(hf)
    ranks = [len(factors.A) for factors in found.values()]
    rank = mode(ranks)
    paths = {layer: architecture.block_path(layer) for layer in found}
    others = {re.escape(paths[layer]): r for layer, r in zip(found, ranks) if r != rank}
    config = AdapterConfig(methods[0], rank, phase, layers=tuple(found), rank_pattern=others)
    adapter = Adapter.create(hf, config)
    with torch.no_grad():
        for (path, delta), factors in zip(adapter.parts(), found.values()):
            if factors.A.shape != delta.factors().A.shape:
                raise AdapterError(
                    f"{folder}: the edit of {path} is {factors.B.shape[0]} wide, not as the model"
                )
            delta.load_(factors)
    return adapter


def _sites(folder: Path) -> list[Site]:
    try:
        config = json.loads((folder / PYREFT_CONFIG).read_text(encoding="utf-8"))
        entries = list(
            zip(config["representations"], config["intervention_types"], config["sorted_keys"], strict=True)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder} is no pyreft checkpoint: {type(error).__name__} {error}") from error
    if config.get("act_fn") not in (None, "linear"):
        raise AdapterError(f"{folder} uses act_fn={config['act_fn']!r}; only the linear one is served")
    sites = [_site(folder, *entry) for entry in entries]
    layers = [site.layer for site in sites]
    if not sites or len(set(layers)) < len(layers):
        raise AdapterError(
            f"{folder} must have one intervention a block, not {len(layers)} on blocks {sorted(set(layers))}"
        )
    return sites


def _site(folder: Path, representation: Any, kind: str, key: str) -> Site:
    given = representation if isinstance(representation, dict) else dict(zip(_FIELDS, representation))
    where = f"{folder}: intervention {key}"
    if given.get("component") != "block_output" or given.get("unit") != "pos":
        raise AdapterError(
            f"{where} acts on {given.get('component')} by {given.get('unit')}; only block_output by pos is served"
        )
    for name in ("subspace_partition", "intervention_link_key"):
        if given.get(name) is not None:
            raise AdapterError(f"{where} uses {name}, which no adapter has")
    name = kind.rpartition(".")[2].removesuffix("'>")
    if name not in _READERS:
        raise AdapterError(f"{where} is a {name}; {', '.join(_READERS)} can be converted")
    file = folder / f"intkey_{key}.bin"
    if not file.is_file():
        raise AdapterError(f"{where} has no file {file.name}")
    return Site(int(given["layer"]), _READERS[name][0], file)


def _factors(site: Site) -> Factors:
    tensors = {name: tensor.float() for name, tensor in read_tensor_file(site.file).items()}
    read = next(reader for method, reader in _READERS.values() if method == site.method)
    try:
        return read(tensors)
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{site.file} does not hold the tensors of its kind: {error}") from error


def _pair(inner_RD: Tensor, bias_R: Tensor, outer_DR: Tensor) -> Factors:
    return Factors(torch.cat([inner_RD, bias_R[:, None]], dim=1), outer_DR)


def _loreft(tensors: Tensors) -> Factors:
    return _pair(tensors["weight"] - tensors["rotate_layer"].T, tensors["bias"], tensors["rotate_layer"])


def _direft(tensors: Tensors) -> Factors:
    return _pair(tensors["learned_source.weight"], tensors["learned_source.bias"], _rotation(tensors))


def _noreft(tensors: Tensors) -> Factors:
    w1_RD, w2_RD = tensors["learned_source.weight"], tensors["proj_layer.weight"]
    bias_R = tensors["learned_source.bias"]
    return _pair(w1_RD - w2_RD, bias_R - tensors.get("proj_layer.bias", torch.zeros_like(bias_R)), w2_RD.T)


def _nodireft(tensors: Tensors) -> Factors:
    return _pair(
        tensors["learned_source.weight"], tensors["learned_source.bias"], tensors["proj_layer.weight"].T
    )


def _rotation(tensors: Tensors) -> Float[Tensor, "D R"]:
    """R^T out of the state of torch's orthogonal parametrisation, by that parametrisation itself."""
    prefix = "rotate_layer."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty_like(state["parametrizations.weight.original"]))
    torch.nn.init.orthogonal_(layer.weight)
    nn.utils.parametrizations.orthogonal(layer).load_state_dict(state)
    weight: Any = layer.weight
    return weight.detach()


_READERS: dict[str, tuple[Method, Callable[[Tensors], Factors]]] = {
    "LoreftIntervention": ("loreft", _loreft),
    "DireftIntervention": ("direft", _direft),
    "NoreftIntervention": ("noreft", _noreft),
    "NodireftIntervention": ("nodireft", _nodireft),
}
