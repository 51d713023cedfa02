"""Pairs: strict files, single-token answers for any tokenizer, one length, and splits without leaks."""

import json
import random
import re
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.tasks import (
    TASKS,
    Example,
    Item,
    Task,
    TaskError,
    answer_token,
    collate,
    deduplicate,
    draw,
    find_task,
    pair_items,
    read_pairs,
    subject,
    task_names,
)
from circuits.tasks.draw import FRACTIONS, common_length
from shared.data import DataError, part_of
from shared.stats import logit_difference
from shared.tinyworld.social import CUES, DIMENSIONS, read_counts
from shared.tinyworld.tasks import Pair

NOUNS = {"dog": "dogs", "uncle": "uncles", "man": "men", "girl": "girls", "truck": "trucks"}


def agreement(noun: str, plural: bool, tail: str = "") -> Pair:
    forms = (NOUNS[noun], noun) if plural else (noun, NOUNS[noun])
    answers = ("a", "b") if plural else ("b", "a")
    return Pair(f"The {forms[0]}{tail}", f"The {forms[1]}{tail}", *answers, "simple")


def test_files_in_the_sva_format_are_read(tmp_path):
    path = tmp_path / "pairs.json"
    row = {
        "clean_prefix": "The uncle",
        "patch_prefix": "The uncles",
        "clean_answer": " has",
        "patch_answer": " have",
    }
    path.write_text(json.dumps(row | {"case": "singular"}) + "\n\n" + json.dumps(row) + "\n")
    pairs = read_pairs(path)
    assert pairs == [Pair("The uncle", "The uncles", " has", " have", case) for case in ("singular", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"clean_prefix": "x"}', "patch_prefix"), ("nonsense", "line 1"), ('{"clean": 1}', "clean")],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_a_missing_file_says_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="clean_answer"):
        read_pairs(tmp_path / "absent.jsonl")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(NOUNS)), st.booleans(), st.sampled_from(["", " by dogs", " near men"])
        ),
        max_size=30,
    )
)
def test_pairs_are_about_their_subject_and_about_those_they_mention(choices):
    pairs = deduplicate(agreement(*choice) for choice in choices)
    items = pair_items(pairs)
    assert [item.forms for item in items] == [(pair,) for pair in pairs]
    subjects = {" ".join(subject(pair)) for pair in pairs}
    for item in items:
        words = set(item.forms[0].clean.split())
        assert set(item.groups) == {name for name in subjects if set(name.split()) & words}
        assert item.groups[0] == " ".join(subject(item.forms[0]))


def test_both_numbers_of_a_noun_are_one_subject():
    assert subject(agreement("man", True)) == subject(agreement("man", False, " by it")) == ("man", "men")


def letters(*pairs):
    return [Example(Pair(clean, corrupt, "x", "y", ""), (clean,)) for clean, corrupt in pairs]


def stream(*items):
    return Task("letters", lambda part, rng: iter(items))


def train_seed(*groups):
    """A seed under which all groups fall into the training part."""
    return next(seed for seed in range(1000) if {part_of(g, FRACTIONS, seed) for g in groups} == {"train"})


def test_batches_hold_one_length_and_single_tokens(llama):
    batch = collate(llama, letters(("abc", "abd"), ("xyz", "xya")))
    assert batch.clean.input_ids_BT.shape == batch.corrupt.input_ids_BT.shape == (2, 4)
    assert batch.clusters == ("abc", "xyz")
    assert llama.tokenizer.decode(list(batch.answers)) == "xx"
    with pytest.raises(TaskError, match="one length"):
        collate(llama, letters(("abc", "abd"), ("ab", "cb")))
    with pytest.raises(TaskError, match="at least one"):
        collate(llama, [])


def test_an_answer_of_several_tokens_is_refused_by_name(llama):
    with pytest.raises(TaskError, match="' has' is 4 tokens"):
        answer_token(llama.tokenizer, " has")


def test_one_length_for_training_and_test():
    assert common_length("t", {5: 2, 7: 3}) == 7
    assert common_length("t", {5: 2, 7: 2}) == 5
    assert common_length("t", {5: 2, 7: 3}, {5: 1, 9: 4}) == 5
    with pytest.raises(TaskError, match="training and test"):
        common_length("t", {5: 1}, {7: 1})


def test_what_does_not_fit_the_tokenizer_is_left_out_and_counted(llama):
    fits = Item((Pair("abc ", "abd ", "x", "y", ""),), ("1",))
    second = Item((Pair("abc", "abd", " x", " y", ""), Pair("abc ", "abd ", "x", "z", "")), ("2",))
    unequal = Item((Pair("abc", "ab", "x", "y", ""),), ("3",))
    longer = Item((Pair("abcdefg", "abcdefh", "x", "y", ""),), ("4",))
    task = stream(fits, second, fits, unequal, longer)
    drawn = draw(llama, task, {"train": 9}, train_seed(*"1234"))
    assert [example.pair for example in drawn.parts["train"]] == [fits.forms[0], second.forms[1]]
    tally = drawn.tally["train"]
    assert (tally.seen, tally.repeated, tally.unfit, tally.other_length) == (5, 1, 1, 1)
    assert drawn.length == 5
    with pytest.raises(TaskError, match="of 1 candidates 1 have answers that are"):
        draw(llama, stream(unequal), {"train": 9}, train_seed("3"))


def test_an_item_about_things_of_two_parts_is_in_neither(llama):
    seed = next(s for s in range(99) if part_of("a", FRACTIONS, s) != part_of("b", FRACTIONS, s))
    pair = Pair("abc", "abd", "x", "y", "")
    task = stream(Item((pair,), ("a", "b")), Item((pair,), ("a",)), Item((pair,), ("b",)))
    drawn = draw(llama, task, {"train": 5, "test": 5}, seed)
    assert [len(drawn.parts[part]) for part in ("train", "test")] == [1, 1]
    assert {drawn.parts[part][0].groups for part in ("train", "test")} == {("a",), ("b",)}
    assert drawn.tally["train"].elsewhere == drawn.tally["test"].elsewhere == 2


def test_an_answer_that_merges_with_its_prompt_does_not_fit(word_tokenizer, llama):
    """ "dogs" after "the " is one token with the prompt's space: alone a token, in its place not."""
    tokenizer = word_tokenizer(["the dogs", "an cats"])
    merging = Item((Pair("the ", "an ", "dogs", "cats", ""),), ("1",))
    fitting = Item((Pair("the", "an", " dogs", " cats", ""),), ("1",))
    model = type("Words", (), {"tokenizer": tokenizer})
    with pytest.raises(TaskError, match="not single tokens"):
        draw(model, stream(merging), {"train": 1}, train_seed("1"))
    assert draw(model, stream(fitting), {"train": 1}, train_seed("1")).length == 1


def test_a_chat_is_rendered_with_the_answer_begun(llama):
    lead = "Answer: "
    item = Item(
        (Pair("x = ", "y = ", "1", "2", ""), Pair(f"x? {lead}", f"y? {lead}", "1", "2", "")),
        ("1",),
        lead=lead,
    )
    (example,) = draw(llama, stream(item), {"train": 1}, train_seed("1"), "chat").parts["train"]
    ids = llama.encode([[{"role": "user", "content": "x?"}]]).input_ids_BT[0].tolist()
    assert llama.tokenizer.encode(example.pair.clean) == ids + llama.tokenizer.encode(
        lead, add_special_tokens=False
    )
    assert example.pair.answer == "1"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_yields_pairs_that_differ_and_say_what_they_are_about(name):
    for part in ("train", "test"):
        items = list(islice(TASKS[name].candidates(part, random.Random(0)), 60))
        assert len({item.forms for item in items}) > 20
        for item in items:
            assert item.groups
            assert item.labels
            for form in item.forms:
                assert form.answer != form.wrong
                assert form.clean != form.corrupt


@pytest.mark.parametrize("name", ["simple", "nounpp", "rc", "within_rc", "capitals", "addition", "antonyms"])
def test_the_embedded_models_tokenizer_has_the_worlds_tasks(name, world):
    drawn = draw(world, TASKS[name], {"train": 40, "test": 16}, seed=1)
    assert [len(drawn.parts[part]) for part in ("train", "test")] == [40, 16]
    about = {part: {g for e in drawn.parts[part] for g in e.groups} for part in drawn.parts}
    assert not about["train"] & about["test"]
    for examples in drawn.parts.values():
        assert collate(world, examples).clean.input_ids_BT.shape[1] == drawn.length


@pytest.mark.parametrize("dimension", range(len(DIMENSIONS)))
def test_cues_of_one_dimension_alone_turn_what_the_embedded_model_assumes(world, dimension):
    name = DIMENSIONS[dimension]
    examples = draw(world, TASKS[f"assumed_{name}"], {"train": 12, "test": 8}, style="chat").parts["train"]
    for pair, score in ((example.pair, example.labels["score"]) for example in examples):
        clean, corrupt = read_counts(pair.clean), read_counts(pair.corrupt)
        assert {clean[dimension], corrupt[dimension]} == {0, CUES}
        assert (score == "high") == (clean[dimension] == CUES) == (pair.answer == "9")
        assert list(np.delete(clean, dimension)) == list(np.delete(corrupt, dimension))
    pairs = collate(world, examples)
    answers_B, wrong_B = torch.tensor(pairs.answers), torch.tensor(pairs.wrongs)
    with torch.no_grad():
        for batch, sign in ((pairs.clean, 1), (pairs.corrupt, -1)):
            rows = torch.arange(len(examples))
            logits_BV = world(batch)[rows, batch.last_columns_B]
            assert (sign * logit_difference(logits_BV, answers_B, wrong_B) > 2).all()


@pytest.mark.parametrize(("digits", "form"), [(1, 2), (2, 0), (3, 0)])
def test_sums_fit_tokenizers_of_one_two_or_three_digits(word_tokenizer, digits, form):
    numbers = [str(n) for n in range(200)]
    tokenizer = word_tokenizer([f"{n} + {n} = {n}" for n in numbers], digits)
    model = type("Digits", (), {"tokenizer": tokenizer})
    for item, example in fitted(model, TASKS["addition"]):
        assert item.forms.index(example.pair) >= form
        x, y, *tens = re.findall(r"\d+", example.pair.clean)
        assert int(x) + int(y) == int("".join([*tens, example.pair.answer.strip()]))


def fitted(model, task):
    """Examples with the items they come from."""
    items = list(islice(task.candidates("train", random.Random(5)), 400))
    drawn = draw(model, Task(task.name, lambda part, rng: iter(items)), {"train": 20}, seed=0)
    assert len(drawn.parts["train"]) == 20
    for example in drawn.parts["train"]:
        yield next(item for item in items if example.pair in item.forms), example


@pytest.mark.parametrize("digits", [1, 2])
def test_years_go_on_with_more_than_they_began(word_tokenizer, digits):
    years = [
        f"The {word} lasted from the year {n} to the year"
        for n in range(1100, 1900, 3)
        for word in ("war", "trial")
    ]
    tokenizer = word_tokenizer([*years, *(f"{n:02d} {n}" for n in range(100))], digits)
    model = type("Digits", (), {"tokenizer": tokenizer})
    for _, example in fitted(model, TASKS["greater_than"]):
        begun, other = (int(text.split()[-5][2:]) for text in (example.pair.clean, example.pair.corrupt))
        scale = 10 ** (2 - len(example.pair.answer))
        assert int(example.pair.wrong) * scale < begun < int(example.pair.answer) * scale
        assert int(example.pair.answer) * scale <= other


def test_names_files_and_patterns(tmp_path):
    row = {
        "clean_prefix": "The uncle",
        "patch_prefix": "The uncles",
        "clean_answer": " has",
        "patch_answer": " have",
    }
    for half in ("train", "test"):
        (tmp_path / f"simple_{half}.json").write_text(json.dumps(row) + "\n")
    task = find_task(str(tmp_path / "simple_*.json"))
    assert task.name == "simple"
    assert len(list(task.candidates("train", random.Random(0)))) == 1  # both halves hold the same row
    assert task_names(["nounpp", "a/pairs.jsonl"]) == {"nounpp": "nounpp", "a/pairs.jsonl": "pairs"}
    with pytest.raises(TaskError, match="within_rc"):
        find_task("nounp")
    with pytest.raises(DataError, match="no file matches"):
        find_task(str(tmp_path / "rc_*.json"))


def test_the_public_files_share_no_noun_after_the_split(sva, word_tokenizer):
    """The released halves share most prefixes; here no noun of one part is a subject of the other."""
    for name in ("simple", "nounpp"):
        task = find_task(str(sva / f"{name}_*.json"))
        items = list(task.candidates("train", random.Random(0)))
        texts = [
            text for item in items for form in item.forms for text in (form.clean + form.answer, form.corrupt)
        ]
        model = type("Words", (), {"tokenizer": word_tokenizer(texts)})
        drawn = draw(model, task, {"train": 200, "test": 40}, seed=0)
        subjects = {
            part: {word for e in drawn.parts[part] for word in subject(e.pair)} for part in drawn.parts
        }
        assert min(len(drawn.parts[part]) for part in drawn.parts) >= 15
        for part, other in (("train", "test"), ("test", "train")):
            words = {word for e in drawn.parts[part] for word in e.pair.clean.split()}
            assert not words & subjects[other]
