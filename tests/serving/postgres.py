"""A real PostgreSQL of the test's own, from the machine's packages."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def _tool(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


INITDB, SERVER = _tool("initdb"), _tool("postgres")
INSTALLED = INITDB is not None and SERVER is not None
_READY = "ready to accept connections"


class Postgres:
    """A server on a loopback port with an empty database; `stop` and `start` are its outages."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="milm-pg-"))
        # The server refuses to run as root.
        self.user: dict[str, str] = {"user": "nobody"} if os.geteuid() == 0 else {}
        if self.user:
            shutil.chown(self.folder, "nobody")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        initdb = [str(INITDB), "-D", str(self.folder / "data"), "-U", "milm", "--auth=trust", "-N"]
        done = subprocess.run(initdb, capture_output=True, text=True, **self.user)
        assert done.returncode == 0, done.stderr
        self.url = f"postgresql://milm@127.0.0.1:{self.port}/postgres"
        self.start()

    def start(self) -> None:
        command = [str(SERVER), "-D", str(self.folder / "data"), "-p", str(self.port)]
        command += ["-h", "127.0.0.1", "-k", str(self.folder), "-c", "shared_buffers=16MB"]
        command += ["-c", "lc_messages=C"]
        before = self._log().count(_READY)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **self.user)
        # Its port answers before, while it still goes through what a crash has left.
        deadline = time.time() + 300
        while self._log().count(_READY) == before:
            assert self.process.poll() is None, self._log()
            assert time.time() < deadline, f"PostgreSQL did not start\n{self._log()}"
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT: at once, without goodbye, as in a crash of the server."""
        self.process.send_signal(how)
        self.process.wait(120)

    def _log(self) -> str:
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
