"""A cluster whose nodes have addresses of their own, and a network between them that can break.

Each node is a network namespace on a bridge. Where that is not allowed (no CAP_NET_ADMIN), nodes
have loopback addresses, and a node whose link is cut is one whose processes are all stopped: to the
others both look the same, nothing comes from it any more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.cluster import ENVIRONMENT, RAY, free_port, ray_node
from tests.processes import command_of

_NODE = {
    **ENVIRONMENT,
    # A node that is silent is given up after some ten seconds, not after a minute.
    "RAY_health_check_timeout_ms": "2500",
    # A job that is told to stop has the time to say so on any machine.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    "RAY_AUTH_MODE": "token",
}


class Network:
    """A head and nodes; `host` is this machine's address as the nodes see it."""

    def __init__(self) -> None:
        self._tag = f"milm{os.getpid() % 100_000}"
        self._net = f"10.203.{os.getpid() % 250}"
        # Sockets want a short path; what dies late may still write there.
        self._folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        self._names: list[str] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        probe = f"{self._tag}-probe"
        self.isolated = (
            _ip("netns", "add", probe)
            and _ip("netns", "exec", probe, "true")
            and _ip("link", "add", self._tag, "type", "bridge")
        )
        _ip("netns", "del", probe)
        self.host = "127.0.0.1"
        if self.isolated:
            self.host = f"{self._net}.1"
            _must("addr", "add", f"{self.host}/24", "dev", self._tag)
            _must("link", "set", self._tag, "up")
        self._dashboard = free_port()

    @property
    def dashboard(self) -> str:
        return f"http://{self.address('head')}:{self._dashboard}"

    def address(self, name: str) -> str:
        number = 10 + self._names.index(name)
        return f"{self._net}.{number}" if self.isolated else f"127.0.0.{number}"

    def start_head(self) -> None:
        self._start(
            "head",
            *("--head", "--num-cpus=0", "--port=6380", f"--ray-client-server-port={free_port()}"),
            *("--dashboard-host={}", f"--dashboard-port={self._dashboard}"),
            f"--temp-dir={self._folder.name}",
        )

    def start_node(self, name: str) -> None:
        self._start(name, "--num-cpus=1", f"--address={self.address('head')}:6380")

    def holds(self, name: str, what: str) -> bool:
        """Whether a node has a process in whose command line `what` occurs."""
        return any(what in command_of(process) for process in self._processes(name))

    def cut(self, name: str) -> None:
        """Let nothing through to a node any more, nor from it."""
        if self.isolated:
            _must("link", "set", self._outer(name), "down")
        else:
            for process in self._processes(name):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        for name, node in self._nodes.items():
            for process in self._processes(name):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait(30)
        for name in self._names:
            if self.isolated:
                _ip("netns", "del", self._inner(name))
        _ip("link", "del", self._tag)
        self._folder.cleanup()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _inner(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _outer(self, name: str) -> str:
        """The bridge's end of a node's link; the kernel allows fifteen characters."""
        return f"{self._tag}v{self._names.index(name)}"

    def _start(self, name: str, *options: str) -> None:
        self._names.append(name)
        command = []
        if self.isolated:
            self._lay_link(name)
            command = ["ip", "netns", "exec", self._inner(name)]
        own = self.address(name)
        log = Path(self._folder.name, f"{name}.log")
        self._nodes[name] = ray_node(
            [
                *(*command, RAY, "start", "--block", "--disable-usage-stats"),
                *(f"--node-ip-address={own}", "--object-store-memory=80000000"),
                *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"),
                *("--min-worker-port=0", "--max-worker-port=0"),
                *(option.format(own) for option in options),
            ],
            log,
            env={**os.environ, **_NODE},
        )

    def _lay_link(self, name: str) -> None:
        inner, outer = self._inner(name), self._outer(name)
        _must("netns", "add", inner)
        _must("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", inner)
        _must("link", "set", outer, "master", self._tag, "up")
        _must("-n", inner, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _must("-n", inner, "link", "set", "eth0", "up")
        _must("-n", inner, "link", "set", "lo", "up")

    def _processes(self, name: str) -> list[psutil.Process]:
        if self.isolated:
            done = subprocess.run(
                ["ip", "netns", "pids", self._inner(name)],
                capture_output=True,
                text=True,
                check=True,
            )
            pids = [int(pid) for pid in done.stdout.split()]
        else:
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(self._nodes[name].pid)
                return [own, *own.children(recursive=True)]
            pids = []
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found


def _ip(*arguments: str) -> bool:
    """Run ip(8); whether it did what was asked."""
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _must(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
