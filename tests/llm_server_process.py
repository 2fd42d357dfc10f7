"""Start `tests/llm_server.py` as a process of its own and read its log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

KEY = "test-key-123456"


class ServerProcess:
    """The misbehaving server; options as on its command line, `rate_limited=0.3`."""

    def __init__(self, log: Path, port: int = 0, host: str = "127.0.0.1", **options: Any) -> None:
        self.log = log
        command = [sys.executable, str(Path(__file__).with_name("llm_server.py"))]
        command += ["--log", str(log), "--host", host, "--port", str(port), "--key", KEY]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}"]
            command += [] if value is True else [str(value)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://{host}:{self.port}/v1"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def most(self, answers: int | None) -> None:
        """Give so many answers in all, over restarts too, and let all others wait; None: no limit.

        Set before a job starts, it stands: what a test does to the job then cannot come too late.
        """
        limit = Path(f"{self.log}.most")
        if answers is None:
            limit.unlink(missing_ok=True)
        else:
            new = limit.with_suffix(".new")
            new.write_text(str(answers))
            new.replace(limit)

    def events(self, event: str = "") -> list[dict[str, Any]]:
        """The log's entries, all or those of one event (asked, answered, failed, refused)."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in entries if not event or entry["event"] == event]
