"""Read and edit activations at named sites: two context managers over nnsight.

    with capture(model, ["blocks.2.output"]) as acts, edit(model, [Add("blocks.1.output", vector)]):
        logits_BTV = model(batch)

1. The context managers only note what is wanted; the model is not touched.
2. A call of the model turns the active captures and edits into a plan: module locations in execution order, and at each
   location its sites with their edits (in the order given, already restricted to tokens) and captures.
3. One nnsight trace runs the model; its block walks the plan: read the module's value, cut out each site, edit, keep,
   put back. Nothing is registered on the modules, so nothing has to be undone, also not after an exception.

A capture sees the value after all edits at its site. Captured tensors are part of autograd's graph when gradients are
enabled. Generation runs one such trace a step (`shared.decoding`), with masks for the tokens of that step; captures
are then joined along the token dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared.architecture import Architecture, Slot, check_sites
from shared.errors import UserError
from shared.experts import listening
from shared.interventions import Intervention, check_fit
from shared.tokens import TokenBatch

if TYPE_CHECKING:
    from shared.models import Model


class Activations(Mapping[str, Tensor]):
    """What a capture has seen in the latest call of the model: site name to tensor (B T X)."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.sites = list(sites)
        self._parts: dict[str, list[Tensor]] = {}

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise KeyError(f"{site} is not captured here; captured are {', '.join(self.sites)}")
        if site not in self._parts:
            raise UserError(f"{site} has not been captured yet: call the model inside the capture first.")
        parts = self._parts[site]
        if len(parts) > 1:  # one part a generation step
            self._parts[site] = parts = [torch.cat(parts, dim=1)]
        return parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def clear(self) -> None:
        """Forget what was seen; the model does this at the start of every call."""
        self._parts = {}

    def add(self, site: str, value: Tensor) -> None:
        """Note one more stretch of tokens of a site."""
        self._parts.setdefault(site, []).append(value)


@dataclass
class ActiveHooks:
    """Captures and edits that are open on one model, in the order they were opened."""

    captures: list[Activations] = field(default_factory=list)
    edits: list[list[Intervention]] = field(default_factory=list)

    def sites(self) -> set[str]:
        """All sites that are captured or edited."""
        captured = {site for capture in self.captures for site in capture.sites}
        return captured | {one.site for group in self.edits for one in group}

    def begin(self) -> None:
        """Start of a call: earlier captures are forgotten."""
        for capture in self.captures:
            capture.clear()


@contextmanager
def capture(model: Model, sites: Iterable[str]) -> Iterator[Activations]:
    """Keep the tensors of `sites` for every call of the model inside; `SiteError` for an unknown site."""
    activations = Activations(check_sites(model.architecture, sites))
    model.active.captures.append(activations)
    try:
        yield activations
    finally:
        _remove(model.active.captures, activations)


@contextmanager
def edit(model: Model, interventions: Intervention | Iterable[Intervention]) -> Iterator[None]:
    """Apply interventions in every call of the model inside, in the order given.

    Raises:
        InterventionError, SiteError: one does not fit the model; nothing has run then.
    """
    chosen = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for intervention in chosen:
        check_fit(intervention, model.architecture)
    model.active.edits.append(chosen)
    try:
        yield
    finally:
        _remove(model.active.edits, chosen)


@dataclass(frozen=True)
class Step:
    """One site at one location: its slot, the edits with their token masks, and whether it is captured."""

    site: str
    slot: Slot
    edits: list[tuple[Intervention, Bool[Tensor, "B T"]]]
    captured: bool


Plan = list[list[Step]]  # locations in execution order, each with its steps


def make_plan(architecture: Architecture, active: ActiveHooks, batch: TokenBatch) -> Plan:
    """Active captures and edits as locations in execution order; edits without a token in the batch are left out."""
    edits: dict[str, list[tuple[Intervention, Tensor]]] = {}
    for intervention in (one for group in active.edits for one in group):
        mask_BT = token_mask(intervention, batch)
        if mask_BT.any():
            edits.setdefault(_canonical(intervention.site), []).append((intervention, mask_BT))
    captured = {_canonical(site) for capture in active.captures for site in capture.sites}
    locations: dict[tuple[str, str], list[Step]] = {}
    slots = {site: architecture.slot(site) for site in {*captured, *edits}}
    for site, slot in sorted(slots.items(), key=lambda item: item[1].rank):
        step = Step(site, slot, edits.get(site, []), site in captured)
        locations.setdefault((slot.path, slot.side), []).append(step)
    return list(locations.values())


def token_mask(intervention: Intervention, batch: TokenBatch) -> Bool[Tensor, "B T"]:
    """The tokens of a batch that an intervention acts on: its phase, and its positions within it."""
    mask_BT = batch.phase_mask(intervention.phase)
    if intervention.positions is None:
        return mask_BT
    n = (
        batch.prompt_lengths_B[:, None]
        if batch.token_prompt_lengths_BT is None
        else batch.token_prompt_lengths_BT
    )
    return mask_BT & _at(intervention.positions, batch.position_ids_BT, n)


def run(model: Model, batch: TokenBatch, **inputs: Any) -> Any:
    """One forward pass of the Hugging Face model on `inputs` under the active hooks; returns its output.

    `batch` describes the tokens of this pass (positions, prompt lengths), for the masks of the edits.
    """
    plan = make_plan(model.architecture, model.active, batch)
    if not plan and not model.config.remote:
        return model.hf(**inputs)
    kept, output = traced(model.lm, plan, inputs, model.config.remote)
    for activations in model.active.captures:
        for site in activations.sites:
            activations.add(site, kept[_canonical(site)])
    return output


def forward_inputs(batch: TokenBatch) -> dict[str, Any]:
    """Arguments of one full forward pass over a batch, without a cache."""
    return {
        "input_ids": batch.input_ids_BT,
        "position_ids": batch.position_ids_BT,
        # Packed rows: without a padding mask transformers derives the documents from the restarting positions.
        "attention_mask": None if batch.packed else batch.attention_mask_BT,
        "use_cache": False,
    }


def traced(
    lm: Any, plan: Plan, inputs: dict[str, Any], remote: bool | str = False
) -> tuple[dict[str, Tensor], Any]:
    """Run one nnsight trace that walks the plan; returns captured tensors by site, and the model's output.

    `remote` True sends the trace to NDIF; "local" goes through the same serialisation on this machine.
    """
    import nnsight

    paths = [steps[0].slot.path for steps in plan]
    with listening(lm._module, paths), lm.trace(**inputs, **({"remote": remote} if remote else {})) as tracer:
        kept = nnsight.save(walk(lm, plan))
        output = nnsight.save(tracer.result)
    return kept, output


def walk(lm: Any, plan: Plan) -> dict[str, Tensor]:
    """Inside a trace: visit every location in execution order, edit and keep its sites."""
    kept: dict[str, Tensor] = {}
    for steps in plan:
        slot = steps[0].slot
        envoy = lm.get(slot.path) if slot.path else lm
        value = envoy.input if slot.side == "input" else envoy.output
        changed = False
        for step in steps:
            tensor = step.slot.take(value)
            for intervention, mask_BT in step.edits:
                tensor = intervention.apply(tensor, mask_BT)
            if step.edits:
                value, changed = step.slot.put(value, tensor), True
            if step.captured:
                kept[step.site] = tensor
        if changed and slot.side == "input":
            envoy.input = value
        elif changed:
            envoy.output = value
    return kept


def _canonical(site: str) -> str:
    return "blocks.0.input" if site == "embed" else site


def _at(
    positions: Sequence[int], position_ids_BT: Int[Tensor, "B T"], n: Int[Tensor, "B _"]
) -> Bool[Tensor, "B T"]:
    found_BT = torch.zeros_like(position_ids_BT, dtype=torch.bool)
    for position in positions:
        found_BT |= position_ids_BT == (position if position >= 0 else n + position)
    return found_BT


def _remove(items: list[Any], item: Any) -> None:
    """Take out one object by identity (edits hold tensors, which do not compare)."""
    index = next(i for i, other in enumerate(items) if other is item)
    del items[index]
