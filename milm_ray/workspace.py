"""The workspace: where artifacts live, and the manifests by which a stage knows that it is done.

An artifact is a directory (`dialogues/`, `adapters/llama3/`). Its data is written first and its
`manifest.json` last, so an artifact either is whole or does not count. A manifest names what the
artifact was made from; when that still matches, the stage has nothing to do. Re-running the same
command is the way to resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel

from milm_ray.errors import UserError

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp"
_VERSIONS = ("milm_ray", "ray", "torch", "transformers", "peft", "deepspeed", "pyarrow")


def digest(value: Any) -> str:
    """sha256 of a JSON-able value or pydantic model, independent of key order."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    canonical = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def children(filesystem: pafs.FileSystem, directory: str) -> list[pafs.FileInfo]:
    """What lies in a directory; nothing where there is none."""
    try:
        return filesystem.get_file_info(pafs.FileSelector(directory, allow_not_found=True))
    except FileNotFoundError:  # allow_not_found or not: somebody was just making it
        return []


def home_for(workspace: str) -> str:
    """The place a `workspace` setting means.

    A URI or an absolute path is taken as it is. A relative one is relative to the current
    directory, except in a job submitted with --working-dir: that directory is Ray's throw-away
    copy, so the results go under the home directory instead.
    """
    if "://" in workspace or os.path.isabs(workspace):
        return workspace
    here = Path.cwd()
    if "working_dir_files" in here.parts:
        return str(Path.home() / workspace)
    return str(here / workspace)


@dataclass(frozen=True)
class Workspace:
    """Artifacts under one root. `root` is a path on `filesystem`; `uri` is what Ray Data reads."""

    uri: str
    filesystem: pafs.FileSystem
    root: str

    @classmethod
    def open(cls, location: str) -> Workspace:
        """The workspace at a local path or a URI that pyarrow knows (s3://, gs://, hdfs://).

        Creates nothing. Raises UserError when the store is unknown or unreachable, or when the URI
        holds a password: it would show in logs, manifests and the report.
        """
        place = home_for(location)
        if "://" in place and "@" in urlsplit(place).netloc:
            raise UserError(
                f"the workspace's URI holds credentials ({place.split('://')[0]}://…@…)",
                "leave them out and give them as the store's own environment variables, e.g. "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        try:
            if "://" not in place:
                return cls(place, pafs.LocalFileSystem(), place)
            filesystem, root = pafs.FileSystem.from_uri(place)
            filesystem.get_file_info(root)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"the workspace {place} cannot be reached: {error}",
                "check the path or URI and the credentials of its store",
            ) from error
        return cls(place, filesystem, root)

    def path(self, *parts: str) -> str:
        """A path inside the workspace, on `filesystem`."""
        return "/".join((self.root, *parts))

    def uri_of(self, *parts: str) -> str:
        """A place inside the workspace as a path or URI that is good on any node."""
        base, mark, query = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return "/".join((base.rstrip("/"), *parts)) + mark + query

    def local(self, *parts: str) -> Path:
        """A path inside a local or mounted workspace, for libraries that need plain files."""
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            raise UserError(
                f"{'/'.join(parts)} needs a workspace on a mounted path, not {self.uri}",
                "use a local or NFS path for this stage",
            )
        return Path(self.path(*parts))

    def exists(self, *parts: str) -> bool:
        return self.filesystem.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound

    def read_text(self, *parts: str) -> str:
        with self.filesystem.open_input_stream(self.path(*parts)) as stream:
            return stream.read().decode("utf-8")

    def write_text(self, text: str, *parts: str) -> None:
        """Write a small file whole: to a temporary name, then renamed over the old one."""
        self.write_bytes(text.encode("utf-8"), *parts)

    def write_bytes(self, data: bytes, *parts: str) -> None:
        self.write_stream([data], *parts)

    def write_stream(self, pieces: Iterable[bytes], *parts: str) -> None:
        """Write a file piece by piece, seen by others when it is whole."""
        target = self.path(*parts)
        self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        # Two nodes may write the same file, one of them given up for dead.
        temporary = f"{target}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                for piece in pieces:
                    stream.write(piece)
            self.filesystem.move(temporary, target)
        except OSError as error:
            raise _store_error(target, error) from error

    def clear(self, artifact: str) -> None:
        """Remove an artifact: the manifest first, so that a half-removed one never counts."""
        if self.exists(artifact, MANIFEST):
            self.filesystem.delete_file(self.path(artifact, MANIFEST))
        if self.exists(artifact):
            self.filesystem.delete_dir(self.path(artifact))

    def read_table(self, artifact: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a finished Parquet artifact; UserError when no job has made it yet."""
        self.manifest(artifact)
        files = self.parquet_files(artifact)
        return pq.read_table(files, filesystem=self.filesystem, columns=columns)

    def parquet_files(self, artifact: str) -> list[str]:
        """The Parquet files of an artifact, in name order, as paths on `filesystem`."""
        selector = pafs.FileSelector(self.path(artifact), recursive=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.path for info in infos if info.path.endswith(".parquet"))

    def write_table(
        self,
        table: pa.Table,
        artifact: str,
        name: str = "part-0.parquet",
        rows_per_group: int | None = None,
    ) -> None:
        """Write one Parquet file of an artifact, whole or not at all.

        rows_per_group: for tables that are read a few rows at a time; None: pyarrow's million.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group)
        self.write_bytes(sink.getvalue().to_pybytes(), artifact, name)

    def manifest(self, artifact: str) -> dict[str, Any]:
        """The manifest of a finished artifact; UserError when there is none."""
        if not self.exists(artifact, MANIFEST):
            raise UserError(
                f"{artifact}/ is not in the workspace {self.uri}",
                f"run the job that makes it first ({_maker(artifact)})",
            )
        return json.loads(self.read_text(artifact, MANIFEST))

    def fingerprint(self, settings: Any, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What an artifact is made from: its settings and the digests of its inputs."""
        return {"settings": digest(settings), "inputs": dict(inputs or {})}

    def input_digests(self, *artifacts: str) -> dict[str, str]:
        """The content digest of each input artifact, as its manifest states it."""
        return {name: self.manifest(name)["digest"] for name in artifacts}

    def is_done(self, artifact: str, fingerprint: Mapping[str, Any]) -> bool:
        """Whether the artifact is whole and was made from exactly this."""
        if not self.exists(artifact, MANIFEST):
            return False
        return self.manifest(artifact).get("made_from") == json.loads(json.dumps(fingerprint))

    def commit(
        self,
        artifact: str,
        *,
        stage: str,
        settings: Any,
        fingerprint: Mapping[str, Any],
        counts: Mapping[str, Any],
        started: float,
        **facts: Any,
    ) -> dict[str, Any]:
        """Write the manifest that makes an artifact count, and return it.

        counts: rows and rejects by reason; started: time.time() at the stage's start; facts:
        anything else worth tracing (tokens, cost, figures, notes).
        """
        if isinstance(settings, BaseModel):
            settings = settings.model_dump(mode="json")
        self._sweep(artifact)
        manifest = {
            "artifact": artifact,
            "stage": stage,
            "made_from": dict(fingerprint),
            "settings": settings,
            "counts": dict(counts),
            **facts,
            "seconds": round(time.time() - started, 2),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": self._content_digest(artifact),
            "versions": versions(),
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=1, default=str)
        self.write_text(text, artifact, MANIFEST)
        return manifest

    def _sweep(self, artifact: str) -> None:
        """Remove the files that a writer was killed over."""
        selector = pafs.FileSelector(self.path(artifact), recursive=True, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.base_name.endswith(_TEMPORARY):
                self.filesystem.delete_file(info.path)

    def _content_digest(self, artifact: str) -> str:
        """sha256 over the artifact's files (name and content), whatever their order on disk."""
        total = hashlib.sha256()
        selector = pafs.FileSelector(self.path(artifact), recursive=True, allow_not_found=True)
        for info in sorted(self.filesystem.get_file_info(selector), key=lambda i: i.path):
            if info.type != pafs.FileType.File or info.base_name == MANIFEST:
                continue
            total.update(info.path.removeprefix(self.path(artifact)).encode())
            with self.filesystem.open_input_stream(info.path) as stream:
                while chunk := stream.read(1 << 20):
                    total.update(chunk)
        return total.hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _store_error(target: str, error: OSError) -> UserError:
    return UserError(
        f"cannot write {target}: {error}",
        "free space or repair the store, then run the same command again; finished work is kept",
    )


def _maker(artifact: str) -> str:
    makers = {
        "dialogues": "ingest",
        "verdicts": "curate",
        "selection": "curate",
        "mi_dialogues": "transcribe",
        "train": "split",
        "test": "split",
        "test_rounds": "split",
        "adapters": "finetune",
        "predictions": "generate",
        "preference_rounds": "preferences",
        "candidates": "preferences",
        "preferences": "preferences",
        "metrics": "score",
        "sessions": "simulate",
        "packet": "miti",
        "packet_key": "miti",
        "codings": "miti",
        "study": "miti",
    }
    return f"jobs/{makers.get(artifact.split('/')[0], 'pipeline')}.py"
