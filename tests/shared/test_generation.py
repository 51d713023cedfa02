"""Requests, seeds, text and the Hugging Face engine, against plain forward passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from shared.generation import Generator, HFGenerator, Request, Sampling
from shared.generation.hf import Row, batches
from shared.generation.requests import expand, sample_seed
from shared.generation.text import decode_new, stop_start
from shared.hooks import capture, edit
from shared.interventions import Add
from shared.models import load
from shared.random_models import byte_tokenizer

PROMPTS = [
    "The dogs",
    "a",
    [{"role": "user", "content": "hi there, how are you?"}],
    [7, 9, 30, 31],
    "x y " * 9,
]
REQUESTS = [Request(prompt, seed=index) for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model():
    return load("random:llama")


@pytest.fixture(scope="module")
def generator(model):
    return HFGenerator(model, batch_size=3)


def tokens(completions):
    return [[sample.token_ids for sample in samples] for samples in completions]


def test_it_is_a_generator(generator):
    assert isinstance(generator, Generator)
    assert generator.generate([], Sampling()) == []


def test_greedy_equals_a_plain_loop_over_the_module(model, generator):
    for request, [answer] in zip(REQUESTS, generator.generate(REQUESTS, Sampling(max_tokens=6, logprobs=3))):
        ids = (
            [*model.encode([request.prompt]).input_ids_BT[0].tolist()]
            if isinstance(request.prompt, str)
            else None
        )
        ids = ids or (
            request.prompt if isinstance(request.prompt[0], int) else chat_ids(model, request.prompt)
        )
        for step, token in enumerate(answer.token_ids):
            with torch.no_grad():
                logprobs_V = model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            values, likeliest = logprobs_V.topk(3)
            assert token == likeliest[0]
            assert answer.logprobs[step] == pytest.approx(float(values[0]), abs=1e-4)
            assert list(answer.top_logprobs[step]) == likeliest.tolist()
            assert list(answer.top_logprobs[step].values()) == pytest.approx(values.tolist(), abs=1e-4)
            ids = [*ids, token]


@pytest.mark.parametrize("interventions", [[], [Add("blocks.1.output", torch.ones(128), phase="decode")]])
def test_log_probabilities_leave_an_open_capture_alone(model, interventions):
    site, steps = "final_norm", 4
    generator = HFGenerator(model, interventions)
    seen = {}
    for logprobs in (None, 3):
        with capture(model, [site]) as acts:
            [[answer]] = generator.generate(REQUESTS[:1], Sampling(max_tokens=steps, logprobs=logprobs))
        seen[logprobs] = acts[site]
    assert len(answer.token_ids) == len(answer.top_logprobs) == steps
    assert torch.equal(seen[3], seen[None])
    logits_TV = seen[3][0, -steps:] @ model.hf.lm_head.weight.T
    expected_TK, ids_TK = logits_TV.log_softmax(-1).topk(3)
    assert [list(top) for top in answer.top_logprobs] == ids_TK.tolist()
    found_TK = torch.tensor([list(top.values()) for top in answer.top_logprobs])
    torch.testing.assert_close(found_TK, expected_TK)


def chat_ids(model, messages):
    return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=8), Sampling(max_tokens=8, temperature=1.3, top_p=0.9, n=2)]
)
def test_an_answer_does_not_depend_on_its_batch(generator, sampling):
    together = generator.generate(REQUESTS, sampling)
    assert tokens(generator.generate(REQUESTS[::-1], sampling)) == tokens(together)[::-1]
    assert tokens([generator.generate([request], sampling)[0] for request in REQUESTS]) == tokens(together)


def test_samples_have_seeds_of_their_own(generator):
    sampling = Sampling(max_tokens=12, temperature=1.0, n=3)
    samples = generator.generate([Request("once", seed=5)], sampling)[0]
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    one = generator.generate([Request("once", seed=5)], Sampling(max_tokens=12, temperature=1.0))[0]
    assert one[0].token_ids == samples[0].token_ids
    seeds = [sample_seed(seed, sample) for seed in range(200) for sample in range(5)]
    assert len(set(seeds)) == len(seeds)


def test_without_a_seed_the_global_generator_decides(generator):
    requests, sampling = [Request("once"), Request("once")], Sampling(max_tokens=12, temperature=1.0)
    torch.manual_seed(1)
    first = tokens(generator.generate(requests, sampling))
    second = tokens(generator.generate(requests, sampling))
    torch.manual_seed(1)
    assert tokens(generator.generate(requests, sampling)) == first != second
    assert first[0] != first[1]
    before = torch.get_rng_state()
    generator.generate(requests, Sampling(max_tokens=2))
    assert torch.equal(before, torch.get_rng_state())


def test_sampled_tokens_follow_the_tempered_nucleus(model):
    """First tokens of 3,000 seeded draws: chi-squared against softmax(logits / T) cut to top-p, and against others."""
    n, temperature, top_p = 3000, 0.7, 0.8
    draws = HFGenerator(model, batch_size=500).generate(
        [Request([7, 9], seed=index) for index in range(n)],
        Sampling(max_tokens=1, temperature=temperature, top_p=top_p, logprobs=None),
    )
    assert all(draw.logprobs == [] for [draw] in draws)
    tokens_N = torch.tensor([draw.token_ids[0] for [draw] in draws])
    with torch.no_grad():
        logits_V = model.hf(torch.tensor([[7, 9]])).logits[0, -1]
    assert excess(tokens_N, nucleus(logits_V / temperature, top_p)) < 5
    assert excess(tokens_N, nucleus(logits_V, top_p)) > 15
    assert excess(tokens_N, nucleus(logits_V / temperature, 1.0)) > 15


def nucleus(logits_V, top_p):
    ordered, ids = logits_V.softmax(-1).sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    return torch.zeros_like(logits_V).index_put((ids[kept],), ordered[kept] / ordered[kept].sum())


def excess(tokens_N, probs_V):
    """How many standard deviations the chi-squared statistic lies above its mean; inf for an impossible token."""
    counts_V = torch.bincount(tokens_N, minlength=len(probs_V))
    if counts_V[probs_V == 0].any():
        return float("inf")
    expected = probs_V[probs_V > 0] * len(tokens_N)
    statistic = ((counts_V[probs_V > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return float(statistic - freedom) / (2 * freedom) ** 0.5


def test_end_token_and_context_end(model, generator, monkeypatch):
    [[free]] = generator.generate([Request("once")], Sampling(max_tokens=9))
    assert free.finish_reason == "length"
    end = free.token_ids[4]
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [end])
    [[ended]] = generator.generate([Request("once")], Sampling(max_tokens=9))
    n = free.token_ids.index(end) + 1
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[:n], "stop")
    assert (
        ended.text
        == decode_new(model.tokenizer, model.encode(["once"]).rows()[0], free.token_ids[: n - 1]).text
    )
    limit = model.hf.config.max_position_embeddings
    [[last], [short]] = generator.generate([Request([7] * (limit - 2)), Request([7])], Sampling(max_tokens=5))
    assert (len(last.token_ids), last.finish_reason, len(short.token_ids)) == (2, "length", 5)


def test_stop_strings_cut_text_tokens_and_logprobs(generator):
    [[free]] = generator.generate([Request("once")], Sampling(max_tokens=12, logprobs=1))
    word = free.text[3:5]
    [[cut]] = generator.generate(
        [Request("once")], Sampling(max_tokens=12, logprobs=1, stop=("absent", word))
    )
    n = len(cut.token_ids)
    assert cut.text == free.text[: free.text.index(word)]
    assert cut.finish_reason == "stop"
    assert n < len(free.token_ids)
    assert (cut.token_ids, cut.logprobs) == (free.token_ids[:n], free.logprobs[:n])
    assert len(cut.top_logprobs) == n


def test_interventions_apply_and_leave_no_trace(model, generator):
    sampling = Sampling(max_tokens=8, logprobs=2)
    plain = generator.generate(REQUESTS, sampling)
    vector = torch.randn(model.architecture.width, generator=torch.Generator().manual_seed(0))
    for phase in ("prefill", "decode", "all"):
        push = Add("blocks.1.output", vector, strength=4.0, phase=phase)
        steered = HFGenerator(model, [push]).generate(REQUESTS, sampling)
        with edit(model, push):
            assert tokens(generator.generate(REQUESTS, sampling)) == tokens(steered)
        first_token_moved = any(a.token_ids[0] != b.token_ids[0] for [a], [b] in zip(plain, steered))
        assert tokens(steered) != tokens(plain)
        assert first_token_moved == (phase != "decode")
        for [answer] in steered:  # the pass for the likeliest tokens ran under the same edits as generation
            best = [max(step, key=step.get) for step in answer.top_logprobs]
            assert best == answer.token_ids
            chosen = [step[token] for step, token in zip(answer.top_logprobs, answer.token_ids)]
            assert chosen == pytest.approx(answer.logprobs, abs=1e-4)
    assert generator.generate(REQUESTS, sampling) == plain


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request("x", adapter="ada"),
            "adapter 'ada': HFGenerator serves none by name; use VLLMGenerator or OpenAI",
        ),
        (
            Request("x", json_schema={}),
            "HFGenerator cannot enforce a json_schema; use VLLMGenerator or OpenAI",
        ),
        (Request([7] * 512), "prompt 1 is 512 tokens long and the context holds 512"),
    ],
)
def test_what_it_cannot_do_is_said_before_any_work(model, request_, message, monkeypatch):
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(UserError) as error:
        HFGenerator(model).generate([Request("x"), request_], Sampling(max_tokens=1))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 2}, "n > 1 greedy samples are all alike: set a temperature"),
        ({"logprobs": -1}, "logprobs must be None or at least 0"),
        ({"stop": "end"}, r"write \('end',\)"),
        ({"stop": ("",)}, "a stop string must not be empty"),
    ],
)
def test_impossible_sampling_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Sampling(**change)


def test_impossible_requests_are_refused():
    for prompt in ("", []):
        with pytest.raises(UserError, match="a request needs a prompt"):
            Request(prompt)
    with pytest.raises(UserError, match="a request's seed lies in"):
        Request("x", seed=-1)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        HFGenerator("random:llama", batch_size=0)


@given(lengths=st.lists(st.integers(1, 20)), size=st.integers(1, 5), limit=st.integers(21, 30))
def test_batches_cover_every_row_once_longest_first(lengths, size, limit):
    rows = [Row(place, [0] * length, 0, min(8, limit - length)) for place, length in enumerate(lengths)]
    made = list(batches(rows, size))
    assert sorted(row.place for batch in made for row in batch) == list(range(len(rows)))
    flat = [len(row.ids) for batch in made for row in batch]
    assert flat == sorted(flat, reverse=True)
    assert all(len(batch) <= size and len({row.room for row in batch}) == 1 for batch in made)


@given(text=st.text("ab", max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_strings_equal_a_search_character_by_character(text, stop):
    expected = None
    for end in range(1, len(text) + 1):
        hits = [word for word in stop if text[:end].endswith(word)]
        if hits:
            expected = end - len(hits[0])
            break
    assert stop_start(text, 0, stop) == expected


# No "<": text that spells a special token would be read as that token.
PLAIN = st.characters(codec="utf-8", exclude_characters="<")


@given(
    prompt=st.text(PLAIN, min_size=1, max_size=6),
    text=st.text(PLAIN, max_size=8),
    stop=st.text(PLAIN, min_size=1, max_size=2),
)
def test_new_text_is_what_the_tokens_add(prompt, text, stop):
    tokenizer = byte_tokenizer()
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
    assert decode_new(tokenizer, *ids) == (text, len(ids[1]), False)
    decoded = decode_new(tokenizer, *ids, [stop])
    assert decoded.stopped == (stop in text)
    if stop in text:
        upto = text[: text.index(stop) + len(stop)]
        assert decoded.text == text[: text.index(stop)]
        assert decoded.n_tokens == len(tokenizer(upto, add_special_tokens=False)["input_ids"])


@given(seeds=st.lists(st.none() | st.integers(0, 2**31 - 1), max_size=5), n=st.integers(1, 4))
def test_draws_are_laid_out_request_by_request(seeds, n):
    requests = [Request("x", seed=seed) for seed in seeds]
    draws = expand(requests, Sampling(temperature=1.0, n=n))
    assert [draw.request for draw in draws] == [request for request in requests for _ in range(n)]
    for index, seed in enumerate(seeds):
        if seed is not None:
            assert [draw.seed for draw in draws[n * index : n * (index + 1)]] == [
                sample_seed(seed, i) for i in range(n)
            ]
    assert all(0 <= draw.seed < 2**31 for draw in draws)
