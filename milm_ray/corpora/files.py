"""Raw corpora on disk or in a cloud store: what is there, and its bytes in chunks of work.

A location is a directory, a file, or an archive (.tar, .tar.gz, .tar.xz, .tar.bz2, .zip), local or
a URI that pyarrow knows (s3://, gs://, hdfs://). The driver lists names only. A chunk is what one
task reads: some files, some members of a zip, or a *segment*, the contents of a run of a tar's
members. Chunks depend on the files alone, never on the number of workers.
"""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import pyarrow as pa
import pyarrow.fs as pafs

from milm_ray.corpora.reading import Reader, Unusable
from milm_ray.corpora.tars import inflated, members

FILES_PER_CHUNK = 1000
BYTES_PER_CHUNK = 16 << 20  # of a tar stream or of listed files: about 1,700 SmileChat dialogues
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_BROKEN = (
    EOFError,
    OSError,
    lzma.LZMAError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    pa.ArrowInvalid,  # a seek before the start of a file that is too short
)


@dataclass(frozen=True)
class Found:
    """One file of a location: its path on the location's filesystem, bytes, modification time."""

    path: str
    size: int
    modified: str


@dataclass(frozen=True)
class Listing:
    """The files of a location that a reader will read, in natural order, and how many it ignores.

    files: plain files; archives: tars and zips, read after the plain files.
    """

    location: str
    files: list[Found]
    archives: list[Found]
    ignored: int

    @property
    def size(self) -> int:
        return sum(found.size for found in (*self.files, *self.archives))

    def state(self) -> list[tuple[str, int, str]]:
        """What changes when the raw files do: paths, sizes and modification times."""
        return [(f.path, f.size, f.modified) for f in (*self.files, *self.archives)]


@dataclass(frozen=True)
class Chunk:
    """Work for one task. part: its name, in output order.

    kind: files (names: paths), zip (names: its path, members), tar (names: its path), segment
    (names: members; data: their contents one after the other, sizes: bytes of each) or broken.
    """

    corpus: str
    part: str
    kind: str
    location: str
    names: Sequence[str]
    limit: int | None = None
    data: bytes = b""
    sizes: Sequence[int] = ()

    def row(self) -> dict[str, bytes]:
        """The chunk as a row that travels: one column, so that all kinds have one schema."""
        return {"chunk": pickle.dumps(self)}

    @staticmethod
    def of(row: Mapping[str, bytes]) -> Chunk:
        chunk = pickle.loads(row["chunk"])
        assert isinstance(chunk, Chunk)
        return chunk


def open_location(location: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path on it. A local path becomes absolute.

    Raises OSError or pyarrow.ArrowInvalid for a store that is unknown or unreachable.
    """
    if "://" in location:
        return pafs.FileSystem.from_uri(location)
    return pafs.LocalFileSystem(), os.path.abspath(location)


def list_location(location: str, reader: Reader, limit: int | None = None) -> Listing:
    """What `reader` will read at a location. Names only; nothing is opened but zip directories.

    Raises FileNotFoundError when nothing is there; other OSErrors when it cannot be reached.
    """
    filesystem, path = open_location(location)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(f"no such file or directory: {location}")
    if info.type == pafs.FileType.File:
        found = [_found(info)]
        archives = found if _is_archive(path) else []
        return Listing(location, [] if archives else found, archives, 0)
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    everything = [
        _found(info) for info in infos if info.type == pafs.FileType.File and _visible(info.path)
    ]
    everything.sort(key=lambda found: natural_key(found.path))
    archives = [found for found in everything if _is_archive(found.path)]
    plain = [found for found in everything if not _is_archive(found.path)]
    pattern = best_pattern((found.path for found in plain), reader)
    files = [found for found in plain if wanted(found.path, pattern)]
    ignored = len(everything) - len(files) - len(archives)
    if limit is not None and reader.one_per_file:
        files = files[:limit]
        if len(files) >= limit:
            archives = []
    return Listing(location, files, archives, ignored)


def chunks(listing: Listing, reader: Reader, limit: int | None) -> list[Chunk]:
    """The listing as chunks in output order; a tar is one chunk until `cut` has read it."""
    made: list[Chunk] = []

    def add(kind: str, source: int, number: int, names: Sequence[str]) -> None:
        part = f"{reader.name}-{source:03d}-{number:05d}"
        made.append(Chunk(reader.name, part, kind, listing.location, names, limit))

    for number, names in enumerate(_batches(listing.files)):
        add("files", 0, number, names)
    for source, archive in enumerate(listing.archives, 1):
        add("zip" if archive.path.endswith(".zip") else "tar", source, 0, [archive.path])
    return made


def cut(chunk: Chunk, reader: Reader) -> Iterator[Chunk]:
    """A tar as segments, a zip as groups of members; any other chunk as it is.

    A broken archive gives what comes before the break and then a chunk of kind "broken".
    """
    if chunk.kind == "zip":
        yield from _cut_zip(chunk, reader)
    elif chunk.kind == "tar":
        yield from _cut_tar(chunk, reader)
    else:
        yield chunk


def contents(chunk: Chunk, reader: Reader) -> Iterator[tuple[str, bytes | Unusable]]:
    """(name, bytes) of each file in a chunk that `cut` has yielded, or why it cannot be read."""
    if chunk.kind == "broken":
        yield chunk.names[0], Unusable("broken_archive", chunk.data.decode())
    elif chunk.kind == "segment":
        start = 0
        for name, size in zip(chunk.names, chunk.sizes, strict=True):
            yield _unzipped(name, chunk.data[start : start + size])
            start += size
    elif chunk.kind == "zip":
        yield from _zip_contents(chunk)
    else:
        filesystem, _ = open_location(chunk.location)
        for path in chunk.names:
            try:
                with filesystem.open_input_stream(path, compression=None) as stream:
                    data = stream.read()
            except OSError as error:
                yield path, Unusable("unreadable", str(error))
            else:
                yield _unzipped(path, data)


def best_pattern(names: Iterable[str], reader: Reader) -> str:
    """The first of the reader's patterns that any of the names fits; "" where none does.

    A folder and an archive of it so give the same corpus.
    """
    best = len(reader.patterns)
    for name in names:
        better = (n for n, pattern in enumerate(reader.patterns[:best]) if wanted(name, pattern))
        best = next(better, best)
        if best == 0:
            break
    return (*reader.patterns, "")[best]


def wanted(name: str, pattern: str) -> bool:
    """Whether a file or a member of an archive is one of the corpus."""
    return _visible(name) and fnmatch(_base(name), pattern)


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts case_2 before case_10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]


def _unzipped(name: str, data: bytes) -> tuple[str, bytes | Unusable]:
    if not name.endswith(".gz"):
        return name, data
    try:
        return name, gzip.decompress(data)
    except _BROKEN as error:
        return name, Unusable("broken_archive", f"not a whole gzip file: {error}")


def _cut_zip(chunk: Chunk, reader: Reader) -> Iterator[Chunk]:
    filesystem, _ = open_location(chunk.location)
    try:
        with (
            filesystem.open_input_file(chunk.names[0]) as file,
            zipfile.ZipFile(file) as archive,
        ):
            infos = [info for info in archive.infolist() if not info.is_dir()]
            pattern = best_pattern((info.filename for info in infos), reader)
            found = [
                Found(info.filename, info.file_size, "")
                for info in infos
                if wanted(info.filename, pattern)
            ]
    except _BROKEN as error:
        yield _broken(chunk, 0, error)
        return
    found.sort(key=lambda item: natural_key(item.path))
    if chunk.limit is not None and reader.one_per_file:
        found = found[: chunk.limit]
    for number, names in enumerate(_batches(found)):
        yield replace(chunk, part=_numbered(chunk, number), names=[chunk.names[0], *names])


def _zip_contents(chunk: Chunk) -> Iterator[tuple[str, bytes | Unusable]]:
    filesystem, _ = open_location(chunk.location)
    path, *names = chunk.names
    with filesystem.open_input_file(path) as file, zipfile.ZipFile(file) as archive:
        for name in names:
            try:
                data = archive.read(name)
            except (*_BROKEN, RuntimeError, NotImplementedError) as error:  # a password, a codec
                yield name, Unusable("broken_archive", f"{_base(path)}: {error}")
            else:
                yield _unzipped(name, data)


def _cut_tar(chunk: Chunk, reader: Reader) -> Iterator[Chunk]:
    """Segments of about BYTES_PER_CHUNK; decompressing is the one thing one task must do alone."""
    pattern = best_pattern(_names(chunk), reader)
    limit = chunk.limit if reader.one_per_file else None
    number, files = 0, 0
    names: list[str] = []
    pending: list[bytes] = []

    def segment() -> Chunk:
        part, sizes = _numbered(chunk, number), [len(data) for data in pending]
        return replace(
            chunk, kind="segment", part=part, names=names, sizes=sizes, data=b"".join(pending)
        )

    failure: Exception | None = None
    try:
        with _opened(chunk) as opened:
            size = 0
            for name, data in opened:
                if not wanted(name, pattern):
                    continue
                names.append(name)
                pending.append(data)
                files, size = files + 1, size + len(data)
                if files == limit:
                    break
                if size >= BYTES_PER_CHUNK:
                    yield segment()
                    number, size, names, pending = number + 1, 0, [], []
    except _BROKEN as error:
        failure = error
    if names:
        yield segment()
        number += 1
    if failure:
        yield _broken(chunk, number, failure)


def _names(chunk: Chunk) -> Iterator[str]:
    """The names of a tar's members, up to where it breaks off if it does.

    Most readers find their best pattern in the first one, and need no second pass.
    """
    with suppress(*_BROKEN), _opened(chunk) as opened:
        for name, _ in opened:
            yield name


@contextmanager
def _opened(chunk: Chunk) -> Iterator[Iterator[tuple[str, bytes]]]:
    filesystem, _ = open_location(chunk.location)
    path = chunk.names[0]
    with (
        filesystem.open_input_stream(path, compression=None) as raw,
        inflated(raw, path) as tar,
    ):
        yield members(tar)


def _broken(chunk: Chunk, number: int, error: Exception) -> Chunk:
    detail = f"{type(error).__name__}: {error}"
    return replace(chunk, kind="broken", part=_numbered(chunk, number), data=detail.encode())


def _numbered(chunk: Chunk, number: int) -> str:
    return f"{chunk.part.rsplit('-', 1)[0]}-{number:05d}"


def _batches(files: Sequence[Found]) -> Iterator[list[str]]:
    """Paths in groups bounded by number and by bytes."""
    names: list[str] = []
    size = 0
    for found in files:
        if names and (len(names) >= FILES_PER_CHUNK or size + found.size > BYTES_PER_CHUNK):
            yield names
            names, size = [], 0
        names.append(found.path)
        size += found.size
    if names:
        yield names


def _found(info: pa.fs.FileInfo) -> Found:
    return Found(info.path, info.size or 0, str(info.mtime_ns or ""))


def _is_archive(path: str) -> bool:
    return path.endswith((*_TARS, ".zip"))


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _visible(path: str) -> bool:
    """Not a hidden file and not the copy of one that macOS puts into archives."""
    return not _base(path).startswith(".") and "__MACOSX/" not in path
