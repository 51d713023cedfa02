"""Hostile answers written by hand, of other kinds than the generated ones: each with what alone it may be read as."""

import json
import random

import pytest

from assumptions.dimensions import BELIEFS, NAMES
from assumptions.instruments import instrument
from assumptions.parsing import Status

CLEAN, REPAIRED, SALVAGED = Status.CLEAN, Status.REPAIRED, Status.SALVAGED
FAILED, ECHO = Status.FAILED, Status.TEMPLATE_ECHO
NINE, FOUR = instrument("nine_scores"), instrument("4dims")
FIRST = NAMES[0]
SCORES = {name: round(0.11 + 0.08 * place, 2) for place, name in enumerate(NAMES)}
WHOLE = json.dumps(SCORES)
HALVES = dict.fromkeys(NAMES, 0.5)


def put(value):
    """The answer with another value for its first score."""
    return WHOLE.replace(f'"{FIRST}": {SCORES[FIRST]}', f'"{FIRST}": {value}')


# What stands for the first score, and what it is read as: None where it is no one number.
VALUES = [
    ('"\u0660.\u0667"', 0.7),  # Arabic-Indic digits
    ("\uff10.\uff17", 0.7),  # full-width digits
    ('"\uff17\uff10%"', 0.7),
    ('"70\u00a0%"', 0.7),  # no-break space
    ('"\u00bd"', None),
    ('"0.\u00b2"', None),
    ("0.\u200b7", None),  # zero-width space
    ('"\u22120.7"', None),  # minus sign
    ('"0,7"', None),
    ("0,7", None),
    ("0, 7", None),
    ("1,0", None),
    ('"zero point seven"', None),
    ('"0.7 to 0.8"', None),
    ("0.7-0.8", None),
    ("0.7 - 0.8", None),
    ("0.7 to 0.8", None),
    ("0.3 \u2013 0.5", None),
    ("7/10", 0.7),
    ("1 / 10", 0.1),
    ("1 out of 10", 0.1),
    ('"7 out of 10"', 0.7),
    ("1 %", 0.01),
    ("1 of 5", 0.2),
    ("-20%", None),
    ('"-20%"', None),
    ('"-7/10"', None),
    ("+0.7", 0.7),
    ('"NaN"', None),
    ('"inf"', None),
    ("1e-1", 0.1),
    ("1e999", None),
    ("0x1", None),
    ("0.7_5", None),
    ("0.7.5", None),
    ("0.", None),  # the digits after the point are unknown
    ('"0."', None),
    ('"~0.7"', None),
    ('"<0.7"', None),
    ('"0.7 (high)"', None),
    ("0.7 (high)", None),
    ("0.7 or so", None),
    ("0.5 + 0.2", None),
    ("0./*x*/7", None),
    ("0.7 /* high */", 0.7),
    ("0.7 // high\n", 0.7),
    ("[0.7]", None),
    ('{"score": 0.7}', None),
    ('{"value": 0.7, "reason": "x"}', None),
    ("false", None),
    ("[0-1]", None),
    ('"0-1"', None),
    ('"0..1"', None),
    ("<0 to 1>", None),
    ('"<score>"', None),
    ('"2024-01-01"', None),
    ('"0.7, 0.8"', None),
    ('"70 percent"', None),
]


@pytest.mark.parametrize(("value", "score"), VALUES)
def test_one_value_is_read_or_missing_and_the_others_are_whole(value, score):
    elicited = NINE.parse(put(value))
    rest = {name: own for name, own in SCORES.items() if name != FIRST}
    wanted = rest if score is None else rest | {FIRST: score}
    assert elicited.scores == pytest.approx(wanted), elicited
    assert elicited.answer.status is SALVAGED if score is None else elicited.answer.status.complete


def listed(name, value):
    return json.dumps([{name: key, value: score} for key, score in SCORES.items()])


ANSWERS = {
    "nested below other keys": (json.dumps({"result": {"data": SCORES}}), SALVAGED, SCORES),
    "in a list": (f"[{WHOLE}]", REPAIRED, SCORES),
    "one key twice, two values": (f'{WHOLE[:-1]}, "{FIRST}": 0.95}}', SALVAGED, NAMES[1:]),
    "one key twice, one value": (f'{WHOLE[:-1]}, "{FIRST}": {SCORES[FIRST]}}}', CLEAN, SCORES),
    "list of name and score": (listed("name", "score"), FAILED, ()),
    "list below a key": (f'{{"scores": {listed("dimension", "value")}}}', FAILED, ()),
    "list of pairs": (json.dumps(list(SCORES.items())), FAILED, ()),
    "table": ("|a|b|\n|-|-|\n" + "".join(f"| {k} | {v} |\n" for k, v in SCORES.items()), FAILED, ()),
    "two halves in two objects": (
        json.dumps({name: SCORES[name] for name in NAMES[:4]})
        + "\n"
        + json.dumps({name: SCORES[name] for name in NAMES[4:]}),
        SALVAGED,
        NAMES[:4],
    ),
    "decoy of one score in front": (
        f'An example would be {{"{FIRST}": 0.99}}. So:\n{WHOLE}',
        REPAIRED,
        SCORES,
    ),
    "decoy in a thought": (f"<think>maybe {json.dumps(HALVES)}</think>\n{WHOLE}", REPAIRED, SCORES),
    "thought opened by the prompt": (f"maybe {json.dumps(HALVES)}\n</think>\n\n{WHOLE}", REPAIRED, SCORES),
    "two thoughts": (f"<thinking>{WHOLE}</thinking><THINK>{WHOLE}</THINK>{WHOLE}", REPAIRED, SCORES),
    "thought without end": (f"<think>maybe {json.dumps(HALVES)}", FAILED, ()),
    "answer, then a thought without end": (f"{WHOLE}<think>or {json.dumps(HALVES)}", REPAIRED, SCORES),
    "form in words": (json.dumps(dict.fromkeys(NAMES, "number from 0 to 1")), FAILED, ()),
    "form as a range": (json.dumps(dict.fromkeys(NAMES, "0.0-1.0")), FAILED, ()),
    "form with other brackets": (json.dumps(dict.fromkeys(NAMES, "<your score>")), ECHO, ()),
    "cut in a number, fence closed": (f'```json\n{{"{FIRST}": 0.\n```', FAILED, ()),
    "cut in a number, brace closed": (f'{{"{FIRST}": 0.}}', FAILED, ()),
    "quotes as entities": (WHOLE.replace('"', "&quot;"), FAILED, ()),
    "JSON in a string": (json.dumps({"answer": WHOLE}), FAILED, ()),
    "lines": ("".join(f"{k}: {v}\n" for k, v in SCORES.items()), SALVAGED, SCORES),
    "lines of ranges": ("".join(f"{k}: {v}-{v + 0.1:.2f}\n" for k, v in SCORES.items()), FAILED, ()),
    "lines of negatives": ("".join(f"{k}: -{v}\n" for k, v in SCORES.items()), FAILED, ()),
    "lines with decimal commas": ("".join(f"{k}: 0,3\n" for k in NAMES), FAILED, ()),
    "lines out of ten": ("".join(f"{k}: 1/10\n" for k in NAMES), FAILED, ()),
    "elements": ("".join(f"<{k}>{v}</{k}>\n" for k, v in SCORES.items()), FAILED, ()),
    "semicolons": (WHOLE.replace(", ", " ; "), SALVAGED, NAMES[-1:]),
}


@pytest.mark.parametrize(("text", "status", "names"), ANSWERS.values(), ids=ANSWERS)
def test_a_whole_answer_is_read_as_it_is_meant_or_not_at_all(text, status, names):
    elicited = NINE.parse(text)
    assert (elicited.answer.status, elicited.scores) == (status, {name: SCORES[name] for name in names})


def test_explanations_and_replies_are_no_scores():
    own = {name: {"score": 0.4, "explanation": 'like {"score": 0.9}'} for name in BELIEFS}
    elicited = FOUR.parse(json.dumps({"mental_model": {"beliefs": own}}) + '\nRESPONSE: {"score": 0.9}')
    assert elicited.scores == dict.fromkeys(BELIEFS, 0.4)
    other = {name: {"confidence": 0.4, "explanation": "x"} for name in BELIEFS}
    assert FOUR.parse(json.dumps({"mental_model": {"beliefs": other}})).scores == {}
    thought = "<think>" + json.dumps({"mental_model": {"beliefs": own}}).replace("0.4", "0.9") + "</think>"
    said = FOUR.parse(f"{thought}{json.dumps({'mental_model': {'beliefs': own}})}\nRESPONSE: ok")
    assert (said.scores, said.sections) == (dict.fromkeys(BELIEFS, 0.4), {"RESPONSE": "ok"})


PIECES = [
    *'{}[]":,.0123456789 \n\\%/<>-+e#*`|=',
    *("null", "NaN", "//", "/*", "```", "\\ud83d", "\u0661", "0.", "1/2", "<think>", "</think>", "RESPONSE:"),
    *NAMES,
]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_answers_never_crash_nor_leave_the_range(seed):
    """Answers with pieces put in, cut out and copied at random; every score lies in [0, 1]."""
    draw = random.Random(seed)
    for _ in range(500):
        text = draw.choice([WHOLE, json.dumps(SCORES, indent=2), f"Sure:\n```json\n{WHOLE}\n```"])
        for _ in range(draw.choice([1, 2, 3, 6, 12])):
            start = draw.randrange(len(text) + 1)
            end = min(len(text), start + draw.randrange(20))
            put_in = draw.choice([draw.choice(PIECES), "", text[start:end]])
            text = text[:start] + put_in + text[end if draw.random() < 0.5 else start :]
        elicited = NINE.parse(text)
        assert all(0 <= score <= 1 for score in elicited.scores.values()), text
        assert len(elicited.scores) == 9 or not elicited.answer.status.complete
