"""An attribution graph: tokens, biases, neurons and logits as nodes, direct effects as edges, and a ledger that closes.

Columns, never positional lists. `activation` is a node's value (a token's relevance enters through its edges),
`total` its effect on each target, `token` the effect of each token's embedding on it (attribution map), `weight` of an
edge the direct effect (not normalised: divide by the target's activation for shares). `own` is what the biases of a
target itself add, `remainder` what it receives from sources that the graph leaves out, so that for every neuron and
logit

    sum of incoming weights + own + remainder = activation         (digest I2; `Graph.closure_error`)

and the graph always states what it keeps (`Graph.inflows`, the masses in the header). `Graph.keep` cuts nodes and
edges so that this stays true.

Saved as graph.json (format version, model, rules, metric, prompt, masses, labels, hashes of model, tokenizer, rules and
prompt) and graph.safetensors (the columns): lossless both ways, and refused where the version, a hash, the header or a
column is not what this release writes.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.config import ConfigError, to_dataclass
from shared.errors import UserError
from shared.experts import ExpertSizes
from shared.runs import config_hash
from shared.serialize import atomic_path, read_json, write_json

FORMAT_VERSION = 2
KINDS = ("embedding", "position", "attn_bias", "mlp_bias", "neuron", "logit")
EMBEDDING, POSITION, ATTN_BIAS, MLP_BIAS, NEURON, LOGIT = range(len(KINDS))


class GraphError(UserError):
    """A graph file that this release cannot read; the message says why."""


@dataclass(frozen=True)
class Header:
    """What a graph was made from and how: everything that is not a column."""

    prompt: str
    tokens: list[str]
    token_ids: list[int]
    targets: list[str]
    target_ids: list[int]
    target_values: list[float]
    target_probabilities: list[float]
    metric: str
    model: str
    fingerprint: str
    n_layers: int
    n_neurons: int
    rules: dict[str, Any]
    tokenizer: str = ""  # hash of its vocabulary
    dtype: str = "float32"
    experts: list[ExpertSizes | None] = field(
        default_factory=list
    )  # by layer; empty where all MLPs are dense
    reference: str = "zero"
    foil_ids: list[int] = field(default_factory=list)  # of a logit difference: the token it is taken from
    settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(
        default_factory=dict
    )  # by node number: what a neuron writes to the vocabulary
    conservation_error: float = 0.0
    node_mass_kept: float = 1.0
    edge_mass_kept: float = 1.0
    version: int = FORMAT_VERSION

    def neuron_name(self, layer: int, index: int) -> str:
        """Return a neuron's name within its layer: `N153`, or `E2/N17` in a mixture of experts."""
        experts = self.experts[layer] if self.experts else None
        return experts.name(index) if experts else f"N{index}"

    def hashes(self) -> dict[str, str]:
        """Return what identifies a graph's origin: hashes of model, tokenizer, rules and prompt."""
        return {
            "model": self.fingerprint,
            "tokenizer": self.tokenizer,
            "rules": config_hash(self.rules),
            "prompt": config_hash([self.prompt, self.token_ids]),
        }


class Inflows(NamedTuple):
    """What every node receives, by origin: kept edges of tokens and neurons, biases (own and as nodes), left out."""

    kept_n: Float[Tensor, " n"]
    bias_n: Float[Tensor, " n"]
    remainder_n: Float[Tensor, " n"]


@dataclass(frozen=True)
class Graph:
    """Node columns (n), edge columns (e) and the header; totals have one entry for each of K targets."""

    header: Header
    kind_n: Int[Tensor, " n"]
    layer_n: Int[Tensor, " n"]
    position_n: Int[Tensor, " n"]
    index_n: Int[Tensor, " n"]
    activation_n: Float[Tensor, " n"]
    total_nK: Float[Tensor, "n K"]
    token_nT: Float[Tensor, "n T"]
    own_n: Float[Tensor, " n"]
    remainder_n: Float[Tensor, " n"]
    source_e: Int[Tensor, " e"]
    target_e: Int[Tensor, " e"]
    weight_e: Float[Tensor, " e"]

    def __len__(self) -> int:
        return len(self.kind_n)

    @property
    def n_edges(self) -> int:
        """Number of edges kept."""
        return len(self.weight_e)

    def columns(self) -> dict[str, Tensor]:
        """Return all columns by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "header"}

    def neurons(self) -> list[tuple[int, int, int]]:
        """Return (layer, position, neuron) of every neuron node."""
        chosen = self.kind_n == NEURON
        columns = (self.layer_n[chosen], self.position_n[chosen], self.index_n[chosen])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def strongest(self, k: int) -> list[tuple[int, int, int]]:
        """Return the k neurons (layer, position, neuron) of largest absolute effect over the targets."""
        columns = (self.layer_n, self.position_n, self.index_n)
        rows = torch.stack(columns, dim=1)[self.strongest_numbers(k)].tolist()
        return [(layer, position, neuron) for layer, position, neuron in rows]

    def strongest_numbers(self, k: int) -> list[int]:
        """Return the node numbers of `strongest`."""
        numbers_n = (self.kind_n == NEURON).nonzero()[:, 0]
        strength_n = self.total_nK[numbers_n].abs().sum(1)
        return numbers_n[strength_n.argsort(descending=True)[:k]].tolist()

    def inflows(self) -> Inflows:
        """Return what every node receives from kept sources, from biases, and from what the graph leaves out."""
        biases_e = (self.kind_n[self.source_e] == ATTN_BIAS) | (self.kind_n[self.source_e] == MLP_BIAS)
        none_n = torch.zeros_like(self.own_n)
        kept_n = none_n.index_add(0, self.target_e, self.weight_e.masked_fill(biases_e, 0.0))
        bias_n = self.own_n.index_add(0, self.target_e, self.weight_e.masked_fill(~biases_e, 0.0))
        return Inflows(kept_n, bias_n, self.remainder_n)

    def inflow(self) -> Float[Tensor, " n"]:
        """Return the sum of incoming weights, own biases and remainder of every node."""
        return torch.stack(self.inflows()).sum(0)

    def strength_e(self) -> Float[Tensor, " e"]:
        """Return the share of the targets' value through each edge: |direct| times the target's effect per unit."""
        return self.weight_e.abs() * unit_effects(self)[self.target_e]

    def closure_error(self) -> float:
        """Return the worst |inflow - activation| over neurons and logits, relative to the absolute in-flow."""
        received = (self.kind_n == NEURON) | (self.kind_n == LOGIT)
        scale_n = self.remainder_n.abs() + self.own_n.abs()
        scale_n = scale_n.index_add_(0, self.target_e, self.weight_e.abs())
        scale_n = torch.maximum(scale_n, self.activation_n.abs()).clamp_min(torch.finfo(scale_n.dtype).tiny)
        error_n = (self.inflow() - self.activation_n).abs() / scale_n
        return float(error_n[received].max()) if received.any() else 0.0

    def keep(self, nodes_n: Bool[Tensor, " n"], edges_e: Bool[Tensor, " e"] | None = None) -> "Graph":
        """Return the graph of some nodes, and of some edges among them; what is cut goes to the remainders.

        The header's masses become shares of what they were: of the neurons' absolute effect, and of the edges'.
        """
        kept_e = nodes_n[self.source_e] & nodes_n[self.target_e]
        kept_e = kept_e if edges_e is None else kept_e & edges_e
        number_n = nodes_n.cumsum(0) - 1
        cut_n = torch.zeros_like(self.own_n).index_add(
            0, self.target_e, self.weight_e.masked_fill(kept_e, 0.0)
        )
        columns = {name: column[nodes_n] for name, column in self.columns().items() if column_of(name) == "n"}
        columns |= {name: column[kept_e] for name, column in self.columns().items() if column_of(name) == "e"}
        columns["remainder_n"] = (self.remainder_n + cut_n)[nodes_n]
        for end in ("source_e", "target_e"):
            columns[end] = number_n[columns[end]]
        effect_n = self.total_nK.abs().sum(1).masked_fill(self.kind_n != NEURON, 0.0)
        kept_notes = {
            str(int(number_n[int(node)])): note
            for node, note in self.header.notes.items()
            if bool(nodes_n[int(node)])
        }
        header = replace(
            self.header,
            notes=kept_notes,
            node_mass_kept=self.header.node_mass_kept * kept_share(effect_n, nodes_n),
            edge_mass_kept=self.header.edge_mass_kept * kept_share(self.strength_e(), kept_e),
        )
        return Graph(header=header, **columns)

    def label(self, node: int) -> str:
        """Return a node's short name: `Dallas` for a token, `L2/N153+` for a neuron, the target for a logit."""
        kind, layer, index = (int(column[node]) for column in (self.kind_n, self.layer_n, self.index_n))
        if kind == NEURON:
            sign = "+" if self.activation_n[node] >= 0 else "-"
            return f"L{layer}/{self.header.neuron_name(layer, index)}{sign}"
        if kind == LOGIT:
            return self.header.targets[index]
        token = self.header.tokens[int(self.position_n[node])]
        return token if kind == EMBEDDING else f"{KINDS[kind]} L{layer} @ {token}".replace(" L-1", "")

    def save(self, folder: Path | str) -> Path:
        """Write graph.json and graph.safetensors into the folder; returns the folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "graph.safetensors") as partial:
            save_file({name: column.contiguous().cpu() for name, column in self.columns().items()}, partial)
        write_json(folder / "graph.json", asdict(self.header) | {"hashes": self.header.hashes()})
        return folder


def column_of(name: str) -> str:
    """Return whether a column is one of nodes (`n`) or of edges (`e`), by its name's suffix."""
    return name.rsplit("_", 1)[1][0]


def kept_share(sizes: Tensor, mask: Tensor) -> float:
    """Return the share of the summed sizes that a mask keeps (1 where there is nothing)."""
    total = sizes.sum()
    return float(sizes[mask].sum() / total) if total > 0 else 1.0


def unit_effects(graph: Graph) -> Float[Tensor, " n"]:
    """Return every node's absolute effect on the targets for one unit of its activation (1 for a target itself)."""
    tiny = torch.finfo(graph.activation_n.dtype).tiny
    unit_n = graph.total_nK.abs().sum(1) / graph.activation_n.abs().clamp_min(tiny)
    return unit_n.masked_fill(graph.kind_n == LOGIT, 1.0)


def load_graph(folder: Path | str) -> Graph:
    """Read a graph written by `Graph.save`; GraphError says what is wrong with the files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "graph.json").exists() or not (folder / "graph.safetensors").exists():
        raise GraphError(
            f"{folder} holds no graph: graph.json and graph.safetensors are written by Graph.save"
        )
    header = _read_header(folder / "graph.json")
    try:
        columns = load_file(folder / "graph.safetensors")
    except SafetensorError as error:
        raise GraphError(f"{folder / 'graph.safetensors'} is damaged ({error}): trace it again") from error
    expected = {item.name for item in fields(Graph)} - {"header"}
    if set(columns) != expected:
        raise GraphError(f"{folder}: columns {sorted(columns)}, expected {sorted(expected)}")
    return Graph(header=header, **columns)


def _check_version(path: Path, version: object) -> None:
    if version == FORMAT_VERSION:
        return
    if isinstance(version, int) and version > FORMAT_VERSION:
        advice = "update this package to read it"
    else:
        advice = f"trace again with `circuits trace --out {path.parent} ...`"
    raise GraphError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}: {advice}")


def _read_header(path: Path) -> Header:
    try:
        content = read_json(path)
    except ValueError as error:
        raise GraphError(f"{path} is not JSON: {error}") from error
    _check_version(path, content.get("version") if isinstance(content, dict) else None)
    hashes = content.pop("hashes", None)
    try:
        header = to_dataclass(Header, content)
    except ConfigError as error:
        raise GraphError(f"{path}: {error}") from error
    wrong = [name for name, value in header.hashes().items() if not hashes or hashes.get(name) != value]
    if wrong:
        raise GraphError(
            f"{path}: the hash of the {wrong[0]} does not fit; the file was changed: trace it again"
        )
    return header
