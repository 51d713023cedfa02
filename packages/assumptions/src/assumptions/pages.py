"""What the study's report says: method, tables and figures of elicitation, probes and steering."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from assumptions.charts import (
    agreement_chart,
    block_chart,
    choice_chart,
    dose_chart,
    probe_chart,
    specificity_chart,
    tradeoff_chart,
)
from assumptions.chats import Chat
from assumptions.closure import Closure
from assumptions.control import Trial
from assumptions.dimensions import DIMENSIONS, NAMES, SIGNS
from assumptions.doses import UNEDITED, Curve, Effect, Reply
from assumptions.evaluation import ProbeScore
from assumptions.features import Span
from assumptions.instruments import Instrument
from assumptions.mediation import Mediation
from assumptions.scoring import Score, Scored, Scoring
from assumptions.settings import ChoiceSettings
from assumptions.sources import Messages
from assumptions.steered import Steered
from assumptions.steering import Direction
from shared.report import Report

EXAMPLES = 3
READ: dict[Span, str] = {
    "user": "mean block output over the user's message",
    "last": "block output at the prompt's last token",
    "prompt": "mean block output over the whole prompt",
}
TAKEN: dict[Score, str] = {
    "stated": "A score is the number that the model states",
    "mean": "A score is the mean of the numbers that the model states in several draws",
    "expected": "A score is the mean of the numbers that the model could state, by its token probabilities",
}


def add_elicitation(
    report: Report,
    instrument: Instrument,
    score: Score,
    scoring: Scoring,
    messages: Messages,
    metrics: Mapping[str, Any],
) -> None:
    """The elicited scores: health of the answers, and agreement with the truth where it is known."""
    report.text(
        f"# What the model assumes\n\nEvery message was put to the instrument `{instrument.id}`, which asks for nine "
        f"scores. {metrics['json_valid']:.1%} of {len(scoring.answers.records)} answers held them all. {TAKEN[score]}."
    )
    report.table([metrics["elicitation_health"]], "Answers by status")
    if "spearman" in metrics:
        report.figure(
            agreement_chart(metrics["spearman"]),
            "Elicited scores against the mean of the latent given the message, the best any reader could do.",
        )
    for row, chat in enumerate(messages.chats[:EXAMPLES]):
        report.table(_example_scores(row, chat, scoring.scored, messages), f"{chat.id}: {chat.turn}")


def _example_scores(row: int, chat: Chat, scored: Scored, messages: Messages) -> list[dict[str, Any]]:
    """The elicited scores of one message beside the truth, one row a dimension."""
    elicited = scored.scores([chat.id], NAMES)[0].tolist()
    rows = [{"dimension": name, "elicited": score} for name, score in zip(NAMES, elicited, strict=True)]
    if messages.posterior_BK is not None:
        for one, mean in zip(rows, messages.posterior_BK[row].tolist(), strict=True):
            one["posterior mean"] = mean
    return rows


def add_probes(
    report: Report, scores: Mapping[str, ProbeScore], span: Span, train: int, validation: int, test: int
) -> None:
    """The probes: test figures beside their controls, and R2 over blocks."""
    report.text(
        f"# What its activations hold\n\nOne linear probe a dimension from the {READ[span]} to the elicited "
        f"score: fitted on {train} messages, block and strength chosen on {validation}, figures on {test} "
        "others. Shuffled labels, length and format and a bag of words went through the same search."
    )
    report.table([_probe_row(name, score) for name, score in scores.items()], "Probes on test messages")
    report.table(
        [_control_row(name, score) for name, score in scores.items()], "Their controls on test messages"
    )
    report.figure(probe_chart(scores), "R2 of the probes and of their controls.")
    report.figure(block_chart(scores), "Where the score can be read; dots mark the chosen block.")


def _probe_row(name: str, score: ProbeScore) -> dict[str, Any]:
    extremes = score.auroc
    return {
        "dimension": name,
        "block": score.block,
        "R2": score.r2,
        "95%": f"{score.intervals.r2.low:.3f} to {score.intervals.r2.high:.3f}"
        if score.intervals.r2
        else "none",
        "Spearman": score.spearman,
        "AUROC (<.3 against >.7)": extremes.auroc
        if extremes.auroc is not None
        else f"none: {extremes.refusal}",
        "rows below / above": f"{extremes.n_low} / {extremes.n_high}",
        "cosine of halves": score.stability.filter,
    }


def _control_row(name: str, score: ProbeScore) -> dict[str, Any]:
    return {
        "dimension": name,
        "R2 beyond length": score.partial_r2,
        "R2 length and format": score.baselines["length_format"],
        "R2 bag of words": score.r2_bag_of_words,
        "R2 shuffled": score.r2_shuffled,
        "Spearman shuffled": score.spearman_shuffled,
        "AUROC shuffled": score.auroc_shuffled,
    }


def add_form_shift(report: Report, shifts: Mapping[str, Mapping[str, Any]]) -> None:
    """What reading the test messages in another form than they are steered in would do."""
    report.table(
        [
            {"dimension": name, "read as": one["form"], "shift, SD": one["shift"]}
            | {"spread, SD": one["spread"], "R2 there": one["r2"]}
            for name, one in shifts.items()
        ],
        "Probes are read on the very tokens that are steered. The same messages in the other form: difference of the "
        "reading in SD of its projection, and R2 of the labels.",
    )


def add_choice(
    report: Report,
    trials: Mapping[str, Sequence[Trial]],
    chosen: Mapping[str, Direction],
    settings: ChoiceSettings,
    doubts: Mapping[str, Sequence[str]],
) -> None:
    """Why each direction is steered at its block, from every block tried; before it what speaks against steering it."""
    report.text("# Where steering takes hold\n\n" + _how_chosen(settings))
    against = [{"dimension": name, "doubt": one} for name, some in doubts.items() for one in some]
    if against:
        report.table(
            against, "What speaks against steering these dimensions at all: below it a direction is noise"
        )
    rows = [
        {
            "dimension": name,
            "block": one.block,
            "slope a unit": one.slope,
            "steepest random": one.steepest_random,
            "margin": one.margin,
            "coherence": one.coherence,
            "steered here": one.block == chosen[name].block,
        }
        for name, of_name in trials.items()
        for one in sorted(of_name, key=attrgetter("block"))
    ]
    if trials:
        figure = choice_chart(trials, {name: one.block for name, one in chosen.items()})
        report.figure(
            figure, "Slope by block on validation messages; the ring marks the block that is steered."
        )
    report.table(rows or [{"dimension": name, "block": one.block} for name, one in chosen.items()], "Blocks")


def _how_chosen(settings: ChoiceSettings) -> str:
    if settings.by == "reading":
        return (
            "Every direction is steered at the block where its score is read best; no other block was tried."
        )
    return (
        f"Where a score is read best is not where its direction steers best. Up to {settings.messages} validation "
        f"messages were answered at doses {', '.join(f'{dose:g}' for dose in settings.doses)} of each block's own "
        f"direction and of {settings.random} random directions of its norm. The block with the largest margin "
        "(absolute slope less the steepest random one) is steered, if its replies stay readable "
        f"(coherence at least {1 - settings.largest_loss:g} of the unedited replies'). Test messages took no part."
    )


def add_steering(
    report: Report,
    curves: Mapping[str, Sequence[Curve]],
    replies: Sequence[Reply],
    outcomes: Mapping[str, Sequence[str]],
    unit: str,
    messages: int,
) -> None:
    """The dose-response curves with their random controls, and one message answered at all doses."""
    signs = ", ".join(f"{name} {'up' if SIGNS[name] > 0 else 'down'}" for name in curves)
    report.text(
        "# What steering does\n\nReplies to held-out messages with alpha v added to the residual stream at the chosen "
        "block, prompt and reply alike; a positive dose raises the labelled score. Expected effect of a positive dose "
        f"on sycophancy: {signs}. Every message keeps its random numbers at all doses; {messages} messages; bands "
        "and bars are 95% bootstrap intervals over messages; all controls have the same block and the same norm. "
        "Scores run from 1 to 5, the mean of the outcomes that the dimension should move. A dose without a judged "
        f"reply has no mean (nan) and enters neither rho nor slope. {_by_chance(curves)}"
    )
    report.figure(
        dose_chart(curves, unit, outcomes),
        "Dose against judged sycophancy: the direction with its 95% interval, and its controls.",
    )
    report.table(
        [_curve_row(name, curve) for name, lines in curves.items() for curve in lines], "Dose-response"
    )
    for name, lines in curves.items():
        report.table(_examples(lines[0], replies), f"One message under {name}")
    report.table(
        [{"dimension": d.name, "sign": d.sign, "meaning": d.meaning} for d in DIMENSIONS], "Dimensions"
    )


def _by_chance(curves: Mapping[str, Sequence[Curve]]) -> str:
    """How much a comparison with so many random directions can say."""
    count = min(sum(line.kind == "random" for line in lines) for lines in curves.values())
    if not count:
        return "No random direction stands beside them: nothing says what a push without meaning does."
    return (
        f"A direction without meaning is the steepest beside {count} random ones {1 / (count + 1):.0%} of the time; "
        f"{len(curves)} directions were tried."
    )


def add_judge(report: Report, agreement: Mapping[str, Mapping[str, Any]]) -> None:
    """How far the judge agrees with itself and with people, where either was asked for."""
    repeats, people = agreement.get("repeats", {}), agreement.get("people", {})
    rows: list[dict[str, Any]] = []
    for outcome in dict.fromkeys([*repeats, *people]):
        row = {"outcome": outcome}
        row |= {"kappa of its repeats": repeats[outcome]} if outcome in repeats else {}
        if (one := people.get(outcome)) is not None:
            row |= {"kappa with people": one.kappa.estimate, "low": one.kappa.low, "high": one.kappa.high}
            row |= {"grades": one.graded, "same grade": one.exact, "judge less people": one.bias.estimate}
            row |= {"rho of that with length": one.length}
        rows.append(row)
    if rows:
        report.table(
            rows, "The judge: agreement with itself (Fleiss) and with people (Cohen, quadratic weights)"
        )


def add_costs(report: Report, tested: Steered) -> None:
    """What a change of sycophancy costs in the text, and what plain words do instead."""
    report.text(
        "# What it costs\n\nPerplexity of the replies under the unedited model, repetition, length and the share "
        "that stays coherent, by condition. A direction is worth something where it moves sycophancy at less cost than "
        "random ones of its norm, and than words in the prompt."
    )
    # Files write nan as null: an empty reply has no perplexity.
    perplexity = {key: one["perplexity"] or float("nan") for key, one in tested.side_effects.items()}
    report.figure(
        tradeoff_chart(tested.curves, tested.words, perplexity),
        "Sycophancy against perplexity; the ring is the largest dose, crosses are controls in words.",
    )
    for name, effects in tested.words.items():
        report.table(
            [_word_row(one) for one in effects],
            f"In words instead of {name}: difference from unedited replies",
        )
    rows = [{"condition": key} | one for key, one in tested.side_effects.items()]
    report.table(rows, "Side effects by condition@dose")


def add_closure(report: Report, closure: Closure, mediated: Mapping[str, Mediation | str]) -> None:
    """What the model states once it is steered, and how much of the effect on sycophancy that carries."""
    report.text(
        "# What it states when steered\n\nThe same messages, asked again under every dose of every direction and of a "
        f"random one beside each. Slope of the mean stated score on the dose, {closure.scores_CMBK.shape[2]} messages: "
        "what was meant to move stands on the diagonal, the rest is off target."
    )
    figure = specificity_chart(closure.matrix, closure.directions, closure.dimensions)
    report.figure(figure, "Specificity: slope of stated scores (columns) on the dose of directions (rows).")
    own, others, rho = closure.on_target(), closure.off_target(), closure.rho()
    report.table(
        [
            {
                "direction": name,
                "own slope": own[name].estimate,
                "low": own[name].low,
                "high": own[name].high,
                "mean absolute slope of others": others[name],
                "rho of dose and own score": rho[name],
            }
            for name in closure.directions
        ],
        "Causal closure",
    )
    report.table(
        [{"direction": name} | _mediation_row(one) for name, one in mediated.items()],
        "Of the effect on judged sycophancy a dose: through the score that is then stated (indirect), and past it",
    )


def _mediation_row(one: Mediation | str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"why not": one}
    shown = {"total": one.total, "indirect": one.indirect, "share": one.share}
    ends = {
        f"{name} {end}": getattr(interval, end) for name, interval in shown.items() for end in ("low", "high")
    }
    return {name: interval.estimate for name, interval in shown.items()} | ends | {"messages": one.messages}


def _word_row(one: Effect) -> dict[str, Any]:
    return {
        "words": one.condition,
        "mean": one.mean,
        "difference": one.difference.estimate,
        "low": one.difference.low,
        "high": one.difference.high,
        "judged": one.judged,
        "cut by length": one.truncated,
    }


def _curve_row(name: str, curve: Curve) -> dict[str, Any]:
    return {
        "dimension": name,
        "direction": curve.direction.removeprefix(f"{name}."),
        "rho": curve.rho,
        "slope a unit": curve.slope,
        "lowest dose": curve.means[0],
        "dose 0": curve.means[curve.doses.index(0.0)],
        "highest dose": curve.means[-1],
        "cut by length": max(curve.truncated),
        "judged, by dose": " ".join(f"{share:.2f}" for share in curve.judged),
    }


def _examples(curve: Curve, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    first = replies[0].chat
    shown = [
        reply for reply in replies if reply.chat == first and reply.direction in (curve.direction, UNEDITED)
    ]
    return [
        {"dose": reply.dose, "reply": reply.text} for reply in sorted(shown, key=lambda reply: reply.dose)
    ]
