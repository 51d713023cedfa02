"""Saved interventions of the residual stream as adapters: an edit that is affine in h is a low-rank update on (h, 1).

    Add       h + s v                    rank 1              A = [0 | 1]           B = s v
    LowRank   h + s (B (A h) + c)        rank R (+1)         A = [A | 0; 0 | 1]    B = s [B, c]
    Scale     h_i f_i       (i chosen)   as many as chosen   A = [e_i | 0]         B = (f_i - 1) e_i
    Set       h_i := v_i    (i chosen)   as many as chosen   A = [-e_i | v_i]      B = e_i
    Ablate    h_i := mean_i (i chosen)   the same with v_i = mean_i or 0

Edits at one block act one after the other, as `shared.hooks.edit` applies them: with d1 = B1 A1 (h, 1) the second
computes A2 (h + d1, 1), so that together A = [A1; A2 + A2' B1 A1], B = [B1, B2], A2' being A2 without its last column.
That is done for each kind of token with the edits whose phase holds it.

Not served, and refused by name: other sites than `blocks.L.output`, edits at chosen positions, a mean for every
position, Interchange, and edits of more coordinates than the highest rank of vLLM.
"""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from preft.adapters import AdapterError, Factors
from preft.parts import Shape, Source, Update
from preft.vllm.mapping import KINDS, Kind
from preft.vllm.residual import SITE
from shared.families import FAMILIES
from shared.generation.vllm_arguments import LORA_RANKS
from shared.intervention_files import read
from shared.interventions import Ablate, Add, Intervention, LowRank, Scale, Set
from shared.tokens import Phase


def read_interventions(folder: Path | str) -> Source:
    """The updates of a folder of interventions; UserError names an edit that cannot be served exactly."""
    saved = read(folder)
    shape = Shape(saved.model["n_layers"], saved.model["width"])
    by_kind: list[Update] = [{} for _ in Kind]
    for number, intervention in enumerate(saved.interventions):
        if intervention.indices == ():
            continue  # no coordinate: an exact no-op
        where = f"intervention {number} ({type(intervention).__name__} at {intervention.site})"
        block = _block(intervention.site, saved.model["family"], shape, where)
        factors = affine(intervention, shape.width, where)
        for kind in Kind:
            if KINDS[Phase(intervention.phase)][kind]:
                update = by_kind[kind]
                update[block] = chained(update[block], factors) if block in update else factors
        _check_ranks(by_kind)  # each time: what is refused must not grow first
    return Source(tuple(by_kind), None, saved.model["name"], saved.model["fingerprint"], shape)


def _block(site: str, family: str, shape: Shape, where: str) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.output", site)
    if match is None or int(match[1]) >= shape.n_layers:
        raise AdapterError(
            f"{where}: only edits of blocks.0.output to blocks.{shape.n_layers - 1}.output are served"
        )
    return f"{FAMILIES[family].layers}.{match[1]}.{SITE}"


def _check_ranks(by_kind: list[Update]) -> None:
    rank = max((len(factors.A) for update in by_kind for factors in update.values()), default=0)
    if rank > LORA_RANKS[-1]:
        raise AdapterError(
            f"the interventions need rank {rank} at one block; vLLM serves at most {LORA_RANKS[-1]}. Choose fewer "
            "indices"
        )


def chained(first: Factors, second: Factors) -> Factors:
    """One update that does what `first` and then `second` do at one site, both on (h, 1)."""
    seen = second.A + second.A[:, :-1] @ first.B @ first.A
    return Factors(torch.cat([first.A, seen]), torch.cat([first.B, second.B], dim=1))


def affine(intervention: Intervention, width: int, where: str) -> Factors:
    """A (R x D+1) and B (D x R) of an edit of a stream of `width`; AdapterError where it is not affine in h alone."""
    if intervention.positions is not None:
        raise AdapterError(f"{where}: edits at chosen positions are not served; choose a phase instead")
    if intervention.width() not in (None, width, len(intervention.indices or ())):
        raise AdapterError(f"{where}: made for size {intervention.width()}, the stream has {width}")
    chosen = (
        torch.arange(width) if intervention.indices is None else torch.tensor(intervention.indices).long()
    )
    match intervention:
        case Add():
            return _add(intervention, width, chosen)
        case LowRank() if intervention.indices is None:
            return _low_rank(intervention)
        case Scale():
            return _diagonal(
                _spread(intervention.factor, chosen) - 1, torch.zeros(len(chosen)), chosen, width
            )
        case Set():
            value = _spread(intervention.value, chosen)
            return _diagonal(-torch.ones(len(chosen)), value, chosen, width)
        case Ablate() if intervention.mean is None or intervention.mean.ndim == 1:
            value = _spread(0.0 if intervention.mean is None else intervention.mean, chosen)
            return _diagonal(-torch.ones(len(chosen)), value, chosen, width)
    raise AdapterError(f"{where} is not a function of the token's own activation; it is not served")


def _add(edit: Add, width: int, chosen: Tensor) -> Factors:
    constant = torch.zeros(1, width + 1)
    constant[0, -1] = 1
    vector = torch.zeros(width, 1)
    vector[chosen, 0] = edit.strength * _spread(edit.vector_D, chosen)
    return Factors(constant, vector)


def _low_rank(edit: LowRank) -> Factors:
    linear = torch.cat([edit.A_RD.float(), torch.zeros(len(edit.A_RD), 1)], dim=1)
    factors = Factors(linear, edit.strength * edit.B_DR.float())
    if edit.bias_D is None:
        return factors
    constant = _add(
        Add(edit.site, edit.bias_D, edit.strength), len(edit.bias_D), torch.arange(len(edit.bias_D))
    )
    return Factors(torch.cat([factors.A, constant.A]), torch.cat([factors.B, constant.B], dim=1))


def _diagonal(
    slope_I: Float[Tensor, " I"], constant_I: Float[Tensor, " I"], chosen: Tensor, width: int
) -> Factors:
    """h_i + slope_i h_i + constant_i at the I chosen coordinates, one rank each."""
    rows = torch.arange(len(chosen))
    A, B = torch.zeros(len(chosen), width + 1), torch.zeros(width, len(chosen))
    A[rows, chosen], A[rows, -1] = slope_I, constant_I
    B[chosen, rows] = 1
    return Factors(A, B)


def _spread(value: float | Tensor, chosen: Tensor) -> Float[Tensor, " I"]:
    """One value for each chosen coordinate, given as a number, for these coordinates or for the whole stream."""
    if not isinstance(value, Tensor):
        return torch.full((len(chosen),), float(value))
    return value.float() if len(value) == len(chosen) else value.float()[chosen]


__all__ = ["affine", "chained", "read_interventions"]
