"""The browser helper tells the truth: it acts as a user does and reports what goes wrong on a page."""

import pytest

PAGE = """<!doctype html><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'">
<title>a page</title><button id="press">press</button><input id="word" aria-label="word"><p id="said"></p>
<script>
const said = document.getElementById("said");
document.getElementById("press").addEventListener("click", (event) => {
  said.textContent = `${event.isTrusted} ${event.shiftKey}`;
});
document.getElementById("word").addEventListener("keydown", (event) => {
  said.textContent += event.key;
});
</script>"""


@pytest.fixture
def page(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    with browser.open(path, width=500, height=300) as page:
        yield page


def test_clicks_and_keys_are_those_of_a_user(page, tmp_path):
    page.click("#press", shift=True)
    assert page.text("#said") == "true true"
    page.click("#word")
    page.type("ab")
    page.press("/")
    page.press("Escape")
    assert page.evaluate("document.getElementById('word').value") == "ab/"
    assert page.text("#said").endswith("/Escape")
    page.set_size(640, 480)
    assert page.screenshot(tmp_path / "page.png").read_bytes()[16:24] == bytes([0, 0, 2, 128, 0, 0, 1, 224])
    assert {"role": "textbox", "name": "word"}.items() <= next(
        node for node in page.accessibility() if node["name"] == "word"
    ).items()
    assert not page.errors
    assert page.fetched == [page.url]


def test_errors_are_reported(page):
    with pytest.raises(RuntimeError, match="nowhere"):
        page.evaluate("nowhere()")
    with pytest.raises(LookupError, match="#absent"):
        page.click("#absent")
    with pytest.raises(TimeoutError, match="1 > 2"):
        page.wait_for("1 > 2", timeout=0.2)
    assert not page.errors
    page.evaluate("console.error('once', 2); setTimeout(() => { throw new Error('later'); })")
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    page.wait_for("true")
    page.settle()
    assert page.errors[0] == "once 2"
    assert any("later" in error for error in page.errors)
    assert any("Content Security Policy" in error for error in page.errors)
