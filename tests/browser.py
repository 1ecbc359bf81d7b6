"""Headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

START_S = 60
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--mute-audio")


@dataclass
class Visit:
    """What a browser did with a page: what it complained about, addresses it asked for besides the page's own and
    `data:`, and the values of the expressions."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def visit(page: Path, *expressions: str) -> Visit:
    """Open a page from disk and evaluate expressions of JavaScript one after the other (promises are awaited); skips
    the test where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: the page cannot be opened in a browser")
    pytest.importorskip("aiohttp", reason="no websocket client: pip install aiohttp")
    with browser(program) as address:
        return asyncio.run(_visit(address, page.resolve().as_uri(), expressions))


@contextlib.contextmanager
def browser(program: str) -> Iterator[str]:
    """Address of a running browser's DevTools."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"], **quiet)
        try:
            port = Path(folder, "DevToolsActivePort")
            end = time.monotonic() + START_S
            while not (port.exists() and port.read_text().count("\n")):
                if process.poll() is not None or time.monotonic() > end:
                    pytest.skip("Chromium does not start here: the page cannot be opened in a browser")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        finally:
            process.terminate()
            process.wait()


async def _visit(address: str, url: str, expressions: tuple[str, ...]) -> Visit:
    import aiohttp

    found = Visit()
    loaded = asyncio.Event()
    answers: dict[int, asyncio.Future[Any]] = {}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{address}/json") as answer:
            target = next(one for one in await answer.json(content_type=None) if one["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def listen() -> None:
                async for message in socket:
                    event = message.json()
                    if "id" in event:
                        answers.pop(event["id"]).set_result(event.get("result", event))
                    elif event["method"] == "Page.loadEventFired":
                        loaded.set()
                    else:
                        _note(found, url, event["method"], event["params"])

            async def send(method: str, **params: Any) -> Any:
                number = len(sent)
                sent.append(method)
                answers[number] = asyncio.get_running_loop().create_future()
                await socket.send_json({"id": number, "method": method, "params": params})
                return await asyncio.wait_for(answers[number], START_S)

            sent: list[str] = []
            listener = asyncio.create_task(listen())
            for domain in ("Runtime", "Log", "Page", "Network"):
                await send(f"{domain}.enable")
            await send("Page.navigate", url=url)
            await asyncio.wait_for(loaded.wait(), START_S)
            for expression in expressions:
                result = await send(
                    "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
                )
                found.values.append(result["result"].get("value"))
            listener.cancel()
    return found


def _note(found: Visit, url: str, method: str, params: dict[str, Any]) -> None:
    if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
        found.complaints.append(str(params)[:500])
    if method == "Network.requestWillBeSent":
        asked = params["request"]["url"]
        if asked != url and not asked.startswith("data:"):
            found.requests.append(asked)
