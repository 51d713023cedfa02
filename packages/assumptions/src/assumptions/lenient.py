"""A reader for almost-JSON that says what it forgave and never completes what is not there.

Language models write JSON with trailing commas, single or typographic quotes, bare keys, comments, Python literals,
percentages, or stop in the middle. Ready-made repairers return a plausible object without saying what they changed,
and read a number cut off by the token limit as a whole number. Here every leniency is listed in `Reading.repairs`,
and a number or word touching the end of the text is dropped, because its remaining digits are unknown.

Recursive descent over the text, one method a grammar rule. Percentages and fractions stay strings ("80%", "4/5"):
what they mean is for the caller to decide. A repeated key whose values differ becomes CONFLICT.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final

CONFLICT: Final = object()
_ABSENT: Final = object()
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u201d": "\u201d", "\u2018": "\u2019", "\u2019": "\u2019"}
_STRICT_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_BARE = re.compile(r"[^\s,:{}\[\]\"]+")
# What goes on after a number on its line and makes it another one, or none: "1 / 10", "5 %", "0.7 - 0.8", and in an
# object "0,7" (whose members begin with a key, never with a digit). The next member, or a comment, does not.
_GOES_ON = re.compile(r"[ \t]*(?![\s,:{}\[\]\"'\u201c\u2018]|//|/\*|\#|\w+[ \t]*[:=])[^,{}\[\]\"\n]+")
_DECIMAL_COMMA = re.compile(r",[ \t]*\d+(?![\d.]*\s*[:=])")
_LITERALS: dict[str, Any] = {"true": True, "false": False, "null": None}
_PYTHON: dict[str, Any] = {"True": True, "False": False, "None": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"'}
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_SURROGATES = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
# What follows a closing quote: for a key a colon; for a value the end of its container, another quote (a comma is
# missing), a comment, or a comma before something that can begin a member. Any other quote is part of the string.
_AFTER_KEY = re.compile(r"\s*(?:$|[:=])")
_AFTER_VALUE = re.compile(
    r"\s*(?:$|[}\]\"'\u201c\u2018]|//|/\*|\#"
    r"|,\s*(?:$|[}\]{\[\"'\u201c\u2018\d-]|//|/\*|\#|true|false|null|True|False|None|\w+\s*[:=]))"
)
_MAX_DEPTH = 32


@dataclass
class Reading:
    """One object read from text: its value, where it ends, what was forgiven, and whether the text ran out."""

    value: dict[str, Any]
    start: int
    end: int
    repairs: list[str] = field(default_factory=list)
    truncated: bool = False


def read_object(text: str, start: int) -> Reading:
    """Read the object whose opening brace is at `start`; ValueError when there is no brace there."""
    if start >= len(text) or text[start] != "{":
        raise ValueError(f"no opening brace at position {start}")
    reader = _Reader(text, start)
    value = reader.object(0)
    return Reading(value, start, reader.at, sorted(set(reader.repairs)), reader.truncated)


class _Reader:
    """Cursor over the text; each method consumes one grammar rule."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self.repairs: list[str] = []
        self.truncated = False

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def note(self, repair: str) -> None:
        self.repairs.append(repair)

    def space(self) -> None:
        while self.at < len(self.text):
            if self.text[self.at].isspace():
                self.at += 1
            elif self.text.startswith("//", self.at) or self.peek() == "#":
                self.note("comment")
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text.startswith("/*", self.at):
                self.note("comment")
                end = self.text.find("*/", self.at)
                self.at = len(self.text) if end < 0 else end + 2
            else:
                return

    def object(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        self.at += 1
        after_comma = False
        while True:
            self.space()
            here = self.peek()
            if here == "":
                self.truncated = True
                return pairs
            if here == "}":
                if after_comma:
                    self.note("trailing comma")
                self.at += 1
                return pairs
            if here in ",]":
                self.note("stray punctuation")
                self.at += 1
                continue
            key = self.key()
            value = self.value(depth, in_object=True) if self.colon() else _ABSENT
            if value is not _ABSENT:
                self.put(pairs, key, value)
            after_comma = self.comma()

    def put(self, pairs: dict[str, Any], key: str, value: Any) -> None:
        if key in pairs and pairs[key] != value:
            self.note("repeated key")
            value = CONFLICT
        pairs[key] = value

    def key(self) -> str:
        if self.peek() in _QUOTES:
            return self.string(_AFTER_KEY)[0]
        self.note("bare key")
        return self.bare()

    def colon(self) -> bool:
        self.space()
        if self.peek() == ":":
            self.at += 1
            return True
        if self.peek() == "=":
            self.note("equals sign")
            self.at += 1
            return True
        if self.peek() == "":
            self.truncated = True
        else:
            self.note("key without value")
        return False

    def comma(self) -> bool:
        """Consume the separator between two members; True when it was there."""
        self.space()
        if self.peek() == ",":
            self.at += 1
            return True
        if self.peek() not in "}]":
            self.note("missing comma")
        return False

    def value(self, depth: int, in_object: bool = False) -> Any:
        self.space()
        here = self.peek()
        if here == "":
            self.truncated = True
            return _ABSENT
        if here in "{[":
            if depth >= _MAX_DEPTH:
                self.note("nested too deeply")
                self.at, self.truncated = len(self.text), True
                return _ABSENT
            return self.object(depth + 1) if here == "{" else self.array(depth + 1)
        if here in _QUOTES:
            string, closed = self.string(_AFTER_VALUE)
            return string if closed else _ABSENT
        if here in ",}]":
            self.note("key without value")
            return _ABSENT
        return self.scalar(in_object)

    def array(self, depth: int) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        after_comma = False
        while True:
            self.space()
            if self.peek() == "":
                self.truncated = True
                return items
            if self.peek() == "]":
                if after_comma:
                    self.note("trailing comma")
                self.at += 1
                return items
            if self.peek() in ",}:":
                self.note("stray punctuation")
                self.at += 1
                continue
            item = self.value(depth)
            if item is not _ABSENT:
                items.append(item)
            after_comma = self.comma()

    def bare(self) -> str:
        found = _BARE.match(self.text, self.at)
        if found is None:  # a character no rule accepts: step over it so that reading goes on
            self.at += 1
            return ""
        self.at = found.end()
        return found.group()

    def scalar(self, in_object: bool) -> Any:
        if (
            self.peek() == "<" and (end := self.text.find(">", self.at)) >= 0
        ):  # a placeholder copied from a prompt
            self.note("placeholder")
            word, self.at = self.text[self.at : end + 1], end + 1
            return word
        word = self.bare()
        if self.at >= len(self.text):
            self.truncated = True
            return _ABSENT
        if word[:1].isdigit() and (more := self.more(in_object)):
            return word + more
        if _STRICT_NUMBER.fullmatch(word):
            return float(word)
        if word in _LITERALS:
            return _LITERALS[word]
        self.note("bare value")
        return _PYTHON.get(word, word)

    def more(self, in_object: bool) -> str:
        """What belongs to the number before the cursor, so that it is not read as the number it begins with."""
        patterns = (_GOES_ON, _DECIMAL_COMMA) if in_object else (_GOES_ON,)
        found = next((one for pattern in patterns if (one := pattern.match(self.text, self.at))), None)
        if found is None:
            return ""
        self.note("bare value")
        self.at = found.end()
        return found.group().rstrip()

    def string(self, after: re.Pattern[str]) -> tuple[str, bool]:
        """Read a quoted string; a quote not followed by what `after` matches is taken as part of the text."""
        opening = self.peek()
        closing = _QUOTES[opening]
        if opening != '"':
            self.note("quotes")
        self.at += 1
        out: list[str] = []
        while self.at < len(self.text):
            here = self.text[self.at]
            if here == "\\":
                out.append(self.escape())
                continue
            if here == closing and self.closes(after):
                self.at += 1
                return "".join(out), True
            if here in "\n\r\t":
                self.note("control character in string")
            out.append(here)
            self.at += 1
        self.truncated = True
        return "".join(out), False

    def escape(self) -> str:
        if pair := _SURROGATES.match(self.text, self.at):
            self.at = pair.end()
            return (
                (chr(int(pair[1], 16)) + chr(int(pair[2], 16)))
                .encode("utf-16", "surrogatepass")
                .decode("utf-16")
            )
        if unit := _UNICODE.match(self.text, self.at):
            self.at = unit.end()
            return chr(int(unit[1], 16))
        code = self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if code not in _ESCAPES:
            self.note("unknown escape")
        return _ESCAPES.get(code, code)

    def closes(self, after: re.Pattern[str]) -> bool:
        if after.match(self.text, self.at + 1):
            return True
        self.note("quote in string")
        return False
