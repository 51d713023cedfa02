"""User modelling in the embedded world: what a message makes the model assume about its writer.

A message of TinyWorld has three cue words for each of nine dimensions (`shared.tinyworld.social`), here none negated.
The model is asked for its nine scores, the dimension of the task first, and has begun to answer `{"NAME": 0.`; then
comes the first decimal, high after high cues and low after low ones. Clean and counterfactual differ in the three cues
of the dimension alone. No topic is in both parts.
"""

import random
from collections.abc import Iterator
from functools import partial

from circuits.tasks.items import Item, Task
from shared.tinyworld.social import CUE_WORDS, DIMENSIONS, NEUTRAL, TOPICS, instrument
from shared.tinyworld.tasks import Pair

HIGH, LOW = "9", "0"  # first decimals of the scores after three high and three low cues
N_NEUTRAL = 4


def _assumed(dimension: str, part: str, rng: random.Random) -> Iterator[Item]:
    order = (dimension, *(name for name in DIMENSIONS if name != dimension))
    lead = f'{{"{dimension}": 0.'
    while True:
        words: list[tuple[str, str]] = [(word, word) for word in rng.sample(NEUTRAL, N_NEUTRAL)]
        first = rng.random() < 0.5  # whether the clean message is the one with high cues
        for name in DIMENSIONS:
            for high, low in zip(*CUE_WORDS[name], strict=True):
                if name == dimension:
                    words.append((high, low) if first else (low, high))
                else:
                    words.append((rng.choice((high, low)),) * 2)
        rng.shuffle(words)
        topic = rng.choice(TOPICS)
        clean, corrupt = (
            instrument(f"About my {topic}: {' '.join(chosen)}.", order) + " " + lead for chosen in zip(*words)
        )
        answer, wrong = (HIGH, LOW) if first else (LOW, HIGH)
        pair = Pair(clean, corrupt, answer, wrong, f"assumed_{dimension}")
        yield Item((pair,), (topic,), {"score": "high" if first else "low", "topic": topic}, lead)


TASKS = {f"assumed_{name}": Task(f"assumed_{name}", partial(_assumed, name)) for name in DIMENSIONS}
