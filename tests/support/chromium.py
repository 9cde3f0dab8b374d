"""A headless Chromium driven through chromedriver by plain WebDriver requests; nothing to install with pip."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium and chromedriver here: apt-get install -y chromium chromium-driver"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
]


class Page:
    """One tab. Every request of the page is refused but those to files, and what the console says is kept."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"binary": BROWSER, "args": [*FLAGS, "--window-size=1240,1000"]}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.request("/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.base += f"/session/{session['sessionId']}"
        self.request("/timeouts", {"script": 60_000, "pageLoad": 60_000})

    def request(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """One WebDriver command; returns its value."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=90) as answer:
            return json.loads(answer.read())["value"]

    def command(self, name: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self.request("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, path: Path, scheme: str = "light") -> None:
        """Load a file with the colour scheme `light` or `dark`, cut off from the network."""
        self.command("Network.enable")
        self.command(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)
        self.request("/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that ends in `return …`."""
        return self.request("/execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str, *arguments: Any) -> Any:
        """The value that a script hands to its last argument, a callback."""
        return self.request("/execute/async", {"script": script, "args": arguments})

    def console(self) -> list[str]:
        """What the console said since the last call, warnings and errors."""
        found = self.request("/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Save a picture of the page, or of what is in view."""
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.command("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", **options)["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A browser for as long as the block runs. What it leaves in the folder for temporary files goes with it."""
    assert DRIVER
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its path is short enough for sockets
        environment = {**os.environ, "TMPDIR": folder}
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        driver = subprocess.Popen([DRIVER, "--port=0"], env=environment, stdout=pipe, stderr=nowhere, text=True)
        try:
            page = Page(_port(driver))
            try:
                yield page
            finally:
                page.request("", method="DELETE")
        finally:
            driver.terminate()
            driver.wait(60)


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout
    deadline = time.monotonic() + 30
    for line in driver.stdout:  # "ChromeDriver was started successfully on port 38291."
        if "successfully on port" in line:
            return int(line.rsplit("port", 1)[1].strip(" .\n"))
        assert time.monotonic() < deadline, "chromedriver does not start"
    raise AssertionError("chromedriver ended at once")
