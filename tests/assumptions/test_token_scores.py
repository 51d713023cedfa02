"""Expected values over token probabilities: against enumeration of all numbers, and against the world's closed form."""

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from assumptions.dimensions import NAMES
from assumptions.elicitation import Elicitation, ElicitationSettings, elicit
from assumptions.instruments import instrument
from assumptions.parsing import Status
from assumptions.records import Record
from assumptions.sources import load_messages
from assumptions.token_scores import Root, TreeSettings, expected_scores, explore, number_starts
from shared.errors import UserError
from shared.generation import Completion, HFGenerator
from shared.models import load

# Three ways in which tokenisers cut numbers: digit by digit, a space before the first one, several digits at once.
VOCABULARIES = {
    "digits": ["0", "1", "2", "8", ".", ",", "}", " ", "\n", "x", '"'],
    "space_before": [" 0", " 1", "0", "5", "9", ".", ",", " }", "}", "-", "e"],
    "pieces": ["0", "1", "0.", "0.8", "85", "8", "00", ".0", ".", "5,", "}", ", ", " 0.9", "7"],
}
DEPTH = 4


class TokenModel:
    """A language model over a small vocabulary whose next-token probabilities hang on the whole text before."""

    def __init__(self, vocabulary):
        self.vocabulary, self.asked, self.known = vocabulary, 0, {}

    def text_of(self, before, token):
        return self.vocabulary[token]

    def probabilities(self, ids):
        if tuple(ids) not in self.known:
            self.known[tuple(ids)] = self.fresh(ids)
        return self.known[tuple(ids)]

    def fresh(self, ids):
        seed = hashlib.sha256(repr(list(ids)).encode()).digest()
        rng = np.random.default_rng(list(seed))
        weights = rng.dirichlet(np.full(len(self.vocabulary), 0.7))
        # after DEPTH tokens every number ends, so that all of them can be enumerated
        if len(ids) > DEPTH:
            weights = np.array([float(t.strip() in (",", "}")) for t in self.vocabulary])
        return weights / weights.sum()

    def generate(self, requests, sampling):
        self.asked += len(requests)
        assert sampling.max_tokens == 1
        answers = []
        for request in requests:
            p = self.probabilities(request.prompt)
            top = sorted((t for t in range(len(p)) if p[t] > 0), key=lambda t: -p[t])[: sampling.logprobs]
            answers.append([Completion("", [], [], "length", [{t: math.log(p[t]) for t in top}])])
        return answers

    def close(self):
        pass


def enumerated(model, root):
    """P(number) by walking every sequence of tokens, with the numbers read by Python and by nothing of ours."""
    numbers = {}

    def walk(ids, text, probability):
        stripped = text.lstrip()
        end = next((i for i, c in enumerate(stripped) if c in " \n,}"), None)
        body = stripped[:end]
        if body and end is not None:  # the number has ended
            whole, _, fraction = body.partition(".")
            spelled = whole in ("0", "1") and ("." not in body or fraction.isdigit())
            if spelled and 0 <= float(body) <= 1 and (whole == "0" or set(fraction) <= {"0"}):
                numbers[float(body)] = numbers.get(float(body), 0.0) + probability
            return
        if len(ids) > DEPTH + 2:
            return
        for token, p in enumerate(model.probabilities(ids)):
            if p > 0 and could_continue(text + model.vocabulary[token]):
                walk([*ids, token], text + model.vocabulary[token], probability * p)

    walk(list(root.ids), root.text, 1.0)
    return numbers


def could_continue(text):
    """Whether the text may be a number with what ends it: a loose filter that only keeps the walk short."""
    stripped = text.lstrip()
    return all(c in "0123456789.,} \n" for c in stripped) and len(text) - len(stripped) <= 8


@pytest.mark.parametrize("name", sorted(VOCABULARIES))
@pytest.mark.parametrize("seed", range(3))
def test_the_tree_is_the_enumeration_of_all_numbers(name, seed):
    """Digits split as in real tokenisers, numbers over several tokens, tokens that end a number and more."""
    model = TokenModel(VOCABULARIES[name])
    roots = [Root([1000 + seed, i], "" if i % 2 else " ") for i in range(3)]
    settings = TreeSettings(top=len(model.vocabulary), min_mass=0.0)
    found = explore(model, roots, model.text_of, settings)
    for numbers, root in zip(found, roots, strict=True):
        truth = enumerated(model, root)
        assert numbers.keys() == truth.keys()
        assert len(truth) > 3
        for number, probability in truth.items():
            assert numbers[number] == pytest.approx(probability, rel=1e-12)


def test_pruning_loses_at_most_what_it_leaves_closed():
    model = TokenModel(VOCABULARIES["digits"])
    whole = explore(model, [Root([7], "")], model.text_of, TreeSettings(top=99, min_mass=0.0))[0]
    before = model.asked
    cut = explore(model, [Root([7], "")], model.text_of, TreeSettings(top=99, min_mass=0.02))[0]
    assert model.asked - before < before / 4
    assert cut.keys() <= whole.keys()
    assert all(cut[number] <= whole[number] + 1e-12 for number in cut)
    assert sum(cut.values()) < sum(whole.values())


class TestWhereNumbersBegin:
    def starts(self, text, cuts, names=("user_rightness",)):
        record = Record("a", 0, Status.CLEAN, dict.fromkeys(names, 0.5), text)
        edges = [0, *cuts, len(text)]
        texts = [text[a:b] for a, b in itertools.pairwise(edges)]
        assert "".join(texts) == text
        return number_starts(record, texts)

    def test_wherever_the_tokens_are_cut(self):
        text = '{"user_rightness": 0.85}'
        colon = text.index(":") + 1
        assert self.starts(text, [colon])["user_rightness"] == (1, "")
        assert self.starts(text, [3, colon + 1])["user_rightness"] == (2, " ")
        assert self.starts(text, range(1, len(text)))["user_rightness"] == (colon, "")
        assert self.starts(text, [colon - 1, colon + 2]) == {}  # one token holds the colon and a digit

    def test_explained_scores_and_repeated_keys(self):
        text = '{"user_rightness": {"score": 0.4, "explanation": "user_rightness: 1"}}'
        cut = text.index(" 0.4")
        assert self.starts(text, [cut])["user_rightness"] == (1, "")
        assert self.starts(text + text, [cut]) == {}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    model = load("tinyworld")
    messages = load_messages("tinyworld", 6, seed=11, columns={})
    settings = ElicitationSettings(guided=False, temperature=1.0, keep_tokens=True, max_tokens=96)
    asked = instrument("tinyworld_nine")
    generator = HFGenerator(model, batch_size=128)
    result = elicit(
        generator, asked, messages.chats, folder / "answers.jsonl", settings, model=model.fingerprint
    )
    tree = TreeSettings(min_mass=0.01)

    def again(path="tokens.jsonl", answers=result):
        return expected_scores(
            generator,
            model.tokenizer,
            asked,
            messages.chats,
            answers,
            folder / path,
            tree,
            model=model.fingerprint,
        )

    return messages, result, again(), again


def test_on_the_embedded_model_the_distribution_is_the_closed_form(study):
    """Scores are trained on draws of the latent: their distribution is the binned Beta posterior."""
    from shared.tinyworld import social

    messages, result, tokens, _ = study
    ids = [chat.id for chat in messages.chats]
    expected = tokens.scores(ids, NAMES)
    stated = result.scores(ids, NAMES)
    truth = messages.posterior_BK
    assert np.isfinite(expected).mean() > 0.95
    error = lambda x: np.sqrt(np.nanmean((x - truth) ** 2))  # noqa: E731
    assert error(expected) < 0.05 < 0.1 < error(stated)
    residual = 1 - np.nanvar(expected - truth) / truth.var()
    assert residual > 0.95
    distances = []
    for record in tokens.records:
        counts = social.read_counts(next(c.turn for c in messages.chats if c.id == record.id))
        ideal = social.score_probabilities(counts)[NAMES.index(record.dimension)]
        told = {round(float(k), 2): p / record.mass for k, p in record.numbers.items()}
        found = np.array([told.pop(round(float(x), 2), 0.0) for x in social.GRID])
        distances.append((np.abs(found - ideal).sum() + sum(told.values())) / 2)
        assert record.mass <= 1 + 1e-6
    assert np.mean(distances) < 0.15


def test_no_plateau(study):
    """More than 20 distinct values a hundred messages, where stated scores lie on a grid of 0.05."""
    messages, result, tokens, _ = study
    ids = [chat.id for chat in messages.chats]
    distinct = [len(set(np.round(column, 4))) for column in tokens.scores(ids, NAMES).T]
    assert min(distinct) >= 0.9 * len(ids)
    assert max(len(set(column)) for column in result.scores(ids, NAMES).T) <= 21


def test_a_finished_file_is_read_and_asks_nothing(study, monkeypatch):
    _, result, tokens, again = study
    monkeypatch.setattr(HFGenerator, "generate", lambda *_: pytest.fail("asked again"))
    assert again().records == tokens.records
    first, *rest = result.records
    other = Elicitation([replace(first, token_ids=first.token_ids[1:]), *rest])
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        again(answers=other)  # another answer of the same draw has scores of its own


def test_answers_without_tokens_are_refused(study):
    _, result, _, again = study
    bare = Elicitation([Record(r.id, r.sample, r.status, r.scores, r.text, r.row) for r in result.records])
    with pytest.raises(UserError, match="keep_tokens=True"):
        again("other.jsonl", bare)


def test_settings_are_checked():
    with pytest.raises(UserError, match="top and batch_size"):
        TreeSettings(top=0)
    with pytest.raises(UserError, match="are probabilities"):
        TreeSettings(least_mass=2.0)
