"""A headless Chromium, driven by the DevTools protocol: open a page, type, click, wait for words, list what it asked for."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=1100,900",
)
PATIENCE_SECONDS = 60


def chromium() -> str:
    """The program. Skips a test where there is none."""
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with an empty profile of its own; ended with the block."""
    import websocket

    words = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20) as answer:
            tabs = json.load(answer)
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        socket = websocket.create_connection(address, timeout=PATIENCE_SECONDS)
        try:
            yield Browser(socket)
        finally:
            socket.close()
    finally:
        process.terminate()
        process.wait(20)


def _port(file: Path, process: subprocess.Popen) -> str:
    """The one that Chromium chose: it writes it into its profile."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, "Chromium ended"
        if file.is_file() and (lines := file.read_text().split()):
            return lines[0]
        time.sleep(0.05)
    raise AssertionError("Chromium opened no port")


class Browser:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.requests: list[str] = []
        self.ask("Page.enable")
        self.ask("Network.enable")

    def ask(self, method: str, **told: Any) -> dict[str, Any]:
        """The result of one method of the protocol; what the page requests in the meantime is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": told}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Network.webSocketCreated":
                self.requests.append(answer["params"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, *, what: str) -> None:
        """Until a script in the page is true."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"{what} did not come: {self.words()[-2000:]}"
            time.sleep(0.1)

    def open(self, address: str, *, words: str) -> None:
        """Goes there, waits for words on the page, and until it asks for nothing more: then its buttons work."""
        self.ask("Page.navigate", url=address)
        self.wait_for(words)
        seen = -1
        while len(self.requests) > seen:
            seen = len(self.requests)
            time.sleep(1.0)
            self.words()

    def words(self) -> str:
        """What can be read on the page."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_for(self, words: str) -> None:
        """Until they can be read."""
        script = f"document.body && document.body.innerText.includes({json.dumps(words)})"
        self.wait(script, what=words)

    def click(self, role: str, words: str) -> None:
        """A button or tab that can be seen, by its words, with the mouse."""
        script = f"""(() => {{
          const all = [...document.querySelectorAll({json.dumps(role)})];
          const one = all.find(e => e.innerText.trim() === {json.dumps(words)} && e.offsetParent);
          if (!one) return null;
          one.scrollIntoView({{block: 'center'}});
          const box = one.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        self.wait(f"{script} !== null", what=f"{role} {words}")
        x, y = self.run(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, label: str, text: str) -> None:
        """Into the text field with a label, in place of what it holds, as a keyboard would."""
        script = f"""(() => {{
          const all = [...document.querySelectorAll('label')].filter(e => e.offsetParent);
          const one = all.find(e => e.innerText.trim() === {json.dumps(label)});
          const field = one && one.querySelector('textarea, input');
          if (!field) return false;
          field.focus(); field.select();
          return true;
        }})()"""
        self.wait(script, what=f"a field {label}")
        self.ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """A PNG of all of the page."""
        told = {"format": "png", "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", **told)["data"]))
