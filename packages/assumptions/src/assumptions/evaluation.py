"""Test figures of probes beside their controls: shuffled labels and a bag of words, through the same search.

The test rows are touched here and nowhere else: block and ridge strength were chosen on the validation rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.chats import Chat
from assumptions.features import Features
from assumptions.metrics import Extremes, extremes_auroc
from assumptions.probes import ProbeSet
from assumptions.ridge import STRENGTHS, r2
from assumptions.selection import Chosen, choose, held_out_r2, shuffled_r2
from assumptions.splits import Split
from shared.stats import spearman


@dataclass(frozen=True)
class ProbeScore:
    """Test figures of one probe; R2 of the control searches beside it."""

    block: int
    strength: float
    r2: float
    rmse: float
    spearman: float
    auroc: Extremes
    auroc_quantile: Extremes
    r2_validation: float
    r2_shuffled: float
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
    """Score every probe on the test rows, beside shuffled labels and a bag of words put through the same search."""
    shuffled = shuffled_r2(features.pooled_LBD, labels_BK, split, shuffles, seed, strengths)
    words = bag_of_words_r2([chat.turn for chat in chats], labels_BK, split, strengths)
    test_sources = [chats[i].source for i in split.test]
    scores = {}
    for k, (name, probe) in enumerate(probe_set.probes.items()):
        predicted_B = probe.predict(features)[split.test]
        labels_B = labels_BK[split.test][:, k].double()
        ordered, truth = predicted_B.numpy(), labels_B.numpy()
        scores[name] = ProbeScore(
            block=probe.block,
            strength=probe.strength,
            r2=float(r2(predicted_B[:, None], labels_B[:, None])[0]),
            rmse=float((predicted_B - labels_B).square().mean().sqrt()),
            spearman=float(spearman(ordered, truth)),
            auroc=extremes_auroc(ordered, truth, "absolute"),
            auroc_quantile=extremes_auroc(ordered, truth, "quantile", test_sources),
            r2_validation=probe.r2_validation,
            r2_shuffled=shuffled[k],
            r2_bag_of_words=words[k],
            curve=chosen[k].curve,
        )
    return scores


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
