"""The reply store: every reply that was ever paid for, kept from the moment it arrives.

Each writing process appends to a file of its own under `replies/`, so writers never meet; a line
cut off by a crash is ignored. The index holds 64-character keys and places, not texts, so that a
store of a million replies fits in memory. On an object store, where nothing can be appended, every
flush is one small object.

Recorded replies are read beside it: stores written elsewhere, or plain rows of
{corpus, source_id, prompt, reply} that are matched by these three names.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.replies import Reply, Subject, sampling, storable
from milm_ray.workspace import Workspace, children

FOLDER = "replies"
_RESERVE = ".reserve"
_RESERVED_BYTES = 1 << 20
_KEY_START = b'{"key": "'
_KEY_END = len(_KEY_START) + 64


class _Source:
    """One file of replies: bytes up to `consumed` are in the index."""

    def __init__(self, path: str, content: bytes | None = None) -> None:
        self.path = path
        self.content = content  # None: a local plain file, read where it lies
        self.consumed = 0

    def unread(self) -> Iterator[bytes]:
        """The whole lines not indexed yet; a last line without its newline is left for later."""
        with self._open() as stream:
            stream.seek(self.consumed)
            for line in stream:
                if line.endswith(b"\n"):
                    yield line

    def line(self, start: int, length: int) -> bytes:
        with self._open() as stream:
            stream.seek(start)
            return stream.read(length)

    def _open(self) -> IO[bytes]:
        return io.BytesIO(self.content) if self.content is not None else open(self.path, "rb")


class ReplyStore:
    """Replies by key. Reading and writing are safe from several threads of one process."""

    def __init__(self, workspace: Workspace, recorded: Sequence[str] = ()) -> None:
        """Open the workspace's own store and index it; `recorded` are files or folders beside it.

        Writes nothing until a reply is put. Raises UserError for a recorded file that cannot be
        read.
        """
        self._workspace = workspace
        self._is_local = isinstance(workspace.filesystem, pafs.LocalFileSystem)
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._objects = 0
        self._descriptor: int | None = None
        self._reserve: int | None = None
        self.full = ""  # why nothing more should be asked for
        self._lock = threading.Lock()
        self._sources: dict[str, _Source] = {}
        self._index: dict[bytes, tuple[_Source, int, int]] = {}
        self._named: dict[Subject, Reply] = {}
        for place in recorded:
            for path in _recorded_files(place):
                self._load_recorded(path)
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: str, subject: Subject | None = None) -> Reply | None:
        """The reply to a request, or None. `subject` lets a recorded reply be found by name."""
        place = self._index.get(bytes.fromhex(key))
        if place is not None:
            source, start, length = place
            return Reply.from_line(source.line(start, length))
        named = self._named.get(subject) if subject is not None else None
        if named is None:
            return None
        return Reply(**{**vars(named), "key": key})

    def refresh(self) -> None:
        """Index what other writers have appended since the last look."""
        with self._lock:
            for path in self._files():
                source = self._sources.get(path)
                if source is None:
                    content = None if self._is_local else self._fetch(path)
                    source = self._sources[path] = _Source(path, content)
                self._add_lines(source)

    def put(self, replies: Sequence[Reply]) -> None:
        """Append replies durably: when this returns they survive a crash of the process or machine.

        On a full disk the space held back by `prepare` takes the replies that are under way, and
        `full` says why no more should be asked for. Raises UserError when even that is not enough,
        or the store cannot be reached.
        """
        data = b"".join(reply.line() for reply in replies)
        with self._lock:
            try:
                path = self._append(data) if self._is_local else self._write_object(data)
            except OSError as error:
                raise self._unwritable(str(error)) from error
            source = self._sources.get(path)
            if source is None:
                content = None if self._is_local else data
                source = self._sources[path] = _Source(path, content)
            self._add_lines(source)

    def prepare(self) -> None:
        """Make sure that a reply could be kept, before it is asked and paid for.

        Holds back some space on the disk until `release`, so that replies under way still fit when
        it fills up. Raises UserError when the store cannot be written or is full.
        """
        if self.full:
            raise self._unwritable(self.full)
        if not self._is_local or self._reserve is not None:
            return
        folder = self._workspace.path(FOLDER)
        try:
            os.makedirs(folder, exist_ok=True)
            _clear_reserves(folder)
            path = f"{folder}/{self._writer}{_RESERVE}"
            self._reserve = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._reserve, fcntl.LOCK_EX)
            os.posix_fallocate(self._reserve, 0, _RESERVED_BYTES)
        except OSError as error:
            self.release()
            raise self._unwritable(str(error)) from error

    def release(self) -> None:
        """Give the space held back by `prepare` free."""
        if self._reserve is not None:
            Path(self._workspace.path(FOLDER, f"{self._writer}{_RESERVE}")).unlink(missing_ok=True)
            os.close(self._reserve)
            self._reserve = None

    def _unwritable(self, why: str) -> UserError:
        return UserError(
            f"replies cannot be written to {self._workspace.path(FOLDER)}: {why}",
            "free space or repair the store and run the same command again; "
            "every reply written before is kept and not asked for again",
        )

    def _files(self) -> list[str]:
        infos = children(self._workspace.filesystem, self._workspace.path(FOLDER))
        return sorted(
            info.path
            for info in infos
            if info.path.endswith(".jsonl")
            and (info.path not in self._sources or self._sources[info.path].consumed != info.size)
        )

    def _fetch(self, path: str) -> bytes:
        with self._workspace.filesystem.open_input_stream(path) as stream:
            return stream.read()

    def _add_lines(self, source: _Source) -> None:
        start = source.consumed
        for line in source.unread():
            if line.startswith(_KEY_START) and line.endswith(b"}\n"):
                try:
                    key = bytes.fromhex(line[len(_KEY_START) : _KEY_END].decode())
                    self._index[key] = (source, start, len(line))
                except ValueError:
                    pass  # a damaged line is as good as a reply that never came
            start += len(line)
        source.consumed = start

    def _append(self, data: bytes) -> str:
        path = self._workspace.path(FOLDER, f"{self._writer}.jsonl")
        if self._descriptor is None:
            folder = self._workspace.path(FOLDER)
            os.makedirs(folder, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(path, flags, 0o644)
            _sync_folder(folder)
        try:
            _append(self._descriptor, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.full:
                raise
            self.full = str(error)
            self.release()
            _append(self._descriptor, data)
        return path

    def _write_object(self, data: bytes) -> str:
        self._objects += 1
        path = self._workspace.path(FOLDER, f"{self._writer}-{self._objects:06d}.jsonl")
        self._workspace.filesystem.create_dir(self._workspace.path(FOLDER), recursive=True)
        with self._workspace.filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return path

    def _load_recorded(self, path: Path) -> None:
        source = _Source(str(path), _read(path))
        if source.content and not source.content.endswith(b"\n"):
            source.content += b"\n"
        if (source.content or b"").startswith(_KEY_START):
            self._add_lines(source)
            return
        for number, row in _rows(source.content or b"", path):
            try:
                subject = Subject(corpus_key(row["corpus"]), str(row["source_id"]), row["prompt"])
                text = storable(row["reply"])
            except (KeyError, TypeError, AttributeError):
                raise _not_recorded(path, number) from None
            self._named[subject] = Reply(
                key="", text=text, finish_reason="recorded", subject=subject
            )


def answered_by(settings: LLMSection) -> dict[str, Any]:
    """Who answers, for a fingerprint: model, sampling and the content of recorded replies."""
    content = hashlib.sha256()
    for place in settings.recorded:
        for path in _recorded_files(place):
            content.update(_read(path))
    recorded = {"recorded": content.hexdigest()} if settings.recorded else {}
    return {"model": settings.model, **sampling(settings), **recorded}


def corpus_key(name: str) -> str:
    """A corpus's published name in the spelling of the configuration: Psy-Insight, psy_insight."""
    return name.strip().lower().replace("-", "_")


def _recorded_files(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz"))]
        return sorted(found)
    return [path]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise UserError(
            f"the recorded replies {path} cannot be read: {error}",
            "correct the path under `recorded:` in the configuration",
        ) from error


def _rows(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    lines: Iterable[bytes] = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise _not_recorded(path, number) from None
        yield number, row


def _not_recorded(path: Path, number: int) -> UserError:
    return UserError(
        f"{path}, line {number}: not a recorded reply",
        "each line is a JSON object with corpus, source_id, prompt and reply, "
        "or a line of another workspace's replies/",
    )


def _clear_reserves(folder: str) -> None:
    """Remove what killed writers held back; a living one has its file locked."""
    for path in Path(folder).glob(f"*{_RESERVE}"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def _append(descriptor: int, data: bytes) -> None:
    """Write all of it and sync, or leave the file as it was."""
    before = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)  # no half line ahead of later ones
        raise


def _sync_folder(folder: str) -> None:
    """Make a new file's name durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
