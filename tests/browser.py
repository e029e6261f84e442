"""A headless Chromium that tests drive over a pipe (Chrome DevTools Protocol), with the standard library alone."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
HOLD = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def pipe():
    """The two ends of a pipe, with numbers above those that Chromium expects its own to have."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends]
    for end in ends:
        os.close(end)
    return high


class Browser:
    """One page of a browser; errors are what its console, its scripts and its content policy complained of."""

    def __init__(self, folder):
        theirs_in, self.out = pipe()
        self.inp, theirs_out = pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(theirs_in), str(theirs_out), FOUND, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.left, self.number, self.session, self.errors, self.loaded = b"", 0, None, [], False
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.inp)
        os.close(self.out)

    def message(self, seconds=60):
        """The next message."""
        end = time.monotonic() + seconds
        while b"\0" not in self.left:
            if not select.select([self.inp], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            got = os.read(self.inp, 1 << 16)
            if not got:
                raise EOFError("the browser has ended")
            self.left += got
        text, self.left = self.left.split(b"\0", 1)
        found = json.loads(text)
        method = found.get("method")
        if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(found["params"]))
        if method == "Runtime.consoleAPICalled" and found["params"]["type"] in ("error", "warning"):
            self.errors.append(json.dumps(found["params"]))
        self.loaded |= method == "Page.loadEventFired"
        return found

    def call(self, method, **told):
        """What a method of the protocol answers."""
        self.number += 1
        wanted = {"id": self.number, "method": method, "params": told}
        if self.session:
            wanted["sessionId"] = self.session
        os.write(self.out, json.dumps(wanted).encode() + b"\0")
        while (found := self.message()).get("id") != self.number:
            pass
        if "error" in found:
            raise RuntimeError(found["error"])
        return found["result"]

    def open(self, path):
        """Open a file and wait until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.message()

    def run(self, script):
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def type(self, text):
        """Type into what has the focus, as a person does."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="char", text=letter)
