"""TinyWorld's own tokenizer: byte-level BPE with single digits, trained on the world's text, and its chat template.

Special tokens: <s> (start), </s> (padding), <|user|>, <|assistant|>, <|system|> (roles) and <|end|> (end of a
message, of a document, and of generation). A digit is a token of its own, with or without its leading space, and
so is a run of letters and underscores that is frequent enough: every noun, verb, city and cue word of the world
is one token.
"""

import random
from functools import cache
from typing import TYPE_CHECKING

from shared.tinyworld import facts, grammar, social, stories, tasks, users

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, PAD, USER, ASSISTANT, SYSTEM, END = "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
PATTERN = r" ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+"
VOCABULARY = 2560
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def world_words() -> list[str]:
    """Words that should each be one token, as they stand in running text (leading space)."""
    words: set[str] = {w for pair in grammar.NOUNS for w in pair}
    words |= {w for singular, plural, _ in grammar.VERBS for w in (singular, plural)}
    words |= {w for pair in grammar.CLAUSE_VERBS for w in pair} | set(grammar.PREPOSITIONS)
    words |= {w for name in (*facts.CITIES, *facts.CAPITALS, *facts.CAPITALS.values()) for w in name.split()}
    words |= {w for pairs in facts.ANTONYMS.values() for pair in pairs for w in pair}
    words |= {w for sides in social.CUE_WORDS.values() for side in sides for w in side}
    words |= set(social.DIMENSIONS) | set(social.TOPICS) | set(social.NEUTRAL)
    words |= {
        *stories.GIRLS,
        *stories.BOYS,
        *stories.THINGS,
        *stories.COLORS,
        *stories.PLACES,
        *stories.MOODS,
    }
    words |= {form.split()[0].rstrip(".") for _, high, low in social.SLOTS for form in (*high, *low)}
    return sorted(words)


def _sample_text() -> list[str]:
    rng = random.Random(0)
    text = [stories.plain_text(rng) for _ in range(4000)]
    for kind in grammar.AGREEMENT:
        sentences = (grammar.agreement_sentence(kind, "train", rng) for _ in range(1500))
        text += [s.prefix + s.right + s.tail for s in sentences]
    for ask in tasks.QUESTIONS.values():
        text += [q.prompt + q.answer + "." for q in ask("train", 2000)]
    people = users.make_users(24, seed=1)
    text += [m["content"] for person in people for row in person.rows("train", 60) for m in row]
    for turn in social.sample_turns(1000, seed=0, split="train"):
        scores = dict.fromkeys(social.DIMENSIONS, 0.5)
        text += [social.instrument(turn.text), social.format_scores(scores)]
    text += [form.format("rent") for _, high, low in social.SLOTS for form in (*high, *low)] * 100
    opening = [
        form.split()[0].rstrip(".") for form in (*social.SLOTS[0][1], *social.SLOTS[0][2])
    ]  # no space before these
    return text + [f" {word}" for word in world_words()] * 60 + [*opening, "NTA", "YTA", "Yes", "No"] * 60


@cache
def train_tokenizer() -> "PreTrainedTokenizerFast":
    """Train the tokenizer from the generator's text; deterministic, so made once a process."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, USER, ASSISTANT, SYSTEM]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
