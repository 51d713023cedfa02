"""Subject-verb agreement in four structures, from the embedded model's grammar (words that any tokenizer has).

    simple     The uncle                       has / have
    nounpp     The uncles behind the dogs      do / does
    rc         The dog that the cats see       is / are
    within_rc  The athlete that the chefs      visit / visits

The counterfactual flips the number of the controlling noun. No noun of the training part occurs in the test part, be it
the controlling one or the other.
"""

import random
from collections.abc import Iterator
from functools import partial

from circuits.tasks.items import Item, Task
from shared.tinyworld.grammar import AGREEMENT, NOUNS, agreement_sentence
from shared.tinyworld.tasks import Pair

_SINGULARS = {noun[0] for noun in NOUNS}
_LEMMA = {form: noun[0] for noun in NOUNS for form in noun}


def _candidates(kind: str, part: str, rng: random.Random) -> Iterator[Item]:
    while True:
        sentence = agreement_sentence(kind, "test" if part == "test" else "train", rng)
        pair = Pair(sentence.prefix, sentence.flipped, sentence.right, sentence.wrong, kind)
        clean, flipped = pair.clean.split(), pair.corrupt.split()
        controlling = next(a for a, b in zip(clean, flipped, strict=True) if a != b)
        nouns = [_LEMMA[word] for word in clean if word in _LEMMA]
        number = "singular" if controlling in _SINGULARS else "plural"
        groups = tuple(dict.fromkeys([_LEMMA[controlling], *nouns]))
        yield Item((pair,), groups, {"number": number})


TASKS = {kind: Task(kind, partial(_candidates, kind)) for kind in AGREEMENT}
