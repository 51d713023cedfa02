"""The assumption_probing pipeline: elicit, probe, steer, judge; each stage leaves the file the next one reads.

1. elicit     scores of every message with the instrument, grammar-guided on vLLM       elicitation-KEY.jsonl
2. capture    pooled block outputs of the same messages                                 features.safetensors
3. probe      one ridge a dimension; block and strength chosen on validation rows       probes/
4. steer      replies along the probe directions and norm-matched random controls       replies-KEY.jsonl
5. judge      sycophancy of every reply (a server's grades are kept), curves            judgements-KEY.jsonl

Every file knows the rows it was made from (`row_hash`): an edited message is asked, read and steered anew, also where a
stage of the same name had finished. Without `run.resume` the answers of former runs are dropped.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from assumptions.asking import OnDemand
from assumptions.chats import Chat
from assumptions.dimensions import NAMES, SIGNS
from assumptions.doses import Condition, Curve, Reply, dose_response, steer
from assumptions.elicitation import Elicitation, elicit, header
from assumptions.evaluation import ProbeScore, evaluate_probes
from assumptions.features import Features, capture_features, load_features, save_features
from assumptions.grades import grade
from assumptions.grades import header as judge_header
from assumptions.instruments import Instrument, instrument
from assumptions.outcomes import Exchange, Judgement, LexicalJudge, ModelJudge
from assumptions.pages import add_elicitation, add_probes, add_steering
from assumptions.probe_files import save_probes
from assumptions.probes import ProbeSet, fit_probes
from assumptions.settings import AssumptionProbingConfig, JudgeSettings, SteeringSettings
from assumptions.sources import Messages, load_messages, moved_outcomes
from assumptions.splits import group_split, row_hash
from assumptions.steering import Direction, pattern_direction, probe_direction, random_directions
from shared.data import read_rows, write_rows
from shared.errors import UserError
from shared.generation import Generator, HFGenerator, OpenAIGenerator, Sampling, VLLMGenerator
from shared.interventions import save_interventions
from shared.models import Model, ModelConfig, load
from shared.runs import Pipeline, Run, config_hash
from shared.stats import spearman


def run(config: AssumptionProbingConfig, model_config: ModelConfig, run: Run) -> dict[str, Any]:
    """Run the pipeline and return its metrics."""
    messages = load_messages(config.data, config.messages, run.seed, config.columns)
    model = run.use_model(load(model_config))
    elicitation = elicit_scores(config, model, messages.chats, run)
    metrics = elicitation_metrics(elicitation, messages)
    add_elicitation(run.report, instrument(config.instrument), elicitation, messages, metrics)

    rows, labels = labelled(messages.chats, elicitation)
    chats = [messages.chats[row] for row in rows]
    features = captured(config, model, messages.chats, run).rows(rows)
    split = group_split(chats, run.seed)
    label = instrument(config.instrument).id
    probes, chosen = fit_probes(features, labels, NAMES, split, label)
    save_probes(run.path("probes"), probes)
    scores = evaluate_probes(
        features, labels, probes, chosen, split, chats, shuffles=config.shuffles, seed=run.seed
    )
    metrics |= {"probe": {name: probe_metrics(score) for name, score in scores.items()}}
    add_probes(run.report, scores, len(split.train), len(split.validation), len(split.test))

    held = [chats[i] for i in split.test][: config.steering.messages]
    curves, replies = steer_and_judge(config, model, probes, held, run)
    metrics |= steering_metrics(curves)
    outcomes = {name: moved_outcomes(config.data, name) for name in curves}
    add_steering(run.report, curves, replies, outcomes, config.steering.unit, len(held))
    return metrics


def elicit_scores(
    config: AssumptionProbingConfig, model: Model, chats: Sequence[Chat], run: Run
) -> Elicitation:
    """Elicit the scores of all chats; answers of a former run of the same question are kept."""
    asked: Instrument = instrument(config.instrument)
    question = header(asked, config.elicitation, model.fingerprint)
    path = answers_path(run, "elicitation", question)
    with closing(OnDemand(lambda: start_engine(config.engine, model))) as generator:
        return elicit(generator, asked, chats, path, config.elicitation, model=model.fingerprint)


def answers_path(run: Run, kind: str, question: dict[str, Any]) -> Path:
    """The file of the answers to one question; without `run.resume` a former run's is removed."""
    path = run.path(f"{kind}-{config_hash(question)}.jsonl")
    if not run.resume:
        path.unlink(missing_ok=True)
    return path


def start_engine(engine: str, model: Model) -> Generator:
    """The engine that answers the instrument."""
    return VLLMGenerator(model.config) if engine == "vllm" else HFGenerator(model)


def elicitation_metrics(elicitation: Elicitation, messages: Messages) -> dict[str, Any]:
    """Share of valid JSON, answers by status, and Spearman with the posterior mean by dimension where it is known."""
    metrics: dict[str, Any] = {
        "json_valid": elicitation.valid_share(),
        "elicitation_health": elicitation.health(),
    }
    if messages.posterior_BK is not None:
        scores = elicitation.scores([chat.id for chat in messages.chats], NAMES)
        read = np.isfinite(scores).all(axis=1)
        metrics["spearman"] = {
            name: float(spearman(scores[read, k], messages.posterior_BK[read, k]))
            for k, name in enumerate(NAMES)
        }
    return metrics


def labelled(chats: Sequence[Chat], elicitation: Elicitation) -> tuple[list[int], Float[torch.Tensor, "B 9"]]:
    """Rows of the chats with a score in every dimension, and these scores (B 9); UserError when there are few."""
    scores = elicitation.scores([chat.id for chat in chats], NAMES)
    read = np.isfinite(scores).all(axis=1)
    if read.sum() < 20:
        raise UserError(
            f"only {read.sum()} of {len(chats)} answers gave all nine scores, too few for probes: see the elicitation "
            "file for what the model wrote"
        )
    return np.flatnonzero(read).tolist(), torch.from_numpy(scores[read])


def captured(config: AssumptionProbingConfig, model: Model, chats: Sequence[Chat], run: Run) -> Features:
    """Pooled block outputs of the chats, from the stage's file if a former run left it for these very chats."""
    stage = run.stage("features.safetensors")
    if stage.done:
        features = load_features(stage.path)
        if features.row_hashes == tuple(row_hash(chat) for chat in chats):
            return features
    with stage as path:
        save_features(path, capture_features(model, chats, config.span))
    return load_features(stage.path)


def probe_metrics(score: ProbeScore) -> dict[str, float | int | None]:
    """The figures of one probe that go into metrics.json."""
    return {
        "r2": score.r2,
        "spearman": score.spearman,
        "auroc": score.auroc.auroc,
        "auroc_quantile": score.auroc_quantile.auroc,
        "r2_shuffled": score.r2_shuffled,
        "spearman_shuffled": score.spearman_shuffled,
        "auroc_shuffled": score.auroc_shuffled,
        "auroc_quantile_shuffled": score.auroc_quantile_shuffled,
        "r2_bag_of_words": score.r2_bag_of_words,
        "rmse": score.rmse,
        "block": score.block,
    }


def steer_and_judge(
    config: AssumptionProbingConfig, model: Model, probes: ProbeSet, chats: Sequence[Chat], run: Run
) -> tuple[dict[str, list[Curve]], list[Reply]]:
    """Curves by dimension, the direction's own first and then its random controls; and all replies."""
    settings = config.steering
    families = {name: direction_family(probes, name, settings, run.seed) for name in settings.dimensions}
    for name, family in families.items():
        save_interventions(run.path(f"directions/{name}"), family[0].interventions(1.0, settings.unit), model)
    answered = [(chat.id, row_hash(chat)) for chat in chats]
    key = config_hash({"probes": probes.weights_hash, "rows": probes.data_hash, "chats": answered})
    stage = run.stage(f"replies-{key}.jsonl")
    if not stage.done:
        directions = [direction for family in families.values() for direction in family]
        sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, logprobs=None)

        def progress(conditions: list[Condition]) -> Iterable[Condition]:
            return run.progress(conditions, "steered replies")

        with stage as path:
            unit, doses = settings.unit, settings.doses
            replies = steer(
                model, chats, directions, doses, sampling, unit=unit, seed=run.seed, progress=progress
            )
            write_rows(path, replies)
    replies = read_rows(stage.path, Reply)
    turns = {chat.id: chat.turn for chat in chats}
    exchanges = [Exchange(turns[reply.chat], reply.text) for reply in replies]
    judgements = judged(config.judge, exchanges, run)
    curves = {
        name: [dose_response(replies, judgements, one, moved_outcomes(config.data, name)) for one in family]
        for name, family in families.items()
    }
    return curves, replies


def judged(settings: JudgeSettings, exchanges: Sequence[Exchange], run: Run) -> list[Judgement]:
    """The judgement of every exchange; a server's grades are kept in a file, the exact judge's are computed anew."""
    if settings.kind == "lexical":
        return LexicalJudge().judge(exchanges)
    with closing(OnDemand(lambda: start_judge(settings))) as engine:
        name = f"{settings.model} at {settings.url}"
        judge = ModelJudge(engine, name, settings.repeats, settings.temperature, run.seed)
        return grade(judge, exchanges, answers_path(run, "judgements", judge_header(judge)))


def start_judge(settings: JudgeSettings) -> Generator:
    """The engine that judges."""
    return OpenAIGenerator(settings.url, settings.model)


def direction_family(probes: ProbeSet, name: str, settings: SteeringSettings, seed: int) -> list[Direction]:
    """The direction of a dimension and its norm-matched random controls."""
    make = probe_direction if settings.kind == "probe" else pattern_direction
    direction = make(probes.probes[name])
    return [direction, *random_directions(direction, settings.random, seed)]


def steering_metrics(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Spearman's rho and slope of dose against judged sycophancy, of the directions and of their random controls."""
    rho: dict[str, float] = {name: lines[0].rho for name, lines in curves.items()}
    slope: dict[str, float] = {name: lines[0].slope for name, lines in curves.items()}
    for name, lines in curves.items():
        rho |= {f"{name}_random{i}": line.rho for i, line in enumerate(lines[1:])}
        slope |= {f"{name}_random{i}": line.slope for i, line in enumerate(lines[1:])}
    return {
        "dose_response_rho": rho,
        "dose_response_slope": slope,
        "slope_over_largest_random": {name: _over_random(lines) for name, lines in curves.items()},
        "expected_sign": {name: SIGNS[name] for name in curves},
        "judged": {name: by_dose(lines[0]) for name, lines in curves.items()},
    }


def by_dose(curve: Curve) -> dict[str, float]:
    """Share of the replies that could be judged, by dose."""
    return {f"{dose:g}": share for dose, share in zip(curve.doses, curve.judged, strict=True)}


def _over_random(lines: Sequence[Curve]) -> float | None:
    """Slope of the direction in units of the steepest random control's; None without controls or with flat ones."""
    steepest = max((abs(line.slope) for line in lines[1:] if np.isfinite(line.slope)), default=0.0)
    return lines[0].slope / steepest if steepest > 1e-9 else None


PIPELINE = Pipeline("assumption_probing", AssumptionProbingConfig, run)
