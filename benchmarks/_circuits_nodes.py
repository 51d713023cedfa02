"""What node scores cost: in forward passes, beside integrated gradients, in batches, and in memory on a long prompt.

Times are CPU time of the process (ratios of them are those of wall time on one thread, and hold on a busy machine).

nodes_over_forward              pose + RelP of every neuron, over one forward pass of the bare model: at most 3
ig10_over_relp                  IG on activations with ten steps over RelP: at least 10
ig10_inputs_over_relp           IG on inputs with ten steps over RelP (one path for all layers)
batch8_over_batch1_per_prompt   RelP of 8 prompts at once over 8 single ones, per prompt: at most 1
tokens_doubled                  RelP of prompts twice as long
long_prompt_peak_gib            peak of a process that scores all neurons of a 4,096-token prompt and traces the
                                direct effects on 300 of them, model and libraries included: under 6
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _circuits_models import prompts, random_llama

from circuits.attribution import attribute, pose
from circuits.memory import GIB, estimate
from circuits.metric import Metric, logit_difference, top_logits
from shared.models import Model
from shared.tokens import TokenBatch

TARGETS = {
    "nodes_over_forward": ("<=", 3.0),
    "ig10_over_relp": (">=", 10.0),
    "batch8_over_batch1_per_prompt": ("<=", 1.0),
    "long_prompt_peak_gib": ("<", 6.0),
}
PROMPT, BATCH, SHORT, LONG, EDGE_TARGETS = 128, 8, 24, 4096, 300  # SHORT: for integrated gradients


def one_target(logits_BTV: torch.Tensor, positions_B: torch.Tensor) -> Metric:
    """The largest logit over another one."""
    rows = len(positions_B)
    return logit_difference(logits_BTV, positions_B, [7] * rows, [11] * rows)


def seconds(run: Callable[[], object]) -> float:
    """Time of one call: CPU time of this process, which other work on the machine does not stretch."""
    start = time.process_time()
    run()
    return time.process_time() - start


def scores(model: Model, batch: TokenBatch, estimator: str = "relp") -> torch.Tensor:
    """All neuron scores of a batch, the pass of the model included."""
    return attribute(pose(model, batch, one_target), estimator)


def forward(model: Model, batch: TokenBatch) -> None:
    """One forward pass of the bare Hugging Face model."""
    with torch.no_grad():
        model(batch)


def sides(model: Model) -> dict[str, Callable[[], object]]:
    """The sides that every round runs one after the other."""
    eight, one, short = (prompts(model, n, t) for n, t in ((BATCH, PROMPT), (1, PROMPT), (1, SHORT)))
    twice = prompts(model, BATCH, 2 * PROMPT)
    return {
        "forward8": lambda: forward(model, eight),
        "relp8": lambda: scores(model, eight),
        "relp1": lambda: scores(model, one),
        "relp8_twice": lambda: scores(model, twice),
        "relp_short": lambda: scores(model, short),
        "ig_inputs_short": lambda: scores(model, short, "ig_inputs"),
    }


def measure(rounds: int, ig_rounds: int = 2) -> list[dict[str, float]]:
    """Return the ratios of every round; the slow estimator runs in the first `ig_rounds` only."""
    model = random_llama("small")
    calls = sides(model)
    for name in ("forward8", "relp8", "relp1", "relp_short"):  # warm up
        calls[name]()
    short = prompts(model, 1, SHORT)
    results = []
    for number in range(rounds):
        took = {name: seconds(run) for name, run in calls.items()}
        ratios = {
            "nodes_over_forward": took["relp8"] / took["forward8"],
            "batch8_over_batch1_per_prompt": took["relp8"] / BATCH / took["relp1"],
            "tokens_doubled": took["relp8_twice"] / took["relp8"],
            "ig10_inputs_over_relp": took["ig_inputs_short"] / took["relp_short"],
        }
        if number < ig_rounds:
            slow_s = seconds(lambda: scores(model, short, "ig_activations"))
            ratios["ig10_over_relp"] = slow_s / took["relp_short"]
        results.append(ratios)
    return results


def long_prompt_peak() -> dict[str, float]:
    """Run the long prompt in a process of its own; its peak resident memory and its seconds."""
    command = [sys.executable, str(Path(__file__).with_name("circuits_speed.py")), "--long-prompt"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def run_long_prompt() -> dict[str, float]:
    """Score all neurons of one long prompt, then trace direct effects on neurons spread over layers and positions."""
    import resource

    from _circuits_edges import spread

    from circuits.edges import direct_effects

    model = random_llama("small")
    start = time.process_time()
    problem = pose(model, prompts(model, 1, LONG), lambda logits, at: top_logits(logits, at, 1))
    node_scores_BKLTN = attribute(problem, "relp")
    nodes_s = time.process_time() - start
    assert node_scores_BKLTN.isfinite().all()
    effects = direct_effects(problem.network, spread(model, EDGE_TARGETS, LONG), problem.metric)
    miss_S = (effects.inflow() - effects.value_S).abs()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "long_prompt_peak_gib": peak_kib / 2**20,
        "nodes_s": nodes_s,
        "edges_s": time.process_time() - start - nodes_s,
        "worst_inflow_error": float(miss_S.max()),
        "long_prompt_estimate_gib": estimate(model, 1, LONG).total / GIB,
    }
