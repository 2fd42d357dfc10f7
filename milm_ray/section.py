"""The base of every section of the configuration: unknown keys are refused, values are fixed."""

from pathlib import Path
from typing import Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _is_remote(path: str) -> bool:
    return "://" in path


def input_path(section: str, kind: Literal["file", "directory"] | None = None) -> AfterValidator:
    """A path that must exist when a job is going to read `section` (see config.load_config).

    kind: of a path on this machine; without one, a remote path or either kind will do.
    """

    def check(value: str, info: ValidationInfo) -> str:
        if section not in (info.context or {}).get("check_paths", ()):
            return value
        if kind is None and _is_remote(value):
            return value
        path = Path(value)
        if not path.exists():
            raise ValueError(f"no such {kind or 'file or directory'}: {value}")
        if kind and path.is_dir() != (kind == "directory"):
            raise ValueError(f"not a {kind}: {value}")
        return value

    return AfterValidator(check)
