"""The tolerant parser: more than 200 generated hostile answers with the status each must get, and no invented score."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assumptions.dimensions import BELIEFS, NAMES
from assumptions.instruments import instrument
from assumptions.lenient import read_object
from assumptions.parsing import Status, parse
from assumptions.shapes import Number, Record, example, json_schema, leaf_paths, read_number

CLEAN, REPAIRED, SALVAGED = Status.CLEAN, Status.REPAIRED, Status.SALVAGED
FAILED, ECHO = Status.FAILED, Status.TEMPLATE_ECHO
NINE = instrument("nine_scores")
FOUR = instrument("4dims")


def nine(seed):
    draw = random.Random(seed)
    return {name: draw.randrange(1, 20) / 20 for name in NAMES}


def four(seed):
    draw = random.Random(seed)
    beliefs = {n: {"score": draw.randrange(1, 20) / 20, "explanation": f"because {n}"} for n in BELIEFS}
    return {"mental_model": {"beliefs": beliefs}}


def scores_of(answer):
    return {n: v["score"] for n, v in answer["mental_model"]["beliefs"].items()}


def drop(scores, *names):
    return {n: v for n, v in scores.items() if n not in names}


def whole(text):
    """Mutations that keep every score: name, new text, expected status."""
    yield "as is", text, CLEAN
    yield "spaces", f"\n  {text}\n\n", CLEAN
    yield "fence", f"```json\n{text}\n```", REPAIRED
    yield "bare fence", f"```\n{text}\n```", REPAIRED
    yield "prose before", f"Sure, here it is:\n{text}", REPAIRED
    yield "prose after", f"{text}\nLet me know if I should go on.", REPAIRED
    yield "trailing comma", text[:-1] + ",}", REPAIRED
    yield "single quotes", text.replace('"', "'"), REPAIRED
    yield "curly quotes", re.sub(r'"([^"]*)"', "\u201c\\1\u201d", text), REPAIRED
    yield "bare keys", re.sub(r'"(\w+)":', r"\1:", text), REPAIRED
    yield "numbers as strings", re.sub(r": (0\.\d+)", r': "\1"', text), REPAIRED
    yield "percentages", re.sub(r": (0\.\d+)", lambda m: f": {float(m[1]) * 100:g}%", text), REPAIRED
    yield "percent strings", re.sub(r": (0\.\d+)", lambda m: f': "{float(m[1]) * 100:g} %"', text), REPAIRED
    yield "fractions", re.sub(r": (0\.\d+)", lambda m: f': "{float(m[1]) * 10:g}/10"', text), REPAIRED
    yield "no leading zero", re.sub(r": 0(\.\d+)", r": \1", text), REPAIRED
    yield "comments", text.replace(", ", ", // a remark\n", 1), REPAIRED
    yield "block comment", text.replace("{", "{ /* scores { } */ ", 1), REPAIRED
    yield "missing comma", text.replace(", ", " ", 1), REPAIRED
    yield "capital keys", re.sub(r'"(\w+)":', lambda m: f'"{m[1].upper()}":', text), REPAIRED
    yield "spaced keys", re.sub(r'"(\w+)":', lambda m: f'"{m[1].replace("_", " ")}":', text), REPAIRED
    yield "extra key", text.replace("{", '{"confidence": 0.77, ', 1), REPAIRED
    yield "wrapped", f'{{"answer": "yes", "note": {{"a": 1}}}}\n{text}', REPAIRED
    yield "twice", f"{text}\n{text}", REPAIRED


def nine_cases(seed):
    scores = nine(seed)
    text = json.dumps(scores)
    first, last = NAMES[0], NAMES[-1]
    for name, mutated, status in whole(text):
        yield name, mutated, status, scores
    rest = drop(scores, first)
    for name, bad in {
        "above range": "7",
        "percent without sign": "70",
        "negative": "-0.3",
        "null": "null",
        "true": "true",
        "word": '"high"',
        "list": "[0.3, 0.4]",
        "nan": "NaN",
        "infinity": "Infinity",
        "range": '"0.2-0.4"',
        "empty string": '""',
        "percent above": '"140%"',
        "fraction above": '"12/10"',
        "placeholder": "<number from 0 to 1>",
        "object": '{"low": 0.2, "high": 0.4}',
    }.items():
        yield name, text.replace(f'"{first}": {scores[first]}', f'"{first}": {bad}'), SALVAGED, rest
    yield "key missing", json.dumps(rest), SALVAGED, rest
    yield "key twice", text.replace("{", f'{{"{first}": 0.99, ', 1), SALVAGED, rest
    spelled = text[:-1] + f', "{last.upper()}": 0.99, "{last.title()}": 0.98}}'
    yield "exact key wins over spellings", spelled, REPAIRED, scores
    cut = text[: text.index(f'"{last}"') + len(last) + 4] + str(scores[last])[:3]
    yield "cut inside the last number", cut, SALVAGED, drop(scores, last)
    yield "no closing brace", text[:-1], SALVAGED, drop(scores, last)
    yield "cut after comma", text[: text.rindex(",") + 1], SALVAGED, drop(scores, last)
    yield "no opening brace", text[1:], SALVAGED, scores
    lines = "".join(f"- **{n}**: {v}\n" for n, v in scores.items())
    yield "bullet list", lines, SALVAGED, scores
    yield "two opinions in lines", lines + f"{first}: 0.99\n", SALVAGED, rest
    runaway = f"{text}\nUser: and now?\n{json.dumps(nine(seed + 999))}"
    yield "runaway second answer", runaway, REPAIRED, scores
    form = example(NINE.shape())
    yield "leaked form, then the answer", f"{form}\nWrite the JSON only.\n{text}", REPAIRED, scores
    zeros = json.dumps(dict.fromkeys(NAMES, 0.0))
    yield "leaked zeros, then the answer", f"{zeros}\n{text}", REPAIRED, scores


def hopeless_cases():
    form = example(NINE.shape())
    yield "form", form, ECHO
    yield "form in fence", f"```json\n{form}\n```", ECHO
    yield "quoted form", json.dumps(dict.fromkeys(NAMES, "<number from 0 to 1>")), ECHO
    yield "two forms", f"{form}\n{form}", ECHO
    for text in (
        "",
        " \n ",
        "I cannot tell.",
        "{}",
        "[]",
        "{{{{",
        "}}}}",
        "[0.1, 0.2, 0.3]",
        "null",
        "0.7",
        '{"error": "no"}',
        '{"score": 0.7}',
        "{0.7}",
        "validation_seeking is 0.7",
        "Give validation_seeking: 0 to 1, user_rightness: 0-1 please",
        '{"validation_seeking": ',
        '{"validation_seeking": 0.7',
        '{"validation_seeking"',
        "{" * 500,
        '{"a":' * 200,
        "\ufffd\x00{\x00}",
        '{"mental_models": [{"probability": 0.4}]}',
        "```json\n```",
        "{'validation_seeking': None}",
        ", ".join(NAMES),
    ):
        yield repr(text[:30]), text, FAILED


NINE_CASES = [
    pytest.param(*case[1:], id=f"{seed}-{case[0]}") for seed in range(5) for case in nine_cases(seed)
]
HOPELESS = [pytest.param(*case[1:], id=case[0]) for case in hopeless_cases()]


def test_there_are_enough_hostile_cases():
    assert len(NINE_CASES) + len(HOPELESS) >= 200


@pytest.mark.parametrize(("text", "status", "scores"), NINE_CASES)
def test_nine_scores(text, status, scores):
    elicited = NINE.parse(text)
    assert elicited.answer.status is status, elicited
    assert elicited.scores == pytest.approx(scores)


@pytest.mark.parametrize(("text", "status"), HOPELESS)
def test_no_score_is_invented(text, status):
    elicited = NINE.parse(text)
    assert elicited.answer.status is status, elicited
    assert elicited.scores == {}
    assert len(elicited.answer.missing) == 9


@pytest.mark.parametrize("seed", range(5))
def test_explained_scores_with_reply(seed):
    answer = four(seed)
    for _, text, _ in whole(json.dumps(answer)):
        if "1}" in text and '"note"' in text:
            continue  # a foreign object in front belongs to the scores-only forms
        elicited = FOUR.parse(text)
        assert elicited.answer.status.complete, (text, elicited)
        assert elicited.scores == pytest.approx(scores_of(answer))
    reply = f"{json.dumps(answer, indent=2)}\n\nRESPONSE: I think {{you}} did well.\nRESPONSE: twice"
    elicited = FOUR.parse(reply)
    assert elicited.answer.status is CLEAN
    assert elicited.sections == {"RESPONSE": "I think {you} did well.\nRESPONSE: twice"}


def test_explained_scores_with_lost_levels():
    answer = four(0)
    beliefs = answer["mental_model"]["beliefs"]
    for flat in (beliefs, {"beliefs": beliefs}, {"mental_model": beliefs}):
        elicited = FOUR.parse(json.dumps(flat))
        assert (elicited.answer.status, elicited.scores) == (REPAIRED, scores_of(answer))
    bare = {"mental_model": {"beliefs": scores_of(answer)}}
    elicited = FOUR.parse(json.dumps(bare))
    assert (elicited.answer.status, elicited.scores) == (REPAIRED, scores_of(answer))


def test_the_released_template_is_an_echo_and_its_answer_is_found():
    """T4: zeros with empty explanations are the template; in front of an answer they are a leaked prompt."""
    empty = {"mental_model": {"beliefs": {n: {"score": 0.0, "explanation": ""} for n in BELIEFS}}}
    assert FOUR.parse(json.dumps(empty)).answer.status is ECHO
    answer = four(3)
    elicited = FOUR.parse(f"{json.dumps(empty)}\nRESPONSE:\n{json.dumps(answer)}\nRESPONSE: hello")
    assert elicited.scores == scores_of(answer)
    assert elicited.sections == {"RESPONSE": "hello"}
    explained = {"mental_model": {"beliefs": {n: {"score": 0.0, "explanation": "none"} for n in BELIEFS}}}
    assert FOUR.parse(json.dumps(explained)).scores == dict.fromkeys(BELIEFS, 0.0)


@pytest.mark.parametrize("zero", ["0.0", "0", "0.00"])
def test_all_zeros_are_an_answer_where_nothing_is_explained(zero):
    """The form of a scores-only instrument holds no number, so zeros cannot be its echo."""
    text = "{" + ", ".join(f'"{name}": {zero}' for name in NAMES) + "}"
    elicited = NINE.parse(text)
    assert (elicited.answer.status, elicited.scores) == (CLEAN, dict.fromkeys(NAMES, 0.0))
    fenced = NINE.parse(f"```json\n{text}\n```")
    assert (fenced.answer.status, fenced.scores) == (REPAIRED, dict.fromkeys(NAMES, 0.0))
    part = NINE.parse('{"validation_seeking": ' + zero + ', "user_rightness"')
    assert (part.answer.status, part.scores) == (SALVAGED, {"validation_seeking": 0.0})


def test_one_score_is_not_spread_over_four():
    for answer in (
        {"score": 0.7},
        {"beliefs": {"score": 0.7}},
        {"mental_model": {"beliefs": {"score": 0.7}}},
    ):
        assert FOUR.parse(json.dumps(answer)).scores == {}


def test_quotes_and_line_breaks_inside_explanations():
    answer = four(1)
    answer["mental_model"]["beliefs"][BELIEFS[0]]["explanation"] = "They say PLACE."
    text = json.dumps(answer).replace("PLACE", '"I was there", twice\nand more')
    elicited = FOUR.parse(text)
    assert (elicited.answer.status, elicited.scores) == (REPAIRED, scores_of(answer))


def test_two_step_sections():
    models = [{"model_name": "a", "description": "b", "probability": p} for p in (0.5, 0.3, 0.2)]
    text = json.dumps({"mental_models": models}) + "\nREASONING: be kind\nRESPONSE: ok"
    elicited = instrument("twostep").parse(text)
    assert elicited.answer.status is CLEAN
    assert elicited.sections == {"REASONING": "be kind", "RESPONSE": "ok"}
    assert [elicited.answer.numbers[("mental_models", i, "probability")] for i in range(3)] == [0.5, 0.3, 0.2]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.sampled_from([None, 2]))
@settings(deadline=None)
def test_lenient_reader_agrees_with_json_on_json(value, indent):
    for ascii_only in (True, False):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        reading = read_object(text, 0)
        assert (reading.value, reading.end, reading.repairs, reading.truncated) == (
            value,
            len(text),
            [],
            False,
        )


@given(st.text(alphabet="{}[]\":,.0123456789 abc'\\\n%/<>-", max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_ends_with_a_status(text):
    shape = Record((("a", Number()), ("b", Number())))
    answer = parse(text, shape)
    assert set(answer.numbers) <= set(leaf_paths(shape, Number))
    assert all(0.0 <= number <= 1.0 for number in answer.numbers.values())
    assert answer.status.complete == (len(answer.numbers) == 2 and answer.status in (CLEAN, REPAIRED))


@given(
    st.dictionaries(st.sampled_from(NAMES), st.floats(0.01, 1), min_size=9, max_size=9), st.integers(1, 200)
)
@settings(deadline=None)
def test_every_prefix_of_an_answer_gives_only_its_own_scores(scores, cut):
    text = json.dumps(scores)
    elicited = NINE.parse(text[:-cut])
    assert elicited.scores == {n: scores[n] for n in elicited.scores}
    assert not elicited.answer.status.complete


@given(st.text(max_size=12))
def test_a_number_is_read_only_from_an_explicit_form(text):
    number, repair = read_number(text)
    assert number is None or (0 <= number <= 1 and repair and re.search(r"\d", text))


def test_schema_form_and_parser_come_from_one_definition():
    """T31: the schema is valid, the form states every key, an answer that fits the schema parses clean."""
    import jsonschema

    for name in (
        "openended",
        "ten",
        "4dims",
        "supporttypes",
        "nine_scores",
        "4dims_scores",
        "supporttypes_chat",
    ):
        shape = instrument(name).shape()
        schema = json_schema(shape)
        jsonschema.Draft202012Validator.check_schema(schema)
        filled = example(shape).replace("<number from 0 to 1>", "0.5")
        filled = re.sub(r"<[^<>]+>", "text", filled)
        jsonschema.validate(json.loads(filled), schema)
        assert instrument(name).parse(filled).answer.status is CLEAN
        assert parse(example(shape), shape).status is ECHO
        with pytest.raises(json.JSONDecodeError):
            json.loads(example(shape))
