"""The base of every section of the configuration: unknown keys are refused, values are fixed."""

from pathlib import Path

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _is_remote(path: str) -> bool:
    return "://" in path


def input_path(section: str) -> AfterValidator:
    """A path that must exist when a job is going to read `section` (see config.load_config)."""

    def check(value: str, info: ValidationInfo) -> str:
        wanted = (info.context or {}).get("check_paths", ())
        if section in wanted and not _is_remote(value) and not Path(value).exists():
            raise ValueError(f"no such file or directory: {value}")
        return value

    return AfterValidator(check)
