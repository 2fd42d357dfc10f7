"""What the tests ask of processes that may end while they are looked at."""

from __future__ import annotations

import psutil


def command_of(process: psutil.Process) -> str:
    """Its command line; "" once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie is one too
        return ""
