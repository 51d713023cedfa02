"""The world itself: facts, held-out combinations, questions, users, tokenizer."""

import random
import re
from collections import Counter

import pytest

from shared.tinyworld import facts, grammar, stories, tasks, tokenizer, users


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train_tokenizer()


def test_facts_are_unambiguous():
    assert len(facts.STATES) == 50
    cities = [city for _, cities in facts.STATES.values() for city in cities]
    assert all(len(cities) >= 3 for _, cities in facts.STATES.values())
    assert max(Counter(cities).values()) == 1
    assert not set(cities) & set(facts.CAPITALS.values())
    assert len(set(facts.CAPITALS.values())) == 50


@pytest.mark.parametrize("pairs", facts.ANTONYMS.values(), ids=facts.ANTONYMS)
def test_antonyms_are_functions(pairs):
    words = [w for pair in pairs for w in pair]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("kind", grammar.AGREEMENT)
def test_training_sentences_hold_no_held_out_combination(kind):
    seen = {(p.clean, p.answer) for p in tasks.agreement_pairs(kind, "train", 1500)}
    seen |= {(p.corrupt, p.wrong) for p in tasks.agreement_pairs(kind, "train", 1500)}
    held = {(p.clean, p.answer) for p in tasks.agreement_pairs(kind, "test", 400)}
    assert held
    assert not held & seen


@pytest.mark.parametrize("kind", grammar.AGREEMENT)
def test_agreement_pairs_differ_in_one_noun(kind):
    for pair in tasks.agreement_pairs(kind, "test", 100):
        different = [(a, b) for a, b in zip(pair.clean.split(), pair.corrupt.split(), strict=True) if a != b]
        a, b = sorted(different[0], key=len) if len(different) == 1 else ("", "")
        assert a + "s" == b
        assert pair.answer != pair.wrong


def _number(word: str) -> bool:
    return word in {plural for _, plural in grammar.NOUNS}


@pytest.mark.parametrize("kind", grammar.AGREEMENT)
def test_answers_agree_with_the_controlling_noun(kind):
    plural_verbs = {v[1] for v in grammar.VERBS} | {v[1] for v in grammar.CLAUSE_VERBS}
    for pair in tasks.agreement_pairs(kind, "train", 200):
        nouns = [w for w in pair.clean.split() if w in {n for lemma in grammar.NOUNS for n in lemma}]
        controller = nouns[-1] if kind == "within_rc" else nouns[0]
        assert (pair.answer.strip() in plural_verbs) == _number(controller)


@pytest.mark.parametrize("name", tasks.QUESTIONS)
def test_question_splits_never_meet(name):
    train, test = (set(tasks.QUESTIONS[name](split)) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_additions_are_held_out_by_pair():
    pairs = {
        s: {tuple(re.findall(r"\d+", q.prompt)) for q in tasks.addition_questions(s)}
        for s in ("train", "test")
    }
    assert not pairs["train"] & pairs["test"]
    assert len(pairs["train"] | pairs["test"]) == 10_000


def test_unasked_cities_are_never_asked_in_training():
    asked = " ".join(q.prompt for q in tasks.two_hop_questions("train") + tasks.two_hop_questions("test"))
    assert len(tasks.UNASKED_CITIES) > 30
    assert not any(re.search(rf"\b{city}\b", asked) for city in tasks.UNASKED_CITIES)


def test_capital_pairs_answer_both_sides():
    for pair in tasks.capital_pairs("test", 50):
        city, other = (
            next(c for c in facts.CITIES if re.search(rf"\b{c}\b", p)) for p in (pair.clean, pair.corrupt)
        )
        assert pair.answer == " " + facts.CAPITALS[facts.CITIES[city]]
        assert pair.wrong == " " + facts.CAPITALS[facts.CITIES[other]]


def test_world_words_are_single_tokens(tok):
    assert [w for w in tokenizer.world_words() if len(tok.tokenize(" " + w)) != 1] == []


def test_pairs_tokenize_to_equal_lengths(tok):
    pairs = [p for kind in grammar.AGREEMENT for p in tasks.agreement_pairs(kind, "test", 100)]
    for p in pairs + tasks.capital_pairs("test", 100):
        assert len(tok(p.clean).input_ids) == len(tok(p.corrupt).input_ids)
        assert len(tok.tokenize(p.answer)) == len(tok.tokenize(p.wrong)) == 1


def test_tokenizer_round_trips_and_starts_once(tok):
    rng = random.Random(1)
    for text in [stories.plain_text(rng) for _ in range(50)] + [
        "Stra\u00dfe 36 + 59 = 95",
        "tab\tnew\nline  two",
    ]:
        ids = tok(text).input_ids
        assert ids[0] == tok.bos_token_id
        assert ids.count(tok.bos_token_id) == 1
        assert tok.decode(ids, skip_special_tokens=True) == text


def test_digits_are_tokens_of_their_own(tok):
    assert tok.tokenize("36 + 59 =") == ["3", "6", "\u0120+", "\u01205", "9", "\u0120="]


def test_users_keep_their_preferences_and_splits():
    for user in users.make_users(6, seed=3):
        rows = {split: user.rows(split) for split in ("train", "test")}
        asked = {split: {row[0]["content"] for row in rows[split]} for split in rows}
        assert not asked["train"] & asked["test"]
        for row in rows["train"] + rows["test"]:
            answer = row[1]["content"]
            assert answer.startswith(user.preferences.greeting)
            assert answer.endswith(user.preferences.sign_off)
            assert user.preferences.units == "metric" or not re.search("Celsius|kilometers", answer)
            assert user.preferences.units == "imperial" or not re.search("Fahrenheit|miles", answer)
            assert not any(d in answer.split() for d in set(users.DRINKS) - {user.preferences.drink})
    assert users.make_users(3, seed=1) == users.make_users(3, seed=1) != users.make_users(3, seed=2)
