"""Test figures of probes beside their controls: shuffled labels and a bag of words, through the same search.

Under shuffled labels every figure is computed as it is for the probes, on the test rows with their shuffled labels, and
averaged over the repeats: at most zero for R2, zero for Spearman and one half for AUROC, on average, is what no
information gives.

The test rows are touched here and nowhere else: block and ridge strength were chosen on the validation rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.chats import Chat
from assumptions.features import Features
from assumptions.metrics import Extremes, extremes_auroc
from assumptions.probes import ProbeSet
from assumptions.ridge import STRENGTHS, r2
from assumptions.selection import Chosen, choose, held_out_r2, shuffled_searches
from assumptions.splits import Split
from shared.stats import spearman


class Figures(NamedTuple):
    """How well predictions of the test rows fit their labels."""

    r2: float
    spearman: float
    auroc: Extremes
    auroc_quantile: Extremes


@dataclass(frozen=True)
class ProbeScore:
    """Test figures of one probe, and of the control searches beside it (AUROC None where there are no two classes)."""

    block: int
    strength: float
    r2: float
    rmse: float
    spearman: float
    auroc: Extremes
    auroc_quantile: Extremes
    r2_validation: float
    r2_shuffled: float
    spearman_shuffled: float
    auroc_shuffled: float | None
    auroc_quantile_shuffled: float | None
    r2_bag_of_words: float
    curve: list[float]


def evaluate_probes(
    features: Features,
    labels_BK: Float[Tensor, "B K"],
    probe_set: ProbeSet,
    chosen: Sequence[Chosen],
    split: Split,
    chats: Sequence[Chat],
    strengths: Sequence[float] = STRENGTHS,
    shuffles: int = 5,
    seed: int = 0,
) -> dict[str, ProbeScore]:
    """Score every probe on the test rows, beside shuffled labels and a bag of words put through the same search.

    Raises UserError when the test rows helped to fit the probes, or were read from another model, template or span.
    """
    probe_set.check(features.rows(split.test))
    shuffled = shuffled_searches(features.pooled_LBD, labels_BK, split, shuffles, seed, strengths)
    words = bag_of_words_r2([chat.turn for chat in chats], labels_BK, split, strengths)
    test_sources = [chats[i].source for i in split.test]
    scores = {}
    for k, (name, probe) in enumerate(probe_set.probes.items()):
        predicted_B = probe.predict(features)[split.test]
        labels_B = labels_BK[split.test][:, k].double()
        found = figures(predicted_B, labels_B, test_sources)
        control = [
            figures(
                one.chosen[k].predict(features.pooled_LBD[one.chosen[k].block_index][split.test]),
                one.targets_BK[split.test][:, k].double(),
                test_sources,
            )
            for one in shuffled
        ]
        scores[name] = ProbeScore(
            block=probe.block,
            strength=probe.strength,
            r2=found.r2,
            rmse=float((predicted_B - labels_B).square().mean().sqrt()),
            spearman=found.spearman,
            auroc=found.auroc,
            auroc_quantile=found.auroc_quantile,
            r2_validation=probe.r2_validation,
            r2_shuffled=_mean([one.r2 for one in control]),
            spearman_shuffled=_mean([one.spearman for one in control]),
            auroc_shuffled=_mean_area([one.auroc for one in control]),
            auroc_quantile_shuffled=_mean_area([one.auroc_quantile for one in control]),
            r2_bag_of_words=words[k],
            curve=chosen[k].curve,
        )
    return scores


def figures(
    predicted_B: Float[Tensor, " B"], labels_B: Float[Tensor, " B"], sources: Sequence[str]
) -> Figures:
    """The figures of predictions (B) of labels (B), rows of one source compared by quantile among themselves."""
    ordered, truth = predicted_B.numpy(), labels_B.numpy()
    return Figures(
        float(r2(predicted_B[:, None], labels_B[:, None])[0]),
        float(spearman(ordered, truth)),
        extremes_auroc(ordered, truth, "absolute"),
        extremes_auroc(ordered, truth, "quantile", sources),
    )


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; nan where there is none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _mean_area(extremes: Sequence[Extremes]) -> float | None:
    """Mean AUROC of the repeats that have one; None where none has."""
    areas = [one.auroc for one in extremes if one.auroc is not None]
    return float(np.mean(areas)) if areas else None


def bag_of_words_r2(
    texts: Sequence[str],
    labels_BK: Float[Tensor, "B K"],
    split: Split,
    strengths: Sequence[float] = STRENGTHS,
) -> list[float]:
    """Test R2 per target of word counts (vocabulary from the training rows) put through the same search."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"(?u)\b\w+\b", dtype=np.float64)
    vectorizer.fit([texts[i] for i in split.train])
    counts_1BD = torch.from_numpy(vectorizer.transform(texts).toarray()).unsqueeze(0)
    read_outs = choose(counts_1BD, labels_BK, split, strengths)
    return held_out_r2(read_outs, counts_1BD, labels_BK, split)
