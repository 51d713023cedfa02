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


@pytest.fixture(scope="module")
def address(monitored, tmp_path_factory):
    """A running monitor of the embedded model."""
    subject, talk = monitored
    app = build(subject, Store(tmp_path_factory.mktemp("sessions")), talk)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


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
