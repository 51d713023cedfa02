"""The assumption_probing pipeline: elicit, probe, steer, judge; each stage leaves the file the next one reads.

1. elicit     scores of every message with the instrument, grammar-guided on vLLM       elicitation-KEY.jsonl
2. capture    pooled block outputs of the same messages                                 features.safetensors
3. probe      one ridge a dimension; block and strength chosen on validation rows       probes/
4. choose     the block to steer at, by dose-response on validation rows (`control`)    choice/KEY.jsonl
5. steer      replies to test rows along the directions, beside their controls          replies/KEY.jsonl
6. judge      sycophancy of every reply of 4 and 5 (a server's grades are kept)         judgements-KEY.jsonl
7. again      the test messages elicited again under the edits (`closing`); what steering costs (`preservation`)
8. truth      on an embedded model: every figure beside what was planted (`truth`)      truth-KEY.json

Every file knows the rows it was made from (`row_hash`): an edited message is asked, read and steered anew, also where a
stage of the same name had finished. Without `run.resume` the answers of former runs are dropped.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from assumptions.answer_file import answers_path
from assumptions.asking import OnDemand
from assumptions.chats import Chat
from assumptions.closing import closing_metrics, elicit_again, mediations
from assumptions.control import control_metrics, doubts
from assumptions.dimensions import NAMES
from assumptions.elicitation import header
from assumptions.embedded import beside_truth, preserved, unguided
from assumptions.engines import start_engine
from assumptions.evaluation import evaluate_probes, leave_one_source_out_scores
from assumptions.features import Features, capture_features, load_features, save_features
from assumptions.form_shift import form_shifts
from assumptions.instruments import Instrument, instrument
from assumptions.judges import check_judge, judge_agreement, judging
from assumptions.pages import (
    add_choice,
    add_closure,
    add_costs,
    add_elicitation,
    add_form_shift,
    add_judge,
    add_probes,
    add_steering,
)
from assumptions.probe_files import save_probes
from assumptions.probes import fit_probes
from assumptions.run_metrics import (
    elicitation_metrics,
    left_out_metrics,
    probe_metrics,
    range_metrics,
    steering_metrics,
)
from assumptions.scoring import Scored, Scoring, asked_with, score_chats
from assumptions.settings import AssumptionProbingConfig
from assumptions.sources import load_messages, moved_outcomes
from assumptions.splits import group_split, row_hash
from assumptions.steered import Grounds, Steering, choose_directions, dose_test, families, find_doses
from shared.errors import UserError
from shared.models import Model, ModelConfig, load
from shared.runs import Pipeline, Run, config_hash
from shared.tinyworld import EMBEDDED

Step = Literal["elicit", "probe", "steer"]


def run(
    config: AssumptionProbingConfig, model_config: ModelConfig, run: Run, last: Step = "steer"
) -> dict[str, Any]:
    """Run the pipeline up to a step (1; 1 to 3; all) and return its metrics."""
    messages = load_messages(config.data, config.messages, run.seed, config.columns)
    model = run.use_model(load(model_config))
    run.report.title = f"What {model_config.name} assumes: {run.folder.name}"
    if last == "steer":
        check_judge(config.judge, model)
    scoring = elicit_scores(config, model, messages.chats, run)
    metrics = elicitation_metrics(scoring, messages)
    add_elicitation(run.report, instrument(config.instrument), config.score, scoring, messages, metrics)
    if last == "elicit":
        return metrics

    rows, labels = labelled(messages.chats, scoring.scored)
    chats = [messages.chats[row] for row in rows]
    features = captured(config, model, messages.chats, run).rows(rows)
    split = group_split(chats, run.seed)
    label = instrument(config.instrument).id
    probes, chosen = fit_probes(features, labels, NAMES, split, label, kind=config.probe.kind)
    save_probes(run.path("probes"), probes)
    scores = evaluate_probes(
        features,
        labels,
        probes,
        chosen,
        split,
        chats,
        shuffles=config.shuffles,
        seed=run.seed,
        embedding=config.probe.embedding or None,
    )
    metrics |= {"probe": {name: probe_metrics(score) for name, score in scores.items()}}
    if config.probe.left_out:
        left_out = leave_one_source_out_scores(
            features, labels, NAMES, chats, label, run.seed, config.probe.kind
        )
        metrics |= {"probe_left_out": left_out_metrics(left_out)}
    add_probes(run.report, scores, config.span, len(split.train), len(split.validation), len(split.test))
    grounds = Grounds(features, labels, split, chats, probes)
    metrics |= {"form_shift": shifted(model, grounds, run)}
    add_form_shift(run.report, metrics["form_shift"])
    if last == "probe":
        return metrics

    study = Steering(config, model, judging(config.judge, run, model), run)
    metrics |= steer_and_judge(study, grounds)
    if config.data == "tinyworld" and model_config.name in EMBEDDED:
        assert messages.posterior_BK is not None
        stated_BK = scoring.answers.scores([chat.id for chat in chats], NAMES)
        metrics |= beside_truth(study, grounds, stated_BK, messages.posterior_BK[rows])
        metrics |= {"json_valid_unguided": unguided(study, messages.chats)}
    return metrics


def shifted(model: Model, grounds: Grounds, run: Run) -> dict[str, Any]:
    """What reading the test messages in the other form would do, by dimension."""
    rows, probes = grounds.split.test, grounds.probes
    held = [grounds.chats[i] for i in rows]
    key = config_hash([probes.weights_hash, [row_hash(chat) for chat in held]])

    def compute() -> Any:
        return form_shifts(model, probes, grounds.features.rows(rows), held, grounds.labels_BK[rows])

    found: dict[str, Any] = run.json_stage(f"form_shift-{key}.json", compute)
    return found


def steer_and_judge(study: Steering, grounds: Grounds) -> dict[str, Any]:
    """Stages 4 to 7: metrics of steering, and its part of the report."""
    config, run = study.config, study.run
    directions, trials = choose_directions(study, grounds)
    metrics: dict[str, Any] = {"control": control_metrics(trials, directions, grounds.probes)}
    probes, train = grounds.probes.probes, grounds.split.train
    metrics["doubts"] = {name: doubts(probes[name], grounds.labels(name, train)) for name in directions}
    add_choice(run.report, trials, directions, config.steering.choice, metrics["doubts"])
    doses, ranges = find_doses(study, grounds, directions)
    of_name, missing = families(study, grounds, directions)
    held = [grounds.chats[i] for i in grounds.split.test][: config.steering.messages]
    steered = dose_test(study, of_name, held, doses)
    metrics |= steering_metrics(steered) | range_metrics(ranges) | {"controls_missing": missing}
    agreement = judge_agreement(config.judge, study.judge, steered.judgements, run.seed)
    metrics["judge_agreement"] = agreement
    if config.again:
        closure = elicit_again(study, of_name, held[: config.again], doses)
        mediated = mediations(study, closure, held[: config.again], steered)
        metrics |= closing_metrics(closure, mediated)
    if study.model.config.name in EMBEDDED:
        metrics |= {"preservation": preserved(study, directions, doses)}
    outcomes = {name: moved_outcomes(config.data, name) for name in steered.curves}
    add_steering(run.report, steered.curves, steered.replies, outcomes, config.steering.unit, len(held))
    add_judge(run.report, agreement)
    add_costs(run.report, steered)
    if config.again:
        add_closure(run.report, closure, mediated)
    return metrics


def elicit_scores(config: AssumptionProbingConfig, model: Model, chats: Sequence[Chat], run: Run) -> Scoring:
    """Elicit and score all chats; answers of a former run of the same question are kept."""
    asked: Instrument = instrument(config.instrument)
    question = header(asked, asked_with(config.score, config.elicitation), model.fingerprint)
    path = answers_path(run, "elicitation", question)
    with closing(OnDemand(lambda: start_engine(config.engine, model, config.replicas))) as generator:
        return score_chats(
            generator,
            model.tokenizer,
            asked,
            chats,
            path,
            config.elicitation,
            config.score,
            model=model.fingerprint,
        )


def labelled(chats: Sequence[Chat], scored: Scored) -> tuple[list[int], Float[torch.Tensor, "B 9"]]:
    """Rows of the chats with a score in every dimension, and these scores (B 9); UserError when there are few."""
    scores = scored.scores([chat.id for chat in chats], NAMES)
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


PIPELINE = Pipeline("assumption_probing", AssumptionProbingConfig, run)
