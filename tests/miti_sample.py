"""A small MITI study: sessions of the scripted client with counselors that speak canned lines."""

from __future__ import annotations

import asyncio
import csv
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milm_ray.config import Config, load_config
from milm_ray.llm.exchange import Usage
from milm_ray.llm.replies import Reply
from milm_ray.miti import simulate
from milm_ray.miti.coding_scheme import GLOBAL_NAMES
from milm_ray.schema import Turn
from milm_ray.workspace import Workspace

LINES = {
    "glm4": (
        "听起来您又累又放不下，两头都是真的。您最想先聊哪一块？",
        "这件事压在您心上。最让您在意的是什么？",
        "您想陪女儿，也想让家里安心。怎么走由您来定。",
    ),
    "llama3": (
        "建议您立刻改掉这个习惯。每天按时记录。",
        "您必须重视，不能再找借口了。请问有多久了？",
    ),
}
CONFIG = """
workspace: {workspace}
seed: 7
models:
  glm4: {{path: {workspace}, chat_format: glm4}}
  llama3: {{path: {workspace}, chat_format: llama3}}
simulate: {{simulator: scripted, sessions: 3, max_rounds: 4}}
miti: {{coders: [anna, ben], resamples: 100}}
"""


class Counselor:
    """Speaks a model's lines in an order fixed by the session."""

    def __init__(self, model: str) -> None:
        self.model = model

    async def __call__(self, turns: Sequence[Turn], seed: int) -> tuple[Reply, int]:
        lines = LINES[self.model]
        return Reply("key", lines[(random.Random(seed).randrange(9) + len(turns)) % len(lines)]), 0


@contextmanager
def counselors(config: Config, workspace: Workspace, arms: Sequence[Any]) -> Any:
    yield {arm: Counselor(arm[0]) for arm in arms}


def config_of(folder: Path, *overrides: str) -> Config:
    path = folder / "study.yaml"
    path.write_text(CONFIG.format(workspace=folder / "ws"), encoding="utf-8")
    return load_config(path, overrides)


def with_adapters(config: Config) -> Workspace:
    """A workspace where the adapters count as made; the counselors here need none."""
    ws = Workspace.open(config.workspace)
    for model in config.models:
        ws.write_text(model, "adapters", model, "adapter.txt")
        ws.commit(
            f"adapters/{model}",
            stage="finetune",
            settings={},
            fingerprint={},
            counts={},
            started=time.time(),
        )
    return ws


def with_sessions(config: Config) -> tuple[Workspace, Mapping[str, Any]]:
    """The workspace with its simulated sessions, and their manifest."""
    ws = with_adapters(config)
    return ws, simulate.run(config, ws, counselors)


def held(config: Config, ws: Workspace) -> list[simulate.Outcome]:
    """The sessions without writing them."""
    answering = {arm: Counselor(arm[0]) for arm in simulate.arms(config)}
    return asyncio.run(simulate.hold(config, ws, answering, Usage()))


def filled(
    ws: Workspace,
    coder: str,
    score: int = 3,
    code: Callable[[str, int], str] = lambda role, n: "Q" if role == "counselor" and n == 1 else "",
) -> Path:
    """The coder's own CSV sheets of the packet, filled in and put where returned sheets go."""
    folder = ws.local("sheets")
    folder.mkdir(exist_ok=True)
    for table in ("utterances", "globals"):
        source = ws.local("packet", "sheets", f"{coder}-{table}.csv")
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if table == "utterances":
                row["code"] = code(row["speaker"], int(row["utterance"]))
            else:
                row |= {"target_behavior": "早睡", **dict.fromkeys(GLOBAL_NAMES, score)}
        with (folder / source.name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder
