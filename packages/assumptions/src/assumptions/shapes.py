"""The shape of an answer: one definition that writes the prompt's example, the JSON schema and the check of a value.

A shape is a tree of Number, Text, Record and Items. `example` renders it for a prompt with placeholders that are not
valid JSON numbers, so that an echoed example can never be read as scores (the released templates show 0.0 everywhere).
`json_schema` renders it for an engine with guided decoding: keys in order, nothing extra, strings bounded. `take` walks
a value that a model produced and returns what in it fits, listing every leniency and everything missing.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from assumptions.lenient import CONFLICT

PLACEHOLDER_NUMBER = "<number from 0 to 1>"
PLACEHOLDER_TEXT = "<{hint}>"
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_FRACTION = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/|out of|of)\s*(1|5|10|100)(?:\.0+)?")
_DECIMAL = re.compile(r"\+?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")  # "0." may have been cut
_PLACEHOLDER = re.compile(r"<[^<>]{2,60}>")


@dataclass(frozen=True)
class Number:
    """A number in [0, 1]."""


@dataclass(frozen=True)
class Text:
    """A string of at most `limit` characters; `hint` says in the prompt what goes there."""

    hint: str
    limit: int = 400


@dataclass(frozen=True)
class Record:
    """An object with these members, in this order; `value_key` is the member a bare value stands for."""

    members: tuple[tuple[str, "Shape"], ...]
    value_key: str | None = None


@dataclass(frozen=True)
class Items:
    """A list of exactly `length` items of one shape."""

    item: Record
    length: int


Shape = Number | Text | Record | Items


@dataclass
class Taken:
    """What fitted: leaves by path, and the notes collected on the way."""

    leaves: dict[tuple[str | int, ...], float | str] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    placeholders: int = 0


def example(shape: Shape, indent: int = 0) -> str:
    """Render the answer's form for a prompt, placeholders in place of values."""
    match shape:
        case Number():
            return PLACEHOLDER_NUMBER
        case Text():
            return '"' + PLACEHOLDER_TEXT.format(hint=shape.hint) + '"'
        case Items():
            inner = example(shape.item, indent + 2)
            pad = " " * (indent + 2)
            return "[\n" + ",\n".join([pad + inner] * shape.length) + "\n" + " " * indent + "]"
    pad = " " * (indent + 2)
    lines = [f'{pad}"{key}": {example(member, indent + 2)}' for key, member in shape.members]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def json_schema(shape: Shape) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12 subset that grammar engines accept) of the shape."""
    match shape:
        case Number():
            return {"type": "number", "minimum": 0, "maximum": 1}
        case Text():
            return {"type": "string", "maxLength": shape.limit}
        case Items():
            return {
                "type": "array",
                "items": json_schema(shape.item),
                "minItems": shape.length,
                "maxItems": shape.length,
            }
    return {
        "type": "object",
        "properties": {key: json_schema(member) for key, member in shape.members},
        "required": [key for key, _ in shape.members],
        "additionalProperties": False,
    }


def leaf_paths(shape: Shape, kind: type) -> list[tuple[str | int, ...]]:
    """Return the paths of all leaves of one kind, in the order of the definition."""
    match shape:
        case Record():
            return [(key, *rest) for key, member in shape.members for rest in leaf_paths(member, kind)]
        case Items():
            return [(i, *rest) for i in range(shape.length) for rest in leaf_paths(shape.item, kind)]
    return [()] if isinstance(shape, kind) else []


def take(shape: Shape, value: Any) -> Taken:
    """Return what of `value` fits the shape; nothing is guessed, every leniency is listed."""
    taken = Taken()
    _take(shape, value, (), taken)
    taken.repairs = sorted(set(taken.repairs))
    return taken


def normalise_key(key: str) -> str:
    """Lower-case and join the words of a key: 'Validation Seeking' and 'validation-seeking' are the same key."""
    return re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


def _take(shape: Shape, value: Any, path: tuple[str | int, ...], taken: Taken) -> None:
    match shape:
        case Number():
            _take_number(value, path, taken)
        case Text():
            _take_text(value, path, taken)
        case Items():
            _take_items(shape, value, path, taken)
        case Record():
            _take_record(shape, value, path, taken)


def _take_number(value: Any, path: tuple[str | int, ...], taken: Taken) -> None:
    number, repair = read_number(value)
    if isinstance(value, str) and _PLACEHOLDER.fullmatch(value.strip()):
        taken.placeholders += 1
    if number is None:
        taken.missing.append(_name(path))
        return
    if repair:
        taken.repairs.append(repair)
    taken.leaves[path] = number


def read_number(value: Any) -> tuple[float | None, str | None]:
    """Return (number in [0, 1] or None, the leniency it took): '80%' and '8/10' are explicit, '80' is not."""
    if isinstance(value, bool) or value is None or value is CONFLICT:
        return None, None
    if isinstance(value, (int, float)):
        return (float(value), None) if 0.0 <= value <= 1.0 else (None, None)
    if not isinstance(value, str):
        return None, None
    text = value.strip()
    if match := _PERCENT.fullmatch(text):
        return _within(float(match[1]) / 100.0, "percentage")
    if match := _FRACTION.fullmatch(text):
        return _within(float(match[1]) / float(match[2]), "fraction")
    if _DECIMAL.fullmatch(text):
        return _within(float(text), "number as string")
    return None, None


def _within(number: float, repair: str) -> tuple[float | None, str | None]:
    return (number, repair) if 0.0 <= number <= 1.0 else (None, None)


def _take_text(value: Any, path: tuple[str | int, ...], taken: Taken) -> None:
    if not isinstance(value, str):
        taken.missing.append(_name(path))
        return
    if _PLACEHOLDER.fullmatch(value.strip()):
        taken.placeholders += 1
        taken.missing.append(_name(path))
        return
    taken.leaves[path] = value


def _take_items(shape: Items, value: Any, path: tuple[str | int, ...], taken: Taken) -> None:
    values = value if isinstance(value, list) else []
    if len(values) > shape.length:
        taken.repairs.append("extra items")
    for index in range(shape.length):
        _take(shape.item, values[index] if index < len(values) else None, (*path, index), taken)


def _take_record(shape: Record, value: Any, path: tuple[str | int, ...], taken: Taken) -> None:
    if not isinstance(value, dict) and shape.value_key is not None and value is not None:
        taken.repairs.append("bare value for a record")
        value = {shape.value_key: value}
    if not isinstance(value, dict):
        value = {}
    exact = {key for key, _ in shape.members}
    loose = _loose_members(value, exact, taken)
    for key, member in shape.members:
        if key in value:
            found = value[key]
        elif normalise_key(key) in loose:
            found = loose[normalise_key(key)]
            taken.repairs.append("key spelling")
        elif len(shape.members) == 1 and _holds_members_of(member, value):
            found = value
            taken.repairs.append("missing level")
        else:
            found = None
        _take(member, found, (*path, key), taken)


def _loose_members(value: dict[str, Any], exact: set[str], taken: Taken) -> dict[str, Any]:
    """Members whose key is not exactly one of the shape's, by normalised key; two spellings of one key conflict."""
    loose: dict[str, Any] = {}
    for key, member in value.items():
        if key in exact:
            continue
        taken.repairs.append("other keys")
        spelled = normalise_key(key)
        loose[spelled] = CONFLICT if spelled in loose and loose[spelled] != member else member
    return loose


def _holds_members_of(member: Shape, value: dict[str, Any]) -> bool:
    """True when the members of a record, the only one at its level, were written one or more levels too high."""
    if not isinstance(member, Record):
        return False
    keys = {normalise_key(key) for key in value}
    if any(normalise_key(key) in keys for key, _ in member.members):
        return True
    return len(member.members) == 1 and _holds_members_of(member.members[0][1], value)


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)
