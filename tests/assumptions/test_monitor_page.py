"""The monitor's page as a person uses it, in a real browser against a real server."""

import contextlib
import json
import threading
import time
import urllib.request

import pytest
import uvicorn

from assumptions.dimensions import NAMES
from assumptions.monitor.server import build
from assumptions.monitor.session import Store
from shared.listening import listen
from shared.tinyworld import social

DONE = "document.querySelector('#status').textContent === 'The reply is complete.'"
FIRST, SECOND = (turn.text for turn in social.sample_turns(2, seed=4))
READY = "document.documentElement.dataset.ready"


@contextlib.contextmanager
def serving(monitored, folder):
    """A running monitor of the embedded model: its address and its server."""
    subject, talk = monitored
    app = build(subject, Store(folder), talk)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", server
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(monitored, tmp_path_factory):
    with serving(monitored, tmp_path_factory.mktemp("sessions")) as (address, _):
        yield address


@pytest.fixture
def page(browser, address):
    with browser.open(address, width=1440, height=900) as page:
        page.wait_for(READY)
        page.click("#new")
        page.wait_for("document.querySelector('#turns .empty') !== null")
        yield page
        assert page.errors == []
        assert all(url.startswith(address) for url in page.fetched)


def content(address, path):
    with urllib.request.urlopen(f"{address}api{path}") as answer:
        return answer.read().decode()


def newest(address):
    return json.loads(content(address, "/sessions"))[0]["id"]


def send(page, text):
    page.click("#message")
    page.type(text)
    page.press("Enter")
    page.wait_for(DONE)


def test_a_person_talks_reads_steers_compares_asks_and_exports(page, address):
    page.click("#message")
    page.type(FIRST)
    page.wait_for("document.querySelectorAll('circle.draft.plain').length === 9")  # read while it is written
    page.press("Enter")
    page.wait_for(DONE)
    assert page.evaluate("document.querySelectorAll('.reply').length") == 1

    page.set_value("#slider-validation_seeking", -4)
    assert page.text("[data-name=validation_seeking] output") == "\u22124.0 SD"
    send(page, SECOND)
    assert page.evaluate("[...document.querySelectorAll('.arms-2 .reply')].map((one) => one.className)") == [
        "reply steered kept",
        "reply plain",
    ]
    assert page.evaluate("document.querySelectorAll('#dimensions path.plain').length") == len(NAMES)
    assert page.evaluate("document.querySelectorAll('#dimensions circle.steered').length") == len(NAMES)
    page.click("#turns > li:last-child .ask")
    page.wait_for("document.querySelectorAll('#dimensions circle.stated').length === 9")

    session = json.loads(content(address, f"/sessions/{newest(address)}"))
    shown = page.evaluate("[...document.querySelectorAll('.reply .text')].map((one) => one.textContent)")
    first, second = session["turns"]
    assert shown == [first["replies"]["plain"]["text"], *(one["text"] for one in second["replies"].values())]
    assert second["scores"]["steered"]["validation_seeking"] < second["scores"]["plain"]["validation_seeking"]
    for kind in ("markdown", "json"):
        link = page.evaluate(f"document.querySelector('#{kind}').getAttribute('href')")
        exported = page.evaluate(f"fetch('{link}').then((answer) => answer.text())")
        assert second["replies"]["plain"]["text"] in exported
    page.click("#table-box summary")
    assert page.evaluate("document.querySelectorAll('#table tbody tr').length") == len(NAMES)


def test_a_session_is_found_again_and_the_other_reply_may_be_kept(page, browser, address):
    page.set_value("#slider-user_rightness", 3)
    send(page, "About my trip: justified blameless.")
    page.click(".reply.plain button")
    page.wait_for("document.querySelector('.reply.plain.kept') !== null")
    with browser.open(address) as other:
        other.wait_for(READY)
        assert other.text("#title") == "About my trip: justified blameless."
        assert other.evaluate("document.querySelector('.reply.plain.kept') !== null")
        assert other.evaluate("document.querySelector('#slider-user_rightness').value") == "3"
        assert other.text("#sessions button[aria-current]").startswith("About my trip")


def test_a_dimension_is_held_where_the_slider_is(page, address):
    page.click("[data-name=tangible_support] .hold")
    page.set_value("#slider-tangible_support", 0.9)
    assert page.text("[data-name=tangible_support] output") == "at 0.90"
    send(page, "About my roof: gesture symbol thought.")
    [turn] = json.loads(content(address, f"/sessions/{newest(address)}"))["turns"]
    assert turn["settings"] == [{"dimension": "tangible_support", "mode": "hold", "value": 0.9}]
    assert turn["scores"]["steered"]["tangible_support"] == pytest.approx(0.9, abs=1e-3)
    assert page.text(".reply.steered .who") == "Model, steered: tangible support at 0.90"
    page.click("#reset")
    assert page.text("[data-name=tangible_support] output") == "as it is"


def test_a_reply_can_be_stopped(page, monitored, monkeypatch):
    """A model that never ends: the person does."""
    model = monitored[0].model
    monkeypatch.setattr(type(model), "eos_token_ids", property(lambda _: []))
    page.set_value("#max_tokens", 400)
    page.click("#message")
    page.type("About my car: praise.")
    page.press("Enter")
    page.wait_for("document.querySelector('.growing')?.textContent.length > 20")
    page.click("#stop")
    page.wait_for(DONE)
    assert "stopped" in page.text("#turns > li:last-child .notes")


def test_two_tabs_on_one_conversation_stop_their_own_replies(page, browser, address, monitored, monkeypatch):
    model = monitored[0].model
    monkeypatch.setattr(type(model), "eos_token_ids", property(lambda _: []))
    page.set_value("#max_tokens", 400)
    page.set_value("#message", "About my car: praise.")
    with browser.open(address) as other:
        other.wait_for(READY)
        other.set_value("#max_tokens", 400)
        other.click("#message")
        other.type("About my roof: praise.")
        page.evaluate("composer.requestSubmit()")  # a tab behind another is not painted, and waits for no key
        page.wait_for("document.querySelector('.growing')")
        other.press("Enter")
        other.wait_for("document.querySelector('#status').textContent.startsWith('Waiting for')")
        other.click("#stop")
        other.wait_for(
            "document.querySelector('#status').textContent === 'Stopped before a reply had begun.'"
        )
        assert other.evaluate("document.querySelector('#message').value") == "About my roof: praise."
    page.wait_for(DONE)
    [turn] = json.loads(content(address, f"/sessions/{newest(address)}"))["turns"]
    assert turn["replies"]["plain"]["finish_reason"] == "length"  # the other tab's stop was not for this one


def test_a_server_that_ends_is_told_and_nothing_is_lost(browser, monitored, monkeypatch, tmp_path):
    model = monitored[0].model
    monkeypatch.setattr(type(model), "eos_token_ids", property(lambda _: []))
    with serving(monitored, tmp_path) as (address, server), browser.open(address) as page:
        page.wait_for(READY)
        page.set_value("#max_tokens", 400)
        page.click("#message")
        page.type("About my car: praise.")
        page.press("Enter")
        page.wait_for("document.querySelector('.growing')?.textContent.length > 20")
        server.should_exit = server.force_exit = True
        page.wait_for("!document.querySelector('#alert').hidden")
        assert "start `assumptions monitor` again" in page.text("#alert")
        assert page.evaluate("document.querySelector('#message').value") == "About my car: praise."
        page.click("#new")
        page.wait_for("document.querySelector('#alert').innerText.startsWith('The server does not answer')")


def test_who_reads_an_earlier_turn_stays_there(page):
    for _ in range(3):
        send(page, FIRST)
    end = "turns.scrollHeight - turns.scrollTop - turns.clientHeight"
    assert page.evaluate(end) < 2
    place = page.evaluate("(turns.scrollTop = 40, document.querySelector('.ask').click(), turns.scrollTop)")
    page.wait_for("document.querySelectorAll('#dimensions circle.stated').length === 9")
    assert page.evaluate("turns.scrollTop") == place
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == (
        "Ask the model for its scores of turn 1"
    )
    send(page, FIRST)
    assert page.evaluate(end) < 2


@pytest.mark.parametrize(("width", "beside"), [(1280, True), (800, True), (420, False)])
def test_what_is_read_stays_in_sight_and_nothing_overlaps(page, width, beside):
    page.set_value("#slider-validation_seeking", -4)
    page.set_size(width, 800)
    send(page, FIRST)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate(
            "message.getBoundingClientRect().right < panel.getBoundingClientRect().left".replace(
                "panel", "document.querySelector('aside')"
            )
        )
        is beside
    )
    overlaps = page.evaluate(
        """[...document.querySelectorAll(".dimension")].filter((row) => {
            const words = document.createRange();
            words.selectNodeContents(row.querySelector("h3"));
            const [name, chart] = [words, row.querySelector(".chart")].map((one) => one.getBoundingClientRect());
            return name.right > chart.left && name.top < chart.bottom && name.bottom > chart.top;
        }).length"""
    )
    assert overlaps == 0


def test_errors_are_shown_and_the_message_is_given_back(page):
    long = "praise " * 700
    page.click("#message")
    page.type(long)
    page.wait_for("!document.querySelector('#alert').hidden")
    assert "512 tokens" in page.text("#alert")
    page.press("Enter")
    page.wait_for("!document.querySelector('#send').hidden && !document.querySelector('#alert').hidden")
    assert page.evaluate("document.querySelector('#message').value") == long
    page.errors.clear()  # the refused draft is an HTTP error, which the browser notes


def test_every_control_has_a_name_and_text_is_never_markup(page):
    send(page, "<img src=x onerror=alert(1)> praise")
    assert page.evaluate("document.querySelectorAll('#turns img').length") == 0
    nodes = page.accessibility()
    controls = [
        one
        for one in nodes
        if one["role"] in ("button", "slider", "textbox", "checkbox", "spinbutton", "link")
    ]
    assert len(controls) > 15
    assert not [one for one in controls if not one["name"]]
    charts = [one["name"] for one in nodes if one["role"] == "image"]
    assert sum("over 1 turns: plain" in name for name in charts) == len(NAMES)
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#slider-user_rightness')).outlineStyle")
        == "none"
    )
    page.evaluate("document.querySelector('#slider-user_rightness').focus()")
    page.press("ArrowRight")
    assert page.text("[data-name=user_rightness] output") == "+0.5 SD"


def test_it_fits_a_narrow_window_and_dark_colours(page):
    page.set_size(420, 900)
    page.set_dark(True)
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    light, dark = "rgb(251, 250, 248)", "rgb(22, 24, 27)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
    page.click("#theme")
    page.click("#theme")
