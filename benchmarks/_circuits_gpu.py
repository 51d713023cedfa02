"""Nodes and edges of Llama-3.1-8B's shape on one GPU: random weights, bf16, 40-token prompts, five logits, 300 nodes.

Seconds a prompt and peak memory of nodes and of edges apart, the median of a few prompts. A random model says nothing
about circuits; its arithmetic is the real model's. (The paper's group reports 10.0 s and 22.1 GB for its later release
on an H100, with batches of four.)
"""

import time

import torch
from _circuits_models import prompts, random_llama

from circuits.attribution import attribute, pose
from circuits.edges import Neurons, direct_effects
from circuits.metric import top_logits
from circuits.prune import select_nodes
from circuits.relp import relp
from shared.models import Model
from shared.tokens import TokenBatch

PROMPT, LOGITS, NODES = 40, 5, 300


def measure(rounds: int = 5) -> list[dict[str, float]]:
    """Seconds and peak GiB of every prompt, after one to warm up."""
    model = random_llama("llama-3.1-8b", "bfloat16", "cuda")
    return [_trace(model, prompts(model, 1, PROMPT, seed)) for seed in range(rounds + 1)][1:]


def _trace(model: Model, batch: TokenBatch) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    start = _now()
    problem = pose(model, batch, lambda logits, at: top_logits(logits, at, LOGITS))
    totals_KLTN = attribute(problem, "relp")[0]
    nodes_s, nodes_gib = _now() - start, _peak_gib()
    values_K = relp(problem.network, problem.metric).ledger.value_BK[0]
    neurons = Neurons.from_mask(select_nodes(totals_KLTN, values_K, 0.0, NODES).mask)
    torch.cuda.reset_peak_memory_stats()
    start = _now()
    direct_effects(problem.network, neurons, problem.metric)
    return {
        "gpu_nodes_s": nodes_s,
        "gpu_nodes_peak_gib": nodes_gib,
        "gpu_edges_s": _now() - start,
        "gpu_edges_peak_gib": _peak_gib(),
        "gpu_kept_nodes": float(len(neurons)),
    }


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30
