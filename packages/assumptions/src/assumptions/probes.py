"""One linear probe a dimension: a calibrated read-out of a score at a block's output (paper section on probes).

score ~ <w, h_b> + intercept, with h_b the pooled output of block b. Besides the filter direction w a probe keeps the
pattern direction Cov(h, y), which under noise that is not isotropic is closer to what carries the score; both scales
in which steering strength is stated (SD of the projection over training rows, mean norm of the residual stream); and
what it was fitted on, so that a probe on other weights, another template or its own training rows is refused.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assumptions.features import Features
from assumptions.metrics import Extremes, extremes_auroc
from assumptions.ridge import STRENGTHS, r2
from assumptions.selection import Chosen, choose, shuffled_r2
from assumptions.splits import Split
from shared.errors import UserError
from shared.stats import spearman


@dataclass(frozen=True)
class Probe:
    """The read-out of one dimension at the output of block `block` (counted from 0, never negative)."""

    dimension: str
    block: int
    weight_D: Float[Tensor, "D"]
    intercept: float
    pattern_D: Float[Tensor, "D"]
    strength: float
    projection_sd: float
    pattern_sd: float
    resid_norm: float
    r2_validation: float

    def __post_init__(self) -> None:
        if self.block < 0:
            raise UserError(f"block {self.block} is negative: name the block by its index from 0")

    @property
    def site(self) -> str:
        """Where the probe reads, and where its direction is added."""
        return f"blocks.{self.block}.output"

    def predict(self, features: Features) -> Float[Tensor, " B"]:
        """Uncut predictions (B) of pooled activations that hold this probe's site."""
        return features.pooled_LBD[features.sites.index(self.site)].double() @ self.weight_D + self.intercept

    def score(self, features: Features) -> Float[Tensor, " B"]:
        """Calibrated read-out in [0, 1]."""
        return self.predict(features).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one study with what they were fitted on."""

    probes: dict[str, Probe]
    span: str
    rendering: str
    fingerprint: str
    labeller: str
    trained_on: tuple[str, ...]  # hashes of the training and validation rows

    @property
    def data_hash(self) -> str:
        """16 hexadecimal digits over the rows that chose the probes."""
        return hashlib.sha256("".join(sorted(self.trained_on)).encode()).hexdigest()[:16]

    def check(self, features: Features, held_out: bool = True) -> None:
        """UserError when features were read from another model, template or span, or (held out) from training rows."""
        for name in ("fingerprint", "rendering", "span"):
            mine, theirs = getattr(self, name), getattr(features, name)
            if mine != theirs:
                raise UserError(
                    f"these probes were fitted with {name} {mine!r}, the features have {theirs!r}"
                )
        overlap = set(self.trained_on) & set(features.row_hashes)
        if held_out and overlap:
            raise UserError(f"{len(overlap)} rows were used to fit these probes; evaluate on others")


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


def fit(
    features: Features,
    labels_BK: Float[Tensor, "B K"],
    dimensions: Sequence[str],
    split: Split,
    labeller: str,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[ProbeSet, list[Chosen]]:
    """Fit one probe per dimension on scores in [0, 1]; block and strength are chosen on the validation rows.

    Raises UserError when a label is missing or one dimension's training labels are all alike.
    """
    _check_labels(labels_BK, dimensions, split)
    chosen = choose(features.pooled_LBD, labels_BK, split, strengths)
    probes = {
        name: _probe(name, one, features, labels_BK[:, k], split)
        for k, (name, one) in enumerate(zip(dimensions, chosen, strict=True))
    }
    used = tuple(features.row_hashes[i] for i in (*split.train, *split.validation))
    return ProbeSet(probes, features.span, features.rendering, features.fingerprint, labeller, used), chosen


def evaluate(
    features: Features,
    labels_BK: Float[Tensor, "B K"],
    probe_set: ProbeSet,
    chosen: Sequence[Chosen],
    split: Split,
    texts: Sequence[str],
    sources: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
    shuffles: int = 5,
    seed: int = 0,
) -> dict[str, ProbeScore]:
    """Score every probe on the test rows, beside shuffled labels and a bag of words put through the same search."""
    shuffled = shuffled_r2(features.pooled_LBD, labels_BK, split, shuffles, seed, strengths)
    words = bag_of_words_r2(texts, labels_BK, split, strengths)
    test_sources = [sources[i] for i in split.test]
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
    return [
        float(r2(one.predict(counts_1BD[0])[split.test][:, None], labels_BK[split.test][:, k : k + 1])[0])
        for k, one in enumerate(read_outs)
    ]


def _probe(name: str, one: Chosen, features: Features, labels_B: Float[Tensor, " B"], split: Split) -> Probe:
    train_BD = features.pooled_LBD[one.block_index][split.train].double()
    centred_B = labels_B[split.train].double() - labels_B[split.train].double().mean()
    pattern_D = (train_BD - train_BD.mean(0)).T @ centred_B / len(centred_B)
    return Probe(
        dimension=name,
        block=_block_of(features.sites[one.block_index]),
        weight_D=one.weight_D,
        intercept=one.intercept,
        pattern_D=pattern_D,
        strength=one.strength,
        projection_sd=_projection_sd(train_BD, one.weight_D),
        pattern_sd=_projection_sd(train_BD, pattern_D),
        resid_norm=float(train_BD.norm(dim=1).mean()),
        r2_validation=one.r2_validation,
    )


def _projection_sd(train_BD: Float[Tensor, "B D"], direction_D: Float[Tensor, "D"]) -> float:
    """SD over rows of <h, v>, v the unit direction."""
    return float((train_BD @ (direction_D / direction_D.norm())).std())


def _block_of(site: str) -> int:
    prefix, block, suffix = site.split(".")
    if (prefix, suffix) != ("blocks", "output"):
        raise UserError(f"a probe reads a block's output (blocks.N.output), not {site!r}")
    return int(block)


def _check_labels(labels_BK: Float[Tensor, "B K"], dimensions: Sequence[str], split: Split) -> None:
    if not torch.isfinite(labels_BK).all():
        raise UserError(
            "some labels are missing: drop the rows whose scores were not read before fitting probes"
        )
    flat = [name for k, name in enumerate(dimensions) if labels_BK[split.train][:, k].std() < 1e-9]
    if flat:
        raise UserError(f"all training labels are alike for {', '.join(flat)}: there is nothing to fit")
    spread = {len(part) for part in (split.train, split.validation, split.test)}
    if min(spread) < 2 or not all(map(math.isfinite, spread)):
        raise UserError("every part of the split needs at least two rows")
