"""Public data sets as one kind of record: where each comes from, what its columns are, how a row becomes messages.

    from assumptions.corpora import load_corpus
    corpus = load_corpus("elephant_oeq", "data/OEQ.csv")
    chats = corpus.chats()

`registry.CORPORA` is the table of all sets. Nothing third-party is shipped and nothing is downloaded unless a source
that begins with `hf` asks for it.
"""

from assumptions.corpora.item import Item, Skip
from assumptions.corpora.loading import LoadedCorpus, load_corpus
from assumptions.corpora.registry import CORPORA, Corpus, corpus

__all__ = ["CORPORA", "Corpus", "Item", "LoadedCorpus", "Skip", "corpus", "load_corpus"]
