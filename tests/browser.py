"""A headless Chromium driven over the DevTools protocol: open a page, act on it as a user does, see what went wrong.

    def test_it(browser):                                  # the fixture of tests/conftest.py; skips without Chromium
        with browser.open(path_or_url) as page:
            page.click("#fit")                             # a real mouse click in the middle of the element
            assert page.evaluate("document.title") == "..."
            page.screenshot(tmp_path / "page.png")
            assert not page.errors                         # console errors, exceptions, refusals of the page's CSP
            assert page.fetched == [page.url]              # everything the page asked any server for

One browser serves a whole session of tests; each page is a tab of its own.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
KEYS = {
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Backspace": 8,
}
TEXTS = {"Enter": "\r"}
SHIFT = 8
PATIENCE = 30.0  # seconds for the browser to start, for an answer, for `wait_for`


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One headless browser process with a profile of its own; a context manager."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._process = subprocess.Popen(
            [executable, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._port = self._wait_for_port()

    @property
    def group(self) -> int:
        """The process group that all of the browser's processes belong to."""
        return self._process.pid

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser's processes and remove its profile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=PATIENCE)
        shutil.rmtree(self._profile, ignore_errors=True)

    @contextlib.contextmanager
    def open(
        self,
        address: Path | str,
        width: int = 1280,
        height: int = 800,
        dark: bool = False,
        scale: float = 1.0,
    ) -> Iterator["Page"]:
        """A tab on a file or a URL, loaded; closed at the end of the block."""
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        tab = self._http("PUT", "/json/new?about:blank")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            page = Page(socket, url)
            page.set_size(width, height, scale)
            page.set_dark(dark)
            page.load(url)
            try:
                yield page
            finally:
                page.command("Page.close")

    def _wait_for_port(self) -> int:
        found, deadline = Path(self._profile, "DevToolsActivePort"), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            # Two lines: the port and the path of the browser's own socket.
            if found.exists() and len(lines := found.read_text().splitlines()) == 2:
                return int(lines[0])
            time.sleep(0.05)
        self.close()
        raise TimeoutError(f"Chromium opened no port within {PATIENCE:.0f} s")

    def _http(self, method: str, path: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)


class Page:
    """One tab; `errors` and `fetched` fill as commands are answered (every method sends at least one)."""

    def __init__(self, socket: ClientConnection, url: str) -> None:
        self.url = url
        self.errors: list[str] = []
        self.fetched: list[str] = []
        self._socket, self._last, self._loaded = socket, 0, False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and return its answer."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message.get("result", {})
            self._event(message)
        raise TimeoutError(f"{method} was not answered within {PATIENCE:.0f} s")

    def load(self, url: str) -> None:
        """Go to a URL and wait until it is loaded and painted."""
        self._loaded = False
        self.command("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while not self._loaded:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not load within {PATIENCE:.0f} s")
            self._event(json.loads(self._socket.recv(timeout=PATIENCE)))
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """The value (JSON types) of a JavaScript expression; a promise is awaited, an exception is raised here."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(_exception(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait for two animation frames: what an event changed is then drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait_for(self, expression: str, timeout: float = PATIENCE) -> None:
        """Wait until JavaScript takes the expression for true; TimeoutError names it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.evaluate(f"Boolean({expression})"):
                return
            time.sleep(0.05)
        raise TimeoutError(f"not true within {timeout:.0f} s: {expression}; errors so far: {self.errors}")

    def text(self, selector: str) -> str:
        """The visible text of the first element that fits the selector."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def centre(self, selector: str) -> tuple[float, float]:
        """The middle of the first element that fits, scrolled into view; in CSS pixels of the window."""
        place = self.evaluate(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                if (!found) return null;
                found.scrollIntoView({{ block: "nearest", inline: "nearest" }});
                const box = found.getBoundingClientRect();
                return box.width && box.height ? [box.x + box.width / 2, box.y + box.height / 2] : null;
            }})()"""
        )
        if place is None:
            raise LookupError(f"nothing visible fits {selector!r}")
        return place[0], place[1]

    def click(self, selector: str, shift: bool = False) -> None:
        """Click in the middle of the first element that fits the selector."""
        self.click_at(*self.centre(selector), shift=shift)

    def click_at(self, x: float, y: float, shift: bool = False) -> None:
        """Click at a place of the window, in CSS pixels."""
        held = SHIFT if shift else 0
        self._mouse("mouseMoved", x, y, modifiers=held)
        self._mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1, modifiers=held)
        self._mouse("mouseReleased", x, y, button="left", clickCount=1, modifiers=held)
        self.settle()

    def hover(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._mouse("mouseMoved", x, y)
        self.settle()

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        """Press the left button at one place, move to another in steps, release."""
        self._mouse("mousePressed", *start, button="left", buttons=1, clickCount=1)
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self._mouse("mouseMoved", x, y, button="left", buttons=1)
        self._mouse("mouseReleased", *end, button="left", clickCount=1)
        self.settle()

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the wheel over a place; positive scrolls down."""
        self._mouse("mouseWheel", x, y, deltaX=0, deltaY=delta)
        self.settle()

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key: a name of KEYS, or one character."""
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = TEXTS.get(key, key if len(key) == 1 else "")
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        self.command("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        self.command("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.command("Input.insertText", text=text)
        self.settle()

    def set_value(self, selector: str, value: Any) -> None:
        """Set a slider, a field or a choice, and tell the page as a user's change does."""
        self.evaluate(
            f"""(() => {{
                const field = document.querySelector({json.dumps(selector)});
                field.value = {json.dumps(str(value))};
                for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {{ bubbles: true }}));
            }})()"""
        )
        self.settle()

    def set_size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the tab a size in CSS pixels, and the number of device pixels in one of them."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def set_dark(self, dark: bool) -> None:
        """Prefer the dark or the light colours."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def accessibility(self) -> list[dict[str, Any]]:
        """The page's accessibility tree as a screen reader gets it: role, name and properties of each node."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        return [
            {key: node.get(key, {}).get("value", "") for key in ("role", "name")}
            | {item["name"]: item["value"].get("value") for item in node.get("properties", [])}
            for node in nodes
            if not node.get("ignored")
        ]

    def screenshot(self, path: Path) -> Path:
        """Write what the tab shows as a PNG file; returns its path."""
        data = self.command("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _mouse(self, kind: str, x: float, y: float, **parameters: Any) -> None:
        self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **parameters)

    def _event(self, message: dict[str, Any]) -> None:
        method, content = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(_exception(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "assert"):
            said = (str(item.get("value", item.get("description"))) for item in content["args"])
            self.errors.append(" ".join(said))
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.errors.append(f"{content['entry']['text']} {content['entry'].get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            address = content["request"]["url"]
            if not address.startswith(("data:", "blob:")):
                self.fetched.append(address)


def _exception(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]
