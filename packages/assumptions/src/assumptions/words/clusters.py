"""Clusters of assumptions that come out the same whatever the order of the texts, the seed or the device.

1. Equal texts (up to case and white space) are one point, weighted by how often they occur; points are sorted by text.
2. TF-IDF over words and word pairs in float64, reduced by a singular value decomposition whose start vector and signs
   are fixed (latent semantic analysis), rows scaled to length 1.
3. k-means with a fixed number of fixed starts. Without `k` the number of clusters with the highest silhouette is taken.
4. Clusters are numbered by falling size, then by their first text. Words that mark a cluster name it: c-TF-IDF, the
   share of a word in the cluster times log(1 + mean number of words a cluster / its count in all clusters).

Nothing is drawn from a global generator and nothing runs on an accelerator, so a run repeats itself. That does not make
clusters true: `stability` says how far they survive when a part of the texts is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from assumptions.words.documents import TOKEN
from shared.errors import UserError

_SEED = 20
_STARTS = 20
_LARGEST_SILHOUETTE = 2000  # points; above it the silhouette is taken of evenly spaced ones


@dataclass(frozen=True)
class Cluster:
    """A cluster: number, share of all texts, the words that mark it, and a few of its texts nearest to its centre."""

    number: int
    size: int
    share: float
    words: tuple[str, ...]
    examples: tuple[str, ...]
    name: str = ""


@dataclass(frozen=True)
class Clustering:
    """The cluster number of every text, in the order given, and the clusters by number."""

    labels: Int[np.ndarray, "N"]
    clusters: list[Cluster]


@dataclass(frozen=True)
class _Points:
    """The different texts in canonical order, their weights, and the point of every text given."""

    texts: list[str]
    weights_P: Float[np.ndarray, "P"]
    point_N: Int[np.ndarray, "N"]


def cluster(
    texts: Sequence[str], k: int | None = None, largest: int = 20, dimensions: int = 50
) -> Clustering:
    """Cluster texts into `k` groups, or into 2 to `largest` by silhouette; UserError when there are too few texts."""
    points = _points(texts)
    # texts that differ in stop words only are one point
    embedded = np.round(embed(points.texts, dimensions), 9)
    different = len(np.unique(embedded, axis=0))
    if different < 3 or (k is not None and not 1 <= k <= different):
        raise UserError(f"{different} different texts cannot make {k or 'any'} clusters")
    found = (
        _best(embedded, points.weights_P, min(largest, different - 1))
        if k is None
        else _k_means(embedded, points.weights_P, k)
    )
    numbered = _numbered(found, points)
    return Clustering(numbered[points.point_N], _described(numbered, points, embedded))


def _points(texts: Sequence[str]) -> _Points:
    keys = [" ".join(text.lower().split()) for text in texts]
    order = sorted(set(keys))
    place = {key: i for i, key in enumerate(order)}
    point_N = np.array([place[key] for key in keys], dtype=np.int64)
    return _Points(order, np.bincount(point_N, minlength=len(order)).astype(float), point_N)


def embed(texts: Sequence[str], dimensions: int = 50) -> Float[np.ndarray, "P D"]:
    """Latent semantic vectors of texts in a given order, each of length 1 (0 for a text without a known word)."""
    from scipy.sparse.linalg import svds
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    vectorizer = TfidfVectorizer(
        token_pattern=TOKEN, stop_words="english", ngram_range=(1, 2), sublinear_tf=True, dtype=np.float64
    )
    try:
        weights = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UserError(f"the texts hold no words to cluster by: {error}") from error
    rank = min(dimensions, min(weights.shape) - 1)
    if rank < 1:
        return np.asarray(normalize(weights).toarray())
    left, values, right = svds(weights, k=rank, v0=np.ones(min(weights.shape)), tol=1e-10)
    strongest = np.abs(right).argmax(axis=1)
    signs = np.sign(right[np.arange(rank), strongest])
    return np.asarray(normalize((left * values * signs)[:, ::-1]))


def _k_means(
    embedded: Float[np.ndarray, "P D"], weights: Float[np.ndarray, "P"], k: int
) -> Int[np.ndarray, "P"]:
    from sklearn.cluster import KMeans

    model = KMeans(k, n_init=_STARTS, random_state=_SEED, algorithm="lloyd")
    return np.asarray(model.fit(embedded, sample_weight=weights).labels_)


def _best(
    embedded: Float[np.ndarray, "P D"], weights: Float[np.ndarray, "P"], largest: int
) -> Int[np.ndarray, "P"]:
    """The clustering with the highest silhouette, of equal ones the coarsest."""
    from sklearn.metrics import silhouette_score

    shown = np.unique(np.linspace(0, len(embedded) - 1, _LARGEST_SILHOUETTE).astype(int))
    best, highest = np.zeros(len(embedded), dtype=np.int64), -np.inf
    for k in range(2, largest + 1):
        labels = _k_means(embedded, weights, k)
        if len(set(labels[shown])) < 2:
            continue
        score = silhouette_score(embedded[shown], labels[shown])
        if score > highest + 1e-9:
            best, highest = labels, score
    return best


def _numbered(labels: Int[np.ndarray, "P"], points: _Points) -> Int[np.ndarray, "P"]:
    """Clusters numbered from 0 by falling weight, then by their first text."""
    sizes = {label: points.weights_P[labels == label].sum() for label in set(labels.tolist())}
    first = {label: int(np.flatnonzero(labels == label)[0]) for label in sizes}
    order = sorted(sizes, key=lambda label: (-sizes[label], first[label]))
    number = {label: i for i, label in enumerate(order)}
    return np.array([number[label] for label in labels.tolist()], dtype=np.int64)


def _described(
    labels: Int[np.ndarray, "P"], points: _Points, embedded: Float[np.ndarray, "P D"], top: int = 8
) -> list[Cluster]:
    marking = marking_words(points.texts, points.weights_P, labels, top)
    clusters = []
    for number, marks in enumerate(marking):
        members = np.flatnonzero(labels == number)
        centre = np.average(embedded[members], axis=0, weights=points.weights_P[members])
        nearest = members[np.argsort(-(embedded[members] @ centre), kind="stable")[:3]]
        size = int(points.weights_P[members].sum())
        share = size / points.weights_P.sum()
        examples = tuple(points.texts[i] for i in nearest)
        clusters.append(Cluster(number, size, float(share), marks, examples, ", ".join(marks[:3])))
    return clusters


def marking_words(
    texts: Sequence[str], weights_P: Float[np.ndarray, "P"], labels: Int[np.ndarray, "P"], top: int
) -> list[tuple[str, ...]]:
    """The `top` words of every cluster by c-TF-IDF, ties in alphabetical order."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=TOKEN, stop_words="english")
    counts = vectorizer.fit_transform(texts).multiply(weights_P[:, None]).tocsr()
    names = vectorizer.get_feature_names_out()
    by_cluster = np.array(
        [np.asarray(counts[labels == i].sum(axis=0)).ravel() for i in range(labels.max() + 1)]
    )
    sizes = by_cluster.sum(axis=1, keepdims=True)
    scores = by_cluster / np.maximum(sizes, 1) * np.log1p(sizes.mean() / by_cluster.sum(axis=0))
    ranked = [sorted(np.flatnonzero(row > 0), key=lambda v: (-row[v], names[v]))[:top] for row in scores]
    return [tuple(str(names[v]) for v in chosen) for chosen in ranked]


def stability(
    texts: Sequence[str],
    clusters: Callable[[Sequence[str]], Clustering] = cluster,
    share: float = 0.8,
    times: int = 5,
    seed: int = 0,
) -> list[float]:
    """Adjusted Rand index between the clustering of all texts and those of `times` random parts of them."""
    from sklearn.metrics import adjusted_rand_score

    whole, rng = clusters(texts).labels, np.random.default_rng(seed)
    indices = []
    for _ in range(times):
        part = rng.permutation(len(texts))[: int(share * len(texts))]
        labels = clusters([texts[i] for i in part]).labels
        indices.append(float(adjusted_rand_score(whole[part], labels)))
    return indices
