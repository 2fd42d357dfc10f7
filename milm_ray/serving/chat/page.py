"""The page as one self-contained file, and the policy that lets a browser run its parts only."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import resources


def _text(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@lru_cache(maxsize=1)
def page() -> tuple[str, str]:
    """(HTML, Content-Security-Policy). Nothing is loaded from elsewhere, nothing else may run."""
    style, script = _text("chat.css"), _text("words.js") + _text("chat.js")
    html = _text("chat.html").replace("/*style*/", style).replace("/*script*/", script)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return html, policy
