"""Headless Chromium by its debugging pipe (the Chrome DevTools protocol): no driver, no download."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60  # seconds; a busy machine takes a while to start it


class Browser:
    """One page of one browser, for the block.

    Attributes:
        errors: what its console said of errors, and exceptions that nobody caught.
        requests: the address of everything that it asked for.
    """

    def __enter__(self):
        self.errors, self.requests, self._count = [], [], 0
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --user-data-dir"
        command = f"exec {CHROMIUM} {options}={self._profile.name} 3<&{read} 4>&{write} > /dev/null 2>&1"
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write))
        os.close(read)
        os.close(write)
        self._buffer, self._session = b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def call(self, method, **parameters):
        """The result of a method of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._await(lambda found: found.get("id") == self._count)["result"]

    def _await(self, wanted):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            while b"\0" not in self._buffer:
                self._buffer += os.read(self._read, 2**16) or b'{"id": 0}\0'
            text, _, self._buffer = self._buffer.partition(b"\0")
            found = json.loads(text)
            self._note(found.get("method"), found.get("params", {}))
            if wanted(found):
                return found
        raise TimeoutError("Chromium does not answer")

    def _note(self, event, parameters):
        if event == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(str(parameters["args"]))
        elif event == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def open(self, address, width=1200, height=900, dark=False):
        """Load a page into a window of that size, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self._await(lambda found: found.get("method") in ("Page.loadEventFired", "Page.navigatedWithinDocument"))

    def value(self, expression):
        """Of a JavaScript expression; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path):
        """Write what the window shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
