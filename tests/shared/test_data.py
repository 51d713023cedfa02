"""Readers refuse what they cannot read by file, line and column; splits depend on the rows alone."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data import DataError, hash_point, part_of, raw_rows, read_rows, split_rows, write_rows
from shared.errors import UserError


@dataclass(frozen=True)
class Row:
    name: str
    score: float
    count: int | None = None
    kind: Literal["a", "b"] = "a"
    tags: list[str] | None = None
    flag: bool = False


rows_strategy = st.lists(
    st.builds(
        Row,
        name=st.text(),
        score=st.floats(allow_nan=False, allow_infinity=False),
        count=st.none() | st.integers(-(2**60), 2**60),
        kind=st.sampled_from(["a", "b"]),
        tags=st.none() | st.lists(st.text(max_size=4), max_size=3),
        flag=st.booleans(),
    ),
    max_size=8,
)


@given(rows=rows_strategy)
def test_jsonl_round_trip(rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file, rows)
    assert read_rows(file, Row) == rows


def test_csv_cells_are_read_as_the_field_types(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(
        '\ufeffname,score,count,kind,tags,flag\n"a, ""b""\nc",1,,b,"[""x""]",True\n7,.5,3,a,,false\n',
        encoding="utf-8",
    )
    assert read_rows(file, Row) == [
        Row('a, "b"\nc', 1.0, None, "b", ["x"], True),
        Row("7", 0.5, 3, "a", None, False),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x", "score": 1}\n{"name": "y"', "line 2: not JSON"),
        ('{"name": "x", "score": NaN}\n', "line 1: not JSON: NaN"),
        ('{"name": "x", "score": 1}\n\n[1]\n', "line 3: a row is a JSON object"),
        ('{"name": "x"}\n', "line 1: no column 'score'; there are 'name'"),
        ('{"name": "x", "score": "1"}\n', "line 1: 'score' must be float"),
        (
            '{"name": "x", "score": 1, "scroe": 2}\n',
            "line 1: unexpected column 'scroe'; Row has the columns name",
        ),
        ('{"name": "x", "score": 1, "kind": "c"}\n', "line 1: 'kind' must be one of a, b"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path, text, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_rows(file, Row)
    assert message in str(error.value)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name,score\n"two\nlines",1\nx,1,2\n', "line 4: 3 cells under 2 columns"),
        ("name,score\nx,high\n", "line 2: column 'score': cannot read 'high' as float"),
        ("name,score\nx,nan\n", "line 2: column 'score': cannot read 'nan' as float"),
        ("name,score,count\nx,1,1.5\n", "line 2: column 'count': cannot read '1.5'"),
        ('name,score\nx,"1\n', "line 2: unexpected end of data"),
        ("name,name\nx,y\n", "line 1: the header must name every column once"),
        ("", "line 1: the header"),
        (",name,score\n0,x,1\n", "line 2: unexpected column ''"),
    ],
)
def test_malformed_csv_names_line_and_column(tmp_path, text, message):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_rows(file, Row)
    assert message in str(error.value)


def test_columns_can_be_renamed_and_dropped(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",prompt,score\n0,x,1\n")
    assert read_rows(file, Row, columns={"name": "prompt"}, drop_extra=True) == [Row("x", 1.0)]
    with pytest.raises(DataError, match="columns names no field of Row: nmae"):
        read_rows(file, Row, columns={"nmae": "prompt"})


def test_a_column_that_is_named_must_be_there(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"name": "x", "score": 1}\n{"name": "y", "score": 1, "n": 2}\n')
    assert [row.count for row in read_rows(file, Row, columns={"count": "n"})] == [None, 2]
    with pytest.raises(DataError, match=r"no row up to .*line 2 has the column 'm' that was named"):
        read_rows(file, Row, columns={"count": "m"}, drop_extra=True)
    with pytest.raises(DataError, match=r"line 1: no column 'who'; there are 'name', 'score': rename one"):
        read_rows(file, Row, columns={"name": "who"}, drop_extra=True)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_text_that_is_not_utf8_names_its_line(tmp_path, name):
    file = tmp_path / name
    file.write_bytes((b"name,score" if name == "rows.csv" else b"") + b"\n\nname,caf\xe9\n")
    with pytest.raises(DataError, match=r"line 3: not UTF-8 .*save the file as UTF-8"):
        list(raw_rows(file, Row))


def test_half_a_character_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"name": "\\ud83d\\ude00 \\\\ud83d", "score": 1}\n{"name": "\\ud83d", "score": 1}\n')
    with pytest.raises(DataError, match=r"line 2: not JSON: half of a character, \\ud83d"):
        read_rows(file, Row)
    file.write_text(file.read_text().splitlines()[0])
    assert read_rows(file, Row) == [Row("\U0001f600 \\ud83d", 1.0)]


def test_lines_may_end_in_carriage_returns(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'name,score\rx,1\r"two\rlines",2\ry,3\r')
    assert [row.name for row in read_rows(file, Row)] == ["x", "two\rlines", "y"]


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "rows.parquet").touch()
    for path, message in [
        (tmp_path / "absent.jsonl", "does not exist; expected .jsonl"),
        (tmp_path / "rows.parquet", "unknown format '.parquet'"),
        (tmp_path, "is no dataset folder"),
    ]:
        with pytest.raises(DataError, match=message):
            read_rows(path, Row)


def test_dataset_folder(tmp_path):
    import datasets

    columns = {"name": ["x", "y"], "score": [1.0, 2.0], "tags": [["t"], []]}
    dataset = datasets.Dataset.from_dict(columns)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    x, y = Row("x", 1.0, tags=["t"]), Row("y", 2.0, tags=[])
    assert read_rows(tmp_path / "one", Row) == [x, y]
    assert read_rows(tmp_path / "two", Row, part="test") == [y]
    with pytest.raises(DataError, match="holds the parts train, test: choose one"):
        read_rows(tmp_path / "two", Row)


fractions_strategy = (
    st.lists(st.integers(0, 5), min_size=1, max_size=4)
    .filter(any)
    .map(lambda weights: {f"part{i}": weight / sum(weights) for i, weight in enumerate(weights)})
)


@given(
    rows=st.lists(st.tuples(st.integers(0, 20), st.text(max_size=3))),
    fractions=fractions_strategy,
    data=st.data(),
)
def test_split_is_a_partition_that_ignores_order_and_neighbours(rows, fractions, data):
    parts = split_rows(rows, fractions, seed=3)
    assert sorted(row for part in parts.values() for row in part) == sorted(rows)
    assert all(not parts[name] for name, fraction in fractions.items() if fraction == 0)
    kept = data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []
    again = split_rows(kept, fractions, seed=3)
    assert all(set(again[name]) <= set(parts[name]) for name in fractions)


@given(rows=st.lists(st.tuples(st.integers(0, 5), st.text(max_size=3)), min_size=1))
def test_groups_and_copies_stay_together(rows):
    halves = {"train": 0.5, "test": 0.5}
    grouped = split_rows(rows, halves, group=lambda row: row[0])
    assert not {row[0] for row in grouped["train"]} & {row[0] for row in grouped["test"]}
    copied = split_rows([*rows, *rows], halves)
    assert not set(copied["train"]) & set(copied["test"])


def test_split_has_the_asked_sizes_and_depends_on_the_seed():
    fractions = {"train": 0.7, "validation": 0.1, "test": 0.2}
    n = 4_000
    parts = split_rows(range(n), fractions)
    for name, fraction in fractions.items():
        deviation = (fraction * (1 - fraction) / n) ** 0.5
        assert abs(len(parts[name]) / n - fraction) < 5 * deviation
    agree = sum(part_of(i, fractions, 0) == part_of(i, fractions, 1) for i in range(n)) / n
    assert abs(agree - sum(f * f for f in fractions.values())) < 0.04  # what independent splits agree on


def test_points_are_the_same_everywhere():
    """Golden: a split made on another machine or by another version must not move."""
    assert hash_point("row") == 0.21205413371357928
    assert hash_point({"b": 1, "a": [2, None]}, seed=7) == hash_point({"a": [2, None], "b": 1}, seed=7)
    assert 0 <= hash_point(json.loads("[]")) < 1


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(UserError, match="sum to 1"):
        split_rows([1], fractions)


def test_a_list_of_objects_in_one_json_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"name": "x", "score": 1}, {"name": "y", "score": 2.5}]')
    assert read_rows(file, Row) == [Row("x", 1.0), Row("y", 2.5)]
    for text, message in [
        ('{"name": "x"}', "rows are a list of objects, got dict"),
        ('[{"name": "x", "score": 1}, 3]', "row 2: a row is a JSON object, got int"),
        ('[{"name": "x"}]', "row 1: no column 'score'"),
        ('[{"name": "x", "score": NaN}]', "not JSON: NaN"),
    ]:
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_rows(file, Row)
