"""The error body of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json

_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error"}
CONTEXT_LENGTH = "context_length_exceeded"


def error_body(status: int, message: str, code: str | None = None) -> str:
    """The JSON text of an error. A prompt that is too long gets OpenAI's own code for it."""
    if code is None and status == 400 and "maximum context length" in message:
        code = CONTEXT_LENGTH
    fallback = "invalid_request_error" if status < 500 else "server_error"
    kind = _TYPES.get(status, "rate_limit_error" if status == 429 else fallback)
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": code}},
        ensure_ascii=False,
    )
