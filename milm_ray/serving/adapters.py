"""Adapters by id: `model:adapter`, found under one root, fetched when a replica first needs one.

`<root>/<model>/` is the adapter `mi`, the one that finetune writes; `<root>/<model>/<name>/` is the
adapter `<name>`. A directory is an adapter once it holds adapter_config.json and its weights. The
root is a local or shared path, or a URI that pyarrow knows (s3://, gs://, hdfs://).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from milm_ray.errors import UserError
from milm_ray.workspace import children

DEFAULT_ADAPTER = "mi"
CONFIG = "adapter_config.json"
CHAT_FORMAT = "chat_template.jinja"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Adapter:
    """One adapter as it lies in the store now. `version` changes when its files do."""

    model: str
    name: str
    path: str
    version: str

    @property
    def public_id(self) -> str:
        return f"{self.model}:{self.name}"

    @property
    def key(self) -> str:
        """The name an engine knows it by: an adapter trained anew is another one."""
        return f"{self.public_id}:{self.version}"


def split_id(model_id: str) -> tuple[str, str | None]:
    """`model:adapter` → (model, adapter); `model` → (model, None)."""
    model, separator, adapter = model_id.partition(":")
    return model, adapter if separator else None


class AdapterStore:
    """The adapters under one root. Every look goes to the store, so a new adapter is seen at once.

    Raises UserError when the root names a store that is unknown or unreachable.
    """

    def __init__(self, root: str, cache: str | None = None) -> None:
        self.root = root.rstrip("/")
        self._cache = cache
        try:
            if "://" in root:
                self._fs, self._base = pafs.FileSystem.from_uri(self.root)
            else:
                self._fs, self._base = pafs.LocalFileSystem(), self.root
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"the adapters' root {root} cannot be reached: {error}",
                "check adapters_root and the credentials of its store",
            ) from error

    def find(self, model: str, name: str) -> Adapter | None:
        """The adapter `model:name`, or None when there is none (yet)."""
        if not _NAME.fullmatch(name):
            return None
        path = f"{self._base}/{model}"
        if name != DEFAULT_ADAPTER:
            path = f"{path}/{name}"
        files = self._files(path)
        if files is None or not any(weights in files for weights in WEIGHTS):
            return None
        stamp = "\n".join(
            f"{key} {info.size} {info.mtime_ns}"
            for key, info in sorted(files.items())
            if key in (CONFIG, CHAT_FORMAT, *WEIGHTS)
        )
        return Adapter(model, name, path, hashlib.sha256(stamp.encode()).hexdigest()[:12])

    def list(self, model: str) -> list[Adapter]:
        """Every adapter of one model, `mi` first."""
        entries = children(self._fs, f"{self._base}/{model}")
        names = sorted(info.base_name for info in entries if info.type == pafs.FileType.Directory)
        found = (self.find(model, name) for name in [DEFAULT_ADAPTER, *names])
        return [adapter for adapter in found if adapter is not None]

    def fetch(self, adapter: Adapter) -> str:
        """A local directory with the adapter's files; one on a mounted path is used as it lies."""
        if isinstance(self._fs, pafs.LocalFileSystem):
            return adapter.path
        cache = Path(self._cache or tempfile.gettempdir()) / "milm_ray_adapters"
        target = cache / adapter.key.replace(":", "--")
        if target.exists():
            return str(target)
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        try:
            pafs.copy_files(
                adapter.path, str(partial), self._fs, pafs.LocalFileSystem(), use_threads=True
            )
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.exists():  # else another replica on this node was first
                raise
        return str(target)

    def _files(self, path: str) -> dict[str, pafs.FileInfo] | None:
        """The plain files of an adapter's directory by name, None where it is no adapter."""
        if self._fs.get_file_info(f"{path}/{CONFIG}").type != pafs.FileType.File:
            return None
        entries = children(self._fs, path)
        return {info.base_name: info for info in entries if info.type == pafs.FileType.File}
