"""From a model's text to scores with a status: a tolerant parser that never invents a score.

    clean          one strict JSON object that fits the shape, nothing around it
    repaired       every number was there, after listed leniencies (fences, quotes, percentages, other keys)
    salvaged       some numbers are there; what is missing is listed (truncation, out of range, contradictions)
    failed         no number could be read
    template_echo  the model repeated the prompt's form: placeholders only, or all zeros with empty explanations (a form
                   without explanations shows no zeros: there all zeros are an answer)

0. What a model thinks aloud in <think> tags is no answer; a thought without end leaves none.
1. Read every outermost brace block leniently (`lenient`) and take what fits the shape (`shapes`).
2. Drop echoes of the form: a leaked prompt tail in front of an answer is not an answer.
3. The first complete one counts, else the first with any number, so that a runaway continuation cannot replace it.
   All zeros in front of another answer are taken for a leaked form.
4. Without any brace block, read lines of the form `key: number`; this is never more than salvaged.
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from assumptions.lenient import Reading, read_object
from assumptions.shapes import Number, Shape, Taken, Text, leaf_paths, read_number, take

_OPENING = re.compile(r"(?i)<think(?:ing)?>")
_CLOSING = re.compile(r"(?i)</think(?:ing)?>")
Path = tuple[str | int, ...]


class Status(StrEnum):
    """How an answer was read."""

    CLEAN = "clean"
    REPAIRED = "repaired"
    SALVAGED = "salvaged"
    FAILED = "failed"
    TEMPLATE_ECHO = "template_echo"

    @property
    def complete(self) -> bool:
        """True where every number of the shape was read."""
        return self in (Status.CLEAN, Status.REPAIRED)


@dataclass(frozen=True)
class Answer:
    """A parsed answer: numbers and texts by path in the shape, what was forgiven, what is missing, where it ended."""

    status: Status
    numbers: dict[Path, float]
    texts: dict[Path, str]
    repairs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    end: int = 0


def parse(text: str, shape: Shape, section: re.Pattern[str] | None = None) -> Answer:
    """Read the answer of the given shape out of a model's text; `section` matches what may follow the object."""
    spoken = _without_thoughts(text)
    answer = _parse(spoken, shape, section)
    if spoken == text:
        return answer
    status = Status.REPAIRED if answer.status is Status.CLEAN else answer.status
    return replace(answer, status=status, repairs=(*answer.repairs, "thoughts"))


def _parse(text: str, shape: Shape, section: re.Pattern[str] | None) -> Answer:
    readings = _readings(text)
    answers = [_judge(text, reading, shape) for reading in readings]
    usable = [index for index, answer in enumerate(answers) if answer.numbers]
    if not usable:
        return _without_object(text, shape, any(a.status is Status.TEMPLATE_ECHO for a in answers))
    marker = section.search(text, readings[usable[0]].end) if section else None
    body = text[: marker.start()] if marker else text
    usable = [index for index in usable if readings[index].start < len(body)]
    return _choose(body, [readings[i] for i in usable], [answers[i] for i in usable])


def _without_thoughts(text: str) -> str:
    """The text with thoughts blanked: all up to the last closing tag, and all from an opening one without end."""
    closed = max((match.end() for match in _CLOSING.finditer(text)), default=0)
    opened = _OPENING.search(text, closed)
    end = opened.start() if opened else len(text)
    return " " * closed + text[closed:end] + " " * (len(text) - end)


def _choose(body: str, readings: list[Reading], answers: list[Answer]) -> Answer:
    complete = [i for i, answer in enumerate(answers) if answer.status.complete]
    telling = [i for i in complete if any(answers[i].numbers.values())]
    best = next(iter([*telling, *complete]), 0)
    answer = answers[best]
    repairs = [] if _stands_alone(body, readings[best]) else ["text around"]
    if any(other.numbers != answer.numbers for other in answers):
        repairs.append("several answers")
    if repairs and answer.status is Status.CLEAN:
        answer = replace(answer, status=Status.REPAIRED)
    return replace(answer, repairs=(*answer.repairs, *repairs))


def _readings(text: str) -> list[Reading]:
    """Read every outermost brace block, left to right."""
    readings = []
    at = text.find("{")
    while at >= 0:
        reading = read_object(text, at)
        readings.append(reading)
        at = text.find("{", max(reading.end, at + 1))
    return readings


def _stands_alone(body: str, reading: Reading) -> bool:
    return not body[: reading.start].strip() and not body[reading.end :].strip()


def _judge(text: str, reading: Reading, shape: Shape) -> Answer:
    taken = take(shape, reading.value)
    numbers = {path: leaf for path, leaf in taken.leaves.items() if isinstance(leaf, float)}
    texts = {path: leaf for path, leaf in taken.leaves.items() if isinstance(leaf, str)}
    repairs = tuple(sorted({*reading.repairs, *taken.repairs}))
    if _is_echo(shape, taken, numbers, texts):
        return Answer(Status.TEMPLATE_ECHO, {}, {}, repairs)
    if not numbers:
        status = Status.FAILED
    elif reading.truncated or len(numbers) < len(leaf_paths(shape, Number)):
        status = Status.SALVAGED
    elif repairs or len(texts) < len(leaf_paths(shape, Text)):
        status = Status.REPAIRED
    else:
        status = Status.CLEAN
    return Answer(status, numbers, texts, repairs, tuple(taken.missing), reading.end)


def _is_echo(shape: Shape, taken: Taken, numbers: dict[Path, float], texts: dict[Path, str]) -> bool:
    """True for the form itself: only placeholders, or nothing but zeros beside empty explanations."""
    if not numbers:
        return taken.placeholders > 0
    explained = bool(leaf_paths(shape, Text))
    return explained and not any(numbers.values()) and not any(map(str.strip, texts.values()))


def _without_object(text: str, shape: Shape, echoed: bool) -> Answer:
    """Read `key: number` lines where no brace block held a number."""
    paths = [path for path in leaf_paths(shape, Number) if path and isinstance(_key(path), str)]
    numbers = {path: number for path in paths if (number := _line_number(text, _key(path))) is not None}
    missing = tuple(".".join(map(str, path)) for path in leaf_paths(shape, Number) if path not in numbers)
    if any(numbers.values()) or (numbers and not echoed and not leaf_paths(shape, Text)):
        return Answer(Status.SALVAGED, numbers, {}, ("no object",), missing, len(text))
    all_paths = tuple(".".join(map(str, path)) for path in leaf_paths(shape, Number))
    return Answer(Status.TEMPLATE_ECHO if echoed else Status.FAILED, {}, {}, missing=all_paths)


def _key(path: Path) -> str:
    """The member that names a number: the dimension, not the `score` below it; empty inside a list."""
    if any(isinstance(part, int) for part in path):
        return ""
    return str(path[-2] if path[-1] == "score" and len(path) > 1 else path[-1])


def _line_number(text: str, key: str) -> float | None:
    """Return the number written right after `key`, when all its mentions agree and none touches the end of the text."""
    if not key:
        return None
    spelled = re.escape(key).replace("_", r"[ _-]")
    found = re.findall(
        rf"(?i)\b{spelled}\b[\"'*`]*\s*[:=]\s*[\"'*`]*([\d.]+\s*%?)(?=[\"'*`]*\s*(?:[;}}\n]|,(?!\d)))", text
    )
    values = {read_number(match)[0] for match in found}
    return values.pop() if len(values) == 1 else None
