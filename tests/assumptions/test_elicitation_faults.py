"""Faults of earlier code about elicitation, one test each: the name says which (T3 to T31)."""

import itertools
import re
from dataclasses import replace

import pytest

from assumptions.chats import Chat
from assumptions.elicitation import ElicitationSettings, check, elicit
from assumptions.instruments import INSTRUMENTS, instrument
from assumptions.parsing import Status
from assumptions.sources import load_messages
from shared.errors import UserError
from shared.generation import HFGenerator, OpenAIGenerator, Request
from shared.generation.prompts import prompt_ids
from shared.models import load

FREE = ElicitationSettings(guided=False, max_tokens=96)


@pytest.fixture(scope="module")
def model():
    return load("tinyworld")


def test_t3_a_batch_gives_the_texts_of_single_prompts_and_no_prompt_leaks_into_them(model, tmp_path):
    asked = instrument("tinyworld_nine")
    chats = load_messages("tinyworld", 6, seed=2, columns={}).chats
    # prompts of very different lengths, so that a cut at the number of attended tokens would show
    chats = [replace(chat, turn=chat.turn[: 20 + 30 * i]) for i, chat in enumerate(chats)]
    texts = {}
    for size in (1, 6):
        generator = HFGenerator(model, batch_size=size)
        path = tmp_path / f"{size}.jsonl"
        texts[size] = [
            r.text for r in elicit(generator, asked, chats, path, FREE, model=model.fingerprint).records
        ]
    assert texts[1] == texts[6]
    lengths = {len(prompt_ids(model.tokenizer, asked.messages(chat.turn))) for chat in chats}
    assert len(lengths) == 6
    for text, chat in zip(texts[6], chats, strict=True):
        assert text.startswith('{"')
        assert chat.turn not in text
        assert not re.search(r"user A|Rate|as JSON", text)


def test_t4_a_leaked_template_is_no_score_and_the_answer_after_it_is(tmp_path):
    four = instrument("4dims")
    empty = '{"mental_model": {"beliefs": {' + ", ".join(
        f'"{name}": {{"score": 0.0, "explanation": ""}}' for name in four.dimensions
    )
    leaked = empty + "}}}"
    assert four.parse(leaked).answer.status is Status.TEMPLATE_ECHO
    assert four.parse(leaked).scores == {}
    told = leaked.replace("0.0", "0.4").replace('""', '"because"')
    assert four.parse(f"{leaked}\nRESPONSE:\n{told}\nRESPONSE: yes").scores == dict.fromkeys(
        four.dimensions, 0.4
    )


def test_t12_a_prompt_that_does_not_fit_is_a_recorded_failure_never_cut(model, tmp_path):
    asked = instrument("tinyworld_nine")
    chats = load_messages("tinyworld", 3, seed=4, columns={}).chats
    long = Chat("long", "About my rent: " + "tears " * 3000)
    result = elicit(
        HFGenerator(model), asked, [*chats, long], tmp_path / "a.jsonl", FREE, model=model.fingerprint
    )
    by_id = {record.id: record for record in result.records}
    assert by_id["long"].status is Status.FAILED
    assert "tokens long and the context holds" in (by_id["long"].error or "")
    assert sum(record.status.complete for record in result.records) == 3


def test_t13_the_prompt_begins_with_one_bos_at_most(model):
    bos = model.tokenizer.bos_token_id
    ids = prompt_ids(model.tokenizer, instrument("nine_scores").messages("Was I right?"))
    direct = model.tokenizer.apply_chat_template(
        instrument("nine_scores").messages("Was I right?"), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids == list(direct)
    assert bos is None or ids.count(bos) <= 1


def test_t28_every_choice_builds_or_is_refused_before_an_engine_is_needed():
    """All instruments by all settings: what passes the check builds its prompt, schema and request."""
    built = 0
    for name, guided, shuffled in itertools.product(
        [*INSTRUMENTS, "openended5", "openended12_chat"], (True, False), (True, False)
    ):
        asked = instrument(name)
        settings = ElicitationSettings(guided=guided, shuffle_order=shuffled)
        if asked.shape_of is None or (guided and asked.sections):
            with pytest.raises(UserError, match="baseline|guided decoding would cut off"):
                check(asked, settings)
            continue
        check(asked, settings)
        Request(asked.messages("Was I right?"), json_schema=asked.json_schema() if guided else None, seed=1)
        built += 1
    assert built > 2 * len(INSTRUMENTS)
    for unknown in ("support", "openended0", "openended100", "openended"[:-1]):
        with pytest.raises(UserError, match="no instrument"):
            instrument(unknown)


def test_t29_the_key_is_read_when_a_server_is_asked_not_at_import(monkeypatch):
    monkeypatch.setattr(OpenAIGenerator, "_list_models", lambda self: {})
    for key in ("first", "second"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with OpenAIGenerator("http://127.0.0.1:9/v1", "m") as generator:
            assert generator._client.api_key == key
    with OpenAIGenerator("http://127.0.0.1:9/v1", "m", "given") as generator:
        assert generator._client.api_key == "given"


def test_t31_any_k_states_its_form_and_schema():
    for k in (1, 5, 10):
        asked = instrument(f"openended{k}")
        text = asked.messages("Was I right?")[0]["content"]
        assert f"the {k} most likely mental models" in text
        assert text.count('"model_name"') == k
        schema = asked.json_schema()["properties"]["mental_models"]
        assert (schema["minItems"], schema["maxItems"]) == (k, k)
    assert instrument("openended3").id == instrument("openended").id


@pytest.mark.filterwarnings("ignore")
def test_guided_answers_cannot_loop_in_digits_strings_or_white_space():
    """The grammar that a schema becomes bounds all three, so that no answer runs into the token limit."""
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    def accepts(asked, text):
        return _is_grammar_accept_string(grammars[asked.id], text)

    scores = replace(instrument("4dims_scores"), sections=())
    models = replace(instrument("openended1"), sections=())
    grammars = {
        one.id: xgrammar.Grammar.from_json_schema(
            one.json_schema(), any_whitespace=False, separators=(", ", ": ")
        )
        for one in (scores, models)
    }
    form = "{" + ", ".join(f'"{name}": NUMBER' for name in scores.dimensions) + "}"
    for number, good in (("0.5", True), ("1", True), ("0.123456", True), ("0.12345678", False), ("7", False)):
        assert accepts(scores, form.replace("NUMBER", number)) == good
    assert not accepts(scores, form.replace("NUMBER", "0.5").replace(", ", ",  "))
    model = '{"mental_models": [{"model_name": "NAME", "description": "d", "probability": 0.5}]}'
    assert accepts(models, model.replace("NAME", "n" * 80))
    assert not accepts(models, model.replace("NAME", "n" * 81))
