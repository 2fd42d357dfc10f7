"""A Ray cluster of several nodes on this machine, whose nodes a test can kill."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from milm_ray.job import started
from tests.processes import command_of

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
_STORE_BYTES = 80 << 20
# A killed node is noticed in some five seconds, not in twenty.
ENVIRONMENT = {"RAY_health_check_period_ms": "1000", "RAY_USAGE_STATS_ENABLED": "0"}


class Nodes:
    """A head that has no CPUs of its own, as in cluster.yaml, and nodes by name."""

    def __init__(self) -> None:
        # Sockets want a short path; what dies late may still write there.
        self._folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        Path(self._folder.name, "ray").mkdir()
        self._before = dict(os.environ)
        os.environ.update(ENVIRONMENT, RAY_TMPDIR=self._folder.name)
        self._cluster = Cluster()
        head = _started(
            lambda: self._cluster.add_node(
                num_cpus=0, object_store_memory=_STORE_BYTES, include_dashboard=False
            )
        )
        self._nodes: dict[str, Any] = {"head": head}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, *names: str) -> None:
        """Start nodes with one CPU each."""
        for name in names:
            self._nodes[name] = _started(
                lambda name=name: self._cluster.add_node(
                    num_cpus=1, resources={name: 1}, object_store_memory=_STORE_BYTES
                )
            )

    def id(self, name: str) -> str:
        """A node's id with Ray."""
        return str(self._nodes[name].node_id)

    def holds(self, name: str, what: str) -> list[psutil.Process]:
        """The processes of a node in whose command line `what` occurs."""
        return [p for p in self._processes(name) if what in command_of(p)]

    def where(self, what: str) -> str | None:
        """The first node that has a process in whose command line `what` occurs."""
        return next((name for name in self._nodes if self.holds(name, what)), None)

    def kill(self, name: str) -> None:
        """As when the machine goes dark: SIGKILL for the node's raylet and all that it started."""
        lost = self._processes(name)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(lambda: not any(map(_lives, lost)), 60)
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def remove_all(self) -> None:
        for name in set(self._nodes) - {"head"}:
            self.kill(name)

    def close(self) -> None:
        self.remove_all()
        self._cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)
        self._folder.cleanup()

    def _processes(self, name: str) -> list[psutil.Process]:
        (raylet,) = self._nodes[name].all_processes["raylet"]
        try:
            parent = psutil.Process(raylet.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Job:
    """One of jobs/*.py as a driver on a cluster, its output in a file."""

    def __init__(
        self, nodes: Nodes, name: str, *arguments: str | Path, cwd: Path = ROOT, **env: str
    ) -> None:
        self._output = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)],
            cwd=cwd,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": nodes.address, **env},
        )

    def output(self) -> str:
        return Path(self._output.name).read_text(encoding="utf-8")

    def wait_for(self, condition: Callable[[], Any], seconds: float = 600) -> Any:
        """What the condition yields once it holds; the job must still run by then."""
        deadline = time.time() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, f"the job ended before its time\n{self.output()}"
            assert time.time() < deadline, f"waited too long\n{self.output()}"
            time.sleep(0.05)
        return found

    def end(self, code: int = 0, seconds: float = 600) -> str:
        """Wait for the job's end, which must be with this exit code; returns its output."""
        try:
            assert self.process.wait(seconds) == code, self.output()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end\n{self.output()}") from None
        finally:
            self.kill()
        return self.output()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition yields once it holds."""
    deadline = time.time() + seconds
    while not (found := condition()):
        assert time.time() < deadline, "waited too long"
        time.sleep(0.1)
    return found


def ray_node(command: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """`ray start --block`, its output in a file, once the node is up.

    What a start that was given up had already started ends with it.
    """

    def start() -> subprocess.Popen[bytes]:
        with log.open("w") as stream:
            node = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, **options)
        try:
            wait_for(lambda: "--block" in log.read_text() or node.poll() is not None, 300)
        except BaseException:
            node.kill()
            raise
        if node.poll() is not None:
            raise RuntimeError(f"ray start did not come up:\n{log.read_text()}")
        return node

    return started(start, lambda: None)


def wait_for_jobs(address: str) -> None:
    """Until a job server takes jobs: on a node that has just started it may not yet.

    Ray itself waits 10 s for that.
    """
    for _ in range(5):
        done = subprocess.run(
            [RAY, "job", "submit", "--address", address, "--", "true"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
        if "No available agent to submit job" not in done.stdout + done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr


def _started(start: Callable[[], Any]) -> Any:
    """The node that `start` starts: tried again, and nothing left of it, where Ray gives it up."""
    before = set(psutil.Process().children(recursive=True))

    def clear() -> None:
        for process in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    return started(start, clear)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _lives(process: psutil.Process) -> bool:
    """Whether it still does anything; what nobody waits for stays in the table as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
