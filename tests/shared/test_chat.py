"""Role spans through chat templates of every habit: they must be found exactly, or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.history import History
from shared.random_models import CHAT_TEMPLATE, byte_tokenizer
from shared.tokens import ChatTemplateError, encode_chat, encode_rows, encode_text, training_row

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "no_bos": CHAT_TEMPLATE.replace("{{ bos_token }}", ""),
    "two_bos": "{{ bos_token }}" + CHAT_TEMPLATE,
    "trims": CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "llama2": (
        "{{ bos_token }}"
        + LOOP
        + "{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>{% else %}[INST] {{ m['content'] }} [/INST]"
        "{% endif %}{% endfor %}"
    ),
    "system_first": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>"
        "{% set messages = messages[1:] %}{% endif %}"
        + LOOP
        + "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    ),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "user"},  # the content is also a word of the template
    {"role": "assistant", "content": "assistant\nsays: hi"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hi"},
]


@pytest.fixture(params=list(TEMPLATES))
def tokenizer(request):
    made = byte_tokenizer()
    made.chat_template = TEMPLATES[request.param]
    return made


def texts(tokenizer, encoded, ends=("content_start", "content_end")):
    return [tokenizer.decode(encoded.ids[getattr(s, ends[0]) : getattr(s, ends[1])]) for s in encoded.spans]


def test_spans_hold_exactly_the_contents(tokenizer):
    encoded = encode_chat(tokenizer, CHAT)
    assert texts(tokenizer, encoded) == [m["content"] for m in CHAT]
    assert [s.role for s in encoded.spans] == [m["role"] for m in CHAT]
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.ids[0] == tokenizer.bos_token_id
    for before, after in zip(encoded.spans, encoded.spans[1:]):
        assert (
            before.start <= before.content_start <= before.content_end <= before.generated_end == before.end
        )
        assert before.end == after.start
    for span in encoded.spans:
        if span.role == "assistant":
            assert encoded.ids[span.generated_end - 1] == tokenizer.eos_token_id


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=0, max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(CONTENT, min_size=1, max_size=5), st.sampled_from(["chatml", "trims", "no_bos"]), st.booleans()
)
def test_any_content_is_found_or_stripped(contents, template, generate):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    roles = ["user", "assistant"] * 3
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    encoded = encode_chat(tokenizer, chat, add_generation_prompt=generate)
    got = texts(tokenizer, encoded)
    assert got == [content.strip() if template == "trims" else content for content in contents]
    plain = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=generate)["input_ids"]
    assert encoded.ids == ([tokenizer.bos_token_id] if template == "no_bos" else []) + plain


def test_training_rows_put_the_loss_on_generated_tokens_only(tokenizer):
    row = training_row(tokenizer, CHAT)
    learnt = [token for token, label in zip(row.input_ids, row.labels) if label != -100]
    assert tokenizer.decode(learnt) == "hi<|end|>"
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels))
    assert not any(row.generated)
    prompt = encode_rows(tokenizer, [CHAT[:-1]])
    assert prompt.rows()[0] == row.input_ids[: row.prompt_length]
    assert prompt.prompt_lengths_B.tolist() == [row.prompt_length]


def test_sticky_rows_learn_every_answer_and_mark_the_earlier_ones(tokenizer):
    row = training_row(tokenizer, CHAT, History.STICKY)
    learnt = [token for token, label in zip(row.input_ids, row.labels) if label != -100]
    assert tokenizer.decode(learnt) == "assistant\nsays: hi<|end|>hi<|end|>"
    earlier = [token for token, flag in zip(row.input_ids, row.generated) if flag]
    assert tokenizer.decode(earlier) == "assistant\nsays: hi<|end|>"
    batch = encode_rows(tokenizer, [CHAT, CHAT[:2]], history=History.STICKY)
    decode = batch.input_ids_BT[batch.phase_mask("decode")].tolist()
    assert tokenizer.decode(decode).startswith("assistant\nsays: hi<|end|>hi<|end|>")


def test_an_answered_chat_is_prompt_up_to_its_last_answer():
    tokenizer = byte_tokenizer()
    batch = encode_rows(tokenizer, [CHAT, "plain"])
    decode = batch.input_ids_BT[batch.phase_mask("decode")].tolist()
    assert tokenizer.decode(decode) == "hi<|end|>\n"
    assert batch.prompt_lengths_B[1] == len("plain") + 1


def test_texts_get_exactly_one_bos():
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    assert encode_text(tokenizer, "ab")[0] == bos
    assert encode_text(tokenizer, "<bos>ab") == encode_text(tokenizer, "ab")
    assert encode_text(tokenizer, "") == [bos]


REFUSED = {
    "upper": (
        CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"),
        "rewrites message 0",
    ),
    "drops": (LOOP + "{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}", "drops or repeats"),
    "repeats": (LOOP + "{{ m['content'] }}{{ m['content'] }}{% endfor %}", "drops or repeats"),
    "no_system": (
        LOOP + "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}"
        "{% endfor %}",
        "refuses this chat .roles system, user.*no system",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_templates_that_hide_the_spans_are_refused(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, message = REFUSED[name]
    with pytest.raises(ChatTemplateError, match=message):
        encode_chat(tokenizer, CHAT)


SPACED = (
    "{{ bos_token }}" + LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST] "
    "{% else %}{{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_an_end_token_behind_white_space_is_learnt():
    """Llama-2's template: a space between the answer and its end token."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SPACED
    row = training_row(tokenizer, CHAT[1:], History.STICKY)
    learnt = [token for token, label in zip(row.input_ids, row.labels) if label != -100]
    assert tokenizer.decode(learnt) == "assistant\nsays: hi <|end|>hi <|end|>"
    assert learnt.count(tokenizer.eos_token_id) == 2
    encoded = encode_chat(tokenizer, CHAT[1:])
    assert texts(tokenizer, encoded) == [m["content"] for m in CHAT[1:]]
    assert texts(tokenizer, encoded, ("content_start", "generated_end")) == [
        "user",
        "assistant\nsays: hi <|end|>",
        "hi",
        "hi <|end|>",
    ]


@pytest.mark.parametrize("after", ["", " ", "</answer>{{ eos_token }}"])
def test_an_answer_without_an_end_token_is_refused_for_training(after):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SPACED.replace(" {{ eos_token }}", after)
    last = encode_chat(tokenizer, CHAT[1:]).spans[-1]
    assert last.generated_end == last.content_end
    with pytest.raises(ChatTemplateError, match="would not learn to stop"):
        training_row(tokenizer, CHAT[1:])


def test_a_generation_prompt_that_differs_from_the_answers_header_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
    )
    encode_chat(tokenizer, CHAT)
    with pytest.raises(ChatTemplateError, match="would not match serving"):
        training_row(tokenizer, CHAT)


def test_a_token_across_the_border_of_an_answer_is_refused():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet, newline + newline])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[(newline, newline)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ny"}]
    with pytest.raises(ChatTemplateError, match="border of an assistant message"):
        encode_chat(tokenizer, chat)
    chat[1]["content"] = "y\n"
    assert texts(tokenizer, encode_chat(tokenizer, chat)) == ["x", "y\n"]


def test_bad_chats_are_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="at least one message"):
        encode_chat(tokenizer, [])
    with pytest.raises(UserError, match="must end with an assistant"):
        training_row(tokenizer, CHAT[:-1])
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encode_chat(tokenizer, CHAT)
