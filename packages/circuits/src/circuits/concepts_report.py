"""The report's parts about concepts: supernodes, hypotheses, steering, and the steps of the capitals question."""

from collections.abc import Mapping, Sequence
from typing import Any

from circuits.hypotheses import Finding, tag_groups
from circuits.merge import AlwaysOn
from circuits.supernodes import Supernodes
from circuits.sweeps import SweepPoint
from shared.runs import Run


def report_supernodes(content: Supernodes, run: Run) -> None:
    """Add what the clusters hear and say, and how stable and how complete they are."""
    best = next(one for one in content.stability if one.number == content.number)
    run.report.text(
        f"{content.number} supernodes from {content.contexts} training prompts, their number the most stable between "
        f"halves of these (ARI {best.ari:.2f}; shuffled {best.ari_shuffled:.2f}; with the layers "
        f"{best.ari_layers:.2f}). Their neurons hold {content.coverage or 0:.0%} of the contribution on test prompts."
    )
    rows = zip(content.supernodes, content.support, strict=True)
    run.report.table(
        [
            {"supernode": one.label, "neurons": len(one.nodes), "contexts a pair": round(seen or 0.0, 1)}
            for one, seen in rows
        ],
        "Supernodes: the words they hear -> the words they say.",
    )


def report_findings(findings: Sequence[Finding], run: Run) -> None:
    """Add how many hypotheses were selected and hold, and the largest groups of neurons with the same tags."""
    holding = sum(finding.holds for finding in findings)
    run.report.text(
        f"{len(findings)} pairs of neuron and class were selected on training prompts, {holding} hold on test prompts "
        "(q at most .05 and AUROC still beyond the threshold)."
    )
    groups = [
        {"tags": ", ".join(tags), "neurons": ", ".join(map(str, neurons[:8]))}
        for tags, neurons in list(tag_groups(findings).items())[:12]
    ]
    if groups:
        run.report.table(groups, "Neurons by the classes that they stand for.")


def report_sweep(name: str, points: Sequence[SweepPoint], run: Run) -> None:
    """Add the effect of every factor, and of the controls."""
    rows = [
        {
            "nodes": point.nodes,
            "factor": point.factor,
            "answers right": round(point.answer_rate.estimate, 3),
            "P(answer)": round(point.probability.estimate, 3),
            "KL on other text": round(point.kl, 4),
        }
        for point in points
    ]
    run.report.table(rows, f"The {name} circuit's nodes multiplied, beside controls.")


def swap_rate(effects: Sequence[dict[str, Any]], nodes: str, question: str) -> list[float]:
    """Return how often a swap of one set makes a question answer as its counterfactual, with the interval."""
    kind = "none" if nodes == "none" else "swapped"
    return list(_effect(effects, nodes, kind, question)["other"])


def _effect(effects: Sequence[dict[str, Any]], nodes: str, kind: str, question: str) -> dict[str, Any]:
    names = (nodes, kind, question)
    return next(row for row in effects if (row["nodes"], row["edit"], row["question"]) == names)


def report_always_on(
    found: Sequence[AlwaysOn], shares: Mapping[str, float], n_prompts: int, run: Run
) -> None:
    """Add the neurons that act whatever the prompt (of `n_prompts`), and how much of each task's circuit they are."""
    names = ", ".join(f"{one.layer}/{one.neuron}" for one in found) or "none"
    circuits = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    run.report.text(
        f"## Always-on neurons\n\nIn the graphs of at least nine in ten of {n_prompts} neutral prompts (layer/index): "
        f"{names}. Of the tasks' circuits they are {circuits}; such neurons are not about a task."
    )


def report_steps(found: dict[str, Any], run: Run) -> None:
    """Add the capitals study's section: rates, named neurons, and what the study does not show."""
    effects = found["effects"]
    run.report.text(f"## Steps of the capitals question\n\n{_shown(found)}\n\n{_not_shown(effects)}")
    rows = [
        {
            "neurons": effect["nodes"],
            "edit": effect["edit"],
            "question": effect["question"],
            "own answer": round(effect["own"][0], 2),
            "counterfactual's": round(effect["other"][0], 2),
        }
        for effect in effects
    ]
    run.report.table(rows, "How often each answer is said.")
    run.report.table(
        [row | {name: ", ".join(row[name]) for name in ("neurons", "says")} for row in found["named"]],
        "The strongest neurons of every state's sets (layer, index, sign), and the words that a whole set raises most.",
    )


def _shown(found: dict[str, Any]) -> str:
    rate = {
        (nodes, question): swap_rate(found["effects"], nodes, question)[0]
        for nodes in ("first", "second")
        for question in ("state", "both")
    }
    return (
        f"{len(found['states'])} states, {found['neurons_a_state']} neurons each for city -> state (`first`, from the "
        "state question) and state -> capital (`second`, from a question without any city). On held-out cities, "
        "swapping the `second` neurons with another city's makes the two-step question answer with that city's capital "
        f"on {rate['second', 'both']:.0%} of prompts, and the state question with its state on "
        f"{rate['second', 'state']:.0%}; swapping the `first` neurons does so on {rate['first', 'both']:.0%} and "
        f"{rate['first', 'state']:.0%}."
    )


def _not_shown(effects: Sequence[dict[str, Any]]) -> str:
    still = _effect(effects, "second", "ablated", "both")["own"][0]
    through_first = swap_rate(effects, "first", "both")[0]
    way = (
        "That the two-step question computes the state with the neurons that say the state: swapping these changes its "
        f"answer on {through_first:.0%} alone, so the city's state reaches the second step by another way too. "
        if through_first < 0.5
        else ""
    )
    return (
        "**What this does not show.** That the neurons are needed: with the `second` ones at their mean the two-step "
        f"answer is still right on {still:.0%}. {way}An order in depth: the sets were not asked to lie in different "
        "layers, and share neurons. The third state's neurons, a control, are now and then those of the "
        "counterfactual's own state."
    )
