"""A job's log: lines for people, or one JSON object a line for machines that collect logs."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Literal

_NOISY = ("httpx", "httpcore", "openai", "jieba", "matplotlib", "ray.data")


def set_up(form: Literal["text", "json"]) -> None:
    """Log to standard output, at INFO, in this form."""
    formatter = (
        _LINES if form == "json" else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def enter_stage(name: str) -> None:
    """From now on lines belong to this stage, from whichever thread they come."""
    _LINES.stage = name


class JsonLines(logging.Formatter):
    """time, level, job (Ray's submission id; empty outside a submitted job), stage, message."""

    stage = ""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "job": submission_id(),
            "stage": self.stage,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


_LINES = JsonLines()


def submission_id() -> str:
    """The id by which `ray job` knows the job that this process drives."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(config["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
