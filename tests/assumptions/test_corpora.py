"""Readers of the public sets: published columns in, typed records out; errors that name line, licence and address."""

import csv
import json
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # for the helper module; the import mode adds nothing

from corpora_cases import HUMAN, ROWS

from assumptions.chats import Chat, read_chats
from assumptions.corpora import CORPORA, load_corpus
from assumptions.corpora.item import label
from assumptions.corpora.turns import read_conversations
from shared.data import DataError
from shared.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"  # beside the checkout
OTHER_FILES = {("sycon", "debate"), ("spiral_bench", "transcripts"), ("talktuner", ""), ("goal_switch", "")}


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_part_of_every_set_is_tested_here():
    assert {(c.name, part) for c in CORPORA.values() for part in c.parts} == set(ROWS) | OTHER_FILES


@pytest.mark.parametrize("key", sorted(ROWS))
def test_published_columns_become_records(tmp_path, key):
    name, part = key
    file, rows, _, _ = ROWS[key]
    write(tmp_path / file, rows)
    whole, single = load_corpus(name, tmp_path, part=part), load_corpus(name, tmp_path / file, part=part)
    assert whole.items == single.items
    assert whole.card["counts"]["rows"] == 2
    assert len(whole.card["files"][file]) == 64
    assert len({item.id for item in whole.items}) == len(whole.items) >= 2
    for chat in whole.chats():
        assert isinstance(chat, Chat)
        assert chat.turn.strip()
        assert chat.source == name
        assert chat.group.startswith(CORPORA[name].groups or name)


@pytest.mark.parametrize("key", sorted(ROWS))
def test_a_malformed_row_is_reported_with_its_line(tmp_path, key):
    name, part = key
    file, rows, change, message = ROWS[key]
    write(tmp_path / file, [rows[0], rows[1] | change])
    with pytest.raises(DataError) as error:
        load_corpus(name, tmp_path, part=part)
    place = "line 3" if file.endswith(".csv") else "row 2" if file.endswith(".json") else "line 2"
    assert f"{file}, {place}: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("key", sorted(ROWS))
def test_a_missing_column_is_reported(tmp_path, key):
    name, part = key
    file, rows, change, _ = ROWS[key]
    column = next(iter(change))
    write(tmp_path / file, [{"other": 1} | {k: v for k, v in row.items() if k != column} for row in rows])
    if column in ("validation_human", "upvotes", "base"):
        assert load_corpus(name, tmp_path, part=part).items
        return
    with pytest.raises(DataError, match=column):
        load_corpus(name, tmp_path, part=part)


@pytest.mark.parametrize("name", sorted(set(CORPORA) - {"goal_switch"}))
def test_a_missing_set_says_how_to_get_it(tmp_path, name):
    corpus = CORPORA[name]
    part = next(iter(corpus.parts))
    for source in (None, tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(UserError) as error:
            load_corpus(name, source, part=part)
        for told in (corpus.title, corpus.licence, corpus.url, corpus.parts[part].file):
            assert told in str(error.value)
        if corpus.hub:
            assert corpus.hub in str(error.value)


def test_unknown_names_are_listed():
    with pytest.raises(UserError, match="elephant_oeq"):
        load_corpus("elephant")
    with pytest.raises(UserError, match="answer, are_you_sure, feedback, mimicry"):
        load_corpus("sycophancy_eval")


def test_sets_with_a_canary_are_kept_out_of_training(tmp_path):
    with pytest.raises(UserError, match="evaluation only"):
        load_corpus("qa2", tmp_path, part="evaluation", use="training")


def test_labels_that_are_missing_are_none_and_texts_are_kept(tmp_path):
    file, rows, _, _ = ROWS["elephant_oeq", ""]
    write(tmp_path / file, [*rows, rows[0]])
    items = load_corpus("elephant_oeq", tmp_path).items
    assert items[0].human == {"reply": "h", "validation": 1.0, "indirectness": None, "framing": None}
    assert items[0].group == items[2].group != items[1].group  # the same prompt twice is one group
    assert [label(cell) for cell in ("", None, float("nan"), "ERROR", "True", "0.5")] == [None] * 4 + [
        1.0,
        0.5,
    ]


def test_moral_pairs_are_joined_by_id_never_by_order(tmp_path):
    posts = [{"id": f"x{i}", "original_post": f"o{i}"} for i in range(4)]
    write(tmp_path / "AITA-NTA-OG.csv", posts[::-1])
    flips = [post | {"flipped_story": f"f{post['id']}"} for post in posts]
    write(tmp_path / "AITA-NTA-FLIP.csv", [*flips[:3], posts[3] | {"flipped_story": "ERROR: refused"}])
    pairs = load_corpus("elephant_moral_pairs", tmp_path)
    assert pairs.card["counts"] == {"rows": 4, "skipped: the other side was not written": 1}
    told = {item.group: item.turns[0] for item in load_corpus("elephant_aita_nta", tmp_path).items}
    for original, flipped in zip(pairs.items[::2], pairs.items[1::2]):
        assert original.group == flipped.group
        assert original.turns[0] == told[original.group]
        assert (original.human["verdict"], flipped.human["verdict"]) == ("NTA", "YTA")


def test_what_a_set_marks_as_unusable_is_skipped_and_counted(tmp_path):
    _, [row, _], _, _ = ROWS["wildchat", ""]
    toxic = row | {
        "conversation": [{"role": "user", "content": "x", "toxic": True}],
        "conversation_hash": "t",
    }
    rows = [row, row | {"language": "French", "conversation_hash": "f"}, toxic, row]
    write(tmp_path / "wildchat.jsonl", rows)
    corpus = load_corpus("wildchat", tmp_path)
    reasons = {"not English": 1, "toxic": 1, "another row of the same id": 1}
    assert corpus.card["counts"] == {"rows": 4} | {f"skipped: {k}": v for k, v in reasons.items()}
    assert len(load_corpus("wildchat", tmp_path, limit=1).items) == 1


def test_counsel_chat_is_one_item_a_question_and_reads_no_names(tmp_path):
    file, [first, second], _, _ = ROWS["counsel_chat", ""]
    write(tmp_path / file, [first, first | {"answerText": "another"}, second])
    items = load_corpus("counsel_chat", tmp_path).items
    assert [item.human["reply"] for item in items] == ["a", "a"]
    assert "Name" not in repr(items)


def test_questions_with_false_and_true_premises_are_told_apart(tmp_path):
    for key in (("cancer_myth", ""), ("cancer_myth_nfp", ""), ("syn_qa2", ""), ("qa2", "evaluation")):
        write(tmp_path / ROWS[key][0], ROWS[key][1])
    premises = {
        name: [item.meta["premise"] for item in load_corpus(name, tmp_path, part=part).items]
        for name, part in (
            ("cancer_myth", ""),
            ("cancer_myth_nfp", ""),
            ("syn_qa2", ""),
            ("qa2", "evaluation"),
        )
    }
    assert premises == {
        "cancer_myth": ["false"] * 2,
        "cancer_myth_nfp": ["true"] * 2,
        "syn_qa2": ["true", "false"] * 2,
        "qa2": ["false", "true"],
    }


def test_the_number_of_a_word_problem(tmp_path):
    write(tmp_path / "test.jsonl", ROWS["gsm8k", "test"][1])
    assert [item.human["answer"] for item in load_corpus("gsm8k", tmp_path, part="test").items] == [
        "1000",
        "1001",
    ]


def test_are_you_sure_has_a_script_and_roles_are_translated(tmp_path):
    prompt = [{"type": "system", "content": "Be brief."}, HUMAN, {"type": "ai", "content": "Yes."}]
    write(tmp_path / "are_you_sure.jsonl", [{"prompt": prompt, "base": {}, "metadata": {}}])
    [item] = load_corpus("sycophancy_eval", tmp_path, part="are_you_sure").items
    assert [message["role"] for message in item.messages] == ["system", "user", "assistant"]
    assert item.turns[0] == HUMAN["content"]
    assert len(item.turns) == 2
    assert item.chat().history == item.messages[:1]


def test_debate_lines_belong_together(tmp_path):
    (tmp_path / "questions.txt").write_text("Is A so?\nIs B so?\n")
    (tmp_path / "arguments.txt").write_text("A is so.\nB is so.\n")
    items = load_corpus("sycon", tmp_path, part="debate").items
    assert [(i.turns[0], i.meta["argument"]) for i in items] == [
        ("Is A so?", "A is so."),
        ("Is B so?", "B is so."),
    ]
    (tmp_path / "arguments.txt").write_text("A is so.\n")
    with pytest.raises(DataError, match="2 lines and .* 1: they belong together"):
        load_corpus("sycon", tmp_path, part="debate")


def test_spiral_transcripts_are_found_in_the_nested_result(tmp_path):
    talk = {"transcript": [{"role": "user", "content": "hum"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "model.json").write_text(json.dumps({"run1": {"file": {"sc01": [talk, None, talk]}}}))
    items = load_corpus("spiral_bench", tmp_path / "model.json", part="transcripts").items
    assert len(items) == 2
    assert len({item.group for item in items}) == 1
    (tmp_path / "model.json").write_text(json.dumps({"run1": {"file": {"sc01": [{}]}}}))
    with pytest.raises(DataError, match=r"model\.json is no result of Spiral-Bench"):
        load_corpus("spiral_bench", tmp_path / "model.json", part="transcripts")


def test_talktuner_archive(tmp_path):
    def archive(name, text):
        with zipfile.ZipFile(tmp_path / "chats.zip", "w") as file:
            file.writestr(
                "conversation_2_age_older adult.txt", "HUMAN: Hi: there.\n\nASSISTANT: Hello. HUMAN: Bye."
            )
            file.writestr(name, text)

    archive("readme.md", "not a chat")
    [item] = load_corpus("talktuner", tmp_path).items
    assert item.meta == {"attribute": "age", "value": "older adult"}
    assert item.turns == ("Hi: there.", "Bye.")
    assert [m["content"] for m in item.chat(1).history] == ["Hi: there.", "Hello."]
    assert item.chat(0).history == ()
    with pytest.raises(UserError, match="no turn 2"):
        item.chat(2)
    archive("conversation_3_gender_male.txt", "Nobody speaks")
    with pytest.raises(DataError, match=r"chats\.zip, conversation_3_gender_male\.txt: .*HUMAN"):
        load_corpus("talktuner", tmp_path)


def test_goal_switch_seeds_are_ours_and_enough():
    items = load_corpus("goal_switch").items
    assert len(items) >= 40
    assert len({item.turns[0] for item in items}) == len(items)
    assert {item.meta["goal"] for item in items} == {"validation", "objectivity"}
    assert all(len([i for i in items if i.group == item.group]) == 2 for item in items)


def test_from_the_hub(tmp_path):
    """`datasets` reads a folder as it reads the hub: no network, the same path through the code."""
    write(tmp_path / "train.jsonl", ROWS["wildchat", ""][1])
    corpus = load_corpus("wildchat", f"hf:{tmp_path}")
    assert corpus.card["source"] == f"hf:{tmp_path}"
    assert [item.turns for item in corpus.items] == [("hi 0",), ("hi 1",)]
    with pytest.raises(UserError, match="not on the hub"):
        load_corpus("qa2", "hf", part="evaluation")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public sets are not here")
@pytest.mark.parametrize(
    ("name", "folder", "part", "rows", "items"),
    [
        ("syco_bench", "syco_bench", "pickside", 40, 80),
        ("syco_bench", "syco_bench", "mirror", 40, 80),
        ("syco_bench", "syco_bench", "whosaid", 40, 80),
        ("syco_bench", "syco_bench", "delusion", 20, 20),
        ("sycon", "sycon", "false_presupposition", 200, 200),
        ("talktuner", "talktuner", "", 200, 200),
    ],
)
def test_real_files(name, folder, part, rows, items):
    corpus = load_corpus(name, SHARED / folder, part=part)
    assert (corpus.card["counts"]["rows"], len(corpus.items)) == (rows, items)
    assert corpus.card["notes"] == list(CORPORA[name].notes)  # the published number of rows
    if name == "sycon":
        assert all(item.human["correction"] and len(item.script) == 4 for item in corpus.items)
    if name == "talktuner":
        roles = [[message["role"] for message in item.messages] for item in corpus.items]
        assert all(
            one == ["user", "assistant"] * (len(one) // 2) + ["user"] * (len(one) % 2) for one in roles
        )
        assert {item.meta["value"] for item in corpus.items} == {"male", "female"}


def test_a_study_names_a_set_in_its_configuration(tmp_path):
    from assumptions.sources import load_messages

    for key in (("gsm8k", "test"), ("elephant_oeq", "")):
        write(tmp_path / ROWS[key][0], ROWS[key][1])
    named = load_messages(f"gsm8k/test:{tmp_path}", 1, 0, {})
    assert [chat.turn for chat in named.chats] == ["q0"]
    assert named.posterior_BK is None
    assert len(load_messages(f"elephant_oeq:{tmp_path}/OEQ.csv", 9, 0, {}).chats) == 2
    assert len(load_messages(str(tmp_path / "OEQ.csv"), 9, 0, {"text": "prompt"}).chats) == 2
    with pytest.raises(UserError, match="choose one"):
        load_messages(f"gsm8k:{tmp_path}", 1, 0, {})


class TestOwnConversations:
    """T20: one turn model; T21: no history, however it is written."""

    @given(st.lists(st.sampled_from(["", " ", "hello", "again"]), min_size=1, max_size=5))
    def test_turns_with_gaps(self, tmp_path_factory, cells):
        path = tmp_path_factory.mktemp("turns") / "own.jsonl"
        write(path, [{"id": "a", "topic": "rent"} | {f"user_{i}": cell for i, cell in enumerate(cells, 1)}])
        filled = [i for i, cell in enumerate(cells) if cell.strip()]
        if filled == list(range(len(filled))) and filled:
            [item] = read_conversations(path)
            assert item.turns == tuple(cells[i] for i in filled)
            assert (item.id, item.meta) == ("a", {"topic": "rent"})
        else:
            with pytest.raises(DataError, match="own.jsonl, line 1"):
                read_conversations(path)

    def test_one_column_will_do_and_two_are_refused(self, tmp_path):
        for column in ("prompt", "user_text"):
            write(tmp_path / "a.csv", [{column: "hello"}])
            assert [item.turns for item in read_conversations(tmp_path / "a.csv")] == [("hello",)]
        for columns in ({"prompt": "a", "user_1": "b"}, {"user_1": "a", "user_3": "b"}, {"text": "a"}):
            write(tmp_path / "a.csv", [columns])
            with pytest.raises(DataError, match="expected columns user_1"):
                read_conversations(tmp_path / "a.csv")

    @pytest.mark.parametrize("cell", ["", "nan", "NaN", "null", "[]", None])
    def test_no_history(self, tmp_path, cell):
        write(tmp_path / "a.csv", [{"text": "hi", "history": "" if cell is None else cell}])
        write(tmp_path / "a.jsonl", [{"text": "hi", "history": cell}])
        assert read_chats(tmp_path / "a.csv")[0].history == read_chats(tmp_path / "a.jsonl")[0].history == ()

    def test_history_in_a_cell_and_malformed_history(self, tmp_path):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        write(tmp_path / "a.csv", [{"text": "hi", "history": json.dumps(turns)}])
        assert list(read_chats(tmp_path / "a.csv")[0].history) == turns
        for bad in ("[1]", "{}", "[{", json.dumps([{"role": "robot", "content": "a"}])):
            write(tmp_path / "a.csv", [{"text": "hi", "history": bad}])
            with pytest.raises(DataError, match=r"a\.csv, line 2"):
                read_chats(tmp_path / "a.csv")
