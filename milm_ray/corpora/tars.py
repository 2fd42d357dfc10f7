"""A tar's members as a stream, in a tenth of the time that tarfile's own stream takes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

_BLOCK = 512  # a tar's unit
_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def members(tar: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each regular file of a tar stream.

    Raises EOFError where the tar breaks off, and tarfile.TarError where it is none.
    """
    extended = b""  # headers that say more about the next member, such as its long name
    first = True
    while True:
        header = tar.read(_BLOCK)
        if first and not header:
            raise EOFError("the archive is empty")
        first = False
        if 0 < len(header) < _BLOCK:
            raise EOFError("the archive ends inside a header")
        if not header.strip(b"\0"):
            return
        info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        stored = info.isreg() or info.type in _EXTENDED or info.type == tarfile.XGLTYPE
        padded = -(-info.size // _BLOCK) * _BLOCK if stored else 0
        data = tar.read(padded)
        if len(data) < min(padded, info.size):
            raise EOFError(f"the archive ends inside {info.name}")
        if info.type in _EXTENDED:
            extended += header + data
            continue
        if info.isreg():
            name = _full_name(extended + header + data) if extended else info.name
            yield name, data[: info.size]
        extended = b""


def _full_name(member: bytes) -> str:
    with tarfile.open(fileobj=io.BytesIO(member), mode="r:") as archive:
        info = archive.next()
    return info.name if info else ""


def inflated(raw: Any, path: str) -> Any:
    """A tar's byte stream, decompressed by its name's ending."""
    if path.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if path.endswith(("gz", ".tgz")):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".bz2"):
        return bz2.BZ2File(raw)
    return io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
