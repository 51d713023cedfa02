"""Files to typed rows and back, and splits that depend on nothing but the rows themselves.

A row type is a dataclass; its fields are the columns. Reading is strict: a row that does not parse, lacks a column,
has one too many or a value of another type is refused with file, line and column, before anything is computed. CSV
cells are text and are read as the field's type (an empty cell is None where the type allows it).

A split is decided row by row: the row's key is hashed to a point in [0, 1), and the point falls into one of the
parts. Adding, removing or reordering rows moves no other row; rows with one key (copies of a row, or the members of
a group where a group key is given) always land on one side.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from shared.config import ConfigError, required, to_dataclass
from shared.errors import UserError
from shared.serialize import atomic_path, plain

Row = TypeVar("Row")
T = TypeVar("T")
FORMATS = ".jsonl, .json (a list of objects), .csv, or a folder written by datasets.save_to_disk"


class DataError(UserError):
    """A file that cannot be read as the rows asked for; the message names file, line and column."""


def read_rows(
    path: Path | str,
    row_type: type[Row],
    *,
    columns: Mapping[str, str] | None = None,
    drop_extra: bool = False,
    part: str | None = None,
) -> list[Row]:
    """Rows of a JSONL, JSON or CSV file or of a Hugging Face dataset folder as instances of the dataclass `row_type`.

    `columns` maps field names to differing column names; `drop_extra` ignores columns that no field asks for; `part`
    names the split to read of a folder that holds several. DataError names file, line and column.
    """
    raw = raw_rows(path, row_type, columns=columns, part=part)
    return typed_rows(raw, row_type, columns=columns, drop_extra=drop_extra)


def raw_rows(
    path: Path | str,
    row_type: type[Row],
    *,
    columns: Mapping[str, str] | None = None,
    part: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, values by column) of every row of what `read_rows` reads, one after the other, for `typed_rows`."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {FORMATS} with {_described(row_type)}")
    return _raw_rows(path, part, get_type_hints(row_type), _columns(row_type, columns))


def typed_rows(
    raw: Iterable[tuple[str, dict[str, Any]]],
    row_type: type[Row],
    *,
    columns: Mapping[str, str] | None = None,
    drop_extra: bool = False,
) -> list[Row]:
    """Rows given as (place, values by column) as instances of `row_type`; DataError names the place and the column."""
    return list(iter_typed_rows(raw, row_type, columns=columns, drop_extra=drop_extra))


def iter_typed_rows(
    raw: Iterable[tuple[str, dict[str, Any]]],
    row_type: type[Row],
    *,
    columns: Mapping[str, str] | None = None,
    drop_extra: bool = False,
) -> Iterator[Row]:
    """`typed_rows` one row at a time, for sources too long to hold."""
    names = _columns(row_type, columns)
    needed = [one.name for one in dataclasses.fields(cast(Any, row_type)) if required(one)]
    unseen, where = set((columns or {}).values()), ""
    for where, values in raw:
        unseen -= set(values)
        extra = set(values) - set(names.values())
        if extra and not drop_extra:
            raise DataError(
                f"{where}: unexpected column {', '.join(map(repr, sorted(extra)))}; {_described(row_type)}"
            )
        if absent := [names[field] for field in needed if names[field] not in values]:
            raise DataError(
                f"{where}: no column {', '.join(map(repr, absent))}; there are {', '.join(map(repr, values))}: "
                "rename one, or say which it is"
            )
        chosen = {field: values[column] for field, column in names.items() if column in values}
        try:
            row = to_dataclass(row_type, chosen)
        except (ConfigError, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        yield row
    if where and unseen:
        raise DataError(
            f"no row up to {where} has the column {', '.join(map(repr, sorted(unseen)))} that was named"
        )


def write_rows(path: Path | str, rows: Iterable[object]) -> None:
    """Write dataclass rows as JSON lines, atomically; `read_rows` gives them back."""
    with atomic_path(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a CSV table, atomically: columns in order of first appearance, an empty cell for None and nan."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)


def split_rows(
    rows: Iterable[T],
    fractions: Mapping[str, float],
    *,
    group: Callable[[T], object] | None = None,
    seed: int = 0,
) -> dict[str, list[T]]:
    """Rows by part, in their order; `fractions` name the parts and sum to 1.

    Rows with equal `group(row)` stay together; without `group` the key is the row's whole content.
    """
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or abs(total - 1) > 1e-9:
        raise UserError(f"the fractions of a split are at least 0 and sum to 1, got {dict(fractions)}")
    parts: dict[str, list[T]] = {name: [] for name in fractions}
    for row in rows:
        parts[part_of(row if group is None else group(row), fractions, seed)].append(row)
    return parts


def part_of(key: object, fractions: Mapping[str, float], seed: int = 0) -> str:
    """Name of the part that `key` (anything with a JSON form) falls into."""
    point = hash_point(key, seed)
    chosen = [name for name, fraction in fractions.items() if fraction > 0]
    bounds = accumulate(fractions[name] for name in chosen)
    # rounding may leave the last bound a hair below 1: the last part takes what is left
    return next((name for name, bound in zip(chosen, bounds) if point < bound), chosen[-1])


def hash_point(key: object, seed: int = 0) -> float:
    """A point in [0, 1) determined by seed and key, the same on every machine and in every process."""
    text = json.dumps([seed, plain(key)], sort_keys=True, ensure_ascii=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _fields(row_type: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, row_type))]


def _columns(row_type: type, columns: Mapping[str, str] | None) -> dict[str, str]:
    """Column of every field."""
    names = {field: (columns or {}).get(field, field) for field in _fields(row_type)}
    if unknown := set(columns or {}) - set(names):
        raise DataError(f"columns names no field of {row_type.__name__}: {', '.join(sorted(unknown))}")
    return names


def _described(row_type: type) -> str:
    return f"{row_type.__name__} has the columns {', '.join(_fields(row_type))}"


def _raw_rows(
    path: Path, part: str | None, hints: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, values by column) of every row."""
    if path.is_dir():
        return _from_dataset(path, part)
    if part is not None:
        raise DataError(f"{path} is one file: part={part!r} is for dataset folders")
    if path.suffix == ".jsonl":
        return _from_jsonl(path)
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".csv":
        return _from_csv(path, {names[field]: hint for field, hint in hints.items() if field in names})
    raise DataError(f"{path}: unknown format {path.suffix!r}; expected {FORMATS}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, their ends kept; DataError names the line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}): save the file as UTF-8"
                ) from None
            yield from io.StringIO(text, newline="")  # a line may end in a carriage return, too


def _from_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = _from_text(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{where}: a row is a JSON object, got {type(values).__name__}")
        yield where, values


def _from_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = _from_text("".join(_lines(path)))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: rows are a list of objects, got {type(rows).__name__}")
    for number, values in enumerate(rows, 1):
        if not isinstance(values, dict):
            raise DataError(f"{path}, row {number}: a row is a JSON object, got {type(values).__name__}")
        yield f"{path}, row {number}", values


def _from_text(text: str) -> Any:
    """The JSON value of a text; ValueError where it is none, or holds half a character that nothing could write."""
    value = json.loads(text, parse_constant=_no_constant)
    if "\\ud" in text.lower() and (
        half := re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
    ):
        raise ValueError(f"half of a character, \\u{ord(half[0]):04x}, without its other half")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _from_csv(path: Path, hints: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_lines(path), strict=True)
    where = f"{path}, line 1"
    try:
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            raise DataError(f"{where}: the header must name every column once, got {header}")
        where = f"{path}, line {reader.line_num + 1}"
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise DataError(f"{where}: {len(cells)} cells under {len(header)} columns")
            if cells:
                named = zip(header, cells, strict=True)
                yield where, {name: _cell(hints.get(name, str), cell, name, where) for name, cell in named}
            where = f"{path}, line {reader.line_num + 1}"
    except csv.Error as error:
        raise DataError(f"{where}: {error}") from error


def _cell(hint: Any, cell: str, column: str, where: str) -> Any:
    """A CSV cell as the type `hint`: text as it is, numbers and truth values parsed, anything else read as JSON."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType, Literal) else (hint,)
    if cell == "" and type(None) in options:
        return None
    if any(option is str or isinstance(option, str) for option in options):
        return cell
    if bool in options and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    parse = int if int in options else float if float in options else json.loads
    try:
        value = parse(cell)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{cell} is not finite")
    except ValueError as error:
        raise DataError(f"{where}: column {column!r}: cannot read {cell!r} as {_name(hint)}") from error
    return value


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _from_dataset(path: Path, part: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is no dataset folder: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if part not in dataset:
            raise DataError(
                f"{path} holds the parts {', '.join(dataset)}: choose one with part=..., got {part!r}"
            )
        dataset = dataset[part]
    elif part is not None:
        raise DataError(f"{path} holds one unnamed part: leave part out")
    for number, values in enumerate(dataset):
        yield f"{path}, row {number}", dict(values)
