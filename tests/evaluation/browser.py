"""A headless Chromium that opens one page from a file, cut off from every network, and says what became of it.

It is spoken to by the DevTools protocol (chromedevtools.github.io/devtools-protocol), which may look into a page that
forbids scripts, too.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120
NO_NETWORK = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--disable-background-networking")

LOOK = (Path(__file__).parent / "look.js").read_text()


class Size(NamedTuple):
    """How a page is looked at: CSS pixels, on screen or on paper, in which colours."""

    width: int
    media: str = "screen"
    scheme: str = "light"


PHONE, DESK, DARK, PAPER = Size(390), Size(1280), Size(1280, scheme="dark"), Size(718, media="print")


class Page(NamedTuple):
    """What the browser made of the page at one size.

    On a screen all `details` are open, on paper they are as the page has them. `wide`: what reaches out of the page;
    `scrolling`: what is cut until one scrolls in it; `faint`: text of a contrast below 4.5; `small`: below 7.5 pixels.
    """

    width: int
    text: str
    headings: list[str]
    images: int
    broken: list[str]
    wide: list[str]
    scrolling: list[str]
    faint: list[str]
    small: list[str]


class Visit(NamedTuple):
    """The page at each size, what it asked for besides itself, what the browser complained of, and how it prints."""

    pages: dict[Size, Page]
    requests: list[str]
    complaints: list[str]
    pdf: bytes


def needed() -> str:
    """The program; the test is skipped where there is none, but not where CI runs it."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    assert "TRIVIT_REQUIRE_BROWSER" not in os.environ, "CI must have chromium"
    pytest.skip("no chromium here")


def visit(path: Path, sizes: Sequence[Size], pictures: Path | None = None) -> Visit:
    """Open a file and look at it in every size; `pictures`: a folder for a screenshot of each."""
    return asyncio.run(asyncio.wait_for(_visit(path, sizes, pictures), SECONDS))


class _Session:
    """One tab: commands and their answers, and the events in between."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.events, self._next = socket, [], 0

    async def call(self, method: str, **parameters: Any) -> Any:
        self._next += 1
        await self.socket.send_json({"id": self._next, "method": method, "params": parameters})
        while (message := await self.socket.receive_json()).get("id") != self._next:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    async def until(self, method: str) -> None:
        while not any(each.get("method") == method for each in self.events):
            self.events.append(await self.socket.receive_json())


async def _visit(path: Path, sizes: Sequence[Size], pictures: Path | None) -> Visit:
    pages: dict[Size, Page] = {}
    async with _tab(needed()) as tab:
        for domain in ("Network", "Page", "Log", "Runtime", "Audits"):
            await tab.call(f"{domain}.enable")
        await tab.call("Page.navigate", url=path.resolve().as_uri())
        await tab.until("Page.loadEventFired")
        pdf = await tab.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        for size in sorted(sizes, key=lambda each: each.media):  # on paper first, before `details` are opened
            features = [{"name": "prefers-color-scheme", "value": size.scheme}]
            await tab.call("Emulation.setEmulatedMedia", media=size.media, features=features)
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=size.width, height=900, deviceScaleFactor=1,
                mobile=size.width < 500,
            )  # fmt: skip
            answer = await tab.call("Runtime.evaluate", expression=LOOK, returnByValue=True)
            assert "exceptionDetails" not in answer, answer["exceptionDetails"]
            pages[size] = Page(**answer["result"]["value"])
            if pictures:
                shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
                (pictures / f"{'-'.join(map(str, size))}.png").write_bytes(base64.b64decode(shot["data"]))
        return Visit(pages, _requests(tab.events, path), _complaints(tab.events), base64.b64decode(pdf["data"]))


@contextlib.asynccontextmanager
async def _tab(program: str) -> AsyncIterator[_Session]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", *NO_NETWORK, "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            async with aiohttp.ClientSession() as client:
                port = await _port(Path(profile) / "DevToolsActivePort", process)
                async with client.ws_connect(await _place(client, port), max_msg_size=0) as socket:
                    yield _Session(socket)
        finally:
            process.terminate()
            process.wait()


async def _port(told: Path, process: subprocess.Popen[bytes]) -> str:
    while not (told.exists() and told.read_text().count("\n")):
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        await asyncio.sleep(0.05)
    return told.read_text().split("\n")[0]


async def _place(client: aiohttp.ClientSession, port: str) -> str:
    while True:
        async with client.get(f"http://127.0.0.1:{port}/json/list") as answer:
            for each in json.loads(await answer.text()):
                if each["type"] == "page":
                    return str(each["webSocketDebuggerUrl"])
        await asyncio.sleep(0.05)


def _requests(events: Sequence[dict[str, Any]], path: Path) -> list[str]:
    asked = [each["params"]["request"]["url"] for each in events if each.get("method") == "Network.requestWillBeSent"]
    return [url for url in asked if url != path.resolve().as_uri() and not url.startswith("data:")]


def _complaints(events: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for each in events:
        method, about = each.get("method"), each.get("params", {})
        if method == "Log.entryAdded":
            found.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            found.append(about["exceptionDetails"]["text"])
        elif method == "Audits.issueAdded":
            found.append(json.dumps(about["issue"]))
    return found
