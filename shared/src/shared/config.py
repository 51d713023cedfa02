"""Mappings from the outside (YAML, JSON, the command line) into typed dataclasses, strictly.

A key that the dataclass lacks, a value of another type and a missing required key are refused by their dotted name,
with the keys or the type that would be right. Supported field types: bool, int, float (an int will do), str, Path,
enums, Literal, None and unions, list, tuple, dict with str keys, nested dataclasses, Any.
"""

import dataclasses
import difflib
import enum
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shared.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that does not fit its dataclass; the message names the key."""


def to_dataclass(cls: type[T], values: Any, where: str = "") -> T:
    """Build `cls` from the mapping `values`; `where` is the dotted name that errors start with. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: keys and values are wanted, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key(str(key), list(fields), where))
    hints = get_type_hints(cls)
    missing = [name for name, field in fields.items() if name not in values and required(field)]
    if missing:
        raise ConfigError(f"missing key {', '.join(repr(_join(where, name)) for name in missing)}")
    converted = {key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:  # the dataclass's own __post_init__
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def unknown_key(key: str, allowed: Sequence[str], where: str = "", near: str | None = None) -> str:
    """The message of an unknown key: its dotted name, what was meant (`near`, or the nearest), all that are allowed."""
    meant = near or next(iter(difflib.get_close_matches(key, allowed, n=1)), None)
    hint = f" (did you mean {meant!r}?)" if meant else ""
    return f"unknown key {_join(where, key)!r}{hint}; allowed: {', '.join(sorted(allowed)) or 'none'}"


def required(field: dataclasses.Field) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _mismatch(hint: Any, value: Any, where: str) -> ConfigError:
    name = getattr(hint, "__name__", None) if isinstance(hint, type) and not get_args(hint) else str(hint)
    if value is None:
        return ConfigError(f"{where!r} is not set: give {where}=... ({name})")
    return ConfigError(f"{where!r} must be {name}, got {type(value).__name__} {value!r}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or ConfigError."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        return _one_of(get_args(hint), value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_one_of([member.value for member in hint], getattr(value, "value", value), where))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise _mismatch(hint, value, where)
        return to_dataclass(hint, value, where)  # type: ignore[arg-type]
    if (origin or hint) in (list, tuple, Sequence, dict, Mapping):
        return _convert_container(hint, origin or hint, value, where)
    return _convert_scalar(hint, value, where)


def _one_of(allowed: Sequence[Any], value: Any, where: str) -> Any:
    if value not in allowed:
        raise ConfigError(f"{where!r} must be one of {', '.join(map(str, allowed))}; got {value!r}")
    return value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    """The first member of the union that takes the value; the error of a nested dataclass is kept, being closer."""
    nested: ConfigError | None = None
    for member in get_args(hint):
        try:
            return _convert(member, value, where)
        except ConfigError as error:
            if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
                nested = error
    raise nested or _mismatch(hint, value, where)


def _convert_container(hint: Any, origin: Any, value: Any, where: str) -> Any:
    arguments = get_args(hint)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mismatch(hint, value, where)
        item = arguments[1] if arguments else Any
        return {key: _convert(item, entry, _join(where, str(key))) for key, entry in value.items()}
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _mismatch(hint, value, where)
    if origin is tuple and arguments and arguments[-1] is not ...:
        if len(arguments) != len(value):
            raise _mismatch(hint, value, where)
        members: Sequence[Any] = arguments
    else:
        members = [arguments[0] if arguments else Any] * len(value)
    items = [
        _convert(member, entry, f"{where}[{i}]") for i, (member, entry) in enumerate(zip(members, value))
    ]
    return tuple(items) if origin is tuple else items


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is type(None) and value is None:
        return None
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise _mismatch(hint, value, where)
