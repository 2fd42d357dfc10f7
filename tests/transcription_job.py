"""A transcription job on made-up dialogues, and what must hold after it."""

import contextlib
import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from milm_ray.config import load_config
from milm_ray.dataset.transcribe import Transcription
from milm_ray.llm.ask import Asking
from milm_ray.llm.exchange import Answer, exchange
from milm_ray.schema import DIALOGUES, Dialogue, Turn
from milm_ray.workspace import Workspace
from tests.llm_server_process import ServerProcess

ROWS = 48

CONFIG = """
workspace: {workspace}
ray: {{num_cpus: 2}}
teacher:
  model: teacher
  base_url: {url}
  api_key_env: TEST_LLM_KEY
  concurrency: 8
  max_attempts: {attempts}
  prompt_price: 1.0
  completion_price: 2.0
transcribe: {{max_reject_rate: 0.5}}
"""


def workspace_with_dialogues(root: Path) -> Workspace:
    """`dialogues/` of one corpus and a `selection/` of it."""
    workspace = Workspace.open(str(root / "ws"))
    rows = [
        Dialogue(
            "smilechat",
            str(number),
            [
                Turn("client", f"第{number}位：我总是熬夜。"),
                Turn("counselor", "早点睡就好了。"),
                Turn("client", "睡不着。"),
                Turn("counselor", "试试数羊。"),
            ],
        ).row()
        for number in range(ROWS)
    ]
    workspace.write_table(pa.Table.from_pylist(rows, schema=DIALOGUES), "dialogues")
    for artifact in ("dialogues", "selection"):
        workspace.commit(
            artifact,
            stage="test",
            settings={},
            fingerprint={},
            counts={},
            started=time.time(),
            selected=["smilechat"],
        )
    return workspace


def check_result(workspace: Workspace, server_log: ServerProcess, lost: int) -> None:
    """Every dialogue once; totals equal what the server says it sent, but for `lost` replies."""
    manifest = workspace.manifest("mi_dialogues")
    done = workspace.read_table("mi_dialogues")["source_dialogue_id"].to_pylist()
    rejects = workspace.read_table("rejects/transcribe")["dialogue_id"].to_pylist()
    wanted = workspace.read_table("dialogues")["dialogue_id"].to_pylist()
    assert sorted(done + rejects) == sorted(wanted)
    assert manifest["counts"]["asked"] == ROWS
    usage = manifest["usage"]
    answered = {event["question"]: event for event in server_log.events("answered")}
    assert usage["replies"] == len(answered)
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage[name] == sum(event[name] for event in answered.values())
    expected = (usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6
    assert usage["cost_usd"] == pytest.approx(expected, abs=1e-6)
    times = Counter(event["question"] for event in server_log.events("answered"))
    assert sum(number - 1 for number in times.values()) <= lost


def assert_nothing_that_arrived_was_asked_again(
    workspace: Workspace, config: Path, server: ServerProcess
) -> None:
    """No question was asked after the time at which its reply was stored."""
    loaded = load_config(config)
    asking = Asking(loaded, loaded.teacher, workspace, Transcription(loaded.transcribe), "check")
    asked: dict[str, list[float]] = {}
    for event in server.events("asked"):
        asked.setdefault(event["question"], []).append(event["at"])
    checked = 0
    for row in workspace.read_table("dialogues").to_pylist():
        steps = exchange(asking.task, row)
        request = next(steps)
        answer = asking.from_store(row)
        assert isinstance(answer, Answer)
        for reply in answer.replies:
            messages = [dict(message) for message in request.messages]
            question = json.dumps(messages, ensure_ascii=False, sort_keys=True)
            times = asked[hashlib.sha256(question.encode()).hexdigest()]
            assert max(times) <= reply.time
            checked += 1
            with contextlib.suppress(StopIteration):
                request = steps.send(reply)
    lines = [
        line
        for path in Path(workspace.path("replies")).glob("*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    assert len(lines) == checked, "a reply is stored twice, or one was asked for that no row needs"
