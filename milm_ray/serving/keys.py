"""API keys: made once, kept as digests in a file, looked up at every request.

A key is 32 random bytes, so a plain sha256 of it can be neither guessed nor tabulated; a slow
password hash would only slow every request.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from milm_ray.errors import UserError

log = logging.getLogger("milm_ray")
_PREFIX = "milm_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LOOK_AGAIN_S = 1.0
DEFAULT_FILE = "runs/keys.json"


@dataclass(frozen=True)
class Key:
    """One key as it is kept. requests_per_minute: what it may ask of each app."""

    name: str
    sha256: str
    requests_per_minute: int
    created: str


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def read(path: str | Path) -> list[Key]:
    """The keys of a file; none where there is no file. Raises UserError when it is not ours."""
    try:
        return [Key(**entry) for entry in json.loads(Path(path).read_text("utf-8"))["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the keys file {path} cannot be read: {type(error).__name__}",
            "restore it, or make a new one with `python jobs/keys.py add NAME`",
        ) from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
    temporary.replace(path)


def add(path: str | Path, name: str, requests_per_minute: int = 600) -> str:
    """Make a key and return it: the file gets its digest only, so it cannot be shown again."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a key", "use letters, digits and . _ @ -")
    if requests_per_minute < 1:
        raise UserError(
            "a key must be good for a request a minute at least", "give --rpm 1 or more"
        )
    keys = read(path)
    if any(key.name == name for key in keys):
        raise UserError(
            f"there is a key named {name} already", "remove it first, or choose another"
        )
    secret = _PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _write(Path(path), [*keys, Key(name, _digest(secret), requests_per_minute, created)])
    return secret


def remove(path: str | Path, name: str) -> None:
    """Forget a key: within seconds it opens nothing any more."""
    keys = read(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise UserError(f"there is no key named {name}", "see `python jobs/keys.py list`")
    _write(Path(path), kept)


class KeyRing:
    """The keys of a file as a server sees them: read anew when the file changes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._looked = float("-inf")
        self._keys: dict[str, Key] = {}

    def find(self, secret: str) -> Key | None:
        """Whose key this is, None where it is nobody's."""
        self._refresh()
        return self._keys.get(_digest(secret))

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = now
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp != self._stamp:
                self._keys = {key.sha256: key for key in read(self._path)}
                self._stamp = stamp
        except (OSError, UserError) as error:
            # Closed rather than open: without a readable file nobody is let in.
            if self._keys or self._stamp is None:
                log.error("keys | %s; nobody is let in", error)
            self._keys, self._stamp = {}, (0, 0, 0)


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """`jobs/keys.py`: add, list and remove keys; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", default=DEFAULT_FILE, help=f"default {DEFAULT_FILE}")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a key and print it, once")
    adding.add_argument("name")
    adding.add_argument("--rpm", type=int, default=600, help="requests a minute, default 600")
    commands.add_parser("list", help="names and limits")
    commands.add_parser("remove", help="forget a key").add_argument("name")
    options = parser.parse_args(argv)
    try:
        if options.command == "add":
            print(add(options.file, options.name, options.rpm))
        elif options.command == "remove":
            remove(options.file, options.name)
        else:
            for key in read(options.file):
                print(f"{key.name}\t{key.requests_per_minute} requests a minute\t{key.created}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
