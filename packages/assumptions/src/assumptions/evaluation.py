"""Test figures of probes beside their controls, all put through the same search.

Controls: shuffled labels, and the readers of text alone in `baselines`. Under shuffled labels every figure is computed
as it is for the probes, on the test rows with their shuffled labels, and averaged over the repeats: at most zero for
R2, zero for Spearman and one half for AUROC, on average, is what no information gives. Beside them stand the partial
R2 given length and format (`residual`), the stability of the directions (`stability`), the calibration of the score.

The test rows are touched here and nowhere else: place and strength were chosen on the validation rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from assumptions.baselines import baseline_scores, length_format
from assumptions.calibration import calibration_error
from assumptions.chats import Chat
from assumptions.families import Family, FamilyName, family
from assumptions.features import ActivationSet
from assumptions.metrics import Extremes, Figures, Intervals, figures, intervals
from assumptions.probes import ProbeSet, fit_probes, places
from assumptions.residual import partial_r2
from assumptions.rows import Rows
from assumptions.selection import Chosen, shuffled_searches
from assumptions.splits import Split, component_ids, leave_one_source_out
from assumptions.stability import Stability, split_half


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
    intervals: Intervals
    r2_validation: float
    r2_shuffled: float
    spearman_shuffled: float
    auroc_shuffled: float | None
    auroc_quantile_shuffled: float | None
    baselines: dict[str, float]  # test R2 of the readers of text alone
    skipped: dict[str, str]  # baselines that were not run, and why
    partial_r2: float  # beyond length and format
    stability: Stability
    calibration_error: float
    curve: list[float]

    @property
    def r2_bag_of_words(self) -> float:
        """Test R2 of word counts."""
        return self.baselines["bag_of_words"]


def evaluate_probes(
    features: ActivationSet,
    labels_BK: Float[Tensor, "B K"],
    probe_set: ProbeSet,
    chosen: Sequence[Chosen],
    split: Split,
    chats: Sequence[Chat],
    strengths: Sequence[float] | None = None,
    shuffles: int = 5,
    seed: int = 0,
    embedding: str | None = None,
    candidates: Sequence[tuple[str, ...]] | None = None,
    resamples: int = 500,
    halvings: int = 3,
) -> dict[str, ProbeScore]:
    """Score every probe on the test rows, beside controls put through the same search.

    `strengths` and `candidates` are those of `fit_probes`; `embedding` names a sentence encoder for a further baseline.
    Raises UserError when the test rows helped to fit the probes, or were read from another model, template or span.
    """
    probe_set.check(features, rows=split.test)
    labels_BK = labels_BK.double()
    kind = family(next(iter(probe_set.probes.values())).family)
    sources = [features.at(sites) for sites in places(features, candidates)]
    shuffled = shuffled_searches(sources, labels_BK, split, shuffles, seed, kind, strengths)
    text = baseline_scores(chats, labels_BK, split, embedding, kind, strengths)
    groups, test_sources = component_ids(chats), [chats[i].source for i in split.test]
    beside = _beside(sources, labels_BK, chosen, split, chats, groups, kind, halvings, seed)
    scores = {}
    for k, (name, probe) in enumerate(probe_set.probes.items()):
        predicted_B, labels_B = probe.predict(features, split.test), labels_BK[split.test, k]
        control = [
            figures(
                kind.estimate(one.chosen[k].read(sources[one.chosen[k].candidate], split.test)),
                one.targets_BK[split.test, k],
                test_sources,
            )
            for one in shuffled
        ]
        scores[name] = ProbeScore(
            block=probe.blocks[-1],
            strength=probe.strength,
            rmse=float((predicted_B - labels_B).square().mean().sqrt()),
            **figures(predicted_B, labels_B, test_sources)._asdict(),
            intervals=intervals(predicted_B, labels_B, [groups[i] for i in split.test], resamples, seed),
            r2_validation=probe.r2_validation,
            r2_shuffled=_mean([one.r2 for one in control]),
            spearman_shuffled=_mean([one.spearman for one in control]),
            auroc_shuffled=_mean_area([one.auroc for one in control]),
            auroc_quantile_shuffled=_mean_area([one.auroc_quantile for one in control]),
            baselines={baseline: by_target[k] for baseline, by_target in text.r2.items()},
            skipped=text.skipped,
            partial_r2=beside[k][0],
            stability=beside[k][1],
            calibration_error=calibration_error(probe.score(features, split.test), labels_B),
            curve=chosen[k].curve,
        )
    return scores


def _beside(
    sources: Sequence[Rows],
    labels_BK: Float[Tensor, "B K"],
    chosen: Sequence[Chosen],
    split: Split,
    chats: Sequence[Chat],
    groups: Sequence[int],
    kind: Family,
    halvings: int,
    seed: int,
) -> list[tuple[float, Stability]]:
    """Partial R2 given length and format, and stability, of every target at its own place; a place is read once."""
    found: dict[int, tuple[float, Stability]] = {}
    for place in {one.candidate for one in chosen}:
        columns = [k for k, one in enumerate(chosen) if one.candidate == place]
        labels = labels_BK[:, columns]
        partial = partial_r2(sources[place], length_format(chats), labels, split)
        kept = [chosen[k].strength for k in columns]
        halves = split_half(sources[place], split.train, groups, labels, kept, kind, halvings, seed)
        found |= dict(zip(columns, zip(partial, halves, strict=True), strict=True))
    return [found[k] for k in range(len(chosen))]


def leave_one_source_out_scores(
    features: ActivationSet,
    labels_BK: Float[Tensor, "B K"],
    dimensions: Sequence[str],
    chats: Sequence[Chat],
    labeller: str,
    seed: int = 0,
    kind: FamilyName = "ridge",
) -> dict[str, dict[str, Figures]]:
    """For every source: probes fitted and chosen on all other sources, figures on it, by dimension."""
    scores: dict[str, dict[str, Figures]] = {}
    for source, split in leave_one_source_out(chats, seed):
        probe_set, _ = fit_probes(features, labels_BK, dimensions, split, labeller, kind=kind)
        probe_set.check(features, rows=split.test)
        scores[source] = {
            name: figures(
                probe.predict(features, split.test), labels_BK[split.test, k], [source] * len(split.test)
            )
            for k, (name, probe) in enumerate(probe_set.probes.items())
        }
    return scores


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; nan where there is none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _mean_area(extremes: Sequence[Extremes]) -> float | None:
    """Mean AUROC of the repeats that have one; None where none has."""
    areas = [one.auroc for one in extremes if one.auroc is not None]
    return float(np.mean(areas)) if areas else None
