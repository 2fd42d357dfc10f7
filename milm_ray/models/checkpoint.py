"""A base model's checkpoint as a directory that plain transformers and vLLM load.

Weights come from the hub, a local path or cloud storage. Llama and Glm checkpoints keep their
files; a Baichuan2-7B checkpoint, whose own layout needs remote code, is brought into the Llama
layout shard by shard. Either way the directory holds the chat template and the stop tokens of the
base's chat format, so that every engine that loads it speaks the format it was trained in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from milm_ray.errors import UserError
from milm_ray.models import chat_format as formats
from milm_ray.models import registry
from milm_ray.workspace import Workspace

MARKER = "milm_base.json"
_LAYOUT_VERSION = 1
_CONFIG = "config.json"
_SMALL = ("*.json", "*.model", "*.jinja", "LICENSE*", "*.txt")
_SAFE, _PICKLED = "*.safetensors", "*.bin"
_FILES = (*_SMALL, _SAFE, _PICKLED)
_HASHED_WHOLE = 64 * 2**20


def bases_directory(workspace: Workspace) -> Path:
    """Where prepared base checkpoints lie: in the workspace, or on each node if that is remote."""
    if "://" in workspace.uri:
        return Path.home() / ".cache" / "milm_ray" / "bases"
    return Path(workspace.path("bases"))


def prepare_base(
    name_or_path: str | Path,
    revision: str | None = None,
    out_dir: str | Path = "bases",
    chat_format: str | None = None,
) -> Path:
    """Prepare a base model and return its directory, `out_dir/<name>` or `out_dir/<name>-<key>`.

    name_or_path: a registry name (its hub id and pin), a hub id, a local directory or a cloud URI.
    revision: a hub branch, tag or commit; overrides the registry's pin. chat_format: its name,
    for a base that the registry does not know; otherwise the registry's, or by the model's type.

    A registry name at its pin and in its format is the plain name; the key of any other is made of
    its source, revision and format. The directory appears in one step and is kept while the source
    and the format are the same.
    UserError: the source cannot be found or read, or has a layout that is not supported.
    """
    entry = _registered(str(name_or_path))
    name = str(name_or_path)
    if "://" in name:
        source = _copy_from_cloud(name, Path(out_dir))
    else:
        source = _fetch(entry, name, revision, [*_SMALL, _SAFE])
        if not any(source.glob(_SAFE)):  # whatever .bin the cache holds: it may be half of them
            source = _fetch(entry, name, revision, [*_SMALL, _PICKLED])
    _check_files(source)
    config = _read_json(source / _CONFIG)
    format_name = chat_format or (entry.chat_format if entry else _format_of(config, source))
    formats.get(format_name)
    marker = {
        "layout": _LAYOUT_VERSION,
        "source": entry.hub_id if entry else name,
        "revision": revision or (entry.revision if entry else None),
        "chat_format": format_name,
        "fingerprint": fingerprint(source, formats.template(format_name)),
    }
    target = Path(out_dir) / _directory_name(entry, marker)
    if _is_prepared(target, marker):
        return target
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        if config.get("model_type") == "baichuan":
            from milm_ray.models.baichuan import convert

            convert(source, partial, config)
        else:
            _take_over(source, partial)
        _write_format(partial, format_name)
        _write_json(partial / MARKER, marker)
        _publish(partial, target, lambda: _is_prepared(target, marker))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def architecture(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """A base's config.json, without its weights; name_or_path, revision, errors: see prepare_base.

    A Baichuan2 names its sizes as Llama does.
    """
    name = str(name_or_path)
    if "://" not in name:
        return _read_json(_fetch(_registered(name), name, revision, [_CONFIG]) / _CONFIG)
    from pyarrow import fs

    try:
        filesystem, root = fs.FileSystem.from_uri(name)
        with filesystem.open_input_stream(f"{root}/{_CONFIG}") as stream:
            return json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise _uncopied(name, error) from error


def _directory_name(entry: registry.BaseModel | None, marker: dict[str, Any]) -> str:
    """A directory of its own for every base: one engine must not find another's weights in it."""
    revision, format_name = marker["revision"], marker["chat_format"]
    if entry and (revision, format_name) == (entry.revision, entry.chat_format):
        return entry.name
    origin = marker["source"]
    if entry is None and Path(origin).is_dir():
        origin = os.path.abspath(origin)
    key = hashlib.sha256(json.dumps([origin, revision, format_name]).encode()).hexdigest()[:8]
    return f"{entry.name if entry else Path(origin).name}-{key}"


def _registered(name: str) -> registry.BaseModel | None:
    if name in registry.BASE_MODELS and not Path(name).is_dir():
        return registry.BASE_MODELS[name]
    return next((e for e in registry.BASE_MODELS.values() if e.hub_id == name), None)


def _format_of(config: dict[str, Any], source: Path) -> str:
    kind = config.get("model_type", "")
    for entry in registry.BASE_MODELS.values():
        if entry.model_type == kind:
            return entry.chat_format
    raise UserError(
        f"{source} is a {kind or 'nameless'} model, whose chat format is not known",
        "name its chat_format, or add the model to milm_ray/models/registry.py",
    )


def _fetch(
    entry: registry.BaseModel | None, name: str, revision: str | None, patterns: list[str]
) -> Path:
    """The source as a local directory: given, or the files of these patterns from the hub."""
    if entry is None and (Path(name).is_dir() or name.startswith((".", "/"))):
        if not (Path(name) / _CONFIG).is_file():
            raise UserError(f"{name} holds no {_CONFIG}", "give the directory of a checkpoint")
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = entry.hub_id if entry else name
    pin = revision or (entry.revision if entry else None)
    try:
        return Path(snapshot_download(repository, revision=pin, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot get {repository} (revision {pin or 'main'}) from the hub: {error}",
            "check the name, the network and HF_TOKEN, or give a local directory",
        ) from error


def _check_files(source: Path) -> None:
    """UserError where the index of the weights names files that are not there.

    A download that was cut off, or a copy of some files only, must not pass for the base: a loader
    may fill what it does not find with random values.
    """
    kind = _SAFE if any(source.glob(_SAFE)) else _PICKLED
    for index in source.glob(f"{kind}.index.json"):
        named = _read_json(index).get("weight_map", {}).values()
        missing = sorted({name for name in named if not (source / name).is_file()})
        if missing:
            raise UserError(
                f"{source} lacks {', '.join(missing)}, named in its {index.name}",
                "give a complete checkpoint; from the hub, run the same command again with the "
                "network up",
            )


def _copy_from_cloud(uri: str, out_dir: Path) -> Path:
    """Copy a checkpoint's files from s3://, gs:// and the like beside the prepared bases, once."""
    from pyarrow import fs

    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
        listed = filesystem.get_file_info(fs.FileSelector(root))
        wanted = [info for info in listed if info.is_file and _is_checkpoint_file(info.base_name)]
        state = sorted((info.base_name, info.size, str(info.mtime_ns)) for info in wanted)
        key = hashlib.sha256(json.dumps([uri, state]).encode()).hexdigest()[:16]
        local = out_dir / ".sources" / key / Path(root).name
        if not local.is_dir():
            partial = local.with_name(f".{uuid.uuid4().hex[:8]}.partial")
            partial.mkdir(parents=True)
            for info in wanted:
                with (
                    filesystem.open_input_stream(info.path) as stream,
                    (partial / info.base_name).open("wb") as copy,
                ):
                    shutil.copyfileobj(stream, copy, 2**24)
            _publish(partial, local, lambda: local.is_dir())
    except (OSError, ValueError) as error:
        raise _uncopied(uri, error) from error
    return local


def _uncopied(uri: str, error: Exception) -> UserError:
    return UserError(f"cannot copy {uri}: {error}", "check the address and the storage credentials")


def _is_checkpoint_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _FILES)


def fingerprint(source: Path, template: str) -> str:
    """A digest of a checkpoint's files; of large ones the size, the beginning and the end."""
    digest = hashlib.sha256(template.encode())
    for path in sorted(source.iterdir()):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            if size <= _HASHED_WHOLE:
                digest.update(stream.read())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()


def _is_prepared(target: Path, marker: dict[str, Any]) -> bool:
    path = target / MARKER
    if not path.is_file():
        return False
    present = _read_json(path)
    return all(present.get(key) == marker[key] for key in ("layout", "chat_format", "fingerprint"))


def _publish(partial: Path, target: Path, is_done: Callable[[], bool]) -> None:
    """Rename into place; of two that make the same directory at once, the first wins."""
    try:
        partial.rename(target)
        return
    except OSError:
        if is_done():
            shutil.rmtree(partial, ignore_errors=True)
            return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _take_over(source: Path, target: Path) -> None:
    """Hard-link large weight files where the file system allows it, copy the rest.

    Small ones are copied so that a base does not change under an engine when its source is
    written over in place.
    """
    names = {path.name for pattern in _FILES for path in source.glob(pattern)}
    weights = {name for name in names if fnmatch(name, _SAFE)}
    weights = weights or {name for name in names if fnmatch(name, _PICKLED)}
    if not weights:
        raise UserError(f"{source} holds no weights", "give a complete checkpoint")
    for name in sorted(names):
        path = (source / name).resolve()
        if name in weights and path.stat().st_size > _HASHED_WHOLE:
            try:
                os.link(path, target / name)
                continue
            except OSError:
                pass  # another file system
        if fnmatch(name, _PICKLED) and name not in weights:
            continue
        shutil.copyfile(path, target / name)


def _write_format(directory: Path, format_name: str) -> None:
    """Chat template and stop tokens of the format, in the files that the engines read."""
    from tokenizers import Tokenizer

    formats.save_chat_format(directory, format_name)
    path = directory / "tokenizer_config.json"
    tokenizer_config = _read_json(path) if path.is_file() else {}
    if tokenizer_config.pop("chat_template", None) is not None:
        _write_json(path, tokenizer_config)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError("the base holds no tokenizer.json", "give a base with a fast tokenizer")
    vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    stops = formats.stop_tokens(format_name)
    missing = [stop for stop in stops if stop not in vocabulary]
    if missing:
        raise UserError(
            f"the tokenizer lacks {', '.join(missing)}, which the format {format_name} needs",
            "choose the chat format that this base was trained with",
        )
    path = directory / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    generation["eos_token_id"] = [vocabulary[stop] for stop in stops]
    generation.setdefault("pad_token_id", vocabulary[stops[0]])
    _write_json(path, generation)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a complete checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object", "give a complete checkpoint")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
