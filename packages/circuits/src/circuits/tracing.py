"""From a prompt to an attribution graph: linearise, score all neurons, keep the strong, trace edges, keep the strong.

1. `pose` runs the model once and freezes it; the metric's targets are the answer's logits (or the top logits).
2. RelP gives the total effect of every neuron on every target, and the conservation error, which must be small.
3. Neurons whose effect is above the threshold become nodes, or those found by following influence down from the
   targets (`circuits.expansion`); embeddings, biases and targets are nodes always.
4. One sweep gives all direct effects among them; the strongest become edges, the rest goes into each target's
   remainder. Another gives the effect of every token on each of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import Problem, pose
from circuits.describe import describe
from circuits.edges import DirectEffects, Neurons, direct_effects
from circuits.expansion import expand
from circuits.graph import (
    ATTN_BIAS,
    EMBEDDING,
    LOGIT,
    MLP_BIAS,
    NEURON,
    POSITION,
    Graph,
    Header,
    kept_share,
)
from circuits.maps import token_maps
from circuits.metric import Metric, MetricError, logit_difference, top_logits
from circuits.prune import Selection, select_edges, select_nodes
from circuits.relp import Relevance, relp
from circuits.rules import Rules
from circuits.selfcheck import TOLERANCE, require_conservation
from circuits.tasks import answer_token
from shared.experts import ExpertSizes
from shared.runs import config_hash

Select = Literal["effect", "influence"]

if TYPE_CHECKING:
    from shared.models import Model
    from shared.tokens import Message


def trace(
    model: "Model",
    prompt: "str | list[Message]",
    answer: str | None = None,
    wrong: str | None = None,
    *,
    top_k: int = 5,
    threshold: float = 0.005,
    max_nodes: int = 300,
    max_edges: int = 3000,
    select: Select = "effect",
    rules: Rules | None = None,
) -> Graph:
    """Trace the circuit of one prompt's next token and return its graph.

    With `answer` and `wrong` (single tokens, with their leading space) the target is their logit difference; without,
    the demeaned logits of the `top_k` most likely tokens. Nodes: with `select="effect"` those of at least `threshold`
    of a target's absolute value, the largest first; with "influence" the `max_nodes` most influential ones.
    """
    if (answer is None) != (wrong is None):
        raise MetricError("give both answer and wrong (a logit difference), or neither (the top logits)")
    pair = None
    if answer is not None and wrong is not None:
        pair = [answer_token(model.tokenizer, answer)], [answer_token(model.tokenizer, wrong)]

    def make_metric(logits_BTV: Tensor, positions_B: Tensor) -> Metric:
        if pair is not None:
            return logit_difference(logits_BTV, positions_B, *pair)
        return top_logits(logits_BTV, positions_B, top_k)

    problem = pose(model, model.encode([prompt]), make_metric, rules=rules)
    names = None if pair is None else [f"{answer} over {wrong}"]
    limits = {"threshold": threshold, "max_nodes": max_nodes, "max_edges": max_edges}
    return trace_problem(problem, 0, names, select=select, **limits)  # type: ignore[arg-type]


def trace_problem(
    problem: Problem,
    row: int = 0,
    target_names: Sequence[str] | None = None,
    *,
    threshold: float = 0.005,
    max_nodes: int = 300,
    max_edges: int = 3000,
    select: Select = "effect",
) -> Graph:
    """Return the graph of one example of a posed problem (its own prompt, zero reference)."""
    network = problem.network.row(row)
    keep_S = problem.network.real_BT[row].nonzero()[:, 0]
    metric = problem.metric.row(row, keep_S).needed()
    relevance = relp(network, metric)
    _check_conservation(problem, relevance)
    acts_LTN = torch.stack(network.neurons, dim=1)[0]
    totals_KLTN = relevance.sensitivity_BKLTN[0] * acts_LTN
    if select == "influence":
        mask_LTN = expand(network, metric, max_nodes)
        nodes = Selection(mask_LTN, kept_share(totals_KLTN.abs().sum(0), mask_LTN))
    else:
        nodes = select_nodes(totals_KLTN, relevance.ledger.value_BK[0], threshold, max_nodes)
    neurons = Neurons.from_mask(nodes.mask)
    effects = direct_effects(network, neurons, metric)
    builder = _Builder(neurons, acts_LTN, metric, relevance, effects, token_maps(network, neurons))
    header = _header(problem, row, metric, relevance, target_names)
    settings = {"select": select, "threshold": threshold, "max_nodes": max_nodes, "max_edges": max_edges}
    notes = describe(network, neurons, problem.model.tokenizer)
    return builder.build(header, settings, notes, nodes.mass_kept, max_edges)


def _check_conservation(problem: Problem, relevance: Relevance) -> None:
    if problem.network.rules == Rules():
        require_conservation(relevance.ledger.error(), TOLERANCE[problem.model.dtype])


class _Builder:
    """Lays out nodes (embeddings, positions, biases, neurons, targets) and the matrix of direct effects over them."""

    def __init__(
        self,
        neurons: Neurons,
        acts_LTN: Tensor,
        metric: Metric,
        relevance: Relevance,
        effects: DirectEffects,
        token_nT: Tensor,
    ) -> None:
        self.token_nT = token_nT
        self.neurons, self.effects, self.ledger, self.metric = neurons, effects, relevance.ledger, metric
        self.n_layers, self.n_positions, _ = acts_LTN.shape
        self.activation_n = neurons.gather(acts_LTN)
        self.total_nK = (relevance.sensitivity_BKLTN[0] * acts_LTN)[
            :, neurons.layer_n, neurons.position_n, neurons.index_n
        ].T
        self.parts: list[tuple[Tensor, ...]] = []
        self.blocks: list[Tensor] = []

    def build(
        self, header: Header, settings: dict, notes: list[str], node_mass: float, max_edges: int
    ) -> Graph:
        """Return the graph with its strongest edges; everything else flows into the remainders."""
        self._sources()
        n_before = sum(len(part[0]) for part in self.parts)
        self._add(
            NEURON,
            self.neurons.layer_n,
            self.neurons.position_n,
            self.neurons.index_n,
            self.activation_n,
            self.total_nK,
        )
        self.blocks.append(self.effects.neuron_Sn)
        weight_Ss = torch.cat(self.blocks, dim=1)
        self._targets()
        kind_n, layer_n, position_n, index_n, activation_n, total_nK = (
            torch.cat(column) for column in zip(*self.parts, strict=True)
        )
        edges = select_edges(self._strength(weight_Ss), max_edges)
        target_S, source_e = edges.mask.nonzero().T
        remainder_n, own_n = torch.zeros_like(activation_n), torch.zeros_like(activation_n)
        own_n[n_before:] = self.effects.own_S
        kept_S = weight_Ss.masked_fill(~edges.mask, 0.0).sum(1) + self.effects.own_S
        remainder_n[n_before:] = self.effects.inflow() - kept_S
        sources_nT = self.token_nT.new_zeros(n_before, self.n_positions)
        complete = replace(
            header,
            settings=settings,
            notes={str(n_before + node): note for node, note in enumerate(notes)},
            node_mass_kept=node_mass,
            edge_mass_kept=edges.mass_kept,
        )
        return Graph(
            header=complete,
            kind_n=kind_n,
            layer_n=layer_n,
            position_n=position_n,
            index_n=index_n,
            activation_n=activation_n,
            total_nK=total_nK,
            token_nT=torch.cat([sources_nT, self.token_nT, self.ledger.embed_BKT[0]]),
            own_n=own_n,
            remainder_n=remainder_n,
            source_e=source_e.contiguous(),
            target_e=target_S + n_before,
            weight_e=weight_Ss[edges.mask],
        )

    def _strength(self, weight_Ss: Tensor) -> Float[Tensor, "S s"]:
        """Return the share of the targets' value through each edge: |direct| times the target's effect per unit."""
        unit_n = self.total_nK.abs().sum(1) / self.activation_n.abs().clamp_min(
            torch.finfo(weight_Ss.dtype).tiny
        )
        unit_S = torch.cat([unit_n, torch.ones_like(self.effects.value_S[len(unit_n) :])])
        return weight_Ss.abs() * unit_S[:, None]

    def _sources(self) -> None:
        """Add token nodes, learned positions and biases where they are not zero everywhere."""
        ledger, effects = self.ledger, self.effects
        steps_T = torch.arange(self.n_positions, device=effects.embed_ST.device)
        bottom_T, zero_T = torch.full_like(steps_T, -1), torch.zeros_like(effects.embed_ST[0])
        self._add(EMBEDDING, bottom_T, steps_T, steps_T, zero_T, ledger.embed_BKT[0].T)
        self.blocks.append(effects.embed_ST)
        if effects.position_ST.any():
            self._add(POSITION, bottom_T, steps_T, steps_T, zero_T, ledger.position_BKT[0].T)
            self.blocks.append(effects.position_ST)
        for kind, effect_SLT, total_BKLT in (
            (ATTN_BIAS, effects.attn_bias_SLT, ledger.attn_bias_BKLT),
            (MLP_BIAS, effects.mlp_bias_SLT, ledger.mlp_bias_BKLT),
        ):
            for layer in range(self.n_layers):
                if effect_SLT[:, layer].any():
                    self._add(
                        kind,
                        torch.full_like(steps_T, layer),
                        steps_T,
                        steps_T,
                        zero_T,
                        total_BKLT[0, :, layer].T,
                    )
                    self.blocks.append(effect_SLT[:, layer])

    def _targets(self) -> None:
        values_K = self.ledger.value_BK[0]
        index_K = torch.arange(len(values_K), device=values_K.device)
        layer_K = torch.full_like(index_K, self.n_layers)
        self._add(LOGIT, layer_K, self.metric.positions_BK[0], index_K, values_K, torch.diag(values_K))

    def _add(
        self,
        kind: int,
        layer_n: Tensor,
        position_n: Tensor,
        index_n: Tensor,
        value_n: Tensor,
        total_nK: Tensor,
    ) -> None:
        self.parts.append((torch.full_like(layer_n, kind), layer_n, position_n, index_n, value_n, total_nK))


def _experts(model: "Model") -> list[ExpertSizes | None]:
    """Return every layer's experts, or nothing where no layer has any."""
    found = [model.architecture.experts(layer) for layer in range(model.architecture.n_layers)]
    return found if any(found) else []


def _header(
    problem: Problem, row: int, metric: Metric, relevance: Relevance, target_names: Sequence[str] | None
) -> Header:
    model, network = problem.model, problem.network
    real_T = network.real_BT[row]
    token_ids = network.input_ids_BT[row][real_T].tolist()
    probabilities_V = metric.gather(network.logits_BTV[row : row + 1][:, real_T])[0, 0].softmax(-1)
    tokens = list(metric.tokens[0])  # directions have none
    unnamed = [f"{metric.name} {number}" for number in range(metric.positions_BK.shape[1])]
    names = target_names or [model.tokenizer.decode([token]) for token in tokens] or unnamed
    return Header(
        prompt=model.tokenizer.decode(token_ids, skip_special_tokens=True),
        tokens=[model.tokenizer.decode([token]) for token in token_ids],
        token_ids=token_ids,
        targets=list(names),
        target_ids=tokens or [-1] * len(unnamed),
        foil_ids=metric.weights_BKV[0].argmin(-1).tolist() if metric.name == "logit difference" else [],
        target_values=relevance.ledger.value_BK[0].tolist(),
        target_probabilities=probabilities_V[tokens].tolist() or [0.0] * len(unnamed),
        metric=metric.name,
        model=model.config.name,
        fingerprint=model.fingerprint,
        n_layers=model.architecture.n_layers,
        n_neurons=model.architecture.n_neurons,
        rules=asdict(network.rules),
        tokenizer=config_hash(sorted(model.tokenizer.get_vocab().items())),
        dtype=str(model.dtype).removeprefix("torch."),
        experts=_experts(model),
        conservation_error=relevance.ledger.error(),
    )
