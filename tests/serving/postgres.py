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
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, **self.user)
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError("PostgreSQL did not start")

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT: at once, without goodbye, as in a crash of the server."""
        self.process.send_signal(how)
        self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
