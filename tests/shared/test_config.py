"""Strict conversion of mappings into dataclasses."""

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from shared.config import ConfigError, to_dataclass
from shared.serialize import plain


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Train:
    steps: int = 10
    rate: float = 0.1
    kind: Literal["sgd", "adam"] = "adam"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")


@dataclass
class Settings:
    name: str
    train: Train = field(default_factory=Train)
    layers: list[int] = field(default_factory=list)
    window: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ()
    floors: dict[str, float] = field(default_factory=dict)
    colour: Colour = Colour.RED
    folder: Path | None = None
    optional: Train | None = None
    switch: bool = False
    anything: Any = None


def test_everything_is_converted_and_round_trips():
    values = {
        "name": "x",
        "train": {"steps": 3, "rate": 1},
        "layers": [1, 2],
        "window": [3, 4],
        "many": ["a", "b"],
        "floors": {"a": 1},
        "colour": "blue",
        "folder": "here",
        "optional": {"kind": "sgd"},
        "anything": {"as": ["it", "is"]},
    }
    settings = to_dataclass(Settings, values)
    assert settings.train == Train(3, 1.0)
    assert isinstance(settings.train.rate, float)
    assert settings.window == (3, 4.0)
    assert settings.many == ("a", "b")
    assert settings.colour is Colour.BLUE
    assert settings.folder == Path("here")
    assert settings.optional == Train(kind="sgd")
    assert to_dataclass(Settings, plain(settings)) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"unknown key 'p.nmae' \(did you mean 'name'\?\); allowed: anything, colour, "),
        ({}, "missing key 'p.name'"),
        ({"name": "x", "train": {"stesp": 1}}, r"unknown key 'p.train.stesp' .*allowed: kind, rate, steps"),
        ({"name": "x", "optional": {"stesp": 1}}, r"unknown key 'p.optional.stesp'"),
        ({"name": None}, r"'p.name' is not set: give p.name=\.\.\. \(str\)"),
        ({"name": 3}, "'p.name' must be str, got int 3"),
        ({"name": "x", "train": {"steps": 1.5}}, "'p.train.steps' must be int, got float 1.5"),
        ({"name": "x", "train": {"steps": True}}, "'p.train.steps' must be int, got bool"),
        ({"name": "x", "train": {"steps": "3"}}, "'p.train.steps' must be int, got str"),
        ({"name": "x", "train": {"kind": "lion"}}, "'p.train.kind' must be one of sgd, adam; got 'lion'"),
        ({"name": "x", "train": {"steps": 0}}, "p.train: steps must be positive, got 0"),
        ({"name": "x", "train": 3}, "'p.train' must be Train, got int"),
        ({"name": "x", "layers": [1, "b"]}, r"'p.layers\[1\]' must be int, got str 'b'"),
        ({"name": "x", "layers": "12"}, "'p.layers' must be list"),
        ({"name": "x", "window": [1]}, "'p.window' must be tuple"),
        ({"name": "x", "floors": {"a": "b"}}, "'p.floors.a' must be float"),
        ({"name": "x", "floors": [1]}, "'p.floors' must be dict"),
        ({"name": "x", "colour": "green"}, "'p.colour' must be one of red, blue"),
        ({"name": "x", "switch": 1}, "'p.switch' must be bool"),
        ({"name": "x", "folder": 1}, "'p.folder' must be pathlib.*Path"),
    ],
)
def test_a_wrong_key_or_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        to_dataclass(Settings, values, where="p")


def test_fields_that_init_does_not_take_are_unknown():
    @dataclass
    class Derived:
        given: int = 1
        made: int = field(init=False, default=2)

    with pytest.raises(ConfigError, match="unknown key 'made'"):
        to_dataclass(Derived, {"made": 3})
    assert dataclasses.asdict(to_dataclass(Derived, {})) == {"given": 1, "made": 2}
