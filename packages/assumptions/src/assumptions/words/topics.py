"""Clusters by other means: BERTopic where it is installed, and names for clusters written by a language model.

BERTopic embeds with a neural network and reduces with UMAP: document order and device move its topics even under a
fixed seed (github.com/MaartenGr/BERTopic/issues/2276). It is an option, never the default; documents are sorted first.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np

from assumptions.words.clusters import Cluster, Clustering, marking_words
from shared.errors import UserError
from shared.generation import Generator, Request, Sampling
from shared.tokens import Message

_NAME = (
    "These words mark a group of short descriptions of what a person wants: {words}.\n"
    "Some of the descriptions:\n{examples}\n\n"
    "Give the group a name of two to five words. Write the name only."
)


def bertopic_cluster(texts: Sequence[str], seed: int = 0) -> Clustering:
    """Topics of BERTopic as clusters; its outliers are cluster number -1. UserError where it is not installed."""
    try:
        bertopic, umap = import_module("bertopic"), import_module("umap")
    except ImportError as error:
        raise UserError(
            "BERTopic is not installed: pip install bertopic, or take words.clusters.cluster"
        ) from error
    order = sorted(range(len(texts)), key=lambda i: texts[i])
    documents = [texts[i] for i in order]
    reducer = umap.UMAP(n_neighbors=15, n_components=5, metric="cosine", random_state=seed)
    model = bertopic.BERTopic(umap_model=reducer)
    topics = np.asarray(model.fit_transform(documents)[0])
    labels = np.empty(len(texts), dtype=np.int64)
    labels[order] = topics
    inside = labels >= 0
    marks = marking_words(
        [t for t, kept in zip(texts, inside) if kept], np.ones(int(inside.sum())), labels[inside], 8
    )
    clusters = []
    for number, words in enumerate(marks):
        members = np.flatnonzero(labels == number)
        examples = tuple(texts[i] for i in members[:3])
        clusters.append(
            Cluster(number, len(members), len(members) / len(texts), words, examples, ", ".join(words[:3]))
        )
    return Clustering(labels, clusters)


def named(clusters: Sequence[Cluster], generator: Generator, max_tokens: int = 24) -> list[Cluster]:
    """The clusters with names written by a language model; one that writes no short name leaves the marking words."""
    requests = [
        Request(
            [
                Message(
                    role="user",
                    content=_NAME.format(
                        words=", ".join(one.words), examples="\n".join(f"- {text}" for text in one.examples)
                    ),
                )
            ]
        )
        for one in clusters
    ]
    answers = generator.generate(requests, Sampling(max_tokens=max_tokens, logprobs=None))
    return [
        replace(one, name=_name(answer.text) or one.name)
        for one, [answer] in zip(clusters, answers, strict=True)
    ]


def _name(text: str) -> str:
    """The first line of an answer without quotes and full stop; "" when it is empty or longer than a name."""
    lines = text.strip().splitlines()
    name = lines[0].strip().strip("\"'*.").strip() if lines else ""
    return name if 0 < len(name) <= 60 else ""
