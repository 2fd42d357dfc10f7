"""The prompts, one Markdown file each. A prompt's version is the digest of its text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Prompt:
    """A prompt's file name, its text and the first twelve digits of the text's sha256."""

    name: str
    text: str
    version: str


@cache
def load(name: str) -> Prompt:
    """The prompt in `milm_ray/prompts/<name>`."""
    text = files("milm_ray.prompts").joinpath(name).read_text(encoding="utf-8").strip()
    return Prompt(name, text, hashlib.sha256(text.encode()).hexdigest()[:12])
