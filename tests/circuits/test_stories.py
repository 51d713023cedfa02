"""On a small model with real weights: figures of the digest's section 9 (skipped where the model is absent)."""

import pytest
import torch

from circuits.attribution import attribute, exact_scores, pose
from circuits.faithfulness import curve
from circuits.metric import logit_difference, top_logits
from circuits.relp import relp
from circuits.rules import Rules

FIRST_TEN = """\
Once upon a time, there was a little girl named Lily. She loved to play with her
Tom and Sam are friends. They like to play with
One day, a big dog saw a small cat. The cat was
The sun was hot. Ben wanted to drink some
Mom said, "Do not run in the house." But Tim
She was very sad because she lost her toy. Her mom gave her a
The bird could fly high in the
Lily and her brother went to the park to play on the
He was so happy that he gave his mom a big
They went home and ate"""
FRESH_THIRTY = """\
Once upon a time, there was a boy named Tim. He had a red
The cat and the dog were good
Sara had a big box. She put her
It was a sunny day. The children ran to the
Once there was a small bird who lived in a
Max saw a frog in the pond. He wanted to
"Can I have a cookie?" asked
The little girl was scared. She hid under the
Dad said, "Let us go to the
Mia liked to draw. She drew a
The tree was very tall and had many
Ben and his dog played with a
One night, the moon was bright and the
Lucy was tired. She went to
The bear was hungry. He looked for some
They found a big shell on the
Amy fell down and hurt her
Jack was mean to his sister. His mom was
The old man smiled and said,
Sue and Bob made a cake. It was very
In the garden there was a pretty
Sam did not want to share his
The rain stopped and a
Anna gave the bunny a
The toy car was fast and
After lunch, they played in the
The fish swam in the
He opened the door and saw a
She said sorry and gave him a
The big truck made a loud"""
LILY = "Once upon a time, there was a girl named Lily."


def she_over_he(stories):
    she, he = stories.tokenizer.convert_tokens_to_ids(["\u2581She", "\u2581He"])
    return lambda logits, at: logit_difference(logits, at, [she], [he])


def test_relp_keeps_more_with_twenty_nodes_than_gradients_do(stories):
    prompts = [*FIRST_TEN.splitlines(), *FRESH_THIRTY.splitlines()]
    batch = stories.encode(prompts)
    problem = pose(stories, batch, lambda logits, at: top_logits(logits, at, 1))
    share = {}
    for name in ("relp", "atp"):
        scores_BLTN = attribute(problem, name)[:, 0]
        point = curve(stories, batch, problem.metric, scores_BLTN, [20], problem.reference_BLTN)[0]
        share[name] = point.per_example()[0]
    assert len(prompts) == 40
    assert float(share["relp"].median()) >= 0.6
    assert float((share["relp"] > share["atp"]).double().mean()) >= 0.7


def test_known_values_of_the_pronoun_prompt(stories):
    problem = pose(stories, stories.encode([LILY]), she_over_he(stories))
    value = float(problem.metric.value(problem.network.logits_BTV))
    assert value == pytest.approx(7.04, abs=0.01)
    assert relp(problem.network, problem.metric).ledger.error() < 1e-4
    scores_LTN = attribute(problem, "relp")[0, 0]
    counts = [int((scores_LTN.abs() >= tau * abs(value)).sum()) for tau in (0.005, 0.01, 0.02, 0.05)]
    assert counts[1:] == [192, 50, 5]
    assert abs(counts[0] - 487) <= 1  # one node lies on the threshold within float32
    strongest = exact_scores(problem, 0, torch.tensor([[2, 11, 15]]), chunk=1)
    assert float(strongest) == pytest.approx(1.48, abs=0.01)
    assert float(attribute(problem, "atp")[0, 0, 2, 11, 15]) == pytest.approx(-0.05, abs=0.01)
    assert float(scores_LTN[2, 11, 15]) == pytest.approx(-0.04, abs=0.01)


def test_half_rule_off_misses_by_what_was_measured(stories):
    problem = pose(stories, stories.encode([LILY]), she_over_he(stories), rules=Rules(half=False))
    ledger = relp(problem.network, problem.metric).ledger
    assert float((ledger.total() - ledger.value_BK).abs() / ledger.value_BK.abs()) > 0.5
