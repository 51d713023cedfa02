"""Settings dataclasses as command line options, and back.

A field `max_grad_norm` becomes `--max-grad-norm`; what is not given keeps the dataclass's default. Values are read as
the field's type (`shared.config`): a tuple as `q_proj,v_proj`, a mapping as `q_proj=4,v_proj=8`, a flag as `--rslora`
or `--no-rslora`, None as `none`.
"""

import argparse
import dataclasses
import enum
import json
import re
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from shared.config import to_dataclass

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, cls: type, skip: Collection[str] = ()) -> None:
    """Add an option for every field of the dataclass but those to skip."""
    group = parser.add_argument_group(cls.__name__)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cast(Any, cls)):
        if field.name in skip:
            continue
        option = f"--{field.name.replace('_', '-')}"
        told = f"default {_text(field.default)}" if field.default is not dataclasses.MISSING else None
        if hints[field.name] is bool:
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=told
            )
        else:
            group.add_argument(
                option, default=argparse.SUPPRESS, metavar=_metavar(hints[field.name]), help=told
            )


def from_options(cls: type[T], arguments: argparse.Namespace, **fixed: Any) -> T:
    """The dataclass as the command line has it; ConfigError names an option whose value does not fit."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cast(Any, cls))]
    given = {
        name: _value(hints[name], getattr(arguments, name)) for name in names if hasattr(arguments, name)
    }
    return to_dataclass(cls, given | fixed)


def _value(hint: Any, text: Any) -> Any:
    """The text of an option as the JSON value of its field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not isinstance(text, str):
        return text
    if type(None) in kinds and text.lower() == "none":
        return None
    if str in kinds and not re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        return text  # a pattern, where names would do as well
    for kind in kinds:
        if (get_origin(kind) or kind) in (tuple, list):
            [item, *_] = get_args(kind) or (str,)
            return [_value(item, part.strip()) for part in text.split(",")]
        if (get_origin(kind) or kind) in (dict, Mapping):
            [_, item] = get_args(kind) or (str, Any)
            pairs = [part.strip().rpartition("=") for part in text.split(",")]
            return {name: _value(item, value) for name, _, value in pairs}
    if {int, float, Any} & set(kinds):
        try:
            return json.loads(text)
        except ValueError:
            return text  # to_dataclass says what the field takes
    return text


def _metavar(hint: Any) -> str:
    """What may be given: the choices, where there are any."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(member.value) for member in hint)
    return "VALUE"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
