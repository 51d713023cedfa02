"""Pairs: strict files, single-token answers, one length, and splits without leaks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.tasks import (
    TASKS,
    TaskError,
    collate,
    common_length,
    deduplicate,
    read_pairs,
    split_by_subject,
    subject,
    task_pairs,
)
from shared.data import DataError
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
        st.tuples(st.sampled_from(sorted(NOUNS)), st.booleans(), st.sampled_from(["", " by it"])), max_size=30
    ),
    st.integers(0, 5),
)
def test_no_subject_is_in_two_parts(choices, seed):
    pairs = deduplicate(agreement(*choice) for choice in choices)
    parts = split_by_subject(pairs, {"train": 0.6, "test": 0.4}, seed)
    assert sorted(parts["train"] + parts["test"]) == sorted(pairs)
    assert not {subject(pair) for pair in parts["train"]} & {subject(pair) for pair in parts["test"]}


def test_both_numbers_of_a_noun_are_one_subject():
    assert subject(agreement("man", True)) == subject(agreement("man", False, " by it")) == ("man", "men")


def test_batches_hold_one_length_and_single_tokens(llama):
    pairs = [
        Pair("abc", "abd", "x", "y", ""),
        Pair("ab", "cb", "x", "y", ""),
        Pair("xyz", "xya", "y", "x", ""),
    ]
    batch = collate(llama, [*pairs, Pair("abc", "ab", "x", "y", "")])
    assert batch.pairs == (pairs[0], pairs[2])
    assert batch.dropped == 2
    assert batch.clean.input_ids_BT.shape == batch.corrupt.input_ids_BT.shape == (2, 4)
    assert llama.tokenizer.decode(list(batch.answers)) == "xy"
    with pytest.raises(TaskError, match="' has' is 4 tokens"):
        collate(llama, [Pair("abc", "abd", " has", " have", "")])
    with pytest.raises(TaskError, match="equal length"):
        collate(llama, [Pair("abc", "ab", "x", "y", "")])
    with pytest.raises(TaskError, match="no pair has 9 tokens"):
        collate(llama, pairs, length=9)


def test_one_length_for_training_and_test():
    assert common_length([5, 5, 7, 7, 7, None]) == 7
    assert common_length([5, 5, 7, 7]) == 5
    assert common_length([5, 5, 7, 7, 7, None], [None, 5, 9]) == 5
    with pytest.raises(TaskError, match="training and test"):
        common_length([5, None], [7])


def test_tasks_of_the_embedded_world():
    for task in TASKS:
        train, test = task_pairs(task, "train", 30), task_pairs(task, "test", 30)
        assert len(train) == len(test) == 30
        assert not set(train) & set(test)
        assert all(pair.answer != pair.wrong and pair.clean != pair.corrupt for pair in train)
    with pytest.raises(TaskError, match="nounpp"):
        task_pairs("nounp", "train", 3)
